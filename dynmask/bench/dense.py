"""The baselines: torch's own kernels, each by its name, the fastest being the denominator."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from dynmask.bench.timing import Times

_CUDA = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
_CPU = {"flash": SDPBackend.FLASH_ATTENTION, "math": SDPBackend.MATH}

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def causal(device: torch.device) -> dict[str, Attend]:
    """Return dense causal attention by backend; ``q`` of one row sees every key.

    The candidates are those that take grouped heads without repeating keys: cuDNN and flash on
    CUDA, torch's one fused kernel on the CPU.
    """
    names = ("cudnn", "flash") if device.type == "cuda" else ("flash",)
    return {name: _causal(_backends(device)[name]) for name in names}


def masked(mask: Tensor) -> dict[str, Attend]:
    """Return attention under a dense additive mask, by backend.

    Not every kernel groups heads: k and v must have q's heads already, see `by_head`.

    Args:
        mask: ``[B, H, Q, K]`` in q's dtype; -inf hides a key.
    """
    backends = _backends(mask.device)
    names = ("cudnn", "efficient") if mask.device.type == "cuda" else ("flash", "math")
    return {name: _masked(backends[name], mask) for name in names}


def _backends(device: torch.device) -> dict[str, SDPBackend]:
    return _CUDA if device.type == "cuda" else _CPU


def _causal(backend: SDPBackend) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(
                q, k, v, is_causal=q.shape[2] > 1, enable_gqa=q.shape[1] != k.shape[1]
            )

    return attend


def _masked(backend: SDPBackend, mask: Tensor) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v, attn_mask=mask)

    return attend


def by_head(keys: Tensor, heads: int) -> Tensor:
    """Return ``[B, H, K, D]`` keys, one a query head: a view where there is one kv head."""
    batch, groups, length, dim = keys.shape
    if groups == 1:
        return keys.expand(batch, heads, length, dim)
    return keys.repeat_interleave(heads // groups, dim=1)


def fastest(times: Mapping[str, Times]) -> str:
    """Name the run of the least median."""
    return min(times, key=lambda name: times[name].median)
