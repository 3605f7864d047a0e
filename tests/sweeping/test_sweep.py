"""Sweeps: what a file may say, fronts and picks, shared work, and the whole command."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from ercsvd_deploy.pipelines.judging.gates import GateResult
from ercsvd_deploy.pipelines.state.cache import FinishedWork
from ercsvd_deploy.pipelines.sweeping.choice import pareto_front
from ercsvd_deploy.pipelines.sweeping.file import Sweep, load_sweep, sweep_points
from ercsvd_deploy.pipelines.sweeping.plot import draw_sweep, sweep_rows
from ercsvd_deploy.pipelines.sweeping.points import (
    DENSE,
    PointResult,
    affordable_jobs,
    judge_points,
    plain_gptq,
    run_point,
    worst_increase,
)
from ercsvd_deploy.recipe.load import Recipe, RecipeError, canonical
from tests.recipe_runs import RecipeWriter, factorize, invoke

RATIO = "stages.0.factorize.compression_ratio"


@pytest.mark.parametrize("seed", range(5))
def test_front_is_what_nothing_beats(seed: int) -> None:
    values = torch.randint(0, 9, (25, 2), generator=torch.Generator().manual_seed(seed)).tolist()
    items = [(float(size), float(loss)) for size, loss in values]
    front = pareto_front(items, lambda item: item)
    for item in set(items):
        is_beaten = any(other != item and other[0] <= item[0] and other[1] <= item[1] for other in set(items))
        assert (item in front) != is_beaten
    assert len(set(front)) == len(front)


def written(tmp_path: Path, recipe: Path, **entries: Any) -> Path:
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump({"recipe": str(recipe), **entries}))
    return path


def test_points_are_every_combination_and_the_single_ones(write_recipe: RecipeWriter, tmp_path: Path) -> None:
    methods = "stages.0.factorize.method"
    sweep = load_sweep(
        written(
            tmp_path,
            write_recipe(factorize()),
            set={"calibration.seed": 9},
            grid={RATIO: [0.2, 0.4], methods: ["svd", "svd_llm", "asvd"], "model.dtype": ["float32"]},
            also=[{"name": "whole", "set": {RATIO: 0.1}}],
        )
    )
    points = sweep_points(sweep)
    found = [
        (p.recipe.factorize.compression_ratio, p.recipe.factorize.method)
        for p in points[:-1]
        if p.recipe.factorize
    ]
    assert found == list(itertools.product([0.2, 0.4], ["svd", "svd_llm", "asvd"]))
    assert points[0].name == "compression_ratio 0.2, method svd"
    assert points[-1].name == "whole"
    assert all(point.recipe.calibration and point.recipe.calibration.seed == 9 for point in points)


def test_fields_are_those_of_overrides_stages_by_name_too(write_recipe: RecipeWriter, tmp_path: Path) -> None:
    recipe = write_recipe(factorize(), {"quantize": {"group_size": 32}})

    def points(ratio: str, bits: str, quantize: str) -> list[tuple[str, Recipe]]:
        entries = {
            "set": {"calibration.seed": 9},
            "grid": {ratio: [0.2, 0.4], bits: [4, 8]},
            "also": [{"name": "not quantized", "set": {quantize: None}}],
        }
        found = sweep_points(load_sweep(written(tmp_path, recipe, **entries)))
        return [(point.name, point.recipe) for point in found]

    by_name = points("factorize.compression_ratio", "quantize.bits", "quantize")
    assert by_name == points(RATIO, "stages.1.quantize.bits", "stages.1")
    assert by_name[0][0] == "compression_ratio 0.2, bits 4"
    assert by_name[-1][1].quantize is None


def test_equal_points_are_run_once(write_recipe: RecipeWriter, tmp_path: Path) -> None:
    grid = {RATIO: [0.2, 0.2, 0.3]}
    assert len(sweep_points(load_sweep(written(tmp_path, write_recipe(factorize()), grid=grid)))) == 2


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({}, "varies nothing"),
        ({"grid": {RATIO: []}}, f"field 'grid.{RATIO}'"),
        ({"grid": {RATIO: 0.2}}, f"field 'grid.{RATIO}'"),
        ({"grid": {RATIO: [0.2]}, "pick": {}}, "exactly one of smallest: true and best_under"),
        ({"grid": {RATIO: [0.2]}, "pick": {"best_under": "3"}}, "field 'pick.best_under'"),
        ({"gird": {RATIO: [0.2]}}, "field 'gird'"),
        ({"grid": {RATIO: [0.2, 1.5]}}, "point (compression_ratio 1.5): --set"),
        ({"grid": {"stages.0.factorize.ratio": [0.2]}}, "is unknown"),
        (
            {"grid": {"quantize.bits": [4]}},
            "point (the recipe): --set quantize.bits=4: the recipe has no stage",
        ),
    ],
)
def test_what_a_sweep_must_not_say(
    write_recipe: RecipeWriter, tmp_path: Path, entries: dict[str, Any], said: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        sweep_points(load_sweep(written(tmp_path, write_recipe(factorize()), **entries)))
    assert said in str(caught.value)


def result(name: str, size: int, a: float, b: float, *, passed: bool = True) -> PointResult:
    gates = [GateResult("logprob_kl", "a", 1.0, 0.5, passed)]
    return PointResult(name, size, 4.0, {"a": a, "b": b}, {}, gates, {"stages": []})


POINTS = [
    PointResult(DENSE, 100, 16.0, {"a": 10.0, "b": 20.0}, {}),
    result("small", 20, 15.0, 21.0),
    result("middle", 30, 11.0, 25.0),
    result("large", 40, 10.5, 20.5),
    result("bad", 10, 30.0, 60.0, passed=False),
]


@pytest.mark.parametrize(
    ("pick", "picked", "why"),
    [
        ({"smallest": True}, "small", "smallest of the 3 points"),
        ({"best_under": "35KB"}, "large", "best on its worst text"),
        (None, None, "nothing was to be picked"),
    ],
)
def test_pick(pick: dict[str, Any] | None, picked: str | None, why: str) -> None:
    sweep = Sweep.model_validate({"recipe": "r.yaml", "grid": {RATIO: [0.2]}, "pick": pick})
    found = judge_points(sweep, POINTS, {})
    assert found.picked == picked
    assert why in found.why
    assert found.front["a"] == ["bad", "small", "middle", "large", DENSE]
    assert found.front["b"] == ["bad", "small", "large", DENSE]


def test_nothing_is_picked_where_nothing_fits() -> None:
    sweep = Sweep.model_validate({"recipe": "r", "grid": {RATIO: [0.2]}, "pick": {"best_under": "0.015KB"}})
    assert judge_points(sweep, POINTS, {}).picked is None
    failing = [POINTS[0], POINTS[-1]]
    assert judge_points(sweep, failing, {}).why == "no point passes the gates"


def test_worst_text_decides() -> None:
    assert worst_increase(POINTS[2], POINTS[0]) == pytest.approx(0.25)


def test_baselines_are_the_recipes_model_quantized_alone(write_recipe: RecipeWriter, tmp_path: Path) -> None:
    stage = {"quantize": {"bits": 4, "group_size": 32, "ignore": ["*.q_proj"]}}
    recipe = write_recipe(factorize(rank_multiple=32), stage)
    points = plain_gptq(load_sweep(written(tmp_path, recipe, grid={RATIO: [0.2]})))
    assert [point.name for point in points] == ["plain GPTQ-4", "plain GPTQ-8"]
    for point in points:
        assert point.recipe.factorize is None
        assert point.recipe.quantize is not None
        assert point.recipe.quantize.group_size == 32
        assert not point.recipe.quantize.ignore
    bare = plain_gptq(load_sweep(written(tmp_path, write_recipe(factorize()), grid={RATIO: [0.2]})))
    assert bare[0].recipe.quantize is not None
    assert bare[0].recipe.quantize.group_size == 128  # the largest that divides every in-dimension
    assert affordable_jobs(bare) >= 1


def test_points_share_stages(
    write_recipe: RecipeWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two bits of one ratio decompose once; a repeated point computes nothing at all."""
    finished: list[tuple[str, str]] = []
    finish = FinishedWork.finish

    def counted(self: FinishedWork, piece: str, *args: Any) -> None:
        finished.append((self._directory.name.partition("-")[0], piece))
        finish(self, piece, *args)

    monkeypatch.setattr(FinishedWork, "finish", counted)
    stages = (factorize(rank_multiple=32), {"quantize": {"bits": 4, "group_size": 32}})
    grid = {"stages.1.quantize.bits": [4, 8]}
    calibration = {"calibration.num_samples": 24}
    points = sweep_points(load_sweep(written(tmp_path, write_recipe(*stages), grid=grid, set=calibration)))
    for point in points:
        run_point(point.name, canonical(point.recipe), str(tmp_path / "work"), 1)
    outcomes = [piece for stage, piece in finished if (stage, piece) == ("factorize", "outcome")]
    assert len(outcomes) == 1
    assert len([piece for stage, piece in finished if stage == "judge"]) == 2
    finished.clear()
    again = run_point(points[0].name, canonical(points[0].recipe), str(tmp_path / "work"), 1)
    assert finished == []
    assert again[0].name == DENSE
    assert again[1].num_bytes < again[0].num_bytes


