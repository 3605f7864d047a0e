"""Gates that are passed, missed and undecided are so everywhere: terminal, page, card, JUnit and JSON."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
from rich.console import Console

from ercsvd_deploy.pipelines.judging.gates import judge_gates
from ercsvd_deploy.pipelines.judging.junit import junit_xml
from ercsvd_deploy.pipelines.reporting.card import make_card
from ercsvd_deploy.pipelines.reporting.html.page import make_page
from ercsvd_deploy.pipelines.reporting.report.document import Report, parse_report
from ercsvd_deploy.pipelines.reporting.screen.terminal import render
from ercsvd_deploy.recipe.gates import Gates
from tests.reporting.page_reader import Page
from tests.reporting.sample_reports import sample_document

# Of the sample's text `prose`: 10 % more, the interval from 8 to 12 %.
LIMITS = {"passed": 0.13, "missed": 0.07, "undecided": 0.11, "undecided, failing": 0.09}


def judged(limit: float) -> Report:
    report = sample_document()
    gates = Gates.model_validate({"perplexity_increase": {"prose": limit}, "built_in_text": False})
    report.gates = judge_gates(gates, report)
    report.serving = None
    return parse_report(report.as_json())


def on_terminal(report: Report) -> str:
    console = Console(file=io.StringIO(), width=140, record=True)
    console.print(render(report))
    return console.export_text()


@pytest.mark.parametrize("case", LIMITS)
def test_one_verdict_in_five_places(case: str, tmp_path: Path) -> None:
    verdict, is_failing = case.partition(",")[0], case in ("missed", "undecided, failing")
    report = judged(LIMITS[case])
    [gate] = report.gates
    assert (gate.verdict, gate.passed) == (verdict, not is_failing)
    told: dict[str, Any] = report.as_json()["gates"][0]
    assert told["verdict"] == verdict
    assert (told["low"], told["high"], told["count"]) == (pytest.approx(0.08), pytest.approx(0.12), 64)
    # Twice as near as the interval is wide: four times the windows.
    assert told["deciding_count"] == (pytest.approx(256, abs=1) if verdict == "undecided" else None)

    places = {
        "terminal": on_terminal(report),
        "page": Page(make_page(report, tmp_path)).text,
        "card": make_card(report, tmp_path),
    }
    for place, text in places.items():
        assert "8.0 to 12.0 %" in text, place
        assert verdict in text.lower(), place
        others = {"passed", "missed", "undecided"} - {verdict}
        gates = text.lower().partition("increase of perplexity, prose")[2].partition("serve it")[0][:400]
        assert not any(other in gates for other in others), place
        assert ("256 windows would decide" in text or "257 windows would decide" in text) == (
            verdict == "undecided"
        ), place
    assert ("UNDECIDED" in places["terminal"]) == (verdict == "undecided")

    root = ET.fromstring(junit_xml(report.gates, "model"))
    [testcase] = root.iter("testcase")
    said = testcase.findtext("system-out") or ""
    assert said.startswith(f"{verdict}: perplexity_increase, prose: 0.1 ")
    assert "95% interval 0.08 to 0.12 over 64 windows" in said
    failure = testcase.find("failure")
    assert (failure is not None) == is_failing
    if failure is not None:
        assert failure.get("type") == ("GateMissed" if verdict == "missed" else "GateUndecided")


def test_a_report_without_intervals_is_judged_by_its_values() -> None:
    """Reports of the versions before intervals have their keys, and no others."""
    values = sample_document().as_json()
    del values["differences"], values["tables"]
    for part in ("original", "compressed"):
        del values[part]["estimates"]
    for gate in values["gates"]:
        for key in ("verdict", "low", "high", "count", "unit", "deciding_count"):
            del gate[key]
    report = parse_report(values)
    gates = Gates.model_validate(
        {
            "perplexity_increase": 0.05,
            "logprob_kl": {"prose": 0.05},
            "exact_match_drop": 0.03,
            "task_drop": 0.01,
        }
    )
    verdicts = {result.name: result.verdict for result in judge_gates(gates, report)}
    assert verdicts == {
        "perplexity_increase, prose": "missed",
        "perplexity_increase, code": "missed",
        "logprob_kl, prose": "passed",
        "exact_match_drop, shapes": "passed",
        "task_drop, arc": "missed",
    }
    assert "11.000" in on_terminal(report)
    assert [gate.verdict for gate in report.gates] == ["passed", "missed", "missed", "missed"]
