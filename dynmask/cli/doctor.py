"""``dynmask doctor``: is everything here that dynmask needs, and what runs on this machine."""

from __future__ import annotations

import argparse
import hashlib
import importlib
import importlib.metadata
import os
import platform
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from typing import TYPE_CHECKING

import dynmask
from dynmask.cli import FAILED, OK
from dynmask.cli.console import Output
from dynmask.cli.tested import remark

if TYPE_CHECKING:
    from torch import Tensor

    from dynmask.masks import Mask

#: Sums of the embedded files, as ``sha256sum`` writes them.
SUMS = "SHA256SUMS"
#: A missing required package is a failed check.
REQUIRED = ("torch", "numpy", "safetensors", "transformers", "tokenizers", "rich")
#: A missing one of these is a note: only what stands beside it needs it.
OPTIONAL = {
    "triton": "the GPU kernels",
    "matplotlib": "dynmask report and demo",
    "accelerate": "dynmask train",
    "datasets": "dynmask train",
    "yaml": "dynmask train",
}
#: What changes how torch, Triton and transformers work here.
VARIABLES = (
    "CUDA_VISIBLE_DEVICES",
    "HF_HOME",
    "HF_HUB_OFFLINE",
    "OMP_NUM_THREADS",
    "TRITON_INTERPRET",
)


