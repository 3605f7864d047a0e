"""Read YAML into plain values that remember their position in the file.

Only plain YAML is read: no Python objects, no duplicate keys, and limits on size, depth and expansion,
so that an untrusted recipe can waste neither memory nor time. Numbers follow YAML 1.2: `5e-2` is a
number, and `010` or `1:30`, which YAML 1.1 reads as 8 and 90, are text. No torch here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ercsvd_deploy.recipe.fields import Location, RecipeError, quoted

MAX_BYTES = 2**20
MAX_NODES = 10_000  # after aliases and merge keys are expanded
MAX_DEPTH = 32
MAX_NUMBER_LENGTH = 64  # characters; converting a very long number takes quadratic time

_TAG = "tag:yaml.org,2002:"
_MERGE = f"{_TAG}merge"
_MAPPING = f"{_TAG}map"
_SEQUENCE = f"{_TAG}seq"
_NUMBERS = {f"{_TAG}int", f"{_TAG}float"}
_SCALARS = _NUMBERS | {f"{_TAG}str", f"{_TAG}bool", f"{_TAG}null"}


@dataclass(frozen=True)
class Node:
    """A value of the recipe and its position in the file or on the command line.

    Attributes:
        value: A mapping, a list (as a tuple), or a str, int, float, bool or None.
        origin: `file:line:column` of its key (of itself in a list), or the override that set it.
    """

    value: Mapping[str, Node] | tuple[Node, ...] | str | int | float | bool | None
    origin: str

    def plain(self) -> Any:
        """Return the value as nested dict, list and scalars."""
        if isinstance(self.value, Mapping):
            return {key: child.plain() for key, child in self.value.items()}
        if isinstance(self.value, tuple):
            return [child.plain() for child in self.value]
        return self.value

    def child(self, part: str | int) -> Node | None:
        """Return the entry under a key or an index, or None if there is none."""
        if isinstance(self.value, Mapping):
            return self.value.get(str(part))
        if isinstance(self.value, tuple) and isinstance(part, int) and part < len(self.value):
            return self.value[part]
        return None

    def origin_of(self, location: Location) -> str:
        """Return the origin of the field at a location, or of its nearest ancestor that is present."""
        node = self
        for part in location:
            child = node.child(part)
            if child is None:
                break
            node = child
        return node.origin


def read_yaml_file(path: Path) -> Node:
    """Read a YAML file.

    Raises:
        RecipeError: it cannot be read, is not UTF-8 or not plain YAML, exceeds a limit, or is empty.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise RecipeError([f"{path}: cannot be read ({reason}); give the path of a recipe file"]) from error
    if len(data) > MAX_BYTES:
        raise RecipeError([f"{path}:1:1: is larger than {MAX_BYTES} bytes; a recipe is a short text file"])
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        column = error.start - data.rfind(b"\n", 0, error.start)
        raise RecipeError(
            [f"{path}:{line}:{column}: byte 0x{data[error.start]:02x} is not UTF-8; save the file as UTF-8"]
        ) from error
    return parse_yaml(text, lambda line, column: f"{path}:{line}:{column}")


def parse_yaml(text: str, locate: Callable[[int, int], str]) -> Node:
    """Parse one YAML document.

    Args:
        text: The document; without content it is null.
        locate: Turns a line and a column, both from 1, into an origin.

    Raises:
        RecipeError: it is not plain YAML, or exceeds a limit.
    """
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        if root is None:
            return Node(None, locate(1, 1))
        return _Builder(loader, locate).build(root)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        column = error.position - text.rfind("\n", 0, error.position)
        where = locate(line, column)
        raise RecipeError(
            [f"{where}: character #x{ord(text[error.position]):04x} is not allowed; remove it"]
        ) from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = locate(mark.line + 1, mark.column + 1) if mark else locate(1, 1)
        reasons = [part for part in (error.context, error.problem) if part]
        raise RecipeError([f"{where}: {', '.join(reasons)}"]) from error


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with YAML 1.2 numbers and no dates, and limits that hold while it parses."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._num_nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self._depth += 1
        self._num_nodes += 1
        mark: yaml.Mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
        _check_limits(self._depth, self._num_nodes, mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in {*_NUMBERS, f"{_TAG}timestamp"}]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    f"{_TAG}int", re.compile(r"^(?:[-+]?(?:0|[1-9][0-9_]*)|0x[0-9a-fA-F_]+)$"), list("-+0123456789")
)
_Loader.add_implicit_resolver(
    f"{_TAG}float",
    re.compile(
        r"""^(?:[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?
        |[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+
        |[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$""",
        re.VERBOSE,
    ),
    list("-+.0123456789"),
)


