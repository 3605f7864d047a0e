"""lm-eval's own results through the adapter, on tasks made from text of this repository."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ercsvd_deploy.pipelines.judging import tasks as adapter
from ercsvd_deploy.pipelines.judging.gates import judge_gates
from ercsvd_deploy.pipelines.judging.tasks import (
    EvaluationError,
    TaskMetric,
    TaskResults,
    TaskSettings,
    check_tasks,
    drop_of,
    find_metric,
    read_results,
    run_tasks,
)
from ercsvd_deploy.pipelines.judging.uncertainty import share_drop
from ercsvd_deploy.pipelines.reporting.report.document import REPORT_FILE, load_report
from ercsvd_deploy.recipe.gates import Gates
from tests.judging.local_tasks import NUM_DOCUMENTS, write_tasks
from tests.recipe_runs import RecipeWriter, factorize, invoke

pytestmark = pytest.mark.slow  # whole runs

MODEL = Path(__file__).parents[2] / "examples" / "tiny-llama"
CPU = torch.device("cpu")


@pytest.fixture(autouse=True, scope="module")
def _nobody_asks_for_the_machine() -> Iterator[None]:
    """Let lm-eval not list packages and compilers, which takes seconds every time."""
    with patch("lm_eval.evaluator.add_env_info"):
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    write_tasks(folder)
    return folder


@pytest.fixture(scope="module")
def measured(folder: Path) -> TaskResults:
    names = ["which_continuation", "fails_when_asked", "next_word", "rolling"]
    return run_tasks(MODEL, TaskSettings(names, include_path=folder), CPU)


def naive_choices(asked: list[dict[str, Any]]) -> list[bool]:
    """Whether the right continuation is the most probable one, one sequence at a time."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    verdicts = []
    for document in asked:
        sums = []
        for choice in document["choices"]:
            whole = tokenizer(f"{document['context']} {choice}", return_tensors="pt").input_ids
            start = tokenizer(document["context"], return_tensors="pt").input_ids.shape[1]
            with torch.no_grad():
                logprobs = model(whole).logits.log_softmax(-1)[0, :-1]
            picked = logprobs.gather(1, whole[0, 1:, None])[:, 0]
            sums.append(float(picked[start - 1 :].sum()))
        verdicts.append(sums.index(max(sums)) == document["answer"])
    return verdicts


def test_a_choice_is_judged_as_naively(folder: Path, measured: TaskResults) -> None:
    asked = [json.loads(line) for line in (folder / "documents.json").read_text().splitlines()]
    acc = measured.metrics["which_continuation"]["acc"]
    expected = naive_choices(asked)
    agreeing = sum(bool(acc.by_document[place]) == right for place, right in enumerate(expected))
    assert agreeing >= NUM_DOCUMENTS - 1  # bfloat16 in lm-eval, float32 here
    assert acc.value == pytest.approx(sum(acc.by_document.values()) / NUM_DOCUMENTS)
    assert 0.3 < acc.value <= 1  # better than chance
    share = acc.value
    assert acc.standard_error == pytest.approx((share * (1 - share) / (NUM_DOCUMENTS - 1)) ** 0.5)
    assert acc.num_documents == NUM_DOCUMENTS
    assert acc.is_higher_better


def test_filters_stay_in_the_names_of_metrics(measured: TaskResults) -> None:
    metrics = measured.metrics["next_word"]
    assert list(metrics) == ["exact_match,strict-match", "exact_match,flexible-extract"]
    assert len(metrics["exact_match,strict-match"].by_document) == NUM_DOCUMENTS
    assert find_metric(metrics) == "exact_match,strict-match"
    assert find_metric(metrics, "exact_match") == "exact_match,strict-match"
    assert find_metric(metrics, "exact_match,flexible-extract") == "exact_match,flexible-extract"
    assert find_metric(metrics, "acc") is None
    assert find_metric(measured.metrics["which_continuation"]) == "acc_norm"


def test_a_task_that_fails_fails_alone(measured: TaskResults) -> None:
    assert set(measured.metrics) == {"which_continuation", "next_word", "rolling"}
    [problem] = measured.problems
    assert problem.startswith("lm-eval's task fails_when_asked was not measured: ")
    assert len(problem.splitlines()) == 1


def test_a_metric_that_is_no_mean_over_documents_has_no_pairs(measured: TaskResults) -> None:
    perplexity = measured.metrics["rolling"]["word_perplexity"]
    assert perplexity.by_document == {}
    assert perplexity.is_higher_better is False
    worse = TaskMetric(perplexity.value + 1, perplexity.standard_error, NUM_DOCUMENTS, False)
    assert drop_of(perplexity, worse).value == pytest.approx(1)


def test_tasks_that_cannot_be_loaded_are_named_at_once(folder: Path) -> None:
    with pytest.raises(EvaluationError, match=r"without_data: .*absent\.json"):
        check_tasks(TaskSettings(["next_word", "without_data"], include_path=folder))
    with pytest.raises(EvaluationError, match="knows no task which_continuation"):
        check_tasks(TaskSettings(["which_continuation"]))
    check_tasks(TaskSettings(["next_word", "which_continuation"], include_path=folder))


