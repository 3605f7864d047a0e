"""Notes of a plan: decisions of the run, and modules that stages leave out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ercsvd_deploy.pipelines.planning.plan import make_plan
from ercsvd_deploy.recipe.fields import PlanError
from ercsvd_deploy.recipe.load import load_recipe
from tests.families.tiny_families import save_tiny_family
from tests.recipe_runs import RecipeWriter

QUANTIZE = {"bits": 4, "group_size": 32}
FACTORIZE = {"factorize": {"method": "svd_llm", "allocation": "error_controlled", "output_metric": "fisher"}}
TARGET = {"overall_bits": 9.0, "bits": [4, 8]}
LEAVES = "factorize leaves"
CHOOSES = "target chooses the same integers for all experts of a layer"
CORRECTS = "routed experts get no low-rank corrections"
TRAINS = "recover trains no rounding of routed experts"


def quantize(**fields: Any) -> dict[str, Any]:
    return {"quantize": QUANTIZE | fields}


@pytest.mark.parametrize(
    ("stages", "sections", "expected"),
    [
        ((quantize(),), {}, set()),
        ((quantize(),), {"target": TARGET}, {CHOOSES}),
        ((quantize(ignore=["*.experts.*"]),), {"target": TARGET | {"overall_bits": 15.5}}, set()),
        ((FACTORIZE, quantize()), {"target": TARGET}, {CHOOSES, LEAVES}),
        ((quantize(correction={"rank": 8}),), {}, {CORRECTS}),
        ((quantize(correction={"rank": 8}, ignore=["*.experts.*"]),), {}, set()),
        ((quantize(),), {"target": {**TARGET, "corrections": [{"rank": 8}]}}, {CHOOSES, CORRECTS}),
        ((quantize(), {"recover": {"rounding": True, "batch_size": 4}}), {}, {TRAINS}),
        ((quantize(), {"recover": {"batch_size": 4}}), {}, set()),
    ],
)
def test_what_stages_do_not_do_to_routed_experts(
    stages: tuple[dict[str, Any], ...],
    sections: dict[str, Any],
    expected: set[str],
    tmp_path: Path,
    write_recipe: RecipeWriter,
) -> None:
    model = save_tiny_family(tmp_path / "model", "mixtral", dtype=torch.bfloat16)
    notes = make_plan(load_recipe(write_recipe(*stages, model={"path": str(model)}, **sections))).notes
    told = {known for known in (LEAVES, CHOOSES, CORRECTS, TRAINS) if any(known in note for note in notes)}
    assert told == expected


def test_experts_that_are_ignored_count_in_a_target(tmp_path: Path, write_recipe: RecipeWriter) -> None:
    model = save_tiny_family(tmp_path / "model", "mixtral", dtype=torch.bfloat16)
    stage = quantize(ignore=["*.experts.*"])
    recipe = load_recipe(write_recipe(stage, model={"path": str(model)}, target=TARGET))
    least = r"overall_bits is 9, and the least that is possible is 15\.\d+: .*less in quantize\.ignore"
    with pytest.raises(PlanError, match=least):
        make_plan(recipe)
