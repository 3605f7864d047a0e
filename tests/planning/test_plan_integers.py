"""Ready recipes that store large models as integers are planned from the configs, and keep what they say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ercsvd_deploy.pipelines.planning.plan import make_plan
from ercsvd_deploy.recipe.load import load_recipe
from tests.planning.public_configs import RECIPES_OF_INTEGERS

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.mark.parametrize(
    ("name", "original", "compressed", "bits"),
    [
        ("qwen3-32b", 65.5, 19.2, 4.125),
        ("llama-3.3-70b", 141.1, 37.8, 4.175),
        ("mistral-small-3.2", 48.0, 15.6, 4.314),
        ("phi-4", 29.3, 8.6, 4.125),
    ],
)
def test_sizes_are_those_that_the_recipe_names(
    name: str, original: float, compressed: float, bits: float, tmp_path: Path
) -> None:
    """In GB, by hand: weights times (bits + 16 / 128) / 8; outside the layers in 16 bits or 8.125.

    Where a target chooses bits, which a run does, the plan spends it evenly: with 4 bits 37.4 of 38 GB, and
    6 bits for a layer are 0.21 GB more, which two layers get.
    """
    recipe = load_recipe(RECIPES / f"{name}.yaml")
    (tmp_path / "config.json").write_text(json.dumps(RECIPES_OF_INTEGERS[recipe.model.path]))
    plan = make_plan(load_recipe(RECIPES / f"{name}.yaml", [f"model.path={tmp_path}"]))
    assert plan.dtype == "bfloat16"
    (candidate,) = plan.candidates
    assert plan.num_bytes / 1e9 == pytest.approx(original, rel=0.01)
    assert candidate.num_bytes / 1e9 == pytest.approx(compressed, rel=0.01)
    assert candidate.linear_bits_per_weight == pytest.approx(bits, abs=0.03)
    assert set(candidate.gpu_bytes) == set(recipe.serving.tensor_parallel_sizes)
