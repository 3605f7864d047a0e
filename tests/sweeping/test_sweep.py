"""Sweeps: what a file may say, fronts and picks, shared work, and the whole command."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from ercsvd_deploy.pipelines.judging.gates import GateResult
from ercsvd_deploy.pipelines.planning.feasibility import TooLittleDiskError
from ercsvd_deploy.pipelines.state.cache import CacheFolder, file_digest
from ercsvd_deploy.pipelines.sweeping.baselines import plain_gptq, points_and_baselines
from ercsvd_deploy.pipelines.sweeping.choice import pareto_front, worst_increase
from ercsvd_deploy.pipelines.sweeping.file import Sweep, is_sweep, load_sweep, sweep_points
from ercsvd_deploy.pipelines.sweeping.needs import (
    SweepNeeds,
    affordable_jobs,
    check_needs,
    plan_points,
    sweep_needs,
)
from ercsvd_deploy.pipelines.sweeping.plot import draw_sweep, sweep_rows
from ercsvd_deploy.pipelines.sweeping.points import gates_for_the_export, run_point
from ercsvd_deploy.pipelines.sweeping.results import DENSE, PointResult
from ercsvd_deploy.pipelines.sweeping.run import Results, hash_models, judge_points
from ercsvd_deploy.recipe.load import Quantize, Recipe, RecipeError, canonical, load_recipe
from ercsvd_deploy.recipe.sections import Vision
from tests.recipe_runs import RecipeWriter, factorize, invoke
from tests.sweeping.sweep_files import RATIO, written


@pytest.mark.parametrize("seed", range(5))
def test_front_is_what_nothing_beats(seed: int) -> None:
    values = torch.randint(0, 9, (25, 2), generator=torch.Generator().manual_seed(seed)).tolist()
    items = [(float(size), float(loss)) for size, loss in values]
    front = pareto_front(items, lambda item: item)
    for item in set(items):
        is_beaten = any(other != item and other[0] <= item[0] and other[1] <= item[1] for other in set(items))
        assert (item in front) != is_beaten
    assert len(set(front)) == len(front)


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
        ({"grid": {RATIO: []}}, f"field 'grid.{RATIO}' is []; it must be a list with at least 1 entry"),
        ({"grid": {RATIO: 0.2}}, f"field 'grid.{RATIO}' is 0.2; it must be a list"),
        ({"also": [{"nam": "one", "set": {RATIO: 0.2}}]}, "field 'also.0.name' is missing; add it: What"),
        ({"also": [{"nam": "one", "set": {RATIO: 0.2}}]}, "did you mean 'name'?"),
        ({"grid": {RATIO: [0.2]}, "pick": 3}, "field 'pick' is 3; it must be a mapping"),
        ({"grid": {RATIO: [0.2]}, "pick": {}}, "exactly one of smallest: true and best_under"),
        ({"grid": {RATIO: [0.2]}, "pick": {"best_under": "3"}}, "field 'pick.best_under'"),
        ({"gird": {RATIO: [0.2]}}, "field 'gird' is unknown (value "),
        ({"gird": {RATIO: [0.2]}}, "did you mean 'grid'?"),
        ({"grid": {RATIO: [0.2]}, "pick": {"smallest": True}}, "its recipe has no gates: give one on texts"),
        (
            {"grid": {RATIO: [0.2]}, "set": {"gates": {"serving_parity": 0.1}}, "pick": {"smallest": True}},
            "a sweep can judge none of its gates",
        ),
        (
            {"also": [{"name": "one", "set": {RATIO: 0.2}}, {"name": "one", "set": {RATIO: 0.3}}]},
            "two points are called (one)",
        ),
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


def test_baselines_are_the_recipes_model_quantized_alone(write_recipe: RecipeWriter) -> None:
    stage = {"quantize": {"bits": 4, "group_size": 32, "ignore": ["*.q_proj"]}}
    recipe = write_recipe(factorize(rank_multiple=32), stage)
    points = plain_gptq(load_recipe(recipe))
    assert [point.name for point in points] == ["plain GPTQ-4", "plain GPTQ-8"]
    for point in points:
        assert point.recipe.factorize is None
        assert point.recipe.quantize is not None
        assert point.recipe.quantize.group_size == 32
        assert not point.recipe.quantize.ignore
    bare = plain_gptq(load_recipe(write_recipe(factorize())))
    assert bare[0].recipe.quantize is not None
    assert bare[0].recipe.quantize.group_size == 128  # the largest that divides every in-dimension


def test_baselines_are_plain_gptq_whatever_the_recipes_own_stage(write_recipe: RecipeWriter) -> None:
    own: dict[str, Any] = {
        "method": "rtn",
        "bits": 3,
        "group_size": 64,
        "sym": False,
        "damping": 0.3,
        "correction": {"rank": 8},
        "output_metric": "fisher",
        "overrides": {"down_proj": {"bits": 8}},
        "lm_head": {"bits": 8},
        "embeddings": {"bits": 8},
    }
    recipe = load_recipe(write_recipe({"quantize": own}))
    for bits, point in zip((4, 8), plain_gptq(recipe), strict=True):
        assert point.recipe.quantize == Quantize.model_validate({"bits": bits, "group_size": 64})
        assert point.recipe.calibration == recipe.calibration
        assert Recipe.model_validate_json(json.dumps(canonical(point.recipe))) == point.recipe
    towers = recipe.model_copy(update={"vision": Vision(compress_tower=True)})
    assert all(point.recipe.vision == Vision() for point in plain_gptq(towers))
    with pytest.raises(RecipeError, match="has no calibration"):
        plain_gptq(recipe.model_copy(update={"calibration": None}))


@pytest.mark.slow
def test_points_share_stages(
    write_recipe: RecipeWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two bits of one ratio decompose once; a repeated point computes nothing at all."""
    finished: list[tuple[str, str]] = []
    finish = CacheFolder.write

    def counted(self: CacheFolder, piece: str, *args: Any) -> None:
        finished.append((self._directory.name.partition("-")[0], piece))
        finish(self, piece, *args)

    monkeypatch.setattr(CacheFolder, "write", counted)
    stages = (factorize(rank_multiple=32), {"quantize": {"bits": 4, "group_size": 32}})
    grid = {"stages.1.quantize.bits": [4, 8]}
    calibration = {"calibration.num_samples": 24}
    points = sweep_points(load_sweep(written(tmp_path, write_recipe(*stages), grid=grid, set=calibration)))
    for point in points:
        run_point(point.name, canonical(point.recipe), str(tmp_path / "sweep"), str(tmp_path / "work"), 1)
    outcomes = [piece for stage, piece in finished if (stage, piece) == ("factorize", "outcome")]
    assert len(outcomes) == 1
    assert len([piece for stage, piece in finished if stage == "judge"]) == 2
    assert len([piece for stage, piece in finished if (stage, piece) == ("judge_original", "outcome")]) == 1
    finished.clear()
    assert not (tmp_path / "out").exists()  # a point is no export
    places = str(tmp_path / "sweep"), str(tmp_path / "other work")  # its report alone is there
    again = run_point(points[0].name, canonical(points[0].recipe), *places, 1)
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


