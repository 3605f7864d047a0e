"""A stage is one class and one entry in the list: by that it is planned, run, resumed and reported."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Self

import pytest
import torch
from pydantic import Field
from rich.console import Console, RenderableType

from ercsvd_deploy.pipelines.flow import run_recipe
from ercsvd_deploy.pipelines.planning import plan as planning
from ercsvd_deploy.pipelines.reporting.report.document import document_adapter, load_report
from ercsvd_deploy.pipelines.reporting.screen.plan_tables import render as render_plan
from ercsvd_deploy.pipelines.reporting.screen.terminal import render
from ercsvd_deploy.pipelines.stages import STAGES
from ercsvd_deploy.pipelines.stages.contract import Candidate, Needs, PlanningContext, Stage, Table
from ercsvd_deploy.pipelines.stages.export import CARD_FILE, PAGE_FILE, ExportStage
from ercsvd_deploy.pipelines.stages.judge import JudgeStage
from ercsvd_deploy.pipelines.stages.stage_run import StageRun
from ercsvd_deploy.pipelines.stages.workload import Workload
from ercsvd_deploy.pipelines.state.cache import OUTCOME
from ercsvd_deploy.recipe.load import load_recipe
from tests.recipe_runs import RecipeWriter


@dataclass(frozen=True)
class Counted:
    """What the stage found."""

    altered_linears: Annotated[int, Field(description="Linears that the stages before have altered.")]


@dataclass(frozen=True)
class CountStage(Stage):
    """Counts the Linears that the stages before have altered."""

    factor: int

    name = "count"
    reported_as = Counted
    runs: ClassVar[list[int]] = []
    factor_of_the_recipe: ClassVar[int] = 1

    @classmethod
    def plan(cls, context: PlanningContext) -> Self | None:
        assert "factorize" in context.planned
        return cls(cls.factor_of_the_recipe)

    def settings(self) -> Any:
        return {"factor": self.factor}

    def needs(self, work: Workload, candidates: Sequence[Candidate]) -> Needs:
        return Needs(2**40, 2**39, 2**28 + work.architecture.num_layers, 2**27, len(candidates) * 1e18)

    def run(self, run: StageRun) -> Counted:
        counted = run.cache.entry(OUTCOME)
        if counted is None:
            counted = self.factor * len(run.model.modules)
            self.runs.append(counted)
            run.cache.write(OUTCOME, counted)
        return Counted(counted)

    def tables(self, result: Counted) -> Iterable[Table]:
        yield Table("Counted", ("altered Linears", "each"), ((str(result.altered_linears), "|one|"),))
        yield Table("Counted, at length", ("all",), (("of them",),), is_detail=True)


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
    assert planning.make_plan(recipe).as_json()["stages"] == [
        "judge_original",
        "factorize",
        "count",
        "judge",
        "export",
    ]
    report, directory = run_recipe(recipe)
    altered = len(report.results["factorize"].modules)
    assert toy.runs == [altered]
    assert report.as_json()["count"] == {"altered_linears": altered}
    assert report.seconds.keys() >= {"factorize", "count", "judge", "export"}
    terminal = shown(render(report))
    page, card = (directory / PAGE_FILE).read_text(), (directory / CARD_FILE).read_text()
    for place in (terminal, page, card):
        assert "Counted" in place
        assert "altered Linears" in place
    assert f"| {altered} | \\|one\\| |" in card
    assert f">{altered}</th><td>|one|</td>" in page
    assert "at length" in page
    assert "at length" not in terminal + card
    document_adapter.cache_clear()
    try:
        assert load_report(directory).tables == report.tables  # also where the stage is not known
    finally:
        document_adapter.cache_clear()


def test_what_a_new_stage_needs_is_in_the_plan(
    toy: type[CountStage],
    write_recipe: RecipeWriter,
) -> None:
    recipe = load_recipe(write_recipe())
    plan = planning.make_plan(recipe, device=torch.device("cuda"))
    _, factorized, counted, judged, _ = plan.estimate.stages  # the original is judged first
    assert counted.stage == toy.name
    assert counted.flops == len(plan.candidates) * 1e18
    assert plan.estimate.flops == sum(stage.flops for stage in plan.estimate.stages)
    # Beside the process itself, and what the stage before has left.
    assert 0 < counted.device_bytes - 2**40 < 2**30
    assert 0 < counted.host_bytes - 2**39 < 2**32
    assert factorized.scratch_bytes > counted.scratch_bytes - 2**28 - plan.num_layers > 0
    assert judged.scratch_bytes == counted.scratch_bytes - 2**28 - plan.num_layers + 2**27
    assert plan.estimate.peak_device_bytes == counted.device_bytes
    on_cpu = planning.make_plan(recipe, device=torch.device("cpu")).estimate
    assert on_cpu.peak_device_bytes == 0
    assert on_cpu.peak_host_bytes > 2**40
    row = next(line for line in shown(render_plan(plan)).splitlines() if line.startswith(f"│ {toy.name} "))
    assert "1,024.59 GiB" in row
    assert f"{len(plan.candidates)} E" in row


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