def test_a_picture_for_light_and_one_for_dark(tmp_path: Path) -> None:
    sweep = Sweep.model_validate({"recipe": "r.yaml", "grid": {RATIO: [0.2]}})
    stages = [{"factorize": {"method": "svd_llm"}}, {"quantize": {"bits": 4}}]
    points = [
        POINTS[0],
        *(PointResult(**{**vars(each), "recipe": {"stages": stages}}) for each in POINTS[1:]),
    ]
    found = judge_points(sweep, points, {})
    drawn = draw_sweep(found, tmp_path)
    corners = []
    for path in drawn:
        with Image.open(path) as image:
            assert image.width > 1000
            corners.append(image.convert("L").tobytes()[0])
    assert corners[0] > 200
    assert corners[1] < 50
    columns, rows = sweep_rows(found)
    assert [row[0] for row in rows] == ["bad", "small", "middle", "large", DENSE]
    assert rows[0][columns.index("gates")] == "MISSED"


@pytest.mark.slow
def test_the_whole_command(write_recipe: RecipeWriter, tmp_path: Path) -> None:
    stages = (factorize(rank_multiple=32), {"quantize": {"bits": 4, "group_size": 32}})
    recipe = write_recipe(*stages, gates={"perplexity_increase": 100.0, "built_in_text": False})
    file = written(
        tmp_path,
        recipe,
        set={"calibration.num_samples": 24},
        grid={RATIO: [0.3]},
        also=[{"name": "too much", "set": {RATIO: 0.99}}],
        output=str(tmp_path / "sweep"),
        pick={"smallest": True},
    )
    code, out, err = invoke("sweep", file, "--jobs", 2, "--export", tmp_path / "picked", "--json")
    assert code == 0, err
    found = json.loads(out[: out.rindex("}") + 1])
    names = [point["name"] for point in found["points"]]
    assert names == [DENSE, "plain GPTQ-4", "plain GPTQ-8", "the recipe"]
    assert found["picked"] == "the recipe"
    assert "too much" in found["failures"]
    assert "FAILED: too much" in err
    assert json.loads((tmp_path / "sweep" / "sweep.json").read_text())["picked"] == "the recipe"
    assert (tmp_path / "sweep" / "pareto-dark.png").is_file()
    assert not (tmp_path / "sweep" / ".sweep.work").exists()
    assert invoke("verify", tmp_path / "picked")[0] == 0
