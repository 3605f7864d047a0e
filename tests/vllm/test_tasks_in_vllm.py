"""lm-eval's tasks on an export that vLLM serves, beside what transformers gives on the same."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ercsvd_deploy.exporters.vllm.engines.process import EngineError
from ercsvd_deploy.pipelines.judging.tasks import TaskSettings, run_tasks
from ercsvd_deploy.pipelines.judging.tasks_in_vllm import run_tasks_in_vllm
from ercsvd_deploy.pipelines.reporting.report.document import load_report
from tests.conftest import ModelDirectory
from tests.judging.local_tasks import write_tasks
from tests.recipe_runs import RecipeWriter, factorize, invoke

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


@pytest.fixture
def settings(tmp_path: Path) -> TaskSettings:
    folder = tmp_path / "tasks"
    folder.mkdir()
    write_tasks(folder)
    return TaskSettings(["which_continuation", "fails_when_asked", "rolling"], include_path=folder)


def test_vllm_measures_what_transformers_does(
    settings: TaskSettings, low_rank_model: ModelDirectory, tmp_path: Path
) -> None:
    directory = low_rank_model("llama")
    served = run_tasks_in_vllm(directory, settings, 1, tmp_path / "vllm.log", eager=True)
    expected = run_tasks(directory, settings, torch.device("cpu"))
    assert served.metrics.keys() == expected.metrics.keys() == {"which_continuation", "rolling"}
    assert served.problems == expected.problems
    choices, reference = (found.metrics["which_continuation"]["acc"] for found in (served, expected))
    assert choices.by_document.keys() == reference.by_document.keys()
    changed = [key for key, value in choices.by_document.items() if value != reference.by_document[key]]
    assert len(changed) <= 0.05 * len(choices.by_document)  # a random model's choices are nearly ties
    for name, metric in expected.metrics["rolling"].items():
        # In nats: a word's perplexity is a byte's to the power of its length. vLLM's own choice of dtype for
        # a model in float32 is one of 16 bits.
        found, wanted = (
            math.log(value) if "perplexity" in name else value
            for value in (served.metrics["rolling"][name].value, metric.value)
        )
        assert found == pytest.approx(wanted, rel=1e-3)


def test_a_recipe_asks_for_it(settings: TaskSettings, write_recipe: RecipeWriter, tmp_path: Path) -> None:
    recipe = write_recipe(
        factorize(num_compressed_layers="all"),
        evaluation={
            "lm_eval": {
                "tasks": ["which_continuation"],
                "include_path": str(settings.include_path),
                "engine": "vllm",
                "eager": True,
            }
        },
        gates={"task_drop": {"which_continuation": 1.0}},
    )
    code, _, error = invoke("run", recipe)
    assert code == 0, error
    report = load_report(tmp_path / "out")
    for figures in (report.original, report.compressed):
        assert 0 <= figures.tasks["which_continuation"]["acc"] <= 1
    assert not (tmp_path / "out.vllm.log").exists()


def test_a_model_that_vllm_cannot_load_is_an_error(settings: TaskSettings, tmp_path: Path) -> None:
    nothing = tmp_path / "nothing"
    nothing.mkdir()
    (nothing / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(EngineError, match="vLLM failed"):
        run_tasks_in_vllm(nothing, replace(settings, tasks=["rolling"]), 1, tmp_path / "vllm.log")
