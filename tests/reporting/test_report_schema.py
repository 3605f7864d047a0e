"""Reports: what runs write is what is documented, and what is read is checked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from ercsvd_deploy.pipelines.flow import run_recipe
from ercsvd_deploy.pipelines.reporting.report.document import (
    REPORT_FILE,
    ReportError,
    load_report,
    parse_report,
)
from ercsvd_deploy.pipelines.reporting.report.reference import (
    REFERENCE_FILE,
    SCHEMA_FILE,
    publish,
    report_json_schema,
    report_reference,
    report_schema_text,
)
from ercsvd_deploy.recipe.load import load_recipe
from tests.recipe_runs import RecipeWriter, factorize
from tests.reporting.sample_reports import sample_report

ROOT = Path(__file__).parents[2]
INT4 = {"quantize": {"bits": 4, "group_size": 32, "ignore": ["*.k_proj"]}}


def as_read(report: dict[str, Any]) -> dict[str, Any]:
    """Return a report after it went through the documented model: what that does not know is gone."""
    return parse_report(report).as_json()


def test_published_copies_are_current(tmp_path: Path) -> None:
    again = (
        "run: python -c 'from ercsvd_deploy.pipelines.reporting.report.reference import publish; "
        "...publish(Path())'"
    )
    assert (ROOT / SCHEMA_FILE).read_text() == report_schema_text(), again
    assert (ROOT / REFERENCE_FILE).read_text() == report_reference(), again
    (tmp_path / "docs").mkdir()
    publish(tmp_path)
    assert (tmp_path / SCHEMA_FILE).read_text() == report_schema_text()


def test_every_key_is_explained() -> None:
    schema = report_json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    parts = {"report": schema} | schema["$defs"]
    unexplained = [
        f"{part}.{key}"
        for part, described in parts.items()
        for key, value in described["properties"].items()
        if not value.get("description")
    ]
    assert unexplained == []
    reference = report_reference()
    for described in parts.values():
        for key in described["properties"]:
            assert f"| `{key}` |" in reference


@pytest.mark.parametrize(
    "stages",
    [
        [factorize(method="erc_svd", num_compressed_layers="auto", rank_multiple="auto"), INT4],
        [factorize(method="svd_llm", allocation="error_controlled")],
        [INT4],
    ],
    ids=["factors in int4", "error control", "int4 alone"],
)
def test_real_reports_are_documented_to_the_last_key(
    stages: list[dict[str, Any]], write_recipe: RecipeWriter
) -> None:
    gates = {"perplexity_increase": 9.0, "max_size_ratio": 1.0, "built_in_text": False}
    _, directory = run_recipe(load_recipe(write_recipe(*stages, gates=gates)))
    report = json.loads((directory / REPORT_FILE).read_text())
    assert as_read(report) == report
    jsonschema.Draft202012Validator(report_json_schema()).validate(report)
    assert load_report(directory).compressed.num_bytes == report["compressed"]["num_bytes"]


def test_a_report_with_every_part_is_read_whole() -> None:
    report = sample_report()
    assert as_read(report) == report


def test_unknown_keys_are_ignored() -> None:
    newer = sample_report(invented_later={"a": 1})
    newer["original"]["invented_later"] = 1
    assert as_read(newer) == sample_report()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"report_version": 1}, "report_version 1, this version reads 2: run the recipe again"),
        ({"report_version": None}, "report_version None"),
        ({"original": {"num_bytes": "many"}}, "is damaged: original.num_bytes"),
        ({"gates": [{}]}, "is damaged: gates.0.gate: Field required"),
        ({"warnings": "one"}, "is damaged: warnings"),
        ({"seconds": {"factorize": float("inf")}}, "is damaged: seconds.factorize"),
        ({"components": [{"num_bytes": 10**400}]}, "is damaged: components.0"),
    ],
)
def test_what_cannot_be_read_is_named(changed: dict[str, Any], said: str) -> None:
    with pytest.raises(ReportError) as refusal:
        parse_report(sample_report(**changed))
    assert said in str(refusal.value)
    assert len(str(refusal.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("content", "said"), [(None, "is not there"), ("[]", "is damaged"), ("{", "is damaged")]
)
def test_a_directory_without_a_report_is_named(content: str | None, said: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / REPORT_FILE).write_text(content)
    with pytest.raises(ReportError, match=said):
        load_report(tmp_path)
