"""Configurations of Llama decoders with native sparse attention or mixture of block attention."""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig

from dynmask.baselines.nsa import NsaBlocks
from dynmask.dma.configuration import refuse_typos
from dynmask.masks.checks import require_integer
from dynmask.ops.attention import BACKENDS


class NsaConfig(LlamaConfig):
    """Shape of a Llama decoder with native sparse attention; read when the model is made.

    Args:
        compress_block: Tokens of a compressed block; as in `dynmask.baselines.nsa.NsaBlocks`, and
            so are the next six.
        compress_stride: See there.
        select_block: See there.
        select_count: See there.
        select_initial: See there.
        select_local: See there.
        window: See there.
        compress_hidden: Hidden width of the MLPs that compress; None for the width of a head. Each
            layer has two, of ``(compress_block + 1) * head_dim * compress_hidden`` weights.
        impl: What computes the attention, as in `dynmask.attention`.
        kwargs: All else is `transformers.LlamaConfig`'s.

    Raises:
        ValueError: Naming the argument, if lengths do not fit or an option cannot be.

    Source: arXiv 2502.11089.
    """

    model_type = "nsa"

    compress_block: int = 32
    compress_stride: int = 16
    select_block: int = 64
    select_count: int = 16
    select_initial: int = 1
    select_local: int = 2
    window: int = 512
    compress_hidden: int | None = None
    impl: str = "auto"

    def __post_init__(self, **kwargs: Any) -> None:
        """Fill in what follows from the rest, and check."""
        refuse_typos(kwargs, NsaConfig)
        super().__post_init__(**kwargs)
        _check_shared(self)
        _ = self.blocks
        if self.compress_hidden is not None and self.compress_hidden < 1:
            raise ValueError(f"compress_hidden={self.compress_hidden} must be at least 1, or None")

    @property
    def blocks(self) -> NsaBlocks:
        """The lengths of the branches.

        Raises:
            ValueError: If they do not fit together.
        """
        return NsaBlocks(
            compress_block=self.compress_block,
            compress_stride=self.compress_stride,
            select_block=self.select_block,
            select_count=self.select_count,
            select_initial=self.select_initial,
            select_local=self.select_local,
            window=self.window,
        )


class MobaConfig(LlamaConfig):
    """Shape of a Llama decoder with mixture of block attention; read when the model is made.

    Args:
        block: Keys of a block.
        top: Blocks that a row sees, its own included.
        impl: What computes the attention, as in `dynmask.attention`.
        kwargs: All else is `transformers.LlamaConfig`'s.

    Raises:
        ValueError: Naming the argument, if it cannot be.

    Source: arXiv 2502.13189.
    """

    model_type = "moba"

    block: int = 512
    top: int = 3
    impl: str = "auto"

    def __post_init__(self, **kwargs: Any) -> None:
        """Fill in what follows from the rest, and check."""
        refuse_typos(kwargs, MobaConfig)
        super().__post_init__(**kwargs)
        _check_shared(self)
        require_integer("block", self.block)
        require_integer("top", self.top)
        if self.block < 1 or self.top < 1:
            raise ValueError(f"block={self.block} and top={self.top} must be at least 1")


def _check_shared(config: NsaConfig | MobaConfig) -> None:
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    if groups is None or groups < 1 or heads % groups:
        raise ValueError(
            f"num_attention_heads={heads} must be a multiple of num_key_value_heads={groups}"
        )
    if config.attention_dropout:
        raise ValueError(
            f"attention_dropout={config.attention_dropout} must be 0: this attention has none"
        )
    if config.impl != "auto" and config.impl not in BACKENDS:
        raise ValueError(f"impl={config.impl!r} is not known: use one of {['auto', *BACKENDS]}")
