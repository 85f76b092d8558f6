"""Read a prompt that is longer than the cache may hold: ``run.cache(max_cache_tokens=...)``.

A record of lines, then a question about one of them. The prompt is read with dynamic masks; then
each layer gives up the tokens that the prompt's last rows, the question, hardly look at. Memory
while answering is that of ``max_cache_tokens``, however long the prompt. A later question may ask
for what is gone: the cache is for one question at the end of its prompt.

    python examples/long_prompt_capped_cache.py [--model MODEL] [--lines 200] [--slots 512]
"""

from __future__ import annotations

import argparse
import random

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

import dynmask
from dynmask.assets import model_folder
from dynmask.eval import prompts
from dynmask.eval.words import sample_pairs


def main(arguments: list[str] | None = None) -> None:
    """Ask the same with a whole and with a capped cache."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(model_folder()), help="folder or hub name")
    parser.add_argument("--lines", type=int, default=200)
    parser.add_argument("--slots", type=int, default=512, help="tokens that a layer may hold")
    options = parser.parse_args(arguments)

    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    draw = random.Random(0)
    lines = [(key, draw.randint(10_000, 50_000)) for key in sample_pairs(draw, options.lines)]
    key, value = draw.choice(lines)
    text = prompts.record(lines) + prompts.completion_question(key)
    prompt = tokenizer(text, return_tensors="pt", verbose=False)
    length = prompt["input_ids"].shape[1]
    print(f"{length} tokens; the answer is {value}")

    with dynmask.accelerate(model) as run:
        for name, cache in (
            ("whole", DynamicCache(config=model.config)),
            ("capped", run.cache(max_cache_tokens=options.slots)),
        ):
            made = model.generate(
                **prompt, max_new_tokens=6, do_sample=False, past_key_values=cache
            )
            answer = tokenizer.decode(made[0, length:])
            held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
            print(f"{name}: {answer!r}, {held / 2**20:.1f} MiB of keys and values")


if __name__ == "__main__":
    main()
