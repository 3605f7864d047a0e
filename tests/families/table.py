"""The README's tables of families, from what their tests found: `python -m tests.families.table`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from ercsvd_deploy.models.description import tested_families
from tests.families import tiny_families, tiny_vision_families

README = Path(__file__).parents[2] / "README.md"
RESULTS = README.with_name("ercsvd_deploy") / "models" / "description" / tested_families.FILE
# What a verdict is about -> the heading of its column.
_ON_TEXTS = {"float32": "low rank in float32", "float16": "int4 in float16"}
_WITH_PICTURES = {f"{dtype} with pictures": f"{title}, pictures" for dtype, title in _ON_TEXTS.items()}


def table(
    families: Iterable[str], columns: Mapping[str, str], results: Mapping[str, Mapping[str, str]]
) -> str:
    """Return the table: model types with alike results share a row."""
    names: dict[tuple[str, ...], list[str]] = {}
    for family in families:
        if family in results:
            names.setdefault(tuple(results[family][key] for key in columns), []).append(f"`{family}`")
    lines = [
        " | ".join(["| model type (and variant)", *columns.values()]) + " |",
        "|---" * (1 + len(columns)) + "|",
    ]
    lines += [f"| {', '.join(each)} | {' | '.join(verdicts)} |" for verdicts, each in names.items()]
    return "\n".join(lines) + "\n"


def with_tables(readme: str) -> str:
    """Return the README with the tables that the results make."""
    results = json.loads(RESULTS.read_text())
    made = {
        "families": table(tiny_families.FAMILIES, _ON_TEXTS, results),
        "vision families": table(tiny_vision_families.FAMILIES, _ON_TEXTS | _WITH_PICTURES, results),
    }
    for name, text in made.items():
        before, begin, rest = readme.partition(f"<!-- {name} -->\n")
        _, end, behind = rest.partition(f"<!-- /{name} -->\n")
        assert end, f"the README has no place for the table of {name}"
        readme = before + begin + text + end + behind
    return readme


if __name__ == "__main__":
    README.write_text(with_tables(README.read_text()))
