"""The reference: a page for each public name, from its docstring, and for each command."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

from commands import COMMANDS, command_page  # mkdocs looks for modules beside a hook
from mkdocs.structure.files import File

PACKAGE = Path(__file__).parents[2] / "dynmask"
#: Public packages in the order of the pages; dynmask's own names come first.
PACKAGES = ("masks", "ops", "dam", "hf", "dma", "baselines", "assets", "eval", "report")


def names_of(package: str) -> list[str]:
    """Return ``__all__`` of ``dynmask.<package>``, or of dynmask itself for ``""``."""
    for node in _tree(package).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return [str(name) for name in ast.literal_eval(node.value)]
    return []


def identifier_of(package: str, name: str) -> str:
    """Return where a name of a package is defined: a module may have the same name."""
    for node in _tree(package).body:
        if isinstance(node, ast.ImportFrom) and name in [alias.name for alias in node.names]:
            return f"{node.module}.{name}"
    return f"dynmask.{package}.{name}"


def summary_of(package: str) -> str:
    """Return the first line of a package's docstring."""
    return (ast.get_docstring(_tree(package)) or "").partition("\n")[0]


def _tree(package: str) -> ast.Module:
    return ast.parse((PACKAGE / package / "__init__.py").read_text(encoding="utf-8"))


def homes() -> dict[str, str]:
    """Return for each name that ``import dynmask`` offers the package that it is taken from."""
    found = {name: package for package in PACKAGES for name in names_of(package)}
    return {name: found[name] for name in names_of("")}


def pages() -> dict[str, tuple[str, str]]:
    """Return ``{place: (title, Markdown)}`` of all pages of the reference but its first."""
    made = {}
    top = homes()
    for name, package in top.items():
        made[f"reference/{name}.md"] = name, _page(identifier_of(package, name))
    for package in PACKAGES:
        for name in names_of(package):
            if name not in top:
                text = _page(identifier_of(package, name))
                made[f"reference/{package}/{name}.md"] = name, text
    for command in COMMANDS:
        made[f"reference/commands/{command}.md"] = f"dynmask {command}", command_page(command)
    return made


def _page(identifier: str) -> str:
    return f"::: {identifier}\n"


def overview() -> str:
    """Return the first page: all names with links, package by package."""
    top = homes()
    rows = ["# Reference", "", "Made from the docstrings and from the commands' own help."]
    rows += ["", "## dynmask", "", ", ".join(f"[`{n}`]({n}.md)" for n in top)]
    for package in PACKAGES:
        links = [
            f"[`{n}`]({n}.md)" if n in top else f"[`{n}`]({package}/{n}.md)"
            for n in names_of(package)
        ]
        rows += ["", f"## dynmask.{package}", "", summary_of(package), "", ", ".join(links)]
    rows += ["", "## Commands", ""]
    rows += [f"- [`dynmask {c}`](commands/{c}.md): {line}" for c, line in COMMANDS.items()]
    return "\n".join(rows) + "\n"


def nav() -> list[Any]:
    """Return the reference's entries of the navigation."""
    groups: dict[str, list[Any]] = {"dynmask": []}
    for place, (title, _) in pages().items():
        parts = place.split("/")
        folder = "dynmask" if len(parts) == 2 else parts[1]
        label = folder if folder == "dynmask" else f"dynmask.{folder}"
        label = "Commands" if folder == "commands" else label
        groups.setdefault(label, []).append({title: place})
    return ["reference/index.md", *({label: entries} for label, entries in groups.items())]


def on_config(config: Any) -> Any:
    """Fill in the navigation."""
    for entry in config.nav:
        if "Reference" in entry:
            entry["Reference"] = nav()
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the pages."""
    files.append(File.generated(config, "reference/index.md", content=overview()))
    for place, (title, text) in pages().items():
        content = f"---\ntitle: {title}\n---\n\n{text}"
        files.append(File.generated(config, place, content=content))
    return files


def on_page_content(content: str, page: Any, config: Any, files: Any) -> str:
    """Say under a name's heading where it is imported from."""
    parts = page.file.src_uri.removesuffix(".md").split("/")
    if parts[0] != "reference" or parts[1] in ("index", "commands"):
        return content
    module = ".".join(["dynmask", *parts[1:-1]])
    line = f"<p><code>from {module} import {parts[-1]}</code></p>"
    return content.replace("</h1>", f"</h1>\n{line}", 1)
