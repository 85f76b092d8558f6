"""``dynmask doctor``: is everything here that dynmask needs, and what runs on this machine."""

from __future__ import annotations

import argparse
import hashlib
import importlib
import importlib.metadata
import platform
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import resources
from importlib.resources.abc import Traversable

import dynmask
from dynmask.cli import FAILED, OK
from dynmask.cli.console import Output

#: Sums of the embedded files, as ``sha256sum`` writes them.
SUMS = "SHA256SUMS"
#: A missing required package is a failed check, a missing optional one a note.
REQUIRED = ("torch", "numpy", "safetensors", "transformers", "tokenizers", "rich")
OPTIONAL = ("triton", "matplotlib")


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
    """Check that the packages can be imported, with their versions."""
    yield Finding("python", True, platform.python_version())
    yield Finding("dynmask", True, dynmask.__version__)
    for name in (*REQUIRED, *OPTIONAL):
        try:
            importlib.import_module(name)
            version = importlib.metadata.version(name)
        except Exception as error:  # a broken package can raise anything
            yield Finding(name, False if name in REQUIRED else None, f"cannot import: {error}")
        else:
            yield Finding(name, True, version)


def computer() -> Iterator[Finding]:
    """Describe processor, cores, threads, memory and GPUs."""
    from dynmask.report.machine import machine

    facts = machine()
    yield Finding("processor", None, str(facts["processor"]))
    yield Finding("cores", None, f"{facts['cores']} usable, torch runs {facts['threads']} threads")
    yield Finding("memory", None, f"{facts['memory_gib']} GiB")
    yield Finding("GPU", None, ", ".join(facts["gpus"]) or "none")


def backends() -> Iterator[Finding]:
    """Ask each backend whether it can run a small masked call, and compare with the reference."""
    import torch

    from dynmask.masks import Stripes
    from dynmask.ops import attention, supports
    from dynmask.ops.attention import BACKENDS

    device = "cuda" if torch.cuda.is_available() else "cpu"
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, 96, 32, generator=random).to(device) for heads in (4, 2, 2))
    mask = Stripes.streaming(4, sinks=2, window=16, device=device)
    expected = attention(q, k, v, mask, impl="reference")
    for name in BACKENDS:
        reason = supports(name, q, k, v, mask)
        if reason is not None:
            yield Finding(f"backend {name}", None, f"not for masks on {device}: {reason}")
            continue
        try:
            error = float((attention(q, k, v, mask, impl=name) - expected).abs().max())
        except Exception as broken:  # a compiler or a driver can raise anything
            yield Finding(f"backend {name}", False, f"breaks: {broken}")
        else:
            exact = error < 1e-4
            yield Finding(f"backend {name}", exact, f"largest error {error:.1e} on {device}")


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
