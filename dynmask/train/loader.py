"""The part of YAML that a recipe needs: plain values in plain mappings and lists."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import yaml
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError

_TAG = "tag:yaml.org,2002:"
_PLAIN = {f"{_TAG}{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map")}
_MAX_DEPTH = 16


def parse(text: str) -> Any:
    """Return what a YAML text holds: null, truth values, numbers, strings, lists and mappings.

    Refused is what a recipe does not need and a hostile one could use: aliases, which unfold to
    any size, tags, keys that come twice, numbers beyond 64 bits, and deep nesting. Dates stay
    strings.

    Raises:
        yaml.YAMLError: The text is no such YAML; says where.
        ValueError: A value is not what its tag says.
    """
    return yaml.load(text, Loader=_Loader)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {  # noqa: RUF012  (as yaml names it)
        first: [(tag, form) for tag, form in forms if tag in _PLAIN]
        for first, forms in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    yaml_constructors = {  # noqa: RUF012
        tag: make
        for tag, make in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag in _PLAIN
    }
    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise ComposerError(None, None, "aliases are not read: write it out", _at(self))
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise ComposerError(None, None, "nested too deeply", _at(self))
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key, _ in node.value:
            if str(key.value) in seen:
                name = str(key.value)[:80]
                raise ConstructorError(None, None, f"{name!r} comes twice", key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep=deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        value = super().construct_yaml_int(node)
        if not -(2**63) <= value < 2**63:
            raise ConstructorError(None, None, "an integer beyond 64 bits", node.start_mark)
        return value


_Loader.add_constructor(f"{_TAG}int", _Loader.construct_yaml_int)


def _at(loader: _Loader) -> Any:
    return loader.peek_event().start_mark
