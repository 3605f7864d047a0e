"""The embedded, trained model through the demo's recipes: what vLLM serves is what transformers loads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import pytest

import ercsvd_deploy.hf  # noqa: F401 - registers the loader of the reference
from ercsvd_deploy.pipelines.flow import RunOptions, run_recipe
from ercsvd_deploy.recipe.load import load_recipe
from tests.forks import REPOSITORY
from tests.vllm.engines import Deviation, deviation, engine, generate

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

# The demo's own settings but for its length: less calibration, one candidate, no judgement.
SHORTER = ("calibration.num_samples=16", "evaluation={}", "gates=null")
FACTORS = ("stages.0.factorize.num_compressed_layers=6",)
DENSE_INT4 = ("stages=[{quantize: {method: gptq, bits: 4, group_size: 32}}]",)
# Factors of the last six layers as integers, some of them and of the dense layers left in bfloat16.
MIXED = (*FACTORS, "stages.1.quantize.ignore=[self_attn.k_proj, mlp.up_proj, layers.0.*, layers.5.*]")


Deviations = Callable[[int], dict[tuple[str, str], Deviation]]


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the exported directories: low-rank, low-rank int4, dense int4, and a mixture of everything."""
    root = tmp_path_factory.mktemp("demo")
    recipes: dict[str, tuple[str, Sequence[str]]] = {
        "low_rank": ("demo-lowrank", FACTORS),
        "low_rank_int4": ("demo", FACTORS),
        "dense_int4": ("demo", DENSE_INT4),
        "mixed": ("demo", MIXED),
    }
    for name, (recipe, overrides) in recipes.items():
        loaded = load_recipe(REPOSITORY / f"recipes/{recipe}.yaml", [*SHORTER, *overrides], root / name)
        report, _ = run_recipe(loaded, options=RunOptions(cache=root / "shared"))
        for matrix in report.results["quantize"].matrices if "quantize" in report.results else ():
            assert matrix.gptq_loss < matrix.rtn_loss, matrix  # on every matrix of a trained model
    return {name: root / name for name in recipes}


@pytest.fixture(scope="module")
def deviations(exports: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Deviations:
    """Return a function that gives, for a tensor-parallel size, (export, dtype) -> deviation of vLLM.

    That is from transformers in float32.
    """
    integers = ("low_rank_int4", "dense_int4", "mixed")
    everywhere = [("low_rank", "float32"), *((name, "float16") for name in integers)]
    wanted = {
        1: everywhere + [(name, "bfloat16") for name in ("low_rank", *integers)],
        2: everywhere,
    }

    @cache
    def by_ranks(num_ranks: int) -> dict[tuple[str, str], Deviation]:
        served = wanted[num_ranks]
        engines = [engine(exports[name], dtype, num_ranks=num_ranks) for name, dtype in served]
        answers = generate(engines, tmp_path_factory.mktemp("engines") / "answer.json")
        return {
            (name, dtype): deviation(exports[name], answer["outputs"])
            for (name, dtype), answer in zip(served, answers, strict=True)
        }

    return by_ranks


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_low_rank_in_float32(num_ranks: int, deviations: Deviations) -> None:
    found = deviations(num_ranks)["low_rank", "float32"]
    assert found.largest <= 1e-4
    assert found.same_tokens


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("name", ["low_rank_int4", "dense_int4", "mixed"])
def test_int4_in_float16(name: str, num_ranks: int, deviations: Deviations) -> None:
    assert deviations(num_ranks)[name, "float16"].largest <= 0.03


@pytest.mark.parametrize("name", ["low_rank", "low_rank_int4", "dense_int4", "mixed"])
def test_bfloat16(name: str, deviations: Deviations) -> None:
    assert deviations(1)[name, "bfloat16"].mean <= 0.03
