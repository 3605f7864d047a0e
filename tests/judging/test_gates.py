"""Gates: what a recipe may ask for, how a report is judged, and what `run` and `check` answer."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
import yaml

from ercsvd_deploy.pipelines.inputs.parity_prompts import NUM_DECODED
from ercsvd_deploy.pipelines.judging.gates import GateResult, judge_gates
from ercsvd_deploy.pipelines.judging.junit import junit_xml
from ercsvd_deploy.pipelines.judging.measurements import ModelFigures
from ercsvd_deploy.pipelines.judging.parity import measure as serving_parity
from ercsvd_deploy.pipelines.judging.parity.measure import ServingError, ServingParity
from ercsvd_deploy.pipelines.reporting.report.document import REPORT_FILE, Report, parse_report
from ercsvd_deploy.pipelines.stages import measured_export as after_export
from ercsvd_deploy.recipe.fields import parse_size
from ercsvd_deploy.recipe.gates import BUILT_IN_TEXT, GATES, Gates
from ercsvd_deploy.recipe.load import RecipeError, load_recipe
from tests.conftest import ModelDirectory
from tests.recipe.written import MINIMAL, problems_of, written
from tests.recipe_runs import RecipeWriter, factorize, invoke

SIZES = {"bytes_by_part": {}, "linear_bits_per_weight": 4.0, "parameters": 9, "linear_parameters": 8}
REPORT: dict[str, Any] = {
    "report_version": 2,
    "recipe": {"gates": {"perplexity_increase": 0.1, "built_in_text": False}},
    "original": {
        **SIZES,
        "num_bytes": 1000,
        "perplexity": {"a": 10.0, "b": 20.0},
        "exact_match": {"asked": 0.9},
        "tasks": {"arc": {"acc": 0.5, "acc_norm": 0.6}, "gsm8k": {"exact_match": 0.3}},
    },
    "compressed": {
        **SIZES,
        "num_bytes": 300,
        "perplexity": {"a": 10.5, "b": 23.0},
        "exact_match": {"asked": 0.87},
        "tasks": {"arc": {"acc": 0.5, "acc_norm": 0.55}, "gsm8k": {"exact_match": 0.31}},
    },
    "change": {"final_layer_error": {"a": 0.1, "b": 0.3}, "logprob_kl": {"a": 0.01, "b": 0.05}},
    "serving": {
        "mean_difference": 0.02,
        "largest_difference": 0.1,
        "num_tokens": 9,
        "tensor_parallel_size": 1,
        "vllm_version": "0",
    },
}


def failures_in(junit: Path) -> str | None:
    suite = ET.parse(junit).getroot().find("testsuite")
    assert suite is not None
    return suite.get("failures")


def judged(**gates: Any) -> dict[str, tuple[float | None, bool]]:
    results = judge_gates(Gates.model_validate(gates), parse_report(REPORT))
    return {result.name: (result.value and round(result.value, 6), result.passed) for result in results}


@pytest.mark.parametrize(
    ("gates", "expected"),
    [
        (
            {"perplexity_increase": 0.1},
            {"perplexity_increase, a": (0.05, True), "perplexity_increase, b": (0.15, False)},
        ),
        ({"perplexity_increase": {"b": 0.2}}, {"perplexity_increase, b": (0.15, True)}),
        ({"logprob_kl": 0.05}, {"logprob_kl, a": (0.01, True), "logprob_kl, b": (0.05, True)}),
        ({"final_layer_error": {"b": 0.29}}, {"final_layer_error, b": (0.3, False)}),
        ({"exact_match_drop": 0.02}, {"exact_match_drop, asked": (0.03, False)}),
        ({"task_drop": 0.04}, {"task_drop, arc": (0.05, False), "task_drop, gsm8k": (-0.01, True)}),
        ({"task_drop": {"arc/acc": 0.0}}, {"task_drop, arc/acc": (0.0, True)}),
        ({"max_size": "300KB"}, {"max_size": (300, True)}),
        ({"max_size_ratio": 0.29}, {"max_size_ratio": (0.3, False)}),
        ({"serving_parity": 0.01}, {"serving_parity": (0.02, False)}),
    ],
)
def test_judged_against_every_limit(
    gates: dict[str, Any], expected: dict[str, tuple[float | None, bool]]
) -> None:
    assert judged(**gates) == expected


@pytest.mark.parametrize(
    "gates",
    [
        {"perplexity_increase": {"absent": 9.0}},
        {"task_drop": {"arc/f1": 1.0}},
        {"task_drop": {"hellaswag": 1.0}},
        {"exact_match_drop": {"absent": 1.0}},
    ],
)
def test_what_was_not_measured_fails(gates: dict[str, Any]) -> None:
    assert [passed for _, passed in judged(**gates).values()] == [False]


def test_a_number_for_nothing_measured_fails() -> None:
    gates = Gates.model_validate({"exact_match_drop": 0.5, "serving_parity": 0.5})
    nothing = Report({}, ModelFigures(1, {}, 1.0, 1, 1), ModelFigures(1, {}, 1.0, 1, 1))
    assert [result.passed for result in judge_gates(gates, nothing)] == [False, False]


def test_perplexity_that_is_not_finite_fails() -> None:
    report = REPORT | {"compressed": SIZES | {"num_bytes": 1, "perplexity": {"a": None}}}
    [result] = judge_gates(Gates(perplexity_increase=1e9), parse_report(report))
    assert not result.passed
    assert "not finite" in result.explain()


def test_junit_has_a_case_for_each_verdict() -> None:
    results = [
        GateResult("logprob_kl", "<a&b>", 0.1, 0.05, True),
        GateResult("max_size", None, 100, 200, False),
    ]
    root = ET.fromstring(junit_xml(results, "out/model"))
    suite = root.find("testsuite")
    assert suite is not None
    assert (suite.get("name"), suite.get("tests"), suite.get("failures")) == ("out/model", "2", "1")
    passed, failed = suite.findall("testcase")
    assert (passed.get("classname"), passed.get("name")) == ("gates.logprob_kl", "<a&b>")
    assert passed.find("failure") is None
    failure = failed.find("failure")
    assert failure is not None
    assert failure.get("message") == "max_size: 200 > 100"


@pytest.mark.parametrize(
    ("size", "expected"),
    [("6MB", 6_000_000), ("1.5KiB", 1536), ("3.2GiB", 3_435_973_836), ("1GB", 10**9), ("2KB", 2000)],
)
def test_sizes(size: str, expected: int) -> None:
    assert parse_size(size) == expected


@pytest.mark.parametrize(
    ("section", "named"),
    [
        ("gates: {}", "'gates' has no gate"),
        ("gates: {built_in_text: true}", "'gates' has no gate"),
        ("gates: {perplexity_increase: -1}", "'gates.perplexity_increase'"),
        ("gates: {perplexity_increase: {}}", "empty perplexity_increase"),
        ("gates: {perplexity_increase: .nan}", "'gates.perplexity_increase'"),
        (
            "gates: {perplexity_increase: {nowhere: 0.1}}",
            "'gates.perplexity_increase.nowhere' is not measured",
        ),
        ("gates: {perplexity_increase: 0.1, built_in_text: false}", "judges texts, but there are none"),
        ("gates: {exact_match_drop: 0.1}", "no evaluation.visual_questions"),
        ("gates: {task_drop: 0.1}", "no evaluation.lm_eval.tasks"),
        ("gates: {max_size: 6}", "'gates.max_size'"),
        ("gates: {max_size: 0GB}", "'gates.max_size'"),
        ("gates: {max_sise: 6GB}", "max_size"),
        (
            f"gates: {{logprob_kl: 1}}\nevaluation: {{perplexity: {{{BUILT_IN_TEXT}: a.txt}}}}",
            "choose another",
        ),
    ],
)
def test_gates_that_cannot_be_judged_are_refused(tmp_path: Path, section: str, named: str) -> None:
    problems = problems_of(written(tmp_path, f"{MINIMAL}{section}\n"))
    assert len(problems) == 1
    assert named in problems[0]


def test_out_of_domain_text_is_judged_by_default(tmp_path: Path) -> None:
    recipe = load_recipe(written(tmp_path, f"{MINIMAL}gates: {{logprob_kl: 0.1}}\n"))
    assert recipe.judged_texts == (BUILT_IN_TEXT,)
    sizes_only = load_recipe(written(tmp_path, f"{MINIMAL}gates: {{max_size: 1GB}}\n"))
    assert sizes_only.judged_texts == ()
    ungated = load_recipe(written(tmp_path, MINIMAL))
    assert ungated.judged_texts == ()


def test_missed_gates_leave_export_and_report(write_recipe: RecipeWriter, tmp_path: Path) -> None:
    gates = {"perplexity_increase": 10.0, "max_size_ratio": 0.01}
    junit = tmp_path / "gates.xml"
    code, out, err = invoke("run", write_recipe(factorize(), gates=gates), "--junit", junit)
    assert code == 3
    assert "MISSED" in out
    assert "max_size_ratio: " in err
    report = json.loads((tmp_path / "out" / REPORT_FILE).read_text())
    verdicts = {(gate["gate"], gate["subject"]): gate["passed"] for gate in report["gates"]}
    assert verdicts == {
        ("perplexity_increase", "held_out"): True,
        ("perplexity_increase", BUILT_IN_TEXT): True,
        ("max_size_ratio", None): False,
    }
    assert failures_in(junit) == "1"
    assert set(report["change"]["logprob_kl"]) == {"held_out", BUILT_IN_TEXT}
    assert invoke("verify", tmp_path / "out")[0] == 0


def test_check_judges_again_without_computing(write_recipe: RecipeWriter, tmp_path: Path) -> None:
    recipe = write_recipe(factorize(num_compressed_layers="all"), gates={"logprob_kl": 100.0})
    assert invoke("run", recipe)[0] == 0
    for file in (tmp_path / "out").glob("*.safetensors"):
        file.unlink()  # nothing is loaded
    code, out, _ = invoke("check", tmp_path / "out", "--json")
    assert code == 0
    assert json.loads(out)["passed"] is True
    strict = write_recipe(factorize(), gates={"logprob_kl": 0.0, "max_size": "1KB"})
    junit = tmp_path / "gates.xml"
    code, out, err = invoke("check", tmp_path / "out", "--recipe", strict, "--junit", junit, "--json")
    assert code == 3
    assert json.loads(out)["passed"] is False
    assert "3 of 3 gates missed" in err
    assert failures_in(junit) == "3"


@pytest.mark.parametrize(
    ("report", "said"),
    [
        (None, "is not there"),
        ("{", "is damaged"),
        ("[]", "is damaged"),
        (json.dumps(REPORT | {"report_version": 1}), "report_version 1"),
        (json.dumps(REPORT | {"compressed": {"num_bytes": "many"}}), "compressed.num_bytes"),
        (json.dumps(REPORT | {"recipe": {}}), "had no gates"),
        (json.dumps(REPORT | {"recipe": {"gates": {"max_size": 5}}}), "cannot be read"),
    ],
)
def test_check_refuses_what_it_cannot_judge(tmp_path: Path, report: str | None, said: str) -> None:
    if report is not None:
        (tmp_path / REPORT_FILE).write_text(report)
    code, out, err = invoke("check", tmp_path)
    assert code == 1
    assert said in err
    assert not out


def test_check_refuses_a_recipe_without_gates(write_recipe: RecipeWriter, tmp_path: Path) -> None:
    (tmp_path / REPORT_FILE).write_text(json.dumps(REPORT))
    code, _, err = invoke("check", tmp_path, "--recipe", write_recipe())
    assert code == 1
    assert "has no gates" in err


def test_parity_needs_vllm_before_any_work(
    write_recipe: RecipeWriter, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(serving_parity, "find_spec", lambda _name: None)
    code, _, err = invoke("run", write_recipe(gates={"serving_parity": 0.1}))
    assert code == 1
    assert "not installed" in err
    assert not (tmp_path / "out").exists()


def test_parity_that_cannot_be_measured_is_a_missed_gate_beside_a_finished_export(
    write_recipe: RecipeWriter, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*_: object) -> ServingParity:
        raise ServingError("vLLM did not serve the export")

    monkeypatch.setattr(after_export, "measure_parity", fail)
    code, out, _ = invoke("run", write_recipe(factorize(), gates={"serving_parity": 0.1}))
    assert code == 3
    assert "serving parity was not measured: vLLM did not serve the export" in out
    assert invoke("verify", tmp_path / "out")[0] == 0


@pytest.mark.vllm
def test_real_vllm_agrees_with_the_reference(
    write_recipe: RecipeWriter, tmp_path: Path, tiny_model: ModelDirectory
) -> None:
    two_layers = {"path": str(tiny_model("llama")), "dtype": "bfloat16"}  # each takes g++ ten seconds
    recipe = write_recipe(factorize(), gates={"serving_parity": 0.05}, model=two_layers)
    ran = subprocess.run(
        [sys.executable, "-m", "ercsvd_deploy", "run", str(recipe)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    report = yaml.safe_load((tmp_path / "out" / REPORT_FILE).read_text())
    # two texts, four prompts each: 47 tokens that have one before them, then those of the continuation
    assert report["serving"]["num_tokens"] == 2 * 4 * (47 + NUM_DECODED)
    assert 0 < report["serving"]["mean_difference"] < 0.05


def test_every_gate_is_described() -> None:
    assert GATES.keys() == Gates.model_fields.keys() - {"built_in_text"}


def test_recipe_errors_name_the_line(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"recipe\.yaml:5:\d+"):
        load_recipe(written(tmp_path, f"{MINIMAL}gates: {{max_size: 6}}\n"))