def test_chat_template_and_examples_reach_lm_eval(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import lm_eval

    prompts: list[str] = []
    evaluate = lm_eval.simple_evaluate

    def listening(**arguments: Any) -> Any:
        answer = evaluate(**arguments)
        prompts.extend(
            sample["arguments"][0][0]
            for sample in answer["samples"]["next_word"]
            if sample["filter"] == "strict-match"
        )
        return answer

    monkeypatch.setattr(lm_eval, "simple_evaluate", listening)
    settings: dict[str, Any] = {"limit": 2, "include_path": folder}
    run_tasks(MODEL, TaskSettings(["next_word"], **settings), CPU)
    chat = TaskSettings(
        ["next_word"], num_fewshot=1, apply_chat_template=True, fewshot_as_multiturn=True, **settings
    )
    results = run_tasks(MODEL, chat, CPU)
    assert results.problems == []
    assert results.metrics["next_word"]["exact_match,strict-match"].num_documents == 2
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    [plain, _, asked, _] = prompts
    turns = [{"role": "user", "content": plain}]
    assert asked.endswith(
        tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)[-40:]
    )
    assert len(asked) > len(plain) + 100  # an example is before it


def test_code_of_the_model_is_run_only_if_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.models import huggingface

    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(huggingface, "HFLM", lambda **arguments: asked.append(arguments))
    for trusted in (False, True):
        adapter.open_for_lm_eval(MODEL, CPU, trust_remote_code=trusted)
    assert [arguments["trust_remote_code"] for arguments in asked] == [False, True]


def test_groups_have_the_documents_of_their_tasks() -> None:
    answer = {
        "results": {
            "a": {"alias": "a", "acc,none": 0.5, "acc_stderr,none": 0.1},
            "b": {"alias": "b", "acc,none": 1.0, "acc_stderr,none": "N/A"},
        },
        "groups": {"both": {"alias": "both", "acc,none": 0.7, "acc_stderr,none": 0.06}},
        "group_subtasks": {"both": ["a", "b"], "a": [], "b": []},
        "n-samples": {"a": {"original": 9, "effective": 6}, "b": {"original": 4, "effective": 4}},
        "higher_is_better": {"a": {"acc": True}},
    }
    found = read_results(answer)
    assert found["both"]["acc"] == TaskMetric(0.7, 0.06, 10, None)
    assert found["a"]["acc"] == TaskMetric(0.5, 0.1, 6, True)
    assert found["b"]["acc"].standard_error is None
    assert not found["b"]["acc"].estimate.has_interval


def test_a_run_judges_tasks_paired_and_by_their_filters(
    write_recipe: RecipeWriter, folder: Path, measured: TaskResults, tmp_path: Path
) -> None:
    tasks = ["which_continuation", "next_word"]
    recipe = write_recipe(
        factorize(compression_ratio=0.5, rank_multiple=32),
        model={"path": str(MODEL), "dtype": "bfloat16"},
        evaluation={"lm_eval": {"tasks": tasks, "include_path": str(folder)}},
        gates={"task_drop": {"which_continuation/acc": 1.0, "next_word": 1.0}},
    )
    code, out, err = invoke("run", recipe, "--quiet")
    assert code == 0, err
    report = load_report(tmp_path / "out")
    assert {gate.subject: gate.verdict for gate in report.gates} == {
        "which_continuation/acc": "passed",
        "next_word": "passed",
    }
    after = run_tasks(tmp_path / "out", TaskSettings(tasks[:1], include_path=folder), CPU)
    pairs = [
        [
            bool(results.metrics["which_continuation"]["acc"].by_document[place])
            for place in range(NUM_DOCUMENTS)
        ]
        for results in (measured, after)
    ]
    assert report.differences.task_drop["which_continuation"]["acc"] == share_drop(
        pairs[0], pairs[1], "documents"
    )
    told = json.loads((tmp_path / "out" / REPORT_FILE).read_text())
    assert told["original"]["tasks"]["next_word"].keys() == {
        "exact_match,strict-match",
        "exact_match,flexible-extract",
    }
    assert f"{NUM_DOCUMENTS} documents" in out
    strict = Gates.model_validate({"task_drop": {"next_word/exact_match,flexible-extract": 1.0}})
    assert judge_gates(strict, report)[0].value is not None


def test_tasks_are_read_again_if_their_folder_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[list[str]] = []

    class Manager:
        def __init__(self, include_path: str) -> None:
            self.all_tasks = sorted(path.stem for path in Path(include_path).iterdir())
            read.append(self.all_tasks)

        def load(self, _names: list[str]) -> dict[str, Any]:
            return {"tasks": {}}

    monkeypatch.setattr("lm_eval.tasks.TaskManager", Manager)
    (tmp_path / "first.yaml").touch()
    for _ in range(2):
        check_tasks(TaskSettings(["first"], include_path=tmp_path))
    (tmp_path / "second.yaml").touch()
    check_tasks(TaskSettings(["second"], include_path=tmp_path))
    os.utime(tmp_path / "first.yaml", ns=(0, 0))
    check_tasks(TaskSettings(["first"], include_path=tmp_path))
    assert read == [["first"], ["first", "second"], ["first", "second"]]