class _Builder:
    """Turns PyYAML's nodes into ours, expanding aliases and merge keys within the limits."""

    def __init__(self, loader: _Loader, locate: Callable[[int, int], str]) -> None:
        self._loader = loader
        self._locate = locate
        self._num_nodes = 0

    def build(self, node: yaml.Node, depth: int = 1, key: yaml.Node | None = None) -> Node:
        """Return the value of a node, located at its key if it has one."""
        self._num_nodes += 1
        _check_limits(depth, self._num_nodes, node.start_mark)
        mark = (key or node).start_mark
        origin = self._locate(mark.line + 1, mark.column + 1)
        if isinstance(node, yaml.MappingNode) and node.tag == _MAPPING:
            return Node(self._build_mapping(node, depth), origin)
        if isinstance(node, yaml.SequenceNode) and node.tag == _SEQUENCE:
            return Node(tuple(self.build(item, depth + 1) for item in node.value), origin)
        if isinstance(node, yaml.ScalarNode) and node.tag in _SCALARS:
            return Node(self._build_scalar(node), origin)
        raise _refuse(f"tag {node.tag!r} is not allowed; write plain YAML", node)

    def _build_mapping(self, node: yaml.MappingNode, depth: int) -> dict[str, Node]:
        entries: dict[str, Node] = {}
        merged: dict[str, Node] = {}
        for key, value in node.value:
            if key.tag == _MERGE:
                for source in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                    if not isinstance(source, yaml.MappingNode):
                        raise _refuse("a merge key (<<) takes a mapping or a list of mappings", source)
                    merged = self._merge_source(source, depth) | merged
                continue
            if not isinstance(key, yaml.ScalarNode) or key.tag not in _SCALARS:
                raise _refuse("a key must be plain text", key)
            name = _check_text(key)
            if name in entries:
                raise _refuse(f"key {quoted(name)} appears twice in one mapping; remove one", key)
            entries[name] = self.build(value, depth + 1, key)
        return merged | entries

    def _merge_source(self, source: yaml.MappingNode, depth: int) -> dict[str, Node]:
        self._num_nodes += 1
        _check_limits(depth + 1, self._num_nodes, source.start_mark)
        return self._build_mapping(source, depth + 1)

    def _build_scalar(self, node: yaml.ScalarNode) -> str | int | float | bool | None:
        text = _check_text(node)
        if node.tag in _NUMBERS and len(text) > MAX_NUMBER_LENGTH:
            raise _refuse(f"a number has more than {MAX_NUMBER_LENGTH} characters", node)
        try:
            value: str | int | float | bool | None = self._loader.construct_object(node)
        except (ValueError, LookupError, ArithmeticError):
            raise _refuse(
                f"{quoted(text)} is not a value of type {node.tag.removeprefix(_TAG)}", node
            ) from None
        return value


def _check_text(node: yaml.ScalarNode) -> str:
    """Return a scalar's text; a NUL or half a surrogate pair cannot be printed or be part of a path."""
    text: str = node.value
    if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
        raise _refuse("the text has a NUL or half a surrogate pair; remove the escape", node)
    return text


def _check_limits(depth: int, num_nodes: int, mark: yaml.Mark) -> None:
    if depth > MAX_DEPTH:
        raise _refuse_at(
            f"values are nested deeper than {MAX_DEPTH} levels, or an alias contains itself", mark
        )
    if num_nodes > MAX_NODES:
        raise _refuse_at(f"there are more than {MAX_NODES} values, counting what aliases repeat", mark)


def _refuse(problem: str, node: yaml.Node) -> yaml.MarkedYAMLError:
    return _refuse_at(problem, node.start_mark)


def _refuse_at(problem: str, mark: yaml.Mark) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=mark)
