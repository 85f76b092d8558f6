"""Run the Triton kernels under NVIDIA's compute-sanitizer, and tell their reports from others'.

python benchmarks/checks/sanitizer.py --out sanitizer.json   # on a machine with a GPU
python benchmarks/checks/sanitizer.py --dry                  # the calls alone; without a GPU in
                                                             # Triton's interpreter

Exit code: 0 if all ended and no report is about our kernels, 1 if one is or a result is wrong, 2 if
a tool is missing, failed or ran out of time.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import dynmask
from dynmask.report.machine import machine, versions

TOOLS = ("memcheck", "racecheck", "initcheck")
SCRIPT = Path(__file__).with_name("sanitizer_calls.py")
PLACES = ("/usr/local/cuda*/bin", "/usr/local/cuda*/compute-sanitizer", "/opt/nvidia/*/bin")
API, UNNAMED = "(a call of the CUDA API)", "(no kernel named)"


def our_kernels() -> dict[str, list[str]]:
    """Return the modules of each kernel of the package, by its name."""
    root, found = Path(dynmask.__file__).parent, {}
    for path in sorted(root.rglob("*.py")):
        module = ".".join(path.relative_to(root.parent).with_suffix("").parts)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.FunctionDef) or not node.name.endswith("_kernel"):
                continue
            if any("jit" in ast.unparse(mark) for mark in node.decorator_list):
                found.setdefault(node.name, []).append(module)
    return found


def records(log: str) -> list[list[str]]:
    """Cut a log into reports: a line behind ``=========``, and the further indented ones below."""
    found: list[list[str]] = []
    for line in log.splitlines():
        if not line.startswith("========="):
            continue
        text = line.lstrip("=")
        if text.startswith("  "):
            if found:
                found[-1].append(text.strip())
        elif text.strip():
            found.append([text.strip()])
    return found


def is_report(record: list[str]) -> bool:
    """Tell a report from a header, a summary or a notice."""
    head = record[0]
    kinds = ("Invalid ", "Uninitialized ", "Misaligned ", "Program hit ", "Fatal ")
    return head.startswith(kinds) or "Race reported between" in head or "hazard detected" in head


def kernel_of(record: list[str], ours: dict[str, list[str]]) -> tuple[str, bool]:
    """Return the kernel that a report is about, and whether it is ours."""
    lines = []
    for line in record:
        # What follows is where the host launched it, with names of our files even for torch's.
        if line.startswith(("Saved host backtrace", "Host Frame", "Device Frame")):
            break
        lines.append(line)
    text = "\n".join(lines)
    for name in ours:
        # Triton may put a specialization behind the name; C++ puts namespaces before.
        if re.search(rf"(?<![\w.])(?<!::){re.escape(name)}(_[0-9]\w*)?(?!\w)", text):
            return name, True
    if record[0].startswith("Program hit"):
        return API, False
    for line in lines:
        at = re.search(r"\b(?:at|in) (?:0x[0-9a-f]+ in )?(?:\S+:\d+:)?([A-Za-z_].*)$", line)
        if at and not at[1].startswith("block"):
            return re.sub(r"\+0x[0-9a-f]+.*", "", at[1]), False
    return UNNAMED, False


def judge(log: str, ours: dict[str, list[str]]) -> dict[str, Any]:
    """Count a tool's reports by kernel, ours and others; an example of each of ours."""
    counts: dict[bool, Counter[str]] = {True: Counter(), False: Counter()}
    examples: dict[str, list[str]] = {}
    for record in filter(is_report, records(log)):
        name, is_ours = kernel_of(record, ours)
        counts[is_ours][name] += 1
        examples.setdefault(name, record[:12])
    return {
        "ours": dict(counts[True].most_common()),
        "others": dict(counts[False].most_common()),
        "examples": examples,
        "summary": re.findall(r"=+ (.*SUMMARY:.*)", log),
    }


def find_sanitizer(given: str | None) -> str | None:
    """Return the program's path: as given, from PATH, or from where CUDA is installed."""
    found = shutil.which(given or "compute-sanitizer")
    if found is None and given is None:
        folders = [str(path) for place in PLACES for path in Path("/").glob(place[1:])]
        wheels = Path(sys.prefix).rglob("compute-sanitizer")
        folders += [str(path.parent) for path in wheels if path.is_file()]
        found = shutil.which("compute-sanitizer", path=os.pathsep.join(sorted(folders)))
    return found