def test_a_model_that_is_ruined_is_never_the_best() -> None:
    ruined = result("ruined", 1, float("inf"), 21.0)
    for pick in ({"best_under": "35KB"}, {"smallest": True}):
        sweep = Sweep.model_validate({"recipe": "r", "grid": {RATIO: [0.2]}, "pick": {"best_under": "35KB"}})
        found = judge_points(sweep, [*POINTS, ruined], {})
        assert found.picked == "large", pick
        assert "ruined" not in found.front["a"]


def test_nothing_is_picked_before_all_points_have_ended() -> None:
    sweep = Sweep.model_validate({"recipe": "r", "grid": {RATIO: [0.2]}, "pick": {"smallest": True}})
    found = judge_points(sweep, POINTS, {}, unfinished=["another"])
    assert (found.picked, found.unfinished) == (None, ["another"])
    assert judge_points(sweep, [], {"a": "failed"}).points == []


def test_gates_that_need_the_export_are_named(write_recipe: RecipeWriter) -> None:
    gates = {"perplexity_increase": 0.1, "serving_parity": 0.1, "task_drop": 0.1, "max_size": "1MB"}
    tasks = {"lm_eval": {"tasks": ["x"]}, "perplexity": {"a": "a.txt"}}
    recipe = load_recipe(write_recipe(factorize(), gates=gates, evaluation=tasks))
    assert gates_for_the_export(recipe) == ["serving_parity", "task_drop"]
    assert gates_for_the_export(load_recipe(write_recipe(factorize()))) == []


