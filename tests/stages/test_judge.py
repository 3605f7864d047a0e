"""The original is judged once: whatever is tried with it, and whatever happens meanwhile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ercsvd_deploy.evaluation.comparison import Comparison, compare_models
from ercsvd_deploy.pipelines.flow import prepare_run, run_recipe, start_run
from ercsvd_deploy.pipelines.stages import judge
from ercsvd_deploy.pipelines.stages.export import ExportStage
from ercsvd_deploy.pipelines.stages.judge import JudgeOriginalStage, JudgeStage
from ercsvd_deploy.pipelines.state.progress import silent
from ercsvd_deploy.recipe.load import load_recipe
from tests.recipe_runs import RecipeWriter, factorize


class Interrupted(Exception):  # noqa: N818 - not an error of the program
    """Ends a run in the middle."""


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """How often either model was judged."""
    counted: list[str] = []

    def counting(name: str) -> None:
        function = getattr(judge, name)

        def run(*arguments: Any) -> Any:
            counted.append(name)
            return function(*arguments)

        monkeypatch.setattr(judge, name, run)

    counting("judge_original")
    counting("judge_compressed")
    return counted


def stop_before(stage: type, recipe: Path, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> None:
    def stop(*_: object) -> None:
        raise Interrupted

    with monkeypatch.context() as patched:
        patched.setattr(stage, "run", stop)
        with pytest.raises(Interrupted):
            run_recipe(load_recipe(recipe, overrides))


@pytest.mark.slow
def test_two_pieces_find_what_both_models_together_have(write_recipe: RecipeWriter, tmp_path: Path) -> None:
    prepared = prepare_run(load_recipe(write_recipe(factorize())), None)
    (tmp_path / "work").mkdir()
    run = start_run(prepared, tmp_path / "work")
    run.run_stages(silent)
    found: Comparison = run.state.results["judge"]
    model = run.state.model
    assert found == compare_models(model.original, model.stream(), prepared.data.texts, {})
    assert found.original == run.state.results["judge_original"]
    assert found.change.logprob_kl["held_out"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("stage", [JudgeStage, ExportStage], ids=["before judging", "behind it"])
def test_a_second_try_with_other_settings_judges_the_original_no_second_time(
    stage: type, write_recipe: RecipeWriter, passes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(factorize())
    stop_before(stage, recipe, monkeypatch)
    first, _ = run_recipe(load_recipe(recipe, ["factorize.compression_ratio=0.5"]))
    assert passes.count("judge_original") == 1
    assert passes[-1] == "judge_compressed"
    second, _ = run_recipe(load_recipe(recipe, ["factorize.compression_ratio=0.5"]))
    assert second.original == first.original
    assert second.change == first.change


def test_another_text_is_judged_anew(
    write_recipe: RecipeWriter, passes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(factorize())
    stop_before(ExportStage, recipe, monkeypatch)
    run_recipe(load_recipe(recipe, ["evaluation.max_sequences=3"]))
    assert passes == ["judge_original", "judge_compressed"] * 2


def test_outputs_that_were_damaged_are_computed_again(
    write_recipe: RecipeWriter, tmp_path: Path, passes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(factorize())
    stop_before(JudgeStage, recipe, monkeypatch)
    [damaged] = tmp_path.glob(f".out.work/{JudgeOriginalStage.name}/outputs-00001.safetensors")
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    report, _ = run_recipe(load_recipe(recipe))
    assert passes.count("judge_original") == 2
    undisturbed, _ = run_recipe(load_recipe(recipe))
    assert report.change == undisturbed.change
