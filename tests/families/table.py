"""The README's table of families, from what their tests found: `python -m tests.families.table`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

from ercsvd_deploy.models import tested_families
from tests.families.tiny_families import FAMILIES

README = Path(__file__).parents[2] / "README.md"
RESULTS = README.with_name("ercsvd_deploy") / "models" / tested_families.FILE
_BEGIN, _END = "<!-- families -->\n", "<!-- /families -->\n"


def table(results: Mapping[str, Mapping[str, str]]) -> str:
    """Return the table: model types with alike results share a row."""
    names: dict[tuple[str, str], list[str]] = {}
    for family in FAMILIES:
        if family in results:
            found = results[family]
            names.setdefault((found["float32"], found["float16"]), []).append(f"`{family}`")
    lines = ["| model type (and variant) | low rank in float32 | int4 in float16 |", "|---|---|---|"]
    lines += [f"| {', '.join(each)} | {first} | {second} |" for (first, second), each in names.items()]
    return "\n".join(lines) + "\n"


def with_table(readme: str) -> str:
    """Return the README with the table that the results make."""
    made = table(json.loads(RESULTS.read_text()))
    return re.sub(f"(?s){_BEGIN}.*{_END}", lambda _: _BEGIN + made + _END, readme)


if __name__ == "__main__":
    README.write_text(with_table(README.read_text()))
