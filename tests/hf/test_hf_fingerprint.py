"""One model in any dtype is one model; everything else is another."""

from __future__ import annotations

import json

import pytest
import torch
from hf_models import make_model

from dynmask.hf import check_fingerprint, fingerprint


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_dtype_does_not_matter(stored, dtype, kind):
    found = fingerprint(make_model(kind).to(stored))
    check_fingerprint(make_model(kind).to(dtype), json.loads(json.dumps(found)))


def test_fine_tuned_model_differs():
    model = make_model("llama")
    found = fingerprint(model)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 1e-3 * torch.randn_like(weight)
    with pytest.raises(ValueError, match=r"another model \(weight .*: other values"):
        check_fingerprint(model, found)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"num_hidden_layers": 2}, "attention_layers"),
        ({"num_key_value_heads": 4}, "kv_heads"),
        ({"vocab_size": 98}, "vocab_size"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 77.0}}, "rope"),
    ],
    ids=["layers", "kv-heads", "vocabulary", "rope"],
)
def test_other_configuration_is_named(change, named):
    found = fingerprint(make_model("llama"))
    with pytest.raises(ValueError, match=named):
        check_fingerprint(make_model("llama", **change), found)


def test_other_seed_differs():
    with pytest.raises(ValueError, match="other values"):
        check_fingerprint(make_model("llama", seed=1), fingerprint(make_model("llama")))
