"""Put `--set a.b.0.c=VALUE` overrides into a recipe that has been read but not yet validated.

An override may set any field, whether the file has it or not; whether the field exists is judged with
the rest of the recipe afterwards. Null removes a field, so that its default holds. No torch here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from ercsvd_deploy.recipe.fields import RecipeError, shown
from ercsvd_deploy.recipe.yaml_source import Node, parse_yaml

_PART = r'(?:"[^"]+"|[^."=]+)'
_OVERRIDE = re.compile(rf"(?P<path>{_PART}(?:\.{_PART})*)=(?P<value>.*)", re.DOTALL)

Path = tuple[str, ...]


def parse_override(text: str) -> tuple[Path, Node]:
    """Parse `a.b.0.c=VALUE`; a key that contains a dot stands in double quotes.

    Returns:
        The path and the value, which is read as YAML; without content it is null.

    Raises:
        RecipeError: the text is not PATH=VALUE, or the value is not plain YAML.
    """
    origin = f"--set {text if text.isprintable() else shown(text)}"
    match = _OVERRIDE.fullmatch(text)
    if match is None:
        raise RecipeError(
            [f"{origin}: is not PATH=VALUE; write it like stages.0.factorize.compression_ratio=0.4"]
        )
    path = tuple(part.strip('"') for part in re.findall(_PART, match["path"]))
    return path, parse_yaml(match["value"], lambda _line, _column: origin)


def with_override(root: Node, path: Path, new: Node) -> Node:
    """Return the tree with the value at a path replaced, added, or (by null) removed.

    Mappings on the way that are missing are made, and a list takes an entry right after its last.

    Raises:
        RecipeError: the path leads through a value that has no entries, or past the end of a list.
    """
    return _replace(root, (), path, new) or Node({}, root.origin)


def _replace(node: Node, above: Path, path: Path, new: Node) -> Node | None:
    """Return `node`, which stands at `above`, with `new` at `path` below it; None removes it."""
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
        # A null for a field that is not there stays: only validation can tell whether it exists at all.
        kept = {key: child for key, child in children.items() if key != part}
        return Node(kept if part in children else {**children, part: absent}, node.origin)
    field = shown(".".join(above))
    if not isinstance(children, tuple):
        found = f"is {shown(children)}, which has no entry {shown(part)}"
        raise RecipeError([f"{new.origin}: field {field} {found}; set it as a whole"])
    index = _index(part)
    if index is None or index > len(children):
        wanted = f"a number from 0 to {len(children)}"
        raise RecipeError([f"{new.origin}: field {field} is a list; {shown(part)} must be {wanted}"])
    entry = _replace(children[index] if index < len(children) else absent, (*above, part), below, new)
    return Node((*children[:index], *([entry] if entry else []), *children[index + 1 :]), node.origin)


def _index(part: str) -> int | None:
    """Return the list index that a part of a path stands for, or None if it is a key."""
    return int(part) if re.fullmatch("[0-9]{1,6}", part) else None
