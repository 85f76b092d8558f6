"""The four model sizes of the paper's scaling experiments."""

from __future__ import annotations

from typing import Any

SIZES: dict[str, dict[str, Any]] = {
    "80M": {
        "hidden_size": 768,
        "intermediate_size": 2304,
        "num_hidden_layers": 12,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "keep": 1024,
    },
    "200M": {
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 16,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "keep": 1024,
    },
    "680M": {
        "hidden_size": 1536,
        "intermediate_size": 4608,
        "num_hidden_layers": 24,
        "num_attention_heads": 12,
        "num_key_value_heads": 6,
        "keep": 1024,
    },
    "1.7B": {
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "keep": 2048,
    },
}
"""Shapes by name: Table 4 of arXiv 2508.02124. It gives no width of the MLP; three times the hidden
size is that of Qwen3-1.7B, whose shape the largest has, and makes the parameters without embeddings
85M, 201M, 680M and 1.41B. The largest gets its name with Qwen3's vocabulary: 1.72B."""
