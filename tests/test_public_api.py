"""A snapshot of the public names: a change here is a change for users."""

import importlib
import inspect

import pytest

PUBLIC = {
    "dynmask": """
        Blocks BoundedKeys DmaConfig DmaForCausalLM DmaModel Documents DynamicMaskAttention
        LifetimeCache Lifetimes MaskPlan Padding Stripes accelerate attention calibrate from_doge
        from_pretrained_dense supports
    """,
    "dynmask.masks": """
        Blocks Documents Lifetimes Mask Padding Stripes
    """,
    "dynmask.ops": """
        BoundedKeys attention choose computed_pairs supports
    """,
    "dynmask.dam": """
        AMPLIFIERS Coverage CoverageMeter Dynamic LayerPlan MODES MapAccumulator MaskPlan Matched
        Settings amplify check_writable describe_data dynamic_attention gate_heads match preview
        true_mask
    """,
    "dynmask.baselines": """
        H2O InfLLM METHODS MixtureOfBlockAttention MoA NativeSparseAttention Policy Quest Selector
        SlidingWindow SnapKV StreamingLLM TopK TopP VerticalSlash XAttention
    """,
    "dynmask.hf": """
        Run accelerate calibrate check_fingerprint fingerprint
    """,
    "dynmask.dma": """
        DmaConfig DmaForCausalLM DmaModel DynamicMaskAttention LifetimeCache context_prefill
        from_doge from_pretrained_dense
    """,
    "dynmask.assets": """
        TEXTS load_model load_texts load_tokenizer model_folder
    """,
    "dynmask.eval": """
        Part Result TABLE_HEAD is_eval_word keyvalue longeval needle perplexity recall ruler wilson
    """,
    "dynmask.report": """
        QualityRow Results SpeedRow build_page merge
    """,
}
each_module = pytest.mark.parametrize("name", PUBLIC)


@each_module
def test_public_names(name):
    module = importlib.import_module(name)
    assert sorted(module.__all__) == sorted(PUBLIC[name].split())
    for public in module.__all__:
        assert getattr(module, public) is not None
        assert public in dir(module)


@each_module
def test_everything_public_says_what_it_is(name):
    module = importlib.import_module(name)
    bare = [] if module.__doc__ else [name]
    for public in module.__all__:
        value = getattr(module, public)
        if not callable(value):
            continue
        # inspect.getdoc would take a base class's.
        if not value.__doc__ or value.__doc__.startswith(f"{public}("):
            bare.append(public)
        if not inspect.isclass(value):
            continue
        for member, found in vars(value).items():
            function = inspect.unwrap(getattr(found, "__func__", getattr(found, "fget", found)))
            if inspect.isfunction(function) and not member.startswith("_") and not function.__doc__:
                bare.append(f"{public}.{member}")
    assert bare == []


def test_unknown_name():
    dynmask = importlib.import_module("dynmask")
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = dynmask.nothing
