"""The README's tables of families, from what their tests found: `python -m tests.families.table`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from ercsvd_deploy.models.description import tested_families
from tests.families import tiny_families, tiny_vision_families

README = Path(__file__).parents[2] / "README.md"
RESULTS = README.with_name("ercsvd_deploy") / "models" / "description" / tested_families.FILE
NUM_RANKS = (1, 2)  # tensor parallel sizes


def kind_of_export(dtype: str, num_ranks: int = 1, *, pictures: bool = False) -> str:
    """Return what a verdict is about."""
    return dtype + " with pictures" * pictures + tested_families.TWO_RANKS * (num_ranks == 2)


# Kind of export, at any number of ranks -> heading of its column.
_TITLES = {"float32": "low rank in float32", "float16": "int4 in float16"}
_ON_TEXTS = {kind_of_export(dtype): title for dtype, title in _TITLES.items()}
_WITH_PICTURES = {
    kind_of_export(dtype, pictures=True): f"{title}, pictures" for dtype, title in _TITLES.items()
}


def table(
    families: Iterable[str], columns: Mapping[str, str], results: Mapping[str, Mapping[str, str]]
) -> str:
    """Return the table: model types with alike results share a row."""
    names: dict[tuple[str, ...], list[str]] = {}
    for family in families:
        if family in results:
            cells = tuple(_cell(results[family], kind) for kind in columns)
            names.setdefault(cells, []).append(f"`{family}`")
    lines = [
        " | ".join(["| model type (and variant)", *columns.values()]) + " |",
        "|---" * (1 + len(columns)) + "|",
    ]
    lines += [f"| {', '.join(each)} | {' | '.join(verdicts)} |" for verdicts, each in names.items()]
    return "\n".join(lines) + "\n"


def _cell(verdicts: Mapping[str, str], kind: str) -> str:
    """Return the verdict on a kind of export, and that at two ranks if it is another."""
    one, two = verdicts[kind], verdicts[f"{kind}{tested_families.TWO_RANKS}"]
    return one if one == two else f"{one}; at two ranks: {two}"


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
