"""Glue to Hugging Face transformers: calibrate a model, and accelerate it by the plan."""

try:
    import transformers as _transformers  # noqa: F401
except ImportError as error:
    raise ImportError(
        "dynmask.hf needs transformers, which is not installed: pip install 'dynmask[hf]'"
    ) from error

from dynmask.hf.attach import Run, accelerate
from dynmask.hf.calibration import calibrate
from dynmask.hf.fingerprint import check_fingerprint, fingerprint

__all__ = ["Run", "accelerate", "calibrate", "check_fingerprint", "fingerprint"]