@dataclass(frozen=True)
class Finding:
    """One line of the list: `ok` is True, False (a failed check) or None (a note)."""

    name: str
    ok: bool | None
    text: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add nothing: the command has no options of its own."""


def run(arguments: argparse.Namespace, output: Output) -> int:
    """Run every check; one that breaks is a failed check, not the end."""
    findings = [finding for check in CHECKS for finding in _guarded(check)]
    marks = {True: "ok", False: "FAILED", None: ""}
    output.table(
        "", ["check", "", "found"], [[f.name, marks[f.ok], f.text] for f in findings], left=3
    )
    failed = [finding.name for finding in findings if finding.ok is False]
    output.say(
        f"{len(failed)} failed: {', '.join(failed)}" if failed else "Everything needed is here."
    )
    output.finish({"ok": not failed, "checks": [asdict(finding) for finding in findings]})
    return FAILED if failed else OK


def packages() -> Iterator[Finding]:
    """Check that the packages can be imported, and compare their versions with those tested."""
    yield Finding("python", True, _with_remark("python", platform.python_version()))
    yield Finding("dynmask", True, dynmask.__version__)
    for name in (*REQUIRED, *OPTIONAL):
        try:
            module = importlib.import_module(name)
            # A module's own word first: torch's names its build.
            version = getattr(module, "__version__", None) or importlib.metadata.version(name)
        except Exception as error:  # a broken package can raise anything
            text = f"cannot import: {error}"
            if name in REQUIRED:
                yield Finding(name, False, text)
            else:
                yield Finding(name, None, f"{text}; {OPTIONAL[name]} will not run")
        else:
            yield Finding(name, True, _with_remark(name, version))


def _with_remark(name: str, version: str) -> str:
    outside = remark(name, version)
    return version if outside is None else f"{version}, {outside}"


def computer() -> Iterator[Finding]:
    """Describe system, processor, cores, threads, memory, GPUs and environment variables."""
    from dynmask.report.machine import machine

    facts = machine()
    yield Finding("system", None, str(facts["system"]))
    yield Finding("processor", None, str(facts["processor"]))
    yield Finding("cores", None, f"{facts['cores']} usable, torch runs {facts['threads']} threads")
    yield Finding("memory", None, f"{facts['memory_gib']} GiB")
    yield from gpus()
    for name in VARIABLES:
        if name in os.environ:
            yield Finding(name, None, os.environ[name])


def gpus() -> Iterator[Finding]:
    """Describe each GPU that torch sees, or say why it sees none."""
    import torch

    version = torch.version
    built = f"CUDA {version.cuda}" if version.cuda else f"ROCm {version.hip}"
    if not version.cuda and not version.hip:
        yield Finding("GPU", None, "none: this torch is built for the CPU alone")
    elif not torch.cuda.is_available():
        yield Finding(
            "GPU", None, f"none: torch is built for {built} and finds no GPU, or no driver for it"
        )
    else:
        for index in range(torch.cuda.device_count()):
            facts = torch.cuda.get_device_properties(index)
            yield Finding(
                f"GPU {index}",
                None,
                f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB, compute capability "
                f"{facts.major}.{facts.minor}, {built}",
            )


def backends() -> Iterator[Finding]:
    """Ask each backend for a small call under each kind of mask; compare with the reference."""
    import torch

    from dynmask.ops.attention import BACKENDS

    device = "cuda" if torch.cuda.is_available() else "cpu"
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, 96, 32, generator=random).to(device) for heads in (4, 2, 2))
    masks = _small_masks(torch.rand(1, 2, 96, generator=random).to(device))
    for name in BACKENDS:
        yield _backend(name, q, k, v, masks)


def _small_masks(score: Tensor) -> dict[str, Mask]:
    """Return a mask of each kind for 4 query heads on 2, of 96 tokens; ``score`` is [1, 2, 96]."""
    import torch

    from dynmask.masks import Blocks, Lifetimes, Stripes

    tiles = torch.arange(3, dtype=torch.int32, device=score.device)
    lists = torch.stack([torch.zeros_like(tiles), tiles], -1)  # the first block and the tile's own
    return {
        "Lifetimes": Lifetimes.top(score, keep=20),
        "Stripes": Stripes.streaming(4, sinks=2, window=16, device=score.device),
        "Blocks": Blocks(lists[None, None], (tiles > 0).int()[None, None] + 1, block=32, tile=32),
    }


def _backend(name: str, q: Tensor, k: Tensor, v: Tensor, masks: dict[str, Mask]) -> Finding:
    from dynmask.ops import attention, supports

    reasons: dict[str, list[str]] = {}  # why not, and the kinds of mask that it stands for
    ran, error = [], 0.0
    for kind, mask in masks.items():
        reason = supports(name, q, k, v, mask)
        if reason is not None:
            reasons.setdefault(reason, []).append(kind)
            continue
        expected = attention(q, k, v, mask, impl="reference")
        try:
            found = attention(q, k, v, mask, impl=name)
        except Exception as broken:  # a compiler or a driver can raise anything
            return Finding(f"backend {name}", False, f"{kind}: breaks: {broken}")
        ran.append(kind)
        error = max(error, float((found - expected).abs().max()))
    parts = [f"not for {', '.join(kinds)}: {reason}" for reason, kinds in reasons.items()]
    if ran:
        parts.insert(0, f"{', '.join(ran)} on {q.device.type}, largest error {error:.1e}")
    return Finding(f"backend {name}", error < 1e-4 if ran else None, "; ".join(parts))


def embedded_model() -> Iterator[Finding]:
    """Check the embedded files against their sums, and load the model and its tokenizer."""
    wrong = wrong_sums(resources.files("dynmask.assets"))
    if wrong:
        yield Finding("embedded files", False, f"changed or missing: {', '.join(wrong)}; reinstall")
        return
    yield Finding("embedded files", True, f"every file matches {SUMS}")
    from dynmask.assets import load_model, load_tokenizer

    parameters = load_model().num_parameters()
    entries = len(load_tokenizer())
    yield Finding(
        "embedded model", True, f"{parameters / 1e6:.1f} M parameters, {entries:,} tokens"
    )


def wrong_sums(folder: Traversable) -> list[str]:
    """Return the files listed in the folder's SHA256SUMS that are missing or differ."""
    wrong = []
    for line in folder.joinpath(SUMS).read_text(encoding="utf-8").splitlines():
        digest, _, name = line.partition("  ")
        try:
            content = folder.joinpath(name).read_bytes()
        except OSError:
            wrong.append(name)
            continue
        if hashlib.sha256(content).hexdigest() != digest:
            wrong.append(name)
    return wrong


CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (packages, computer, backends, embedded_model)


def _guarded(check: Callable[[], Iterator[Finding]]) -> list[Finding]:
    findings: list[Finding] = []
    try:
        # One by one, so that what was found before an error stays.
        for finding in check():
            findings.append(finding)  # noqa: PERF402
    except Exception as error:
        name = check.__name__.replace("_", " ")
        findings.append(Finding(name, False, f"{type(error).__name__}: {error}"))
    return findings
