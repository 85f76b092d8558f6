"""Turn a dense model into a DMA model, and train it further with transformers' Trainer.

``from_pretrained_dense`` keeps the weights; new are the scores that choose the keys. Windows must
be well over ``keep`` tokens long, or nothing is ever dropped and the scores have nothing to learn.
Printed is the loss on held-out windows, before the training and after it.

    python examples/finetune_dma.py MODEL --texts book.txt another.txt --out my-dma \
        --keep 1024 --length 4096 --steps 1000

Needs ``pip install accelerate``. `dynmask train` does this and more from a recipe: docs/train.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import dynmask
from dynmask.assets import load_texts, model_folder


def windows(tokenizer, texts: list[str], length: int) -> list[dict[str, torch.Tensor]]:
    """Cut texts into windows of ``length`` tokens; what is left over is dropped."""
    found = []
    for text in texts:
        ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
        found += [{"input_ids": w, "labels": w} for w in ids.split(length) if len(w) == length]
    return found


def main(arguments: list[str] | None = None) -> None:
    """Convert, train, save, and load what was saved."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default=str(model_folder()), help="folder or hub name")
    parser.add_argument("--texts", nargs="+", type=Path, help="the last file is held out")
    parser.add_argument("--out", default="my-dma", help="folder of the trained model")
    parser.add_argument("--keep", type=int, default=64)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--lr", type=float, default=3e-4)
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    texts = [path.read_text() for path in options.texts or []] or load_texts("calibration")
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    # With a_std=0 every row would begin by keeping the first tokens of the text.
    model = dynmask.from_pretrained_dense(options.model, keep=options.keep, a_std=0.02).float()
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=options.out,
            max_steps=options.steps,
            per_device_train_batch_size=options.batch,
            per_device_eval_batch_size=options.batch,
            learning_rate=options.lr,
            lr_scheduler_type="cosine",
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            prediction_loss_only=True,
            disable_tqdm=True,
        ),
        train_dataset=windows(tokenizer, texts[:-1], options.length),
        eval_dataset=windows(tokenizer, texts[-1:], options.length),
    )
    model.config.use_cache = False  # else each training step fills a cache that nobody reads
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    model.config.use_cache = True
    trainer.save_model(options.out)
    tokenizer.save_pretrained(options.out)
    print(f"held-out loss {before:.3f} before, {after:.3f} after {options.steps} steps")

    again = AutoModelForCausalLM.from_pretrained(options.out)  # `import dynmask.dma` made it known
    print(f"{type(again).__name__} in {options.out} keeps {again.config.keep} keys a head")


if __name__ == "__main__":
    main()
