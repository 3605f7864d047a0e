"""What storages would cost the model is measured once for all sizes, and again for what changes it."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from ercsvd_deploy.pipelines.flow import RunOptions, run_recipe
from ercsvd_deploy.pipelines.planning.plan import Plan, make_plan
from ercsvd_deploy.pipelines.stages.cached import StageCache
from ercsvd_deploy.pipelines.stages.factorize.damages.stage import DamagesStage
from ercsvd_deploy.pipelines.stages.factorize.stage import FactorizeStage
from ercsvd_deploy.pipelines.state.cache import CacheFolder
from ercsvd_deploy.pipelines.sweeping.file import load_sweep, sweep_points
from ercsvd_deploy.pipelines.sweeping.needs import sweep_needs
from ercsvd_deploy.pipelines.sweeping.points import run_point
from ercsvd_deploy.recipe.load import canonical, load_recipe
from tests.planning.counted import declared
from tests.recipe_runs import TEXT, RecipeWriter
from tests.state.interrupted_runs import hashes
from tests.sweeping.sweep_files import written

SIZE = "target.overall_bits"
CONTROLLED: dict[str, Any] = {
    "factorize": {
        "method": "svd_llm",
        "allocation": "error_controlled",
        "output_metric": "fisher",
        "num_fisher_samples": 6,
    }
}
RESIDUALS = {"factorize": CONTROLLED["factorize"] | {"method": "erc_svd", "beta": "auto"}}
INT4: dict[str, Any] = {"quantize": {"bits": 4, "group_size": 32}}
CALIBRATION = {
    "dataset": {"text": str(TEXT / "calibration.txt")},
    "num_samples": 24,
    "sequence_length": 48,
}


def recipe_of(write_recipe: RecipeWriter, *stages: dict[str, Any], **sections: Any) -> Path:
    """Write a recipe with ranks and bits on offer, unless told otherwise."""
    usual = {"target": {"overall_bits": 4.2, "bits": [2, 4, 8]}, "calibration": CALIBRATION}
    return write_recipe(*(stages or (CONTROLLED, INT4)), **usual | sections)


@pytest.fixture
def finished(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[str, str]]:
    """Count the pieces that are computed: stage and piece -> how often."""
    counts: Counter[tuple[str, str]] = Counter()
    finish = CacheFolder.write

    def counted(self: CacheFolder, piece: str, *args: Any) -> None:
        counts[self._directory.name.partition("-")[0], piece] += 1
        finish(self, piece, *args)

    monkeypatch.setattr(CacheFolder, "write", counted)
    return counts


def times(finished: Counter[tuple[str, str]], stage: str) -> set[int]:
    """Return how often the pieces of a stage were computed."""
    return {count for (name, _), count in finished.items() if name == stage}


@pytest.mark.slow
@pytest.mark.parametrize("stages", [(CONTROLLED, INT4), (INT4,)], ids=["ranks and bits", "bits alone"])
def test_a_sweep_over_sizes_measures_once(
    stages: tuple[dict[str, Any], ...],
    write_recipe: RecipeWriter,
    tmp_path: Path,
    finished: Counter[tuple[str, str]],
) -> None:
    grid = {SIZE: [4.2, 4.6, 5.0]}
    file = written(tmp_path, recipe_of(write_recipe, *stages), grid=grid)
    for point in sweep_points(load_sweep(file)):
        run_point(point.name, canonical(point.recipe), str(tmp_path / "sweep"), str(tmp_path / "work"), 1)
    assert times(finished, "damages") == {1}
    pieces = {piece for stage, piece in finished if stage == "damages"}
    assert pieces == {f"{kind}-{layer:05d}" for kind in ("decomposition", "damages") for layer in range(4)}
    assert times(finished, "sensitivity") == {1}
    assert finished["factorize", "outcome"] == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stages", "size"),
    [
        ((CONTROLLED, INT4), {"model_bits": 6.0}),
        ((INT4,), {"bytes": "700KB"}),
        # So little that the steps of ranks are halved: other ranks are on offer, and measured for themselves.
        ((CONTROLLED, INT4), {"overall_bits": 1.2}),
        ((RESIDUALS, INT4), {"overall_bits": 5.0}),
    ],
    ids=["ranks and bits", "bits alone", "finer ranks", "beta auto"],
)
def test_what_was_measured_for_another_size_gives_the_same_bytes(
    stages: tuple[dict[str, Any], ...],
    size: dict[str, Any],
    write_recipe: RecipeWriter,
    tmp_path: Path,
) -> None:
    options = RunOptions(cache=tmp_path / "cache")
    run_recipe(load_recipe(recipe_of(write_recipe, *stages)), options=options)
    recipe = load_recipe(recipe_of(write_recipe, *stages, target={"bits": [2, 4, 8], **size}))
    shared, _ = run_recipe(recipe, options=options)
    found = hashes(tmp_path / "out")
    alone, _ = run_recipe(recipe)
    assert hashes(tmp_path / "out") == found
    assert shared.as_json()["factorize"] == alone.as_json()["factorize"]


@pytest.mark.slow
def test_a_changed_size_uses_what_an_interrupted_run_has_measured(
    write_recipe: RecipeWriter,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    finished: Counter[tuple[str, str]],
) -> None:
    recipe = recipe_of(write_recipe)
    changed = load_recipe(recipe, [f"{SIZE}=5.0"])
    run_recipe(changed)
    expected = hashes(tmp_path / "out")
    with monkeypatch.context() as patched:
        patched.setattr(FactorizeStage, "run", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run_recipe(load_recipe(recipe))
    finished.clear()
    report, _ = run_recipe(changed)
    assert hashes(tmp_path / "out") == expected
    assert not times(finished, "damages") | times(finished, "sensitivity")
    assert "damages: 8 finished pieces of an earlier run are used" in report.resumed


@pytest.mark.slow
def test_the_folder_is_as_large_as_planned_and_goes_with_the_choice(
    write_recipe: RecipeWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe(recipe_of(write_recipe))
    sizes: dict[str, int] = {}
    discard = StageCache.discard

    def look_and_discard(self: StageCache, stage: str) -> None:
        files = list((self.directory / stage).glob("*.safetensors"))
        headers = [8 + int.from_bytes(path.read_bytes()[:8], "little") for path in files]
        sizes[stage] = sum(path.stat().st_size for path in files) - sum(headers)
        discard(self, stage)
        assert not (self.directory / stage).exists()

    monkeypatch.setattr(StageCache, "discard", look_and_discard)
    run_recipe(recipe)
    needs = declared(recipe)
    assert needs["damages"].kept_bytes == needs["damages"].scratch_bytes
    told = 8192 * 4 * 7  # entry, as JSON
    assert needs["damages"].kept_bytes - told == pytest.approx(sizes["damages"], rel=0.02)
    assert needs["sensitivity"].kept_bytes == pytest.approx(sizes["sensitivity"], rel=0.02)


def planned(recipe: Path, *overrides: str) -> Plan:
    return make_plan(load_recipe(recipe, overrides), device=torch.device("cpu"))


def damages_stage(recipe: Path, *overrides: str) -> DamagesStage:
    [stage] = (each for each in planned(recipe, *overrides).stages if isinstance(each, DamagesStage))
    return stage


def measured(recipe: Path, *overrides: str) -> tuple[Any, dict[str, list[Any]]]:
    """Return what of a recipe damages depend on, and the storages on offer in their order."""
    stage = damages_stage(recipe, *overrides)
    return stage.settings(), {name: list(costs) for name, costs in stage.task.costs.items()}


@pytest.mark.parametrize(
    "changes",
    [
        [f"{SIZE}=3.9"],
        [f"{SIZE}=null", "target.model_bits=6"],
        [f"{SIZE}=null", "target.bytes=1MB"],
        ["factorize.compressed_prefix_inputs=true"],
        ["serving.tensor_parallel_sizes=[1]"],
    ],
)
def test_damages_do_not_depend_on_it(changes: list[str], write_recipe: RecipeWriter) -> None:
    recipe = recipe_of(write_recipe)
    assert measured(recipe, *changes) == measured(recipe)


@pytest.mark.parametrize(
    "changes", [{"budget": 10**6}, {"likeness": 0.5}, {"costs": "one bit more each"}], ids=str
)
def test_the_choice_depends_on_costs_and_budget_and_damages_do_not(
    changes: dict[str, Any], write_recipe: RecipeWriter
) -> None:
    [stage] = (each for each in planned(recipe_of(write_recipe)).stages if isinstance(each, FactorizeStage))
    task = stage.allocation
    assert task is not None
    if "costs" in changes:
        changes = {
            "costs": {
                name: {storage: cost + 1 for storage, cost in costs.items()}
                for name, costs in task.costs.items()
            }
        }
    changed = replace(task, **changes)
    assert replace(stage, allocation=changed).settings() != stage.settings()
    damages = damages_stage(recipe_of(write_recipe))
    assert replace(damages, task=changed).settings() == damages.settings()


def test_nor_on_likeness(write_recipe: RecipeWriter) -> None:
    recipe = recipe_of(write_recipe, INT4)
    alike = "export.format=compressed-tensors"
    assert measured(recipe, alike) == measured(recipe)
    assert damages_stage(recipe, alike).task.likeness != damages_stage(recipe).task.likeness


def test_nor_on_the_ratio_that_is_removed(write_recipe: RecipeWriter) -> None:
    recipe = write_recipe({"factorize": CONTROLLED["factorize"] | {"compression_ratio": 0.3}})
    assert measured(recipe, "factorize.compression_ratio=0.2") == measured(recipe)


@pytest.mark.parametrize(
    "change",
    [
        "target.bits=[4,6,8]",
        "target.factor_bits=[3,4]",
        "target.group_sizes=[64]",
        "target.corrections=[{rank: 8, bits: 8}]",
        "quantize.damping=0.05",
        "quantize.ignore=['*.q_proj']",
        "factorize.output_metric=identity",
        "factorize.rank_multiple=64",
        "factorize.layout=pivoted",
        f"{SIZE}=1.2",
    ],
)
def test_damages_depend_on_it(change: str, write_recipe: RecipeWriter) -> None:
    recipe = recipe_of(write_recipe)
    assert measured(recipe, change)[0] != measured(recipe)[0]


@pytest.mark.parametrize("sizes", ["[1]", "[2]", "[4]", "[1,2]", "[1,2,4]"])
@pytest.mark.parametrize("layout", ["low_rank", "pivoted"])
def test_tensor_parallel_sizes_count_where_they_change_what_is_on_offer(
    layout: str, sizes: str, write_recipe: RecipeWriter
) -> None:
    recipe = recipe_of(write_recipe, {"factorize": CONTROLLED["factorize"] | {"layout": layout}}, INT4)
    settings, offer = measured(recipe)
    others, other_offer = measured(recipe, f"serving.tensor_parallel_sizes={sizes}")
    assert (others == settings) == (other_offer == offer)


def test_a_sweep_has_room_for_what_it_shares(write_recipe: RecipeWriter) -> None:
    plan = planned(recipe_of(write_recipe))
    stages = {each.stage: each for each in plan.estimate.stages}
    needs = sweep_needs({"one": plan})
    assert stages["quantize"].shared_bytes > stages["quantize"].scratch_bytes + 2**20
    assert needs.scratch_bytes == max(each.shared_bytes for name, each in stages.items() if name != "export")


def test_without_error_control_nothing_is_measured_before(write_recipe: RecipeWriter) -> None:
    assert "damages" not in [stage.name for stage in planned(write_recipe()).stages]
    names = [stage.name for stage in planned(recipe_of(write_recipe, INT4)).stages]
    assert names[:4] == ["judge_original", "sensitivity", "damages", "factorize"]


@pytest.mark.slow
def test_progress_counts_every_layer(write_recipe: RecipeWriter) -> None:
    steps: dict[str, list[int]] = {}

    class Counting:
        """A reporter that counts."""

        def __init__(self, description: str, total: int) -> None:
            self.counts = steps.setdefault(description, [0, total])

        def __enter__(self) -> Any:
            def step() -> None:
                self.counts[0] += 1

            return step

        def __exit__(self, *_: object) -> None:
            return None

    run_recipe(load_recipe(recipe_of(write_recipe)), progress=Counting)
    assert steps["damages"] == [8, 8]
    assert steps["svd_llm, error-controlled"] == [4, 4]