def test_a_sweep_is_planned_for_all_its_points(
    write_recipe: RecipeWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    points = sweep_points(
        load_sweep(written(tmp_path, write_recipe(factorize()), grid={RATIO: [0.2, 0.3, 0.99]}))
    )
    cpu = torch.device("cpu")
    plans, failures = plan_points(points, cpu)
    assert list(failures) == ["compression_ratio 0.99"]
    needs = sweep_needs(plans)
    single = [max(s.scratch_bytes for s in p.estimate.stages if s.stage != "export") for p in plans.values()]
    assert needs.scratch_bytes == sum(single)
    assert needs.least_scratch_bytes == max(single)
    memory = "ercsvd_deploy.pipelines.sweeping.needs.available_memory"
    for available, jobs in ((10 * needs.peak_host_bytes, 2), (needs.peak_host_bytes, 1), (1, 1), (None, 1)):
        monkeypatch.setattr(memory, lambda available=available: available)
        monkeypatch.setattr("os.sched_getaffinity", lambda _pid: {0, 1})
        assert affordable_jobs(needs, 3, cpu) == jobs
        assert affordable_jobs(needs, 3, torch.device("cuda")) == 1


def test_a_disk_or_a_memory_too_small_for_a_sweep_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = "ercsvd_deploy.pipelines.sweeping.needs"
    needs = SweepNeeds(peak_host_bytes=100, scratch_bytes=1000, least_scratch_bytes=400)
    monkeypatch.setattr(f"{module}.available_memory", lambda: 300)
    monkeypatch.setattr(f"{module}.free_disk", lambda _path: 2000)
    assert check_needs(needs, tmp_path, 3) == []
    assert "4 points at a time need" in check_needs(needs, tmp_path, 4)[0]
    monkeypatch.setattr(f"{module}.free_disk", lambda _path: 500)
    assert "the sweep writes up to" in check_needs(needs, tmp_path, 1)[0]
    assert check_needs(needs, tmp_path, 1, reusable_bytes=600) == []
    monkeypatch.setattr(f"{module}.free_disk", lambda _path: 300)
    with pytest.raises(TooLittleDiskError, match="nothing has been computed yet"):
        check_needs(needs, tmp_path, 1)


def test_validate_and_plan_know_sweeps(write_recipe: RecipeWriter, tmp_path: Path) -> None:
    stages = (factorize(rank_multiple=32), {"quantize": {"bits": 4, "group_size": 32}})
    recipe = write_recipe(*stages, gates={"serving_parity": 0.1, "logprob_kl": 1.0})
    file = written(tmp_path, recipe, grid={RATIO: [0.2, 0.3]}, output=str(tmp_path / "sweep"))
    assert "valid, 2 points" in invoke("validate", file)[1]
    code, output, error = invoke("plan", file, "--json")
    assert code == 0, error
    planned = json.loads(output)
    names = [point["name"] for point in planned["points"]]
    assert names == ["plain GPTQ-4", "plain GPTQ-8", "compression_ratio 0.2", "compression_ratio 0.3"]
    single = json.loads(invoke("plan", recipe, "--set", f"{RATIO}=0.2", "--json")[1])
    assert planned["points"][2]["num_bytes"] == single["candidates"][-1]["num_bytes"]
    assert planned["gates_for_the_export"] == ["serving_parity"]
    assert "judged on the export alone: serving_parity" in invoke("plan", file)[1]
    assert not (tmp_path / "sweep").exists()
    bad = written(tmp_path, recipe, grid={RATIO: [0.2, 0.99]})
    code, _, error = invoke("plan", bad)
    assert code == 1
    assert "point (compression_ratio 0.99)" in error
    missing = written(tmp_path, recipe, grid={"calibration.dataset.text": ["nowhere.txt"]})
    code, _, error = invoke("validate", missing)
    assert code == 2
    assert "nowhere.txt" in error
    for command in ("validate", "plan"):
        assert invoke(command, file, "--set", "calibration.seed=1")[0] == 2


def test_baselines_that_cannot_be_fail_no_point(
    write_recipe: RecipeWriter, tmp_path: Path, llama: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = write_recipe(factorize(), model={"path": str(tmp_path / "nowhere")})
    grid = {"model.path": [str(tmp_path / "nowhere"), str(llama)]}
    points = points_and_baselines(load_sweep(written(tmp_path, recipe, grid=grid)))
    assert [point.recipe.model.path for point in points] == grid["model.path"]
    assert "no plain GPTQ is compared with" in caplog.text
    named = written(tmp_path, write_recipe(factorize()), also=[{"name": "plain GPTQ-4", "set": {RATIO: 0.2}}])
    with pytest.raises(RecipeError, match="as a baseline is: rename it"):
        points_and_baselines(load_sweep(named))


def test_a_model_is_hashed_once_for_all_points(
    write_recipe: RecipeWriter, tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[str] = []

    def counted(path: Path) -> str:
        hashed.append(path.name)
        return file_digest(path)

    monkeypatch.setattr("ercsvd_deploy.pipelines.state.fingerprint.file_digest", counted)
    sweep = load_sweep(written(tmp_path, write_recipe(factorize()), grid={RATIO: [0.2, 0.3]}))
    points, output, work = sweep_points(sweep), tmp_path / "sweep", tmp_path / "work"
    hash_models(points, work, Results(sweep, output, points, {}))
    for point in points:
        run_point(point.name, canonical(point.recipe), str(output), str(work), 1)
    assert hashed.count("model.safetensors") == 1
    results = Results(sweep, output, points, {})
    gone = load_sweep(
        written(tmp_path, write_recipe(factorize()), grid={"model.path": ["./nowhere", str(llama)]})
    )
    hash_models(sweep_points(gone), work, results)
    assert list(results.failures) == ["path ./nowhere"]


def test_a_recipe_is_no_sweep(write_recipe: RecipeWriter, tmp_path: Path) -> None:
    recipe = write_recipe(factorize())
    assert not is_sweep(recipe)
    assert is_sweep(written(tmp_path, recipe, grid={RATIO: [0.2]}))
    recipe.write_text(recipe.read_text() + "grid: 3\n")
    code, _, error = invoke("validate", recipe)
    assert code == 2
    assert "'grid'" in error
