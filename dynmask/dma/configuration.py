"""The configuration of a DMA model."""

from __future__ import annotations

import math
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from dynmask.dma.score import SCORES
from dynmask.dma.selection import check_keep
from dynmask.dma.sizes import SIZES
from dynmask.dma.tensor_parallel import STYLE
from dynmask.ops.attention import BACKENDS

_COUNTS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)


class DmaConfig(PreTrainedConfig):
    r"""Shape of a decoder whose attention is Dynamic Mask Attention (DMA).

    Read when a layer runs, so ``model.config.keep = 512`` takes effect, and is checked, at the next
    call (a cache keeps the number that it started with). Nothing else is checked after the start.

    Args:
        vocab_size: Tokens in the vocabulary.
        hidden_size: Width of the residual stream.
        intermediate_size: Width of the MLP.
        num_hidden_layers: Decoder layers.
        num_attention_heads: ``H``, query heads.
        num_key_value_heads: ``G``, kv heads; None means ``H``.
        head_dim: ``d``, width of a head; None means ``hidden_size / H``.
        keep: ``w``, keys that each row keeps in each kv head. An integer; a list with one integer
            (or None) a layer; a float between 0 and 1, the share of the input's length (rounded up;
            a row's keys then depend on how much text follows, and with a cache the first call's
            length counts); None for all keys. Inputs of at most ``w`` tokens drop no key: train
            with ``w`` well under the length, or the selection never takes part.
        window: Of the ``keep`` keys so many are the row's nearest, its own included, whatever their
            scores; the others are the best of the older ones. 0, as in the paper, chooses all by
            score. As many as ``keep`` make a sliding window; of a share of the length more do not
            count.
        threshold: Keys with a lower score are never kept, besides the limit of ``keep`` (with
            ``keep=None`` it is the only rule, and the number of keys follows the content); the
            nearest ones of a ``window`` are. A row without any key gives 0. None for no threshold.
        score: ``"exp"``: ``exp(A softplus(Wdt v))``, the paper's, above 148 by its tangent, or
            ``"linear"``: ``A softplus(Wdt v)``, that of its authors' later kernels.
        a_std: Standard deviation of the score's initial ``A``; None for ``initializer_range``. With
            0, as in Doge, all keys tie at the start and ``Wdt`` gets no gradient in the first step.
        qk_norm: RMSNorm of each query and key head before RoPE, as in Qwen3 and Doge.
        residual_weights: Learned factors of the residual stream, one a channel, as in Doge.
        attention_bias: Biases in the projections of queries, keys, values and output.
        mlp_bias: Biases in the MLP.
        hidden_act: Activation of the MLP.
        rms_norm_eps: Added to the mean square in RMSNorm.
        max_position_embeddings: Length that the model is made for.
        rope_parameters: As in transformers: ``{"rope_type": "default", "rope_theta": 10000.0}``.
        initializer_range: Standard deviation of all initial weights, those of the score included.
        tie_word_embeddings: Whether the output projection is the embedding.
        use_cache: Whether a forward pass makes a cache if none is given.
        impl: What computes the attention, as in `dynmask.attention`.
        pad_token_id: Token of padding, if there is one.
        bos_token_id: Token before a text, if there is one.
        eos_token_id: Token or tokens after a text, if there are.

    Raises:
        ValueError: Naming the argument, if the shape cannot be or an option is not known.

    Source: DMA, arXiv 2508.02124.
    """

    model_type = "dma"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012
    base_model_tp_plan = {  # noqa: RUF012
        "embed_tokens": "embedding_rowwise",
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.q_norm": "replicated_with_grad_allreduce",
        "layers.*.self_attn.k_norm": "replicated_with_grad_allreduce",
        "layers.*.self_attn.score": STYLE,
        "layers.*.self_attn.score.dt_proj": "rowwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }

    vocab_size: int = 32768
    hidden_size: int = 768
    intermediate_size: int = 2304
    num_hidden_layers: int = 12
    num_attention_heads: int = 6
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    keep: int | float | list[int | None] | None = 1024
    window: int = 0
    threshold: float | None = None
    score: str = "exp"
    a_std: float | None = None
    qk_norm: bool = True
    residual_weights: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 2048
    rope_parameters: dict[str, Any] | None = None
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    use_cache: bool = True
    impl: str = "auto"
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Fill in what follows from the rest, and check."""
        refuse_typos(kwargs, DmaConfig)
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"hidden_size={self.hidden_size} is no multiple of "
                    f"num_attention_heads={self.num_attention_heads}: change one, or give head_dim"
                )
            self.head_dim = self.hidden_size // self.num_attention_heads
        self._check()
        super().__post_init__(**kwargs)

    @classmethod
    def named(cls, name: str, **changes: Any) -> DmaConfig:
        """Return one of the sizes of the paper's experiments.

        Args:
            name: ``"80M"``, ``"200M"``, ``"680M"`` or ``"1.7B"``; see `dynmask.dma.sizes`.
            changes: Any argument of the configuration, in place of the size's own.

        Raises:
            ValueError: If there is no such size.

        Source: Table 4 of arXiv 2508.02124.
        """
        if name not in SIZES:
            raise ValueError(f'no size "{name}": use one of {list(SIZES)}')
        return cls(**{**SIZES[name], **changes})

    def _check(self) -> None:
        for name in _COUNTS:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)!r} must be at least 1")
        if self.hidden_act not in ACT2FN:
            raise ValueError(
                f"hidden_act={self.hidden_act!r} is not known: use one of {sorted(ACT2FN)}"
            )
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        if groups is None or groups < 1 or heads % groups:
            raise ValueError(
                f"num_attention_heads={heads} must be a multiple of num_key_value_heads={groups}"
            )
        if self.head_dim is None or self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(
                f"head_dim={self.head_dim} must be even and positive: RoPE turns pairs"
            )
        check_keep(self.keep, self.num_hidden_layers, self.window)
        threshold = self.threshold
        if threshold is not None and (
            isinstance(threshold, bool)
            or not isinstance(threshold, int | float)
            or not math.isfinite(threshold)
        ):
            raise ValueError(f"threshold={threshold!r} must be a finite number, or None")
        if self.a_std is not None and not 0 <= self.a_std < math.inf:
            raise ValueError(
                f"a_std={self.a_std!r} must be a finite number of at least 0, or None for "
                "initializer_range"
            )
        if self.score not in SCORES:
            raise ValueError(f"score={self.score!r} is not known: use one of {list(SCORES)}")
        if self.impl != "auto" and self.impl not in BACKENDS:
            raise ValueError(f"impl={self.impl!r} is not known: use one of {['auto', *BACKENDS]}")


def refuse_typos(names: Iterable[str], of: type[PreTrainedConfig]) -> None:
    """Refuse a name that is nearly an argument's: transformers keeps any name, and reads none.

    Args:
        names: Arguments that the configuration does not know.
        of: The configuration.

    Raises:
        ValueError: Naming both.
    """
    # Token ids differ by a letter or two, and there are more than a DMA model has.
    own = [name for name in of.__annotations__ if not name.endswith("token_id")]
    for name in names:
        for meant in get_close_matches(name, own, n=1, cutoff=0.8):
            raise ValueError(f"{name} is no argument of {of.__name__}: write {meant}")
