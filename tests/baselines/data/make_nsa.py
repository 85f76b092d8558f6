"""Write nsa.safetensors; see README.md. Needs native-sparse-attention-pytorch, not dynmask."""

from pathlib import Path

import torch
from native_sparse_attention_pytorch.native_sparse_attention import SparseAttention
from safetensors.torch import save_file

# Lengths of the input, seed, spread of the projection, heads, kv heads, l, d, l', n, window.
CASES = {
    # Importance is the same in both: one query head a kv head, one compressed block a block.
    "plain": ((53, 5), 0, 0.3, 2, 2, 8, 8, 8, 2, 7),
    # Groups, and two compressed blocks in a block: a seed for which both choose alike.
    "groups": ((61,), 2, 0.03, 4, 2, 4, 4, 8, 2, 6),
    # Compressed blocks that overlap, with room for every block.
    "overlap": ((37, 7, 3), 2, 0.5, 4, 2, 8, 4, 8, 9, 5),
}
WIDTH, DIM = 12, 8


@torch.no_grad()
def main() -> None:
    tensors = {}
    for name, case in CASES.items():
        lengths, seed, spread, heads, groups, block, stride, select, n, window = case
        torch.manual_seed(seed)
        layer = SparseAttention(
            dim=WIDTH,
            dim_head=DIM,
            heads=heads,
            kv_heads=groups,
            sliding_window_size=window,
            compress_block_size=block,
            compress_block_sliding_stride=stride,
            selection_block_size=select,
            num_selected_blocks=n,
            compress_mlp_expand_factor=0.5,
            causal=True,
            norm=False,
        )
        for parameter in layer.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
        layer.to_qkv.weight.normal_(std=spread)
        for key, value in layer.state_dict().items():
            tensors[f"{name}.weights.{key}"] = value
        for length in lengths:
            x = torch.randn(2, length, WIDTH)
            tensors[f"{name}.x.{length}"] = x
            tensors[f"{name}.y.{length}"] = layer(x)
    save_file(tensors, Path(__file__).parent / "nsa.safetensors")


if __name__ == "__main__":
    main()
