"""Train a DMA model with peft's LoRA: low-rank changes of the projections, and the whole scores.

The scores (``score``: ``A`` and ``dt_proj``) choose the keys. They are a thousandth of the weights
and new in a converted model, so they are trained whole, as ``modules_to_save``. LoRA on the
projections alone would leave the choice of keys at its random start.

    python examples/lora_dma.py DMA-MODEL --texts book.txt --out my-adapter --steps 500

Needs ``pip install peft``. Without a model, one is made of the dense one in the package.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoTokenizer

import dynmask
from dynmask.assets import load_texts, model_folder

LORA = LoraConfig(
    r=8,
    lora_alpha=16,
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
    modules_to_save=["score"],
    task_type="CAUSAL_LM",
)


def load(name: str | None, keep: int) -> dynmask.DmaForCausalLM:
    """Load a DMA model, or make one of the embedded dense model: the same each time."""
    if name is not None:
        return dynmask.DmaForCausalLM.from_pretrained(name)
    torch.manual_seed(0)
    return dynmask.from_pretrained_dense(str(model_folder()), keep=keep, a_std=0.02).float()


def main(arguments: list[str] | None = None) -> None:
    """Train an adapter, save it, load it again and merge it into the model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", help="folder or hub name of a DMA model")
    parser.add_argument("--texts", nargs="+", type=Path)
    parser.add_argument("--out", default="my-adapter", help="folder of the adapter")
    parser.add_argument("--keep", type=int, default=64, help="of a model that is made here")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--lr", type=float, default=1e-3)
    options = parser.parse_args(arguments)

    texts = [path.read_text() for path in options.texts or []] or load_texts("calibration")
    tokenizer = AutoTokenizer.from_pretrained(options.model or model_folder())
    ids = torch.cat([torch.tensor(tokenizer(t, verbose=False)["input_ids"]) for t in texts])
    held_out, *rows = ids.unfold(0, options.length, options.length).split(4)

    model = get_peft_model(load(options.model, options.keep), LORA)
    model.print_trainable_parameters()
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=options.lr)

    @torch.no_grad()
    def loss() -> float:
        return model(input_ids=held_out, labels=held_out, use_cache=False).loss.item()

    before = loss()
    for step in range(options.steps):
        row = rows[step % len(rows)]
        model(input_ids=row, labels=row, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"held-out loss {before:.3f} before, {loss():.3f} after {options.steps} steps")
    model.save_pretrained(options.out)

    again = PeftModel.from_pretrained(load(options.model, options.keep), options.out)
    merged = again.merge_and_unload()  # an ordinary DMA model once more
    made = merged.eval().generate(held_out[:1, :32], max_new_tokens=20, do_sample=False)
    same = torch.equal(
        made, model.eval().generate(held_out[:1, :32], max_new_tokens=20, do_sample=False)
    )
    print(f"{type(merged).__name__}, merged, writes the same: {same}")


if __name__ == "__main__":
    main()
