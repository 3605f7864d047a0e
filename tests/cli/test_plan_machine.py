"""`ercsvd plan`: what a machine lacks is a warning, what cannot work anywhere a failure; other machines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.recipe_runs import RecipeWriter, invoke

SMALL = "memory=1MiB,disk=1KiB"


def plan(recipe: Path, *options: str) -> tuple[int, dict[str, Any], str]:
    code, output, error = invoke("plan", recipe, "--json", *options)
    return code, json.loads(output), error


def test_a_machine_that_is_too_small_is_a_warning(write_recipe: RecipeWriter) -> None:
    code, planned, error = plan(write_recipe(), "--machine", SMALL)
    assert code == 0
    assert planned["problems"] == []
    memory, disk = planned["shortages"]
    assert "of memory, 1 MiB are available: lower" in memory
    assert "0 MiB free: make room" in disk
    assert error == "".join(
        f"warning: the machine asked about may not suffice: {shortage}\n" for shortage in (memory, disk)
    )


def test_a_strict_plan_fails_for_what_the_machine_lacks(write_recipe: RecipeWriter) -> None:
    code, planned, error = plan(write_recipe(), "--machine", SMALL, "--strict-machine")
    assert code == 1
    assert error.count("error: the machine asked about may not suffice: ") == len(planned["shortages"]) == 2
    assert plan(write_recipe(), "--machine", "memory=1TiB,disk=1TiB", "--strict-machine")[0] == 0


@pytest.mark.slow
def test_time_is_bounded_by_operations_at_a_peak(write_recipe: RecipeWriter) -> None:
    recipe = write_recipe()
    _, planned, _ = plan(recipe, "--machine", "flops=2G")
    needs = planned["estimate"]
    assert needs["flops"] == sum(stage["flops"] for stage in needs["stages"]) > 0
    assert needs["least_seconds"] == needs["flops"] / 2e9
    _, planned, _ = plan(recipe, "--machine", "memory=1TiB")
    assert planned["estimate"]["least_seconds"] is None
    _, planned, _ = plan(recipe)
    assert planned["estimate"]["least_seconds"] == pytest.approx(
        needs["flops"] / planned["estimate"]["machine"]["flops"]
    )
    shown = invoke("plan", recipe, "--machine", "flops=2G")[1]
    assert "FLOP, at least" in shown
    assert "at a peak of 2 GFLOP/s" in shown
    assert "lower bound" in shown
    assert "at a peak" not in invoke("plan", recipe, "--machine", "memory=1TiB")[1]


def test_quiet_leaves_warnings_out(write_recipe: RecipeWriter) -> None:
    assert plan(write_recipe(), "--machine", SMALL, "-q")[::2] == (0, "")


def test_a_machine_with_a_gpu_has_gpu_memory_planned_without_one_here(
    write_recipe: RecipeWriter,
) -> None:
    code, planned, error = plan(write_recipe(), "--machine", "gpu=80GiB")
    assert (code, error) == (0, "")
    assert planned["estimate"]["device"] == "cuda"
    assert planned["estimate"]["peak_device_bytes"] > 0
    code, planned, error = plan(write_recipe(), "--machine", "gpu=1KiB")
    assert code == 0
    assert "of GPU memory, 0 MiB are free" in error
    assert "--device cpu" in error
    code, planned, error = plan(write_recipe(), "--machine", "gpu=none")
    assert (code, error) == (0, "")
    assert planned["estimate"]["device"] == "cpu"
    assert planned["estimate"]["peak_device_bytes"] == 0
    assert plan(write_recipe(), "--machine", "gpu=1KiB", "--device", "cpu")[::2] == (0, "")


def test_a_recipe_that_cannot_work_fails_on_every_machine(
    write_recipe: RecipeWriter,
    llama: Path,
) -> None:
    recipe = write_recipe()
    code, planned, error = plan(recipe, "--machine", "memory=1TiB", "--output", str(llama / "inside"))
    assert code == 1
    assert "lies inside the source model" in error
    assert len(planned["problems"]) == 1
    code, output, error = invoke("plan", recipe, "--set", "factorize.num_compressed_layers=1")
    assert (code, output) == (2, "")
    assert "admissible" in error


@pytest.mark.parametrize(
    ("options", "expected_code", "said"),
    [
        (["--machine", "gpus=1GiB"], 2, "did you mean gpu=SIZE?"),
        (["--machine", "gpu=none", "--device", "cuda"], 2, "--machine says gpu=none"),
        (["--machine", "gpu=1GiB", "--device", "banana"], 1, "not a device"),
    ],
)
def test_machines_that_make_no_sense_are_refused(
    options: list[str],
    expected_code: int,
    said: str,
    write_recipe: RecipeWriter,
) -> None:
    code, output, error = invoke("plan", write_recipe(), *options)
    assert (code, output) == (expected_code, "")
    assert error.startswith("error: --")
    assert said in error
