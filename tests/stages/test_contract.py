"""A stage is one class and one entry in the list: by that it is planned, run, resumed and reported."""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import pytest
from rich.console import Console, RenderableType

from ercsvd_deploy.pipelines.flow import run_recipe
from ercsvd_deploy.pipelines.planning import plan as planning
from ercsvd_deploy.pipelines.reporting.document import render
from ercsvd_deploy.pipelines.stages import STAGES
from ercsvd_deploy.pipelines.stages.contract import PlanningContext, Stage, Table
from ercsvd_deploy.pipelines.stages.export import ExportStage
from ercsvd_deploy.pipelines.stages.judge import JudgeStage
from ercsvd_deploy.pipelines.stages.work import StageRun
from ercsvd_deploy.pipelines.state.cache import OUTCOME
from ercsvd_deploy.recipe.load import load_recipe
from tests.recipe_runs import RecipeWriter


@dataclass(frozen=True)
class CountStage(Stage):
    """Counts the Linears that the stages before have altered."""

    factor: int

    name = "count"
    runs: ClassVar[list[int]] = []
    factor_of_the_recipe: ClassVar[int] = 1

    @classmethod
    def plan(cls, context: PlanningContext) -> Self | None:
        assert "factorize" in context.planned
        return cls(cls.factor_of_the_recipe)

    def settings(self) -> Any:
        return {"factor": self.factor}

    def run(self, run: StageRun) -> int:
        counted = run.cache.findings(OUTCOME)
        if counted is None:
            counted = self.factor * len(run.model.modules)
            self.runs.append(counted)
            run.cache.finish(OUTCOME, counted)
        return int(counted)

    def as_json(self, result: int) -> Any:
        return {"altered_linears": result}

    def tables(self, result: int) -> Iterable[Table]:
        yield Table("Counted", ("altered Linears",), [(str(result),)])


def shown(what: RenderableType) -> str:
    console = Console(file=io.StringIO(), width=120, record=True)
    console.print(what)
    return console.export_text()


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> type[CountStage]:
    place = STAGES.index(JudgeStage)
    monkeypatch.setattr(planning, "STAGES", (*STAGES[:place], CountStage, *STAGES[place:]))
    monkeypatch.setattr(CountStage, "runs", [])
    return CountStage


def test_a_new_stage_is_planned_run_and_reported(
    toy: type[CountStage],
    write_recipe: RecipeWriter,
) -> None:
    recipe = load_recipe(write_recipe())
    assert planning.make_plan(recipe).as_json()["stages"] == ["factorize", "count", "judge", "export"]
    report, _ = run_recipe(recipe)
    altered = len(report.results["factorize"].modules)
    assert toy.runs == [altered]
    assert report.as_json()["count"] == {"altered_linears": altered}
    assert report.seconds.keys() >= {"factorize", "count", "judge", "export"}
    assert "altered Linears" in shown(render(report))


def test_a_new_stage_is_resumed_and_fingerprinted(
    toy: type[CountStage],
    write_recipe: RecipeWriter,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = load_recipe(write_recipe())

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as interrupted:
        interrupted.setattr(ExportStage, "run", interrupt)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                run_recipe(recipe)
    assert len(toy.runs) == 1
    monkeypatch.setattr(toy, "factor_of_the_recipe", 3)
    report, _ = run_recipe(recipe)
    assert toy.runs[1:] == [3 * toy.runs[0]]
    assert any(note.startswith("count: computed again") and "factor" in note for note in report.resumed)
    assert any(note.startswith("factorize: ") and "are used" in note for note in report.resumed)
    assert any(note.startswith("judge: computed again") for note in report.resumed)
