"""What error control counts as the cost of a storage: what all GPUs hold, replicated factors included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ercsvd_deploy.format.schema import Storage
from ercsvd_deploy.models.description.meta import load_config, read_architecture
from ercsvd_deploy.pipelines.stages.factorize.ranks.options import AllocationTask
from ercsvd_deploy.pipelines.stages.factorize.ranks.plans import plan_allocation
from ercsvd_deploy.recipe.load import load_recipe
from tests.recipe_runs import RecipeWriter

STAGES = (
    {"factorize": {"method": "svd_llm", "allocation": "error_controlled", "output_metric": "fisher"}},
    {"quantize": {"bits": 4, "group_size": 32, "lm_head": {"bits": 8}}},
)
ELEMENT = 4


def task(write_recipe: RecipeWriter, sizes: list[int], **target: Any) -> AllocationTask:
    path = write_recipe(*STAGES, target=target, serving={"tensor_parallel_sizes": sizes})
    recipe = load_recipe(path)
    return plan_allocation(recipe, read_architecture(load_config(recipe.model.path)), ELEMENT)


def matrix_bits(rows: int, columns: int) -> int:
    """Return the bits of int4 in groups of 32 with their scales, and of the tensor that tells the shape."""
    return 4 * rows * columns + 8 * ELEMENT * rows * columns // 32 + 8 * 16


def low_rank(costs: dict[Storage, int]) -> list[tuple[Storage, int]]:
    return [(storage, cost) for storage, cost in costs.items() if storage.rank and storage.rank % 32 == 0]


@pytest.mark.parametrize("sizes", [[1], [2], [1, 2], [2, 4]])
def test_factors_that_every_gpu_has_whole_count_for_each(
    sizes: list[int], write_recipe: RecipeWriter
) -> None:
    found, size = task(write_recipe, sizes, overall_bits=6.0), min(sizes)
    column_parallel, row_parallel = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"
    for storage, cost in low_rank(dict(found.costs[column_parallel])):
        assert storage.rank is not None
        first, second = matrix_bits(storage.rank, 128), matrix_bits(256, storage.rank)
        assert cost == size * first + second
    for storage, cost in low_rank(dict(found.costs[row_parallel])):
        assert storage.rank is not None
        first, second = matrix_bits(storage.rank, 256), matrix_bits(128, storage.rank)
        assert cost == first + size * second
    costs = found.costs[column_parallel].items()
    assert [cost for each, cost in costs if each.is_quantized and not each.rank] == [matrix_bits(256, 128)]
    assert low_rank(dict(found.costs[row_parallel]))


def test_what_is_outside_counts_as_it_is_held(write_recipe: RecipeWriter, llama: Path) -> None:
    """Norms are on every GPU, rows of tokens are shared out."""
    one, two = (task(write_recipe, [size], bytes="1MB").budget for size in (1, 2))
    norms = 128 * (2 * 4 + 1)
    assert one - two == 8 * ELEMENT * norms
    whole = task(write_recipe, [1], model_bits=8.0)
    architecture = read_architecture(load_config(str(llama)))
    embedding, output_layer = 256 * 128, 256 * 128
    outside = 8 * (ELEMENT * (norms + embedding) + output_layer + ELEMENT * output_layer // 32 + 16)
    assert whole.budget == 8 * architecture.total_parameters - outside