def run(command: list[str], environment: dict[str, str], limit: float) -> tuple[int | None, str]:
    """Run a command; return its exit code, None if its time was over, and what it printed."""
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as printed:
        process = subprocess.Popen(
            command,
            env={**os.environ, **environment},
            stdout=printed,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:  # The sanitizer's own child too.
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        printed.seek(0)
        return code, printed.read()


def calls_of(printed: str) -> dict[str, str]:
    """Return how each call ended."""
    return dict(re.findall(r"^CALL (\w+) (\w+)$", printed, re.MULTILINE))


def plain(words: list[str], limit: float) -> dict[str, Any]:
    """Make the calls without a tool, which also compiles the kernels."""
    started = time.perf_counter()
    environment = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    with tempfile.TemporaryDirectory() as folder:
        launched = Path(folder) / "launched.json"
        command = [sys.executable, str(SCRIPT), "--launched", str(launched), *words]
        code, printed = run(command, environment, limit)
        names = json.loads(launched.read_text(encoding="utf-8")) if launched.exists() else []
    found = {
        "status": {0: "ok", 1: "wrong", None: "out of time"}.get(code, f"exit code {code}"),
        "seconds": round(time.perf_counter() - started, 1),
        "calls": calls_of(printed),
        "launched": names,
    }
    if code != 0:
        found["tail"] = printed[-4000:]
    return found


def under(
    tool: str, sanitizer: str, words: list[str], limit: float, *, expected: set[str]
) -> dict[str, Any]:
    """Make the calls under one tool; ``expected`` are those that must end."""
    started = time.perf_counter()
    environment = {}
    if tool != "racecheck":
        # Else tensors are parts of large allocations, and nothing beside them is out of bounds.
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        options = ["--tool", tool, "--log-file", str(log), "--print-limit", "1000000"]
        options += ["--target-processes", "application-only"]
        if tool == "memcheck":
            options += ["--report-api-errors", "explicit"]
        command = [sanitizer, *options, sys.executable, str(SCRIPT), *words]
        code, printed = run(command, environment, limit)
        text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    found = judge(text, our_kernels())
    calls = calls_of(printed)
    if code is None:
        status = "out of time"
    elif not found["summary"] or calls.keys() != expected or "Internal Sanitizer Error" in text:
        status = "failed"
    elif found["ours"] or "wrong" in calls.values():
        status = "reports"
    else:
        status = "clean"
    found |= {
        "status": status,
        "exit_code": code,
        "seconds": round(time.perf_counter() - started, 1),
        "calls": calls,
    }
    if status != "clean":
        found["tail"] = (printed + text)[-4000:]
    return found


def table(document: dict[str, Any]) -> str:
    """Return a line for each kernel: whether it ran, and how many reports each tool has."""
    tools = document["tools"]
    lines = [f"{'kernel':<28}{'launched':<10}" + "".join(f"{tool:>12}" for tool in tools)]
    launched = {name.rpartition(".")[2] for name in document["plain"]["launched"]}
    for name in our_kernels():
        counts = "".join(f"{tools[tool]['ours'].get(name, 0):>12}" for tool in tools)
        lines.append(f"{name:<28}{'yes' if name in launched else 'no':<10}{counts}")
    others = "".join(f"{sum(tools[tool]['others'].values()):>12}" for tool in tools)
    lines.append(f"{'all others':<38}{others}")
    lines.append(f"{'':<38}" + "".join(f"{tools[tool]['status']:>12}" for tool in tools))
    plain_run = document["plain"]
    lines.append(f"plain: {plain_run['status']}, {plain_run['seconds']} s, {plain_run['calls']}")
    if document["not_launched"]:
        lines.append("not launched: " + ", ".join(document["not_launched"]))
    return "\n".join(lines)


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--tools", nargs="+", default=list(TOOLS), choices=TOOLS)
    parser.add_argument("--only", nargs="+", help="calls of sanitizer_calls.py; all by default")
    parser.add_argument("--limit", type=float, default=180, help="seconds for each tool")
    parser.add_argument("--sanitizer", help="path of compute-sanitizer")
    parser.add_argument("--dry", action="store_true", help="make the calls without a tool")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(words)
    sanitizer = None if given.dry else find_sanitizer(given.sanitizer)
    if not given.dry and (sanitizer is None or not torch.cuda.is_available()):
        print("this needs a GPU and compute-sanitizer (--sanitizer PATH), which is part of CUDA's")
        print("toolkit; --dry makes the calls without it")
        return 2
    only = [] if given.only is None else ["--only", *given.only]
    document: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(),
        "limit_seconds": given.limit,
        "plain": plain(only, given.limit),
        "tools": {},
    }
    names = [f"{module}.{name}" for name, modules in our_kernels().items() for module in modules]
    document["not_launched"] = sorted(set(names) - set(document["plain"]["launched"]))
    if sanitizer is not None:
        _, version = run([sanitizer, "--version"], {}, 60)
        document["sanitizer"] = version.strip().splitlines()[-1:]
        for tool in given.tools:
            expected = set(document["plain"]["calls"])
            document["tools"][tool] = under(tool, sanitizer, only, given.limit, expected=expected)
            write(document, given.out)
    write(document, given.out)
    print(table(document))
    for tool, found in document["tools"].items():
        for name in found["ours"]:
            print(f"\n{tool}, {name}:", *found["examples"][name], sep="\n  ")
    states = {document["plain"]["status"], *(t["status"] for t in document["tools"].values())}
    if states <= {"ok", "clean"}:
        return 0
    return 1 if states <= {"ok", "clean", "wrong", "reports"} else 2


def write(document: dict[str, Any], out: Path | None) -> None:
    # After each tool: what has run is kept.
    if out is not None:
        out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
