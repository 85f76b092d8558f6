"""Peak memory of a calibration against the model's own: a Llama-3.2-3B shape with random weights.

python benchmarks/capture_memory.py --out benchmarks/results/capture_memory.json
"""

from __future__ import annotations

import argparse
import datetime
import json
import time
from pathlib import Path

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

import dynmask

SHAPES = {
    "llama-3.2-3b": {
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 512,
        "tie_word_embeddings": True,
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="llama-3.2-3b", choices=SHAPES)
    parser.add_argument("--capture-length", type=int, default=1024)
    parser.add_argument("--texts", type=int, default=8)
    parser.add_argument("--text-length", type=int, default=4096, help="tokens")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"
    shape = SHAPES[args.shape]
    with torch.device(device):
        torch.set_default_dtype(torch.bfloat16)
        model = LlamaForCausalLM(LlamaConfig(**shape, max_position_embeddings=8192)).eval()
        torch.set_default_dtype(torch.float32)
    own = sum(p.numel() * p.element_size() for p in model.parameters())
    generator = torch.Generator().manual_seed(0)
    texts = torch.randint(
        0, shape["vocab_size"], (args.texts, args.text_length), generator=generator
    ).tolist()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    plan = dynmask.calibrate(
        model, None, texts, capture_length=args.capture_length, batch_size=args.batch_size
    )
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() if on_gpu else None
    result = {
        "shape": args.shape,
        "parameters": sum(p.numel() for p in model.parameters()),
        "capture_length": args.capture_length,
        "texts": args.texts,
        "text_length": args.text_length,
        "batch_size": args.batch_size,
        "model_bytes": own,
        "peak_bytes": peak,
        "ratio": peak / own if peak else None,
        "seconds": seconds,
        "layers_in_plan": len(plan.layers),
        "gpu": torch.cuda.get_device_name() if on_gpu else None,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "dynmask": dynmask.__version__,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }
    print(json.dumps(result))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
