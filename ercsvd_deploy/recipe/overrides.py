"""Put `--set factorize.beta=0.1` overrides into a recipe that has been read but not yet validated.

An override may set any field, whether the file has it or not; unknown fields are refused later, when the
recipe is validated. Null removes a field, so that its default holds. A stage is addressed by its name, or by
its index in the list (`stages.0.factorize`). No torch here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from ercsvd_deploy.recipe.fields import RecipeError, did_you_mean, quoted
from ercsvd_deploy.recipe.messages import fields_at
from ercsvd_deploy.recipe.yaml_source import Node, parse_yaml

_PART = r'(?:"[^"]+"|[^."=]+)'
_OVERRIDE = re.compile(rf"(?P<path>{_PART}(?:\.{_PART})*)=(?P<value>.*)", re.DOTALL)

Path = tuple[str, ...]


def apply_override(root: Node, text: str) -> Node:
    """Return the tree with one override applied; null for a field at its default changes nothing.

    Args:
        root: A recipe as read, a mapping.
        text: `PATH=VALUE`; the path may begin with a stage's name.

    Raises:
        RecipeError: it cannot be parsed, its path does not exist, or its stage is missing or not unique.
    """
    path, value = parse_override(text)
    path = _with_index_of_stage(root, path, value)
    if value.value is None and path[-1] in fields_at(path[:-1]) and not _contains(root, path):
        return root
    return with_override(root, path, value)


def parse_override(text: str) -> tuple[Path, Node]:
    """Parse `a.b.0.c=VALUE`; a key that contains a dot is written in double quotes.

    Returns:
        The path and the value, which is read as YAML; without content it is null.

    Raises:
        RecipeError: the text is not PATH=VALUE, or the value is not plain YAML.
    """
    origin = f"--set {text if text.isprintable() else quoted(text)}"
    match = _OVERRIDE.fullmatch(text)
    if match is None:
        raise RecipeError([f"{origin}: is not PATH=VALUE; write it like factorize.compression_ratio=0.4"])
    path = tuple(part.strip('"') for part in re.findall(_PART, match["path"]))
    return path, parse_yaml(match["value"], lambda _line, _column: origin)


def with_override(root: Node, path: Path, new: Node) -> Node:
    """Return the tree with the value at a path replaced, added, or (by null) removed.

    Missing mappings on the path are created, and a list accepts an entry right after its last one.

    Raises:
        RecipeError: the path leads through a value that has no entries, or past the end of a list.
    """
    return _replace(root, (), path, new) or Node({}, root.origin)


def _replace(node: Node, above: Path, path: Path, new: Node) -> Node | None:
    """Return `node`, whose own path is `above`, with `new` at `path` below it; None if it is removed."""
    if not path:
        return None if new.value is None else new
    part, below = path[0], path[1:]
    absent = Node(None, new.origin)
    children = node.value
    if children is None:
        children = () if _index(part) is not None else {}
    if isinstance(children, Mapping):
        entry = _replace(children.get(part, absent), (*above, part), below, new)
        if entry is not None:
            return Node({**children, part: entry}, node.origin)
        # A null for an absent field stays: only validation can tell whether such a field exists.
        remaining = {key: child for key, child in children.items() if key != part}
        return Node(remaining if part in children else {**children, part: absent}, node.origin)
    field = quoted(".".join(above))
    if not isinstance(children, tuple):
        problem = f"is {quoted(children)}, which has no entry {quoted(part)}"
        raise RecipeError([f"{new.origin}: field {field} {problem}; set it as a whole"])
    index = _index(part)
    if index is None or index > len(children):
        expectation = f"a number from 0 to {len(children)}"
        raise RecipeError([f"{new.origin}: field {field} is a list; {quoted(part)} must be {expectation}"])
    entry = _replace(children[index] if index < len(children) else absent, (*above, part), below, new)
    return Node((*children[:index], *([entry] if entry else []), *children[index + 1 :]), node.origin)


def _with_index_of_stage(root: Node, path: Path, value: Node) -> Path:
    """Return the path with a stage's name replaced by its index in the list.

    Null for a stage as a whole removes its entry.

    Raises:
        RecipeError: the recipe has no such stage, or two; or the path begins with a field of a stage.
    """
    name, below = path[0], path[1:]
    stages = _stages(root)
    if name in fields_at(("stages", 0)):
        places = [place for place, stage in stages if stage == name]
        if len(places) != 1:
            raise RecipeError([f"{value.origin}: {_unclear_stage(name, places, stages)}"])
        entry = ("stages", str(places[0]))
        has_entry_alone = sum(place == places[0] for place, _ in stages) == 1
        return entry if value.value is None and not below and has_entry_alone else (*entry, name, *below)
    if name not in fields_at(()):
        candidates = [(stage, *path) for _, stage in stages if name in fields_at(("stages", 0, stage))]
        close = did_you_mean(name, [stage for _, stage in stages])
        candidates += [(close, *below)] if close else []
        if candidates:
            suggestions = " or ".join(dict.fromkeys(quoted(".".join(candidate)) for candidate in candidates))
            problem = f"{quoted(name)} is no field of the recipe; did you mean {suggestions}?"
            raise RecipeError([f"{value.origin}: {problem}"])
    return path


def _unclear_stage(name: str, places: list[int], stages: list[tuple[int, str]]) -> str:
    """Return the message for a stage name that is missing or not unique."""
    if places:
        paths = " and ".join(f"stages.{place}.{name}" for place in places)
        return f"the recipe has {len(places)} stages {name!r}: {paths}; write which one is meant"
    listed = ", ".join(f"{quoted(stage)} (stages.{place})" for place, stage in stages) or "none"
    return f"the recipe has no stage {name!r}; its stages: {listed}; stages.{len(stages)}.{name} adds one"


def _stages(root: Node) -> list[tuple[int, str]]:
    """Return index and name of every stage; entries that are not stages are left to validation."""
    listed = root.child("stages")
    if listed is None or not isinstance(listed.value, tuple):
        return []
    entries = [(place, entry.value) for place, entry in enumerate(listed.value)]
    return [(place, name) for place, keys in entries if isinstance(keys, Mapping) for name in keys]


def _contains(root: Node, path: Path) -> bool:
    node: Node | None = root
    for part in path:
        node = (
            node.child(int(part) if part.isdecimal() and isinstance(node.value, tuple) else part)
            if node
            else None
        )
    return node is not None


def _index(part: str) -> int | None:
    """Return the list index that a part of a path stands for, or None if it is a key."""
    return int(part) if re.fullmatch("[0-9]{1,6}", part) else None
