"""The published files about reports: the JSON schema and a reference of every key.

Both are generated from the result dataclasses. A test compares the repository's copies with what this module
returns; `publish` writes them again.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ercsvd_deploy.pipelines.reporting.report.document import document_adapter

SCHEMA_FILE = Path("docs/report.schema.json")
REFERENCE_FILE = Path("docs/report.md")

_WORDS = {
    "array": "list",
    "boolean": "true, false",
    "integer": "whole number",
    "null": "null",
    "number": "number",
    "object": "mapping",
    "string": "text",
}
_HEAD = """\
# The report of a run

`ercsvd run` writes three files about itself into the export: `ercsvd_report.json`, described here,
`ercsvd_report.html`, a page made from it, and the model card `README.md`. `ercsvd report DIR` makes the
page again.

[`report.schema.json`](report.schema.json) is the JSON schema (draft 2020-12). A measured number is null where
it is not finite. Keys may be added within a `report_version`: a reader should ignore those it does not know.

<!-- generated from the descriptions of the results' fields in the code: change them there, not here -->
"""
_TABLE_HEAD = "| key | value | meaning |\n|---|---|---|\n"


def report_json_schema() -> dict[str, Any]:
    """Return the JSON schema (draft 2020-12) of a report."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **document_adapter().json_schema(),
        "title": "ercsvd-deploy report",
    }


def report_schema_text() -> str:
    """Return the JSON schema as the published file has it."""
    return json.dumps(report_json_schema(), indent=2) + "\n"


def report_reference() -> str:
    """Return the reference of every key as Markdown: a table for the whole and for each part."""
    schema = report_json_schema()
    schemas = {"The whole report": schema} | schema["$defs"]
    return "\n".join([_HEAD, *(_section(heading, part) for heading, part in schemas.items())])


def publish(root: Path) -> None:
    """Write schema and reference into a checkout."""
    (root / SCHEMA_FILE).write_text(report_schema_text(), encoding="utf-8")
    (root / REFERENCE_FILE).write_text(report_reference(), encoding="utf-8")


def _section(heading: str, schema: dict[str, Any]) -> str:
    rows = []
    for name, values in schema["properties"].items():
        cells = (f"`{name}`", _values(values), values.get("description", ""))
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n")
    return f"## {heading}\n\n{schema['description']}\n\n{_TABLE_HEAD}{''.join(rows)}"


def _values(schema: dict[str, Any]) -> str:
    """Return in words which values a key has; parts link to their tables."""
    if "$ref" in schema:
        part = schema["$ref"].rpartition("/")[2]
        return f"[{part}](#{part.lower()})"
    if "const" in schema or "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema.get("enum", [schema.get("const")]))
    if "anyOf" in schema:
        return " or ".join(map(_values, schema["anyOf"]))
    kind = _WORDS[schema.get("type", "object")]
    if "prefixItems" in schema:
        return f"list of {', '.join(map(_values, schema['prefixItems']))}"
    contents = schema.get("items", schema.get("additionalProperties"))
    return f"{kind} of {_values(contents)}" if isinstance(contents, dict) else kind
