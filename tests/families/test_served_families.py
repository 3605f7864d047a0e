"""Every family: a recipe runs, transformers loads what it wrote, and vLLM serves it with the same numbers.

Engines take many seconds to start, so these tests are run by `make test-families` alone, and those of all
families that are asked for share a process. What they find is in
`models/description/tested_families.json`; `python -m tests.families.table` makes the README's table of it,
and with ERCSVD_UPDATE_FAMILIES=1 they write it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import ercsvd_deploy.hf  # noqa: F401 - registers the loader of compressed checkpoints
from ercsvd_deploy.format.schema import CheckpointConfig
from ercsvd_deploy.models.description.families import attention_implementation
from ercsvd_deploy.models.description.meta import load_config
from ercsvd_deploy.models.description.tensor_parallel import cuts_inputs
from tests.families.dense import materialise
from tests.families.served import (
    STAGES,
    compress,
    in_dtype,
    judge,
    reference,
    run_in_their_dtypes,
)
from tests.families.table import NUM_RANKS, RESULTS, kind_of_export
from tests.families.tiny_families import FAMILIES, save_tiny_family
from tests.vllm.engines import engine

pytestmark = [pytest.mark.families, pytest.mark.slow, pytest.mark.timeout(3600)]
Exports = Callable[[str], dict[str, Path]]
Answers = dict[tuple[str, str, int], dict[str, Any]]


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return cache(lambda family: save_tiny_family(tmp_path_factory.mktemp(family) / "model", family))


@pytest.fixture(scope="module")
def exports(originals: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Exports:
    """Return family -> what each of `STAGES` makes of it."""

    @cache
    def of_family(family: str) -> dict[str, Path]:
        directory = tmp_path_factory.mktemp(f"{family}-exports")
        return {dtype: compress(originals(family), directory / dtype, dtype) for dtype in STAGES}

    return of_family


@pytest.fixture(scope="module")
def answers(
    request: pytest.FixtureRequest, exports: Exports, tmp_path_factory: pytest.TempPathFactory
) -> Answers:
    """Return (family, dtype of its export, ranks) -> what vLLM generated, for the families asked for."""
    families = {item.callspec.params["family"] for item in request.session.items if hasattr(item, "callspec")}
    keys = [(family, dtype) for family in FAMILIES if family in families for dtype in STAGES]
    work = tmp_path_factory.mktemp("engines")
    found: Answers = {}
    for num_ranks in NUM_RANKS:
        jobs = {
            (family, dtype, num_ranks): engine(exports(family)[dtype], dtype, num_ranks=num_ranks)
            for family, dtype in keys
        }
        found |= run_in_their_dtypes(jobs, work / f"{num_ranks}")
    return found


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_transformers_loads_what_was_written(family: str, exports: Exports, tmp_path: Path) -> None:
    tokens = torch.randint(3, 250, (2, 40), generator=torch.Generator().manual_seed(1))
    for dtype, directory in exports(family).items():
        raw = json.loads((directory / "config.json").read_text())
        described = CheckpointConfig.read(raw["quantization_config"])
        storages = [module for module in described.modules.values() if module.is_altered]
        assert any(module.rank is not None for module in storages)
        assert (dtype == "float16") == any(module.is_quantized for module in storages)
        assert dtype == "float32" or any(module.rank is None for module in storages)
        attention = attention_implementation(load_config(str(directory)))
        model = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, attn_implementation=attention
        )
        expected = reference(materialise(directory, tmp_path / dtype))(tokens).logits
        found = model.eval()(tokens).logits
        assert float((found - expected).abs().max()) <= 1e-4 * max(1.0, float(expected.abs().max()))


@pytest.mark.vllm
@pytest.mark.parametrize("family", FAMILIES)
def test_vllm_serves_it_with_the_same_numbers(
    family: str, exports: Exports, answers: Answers, tmp_path: Path
) -> None:
    verdicts = {}
    for dtype, directory in exports(family).items():
        dense = materialise(directory, tmp_path / f"{dtype}-dense")
        for num_ranks in NUM_RANKS:
            answer = answers[family, dtype, num_ranks]
            work = tmp_path / f"{dtype}-{num_ranks}"
            verdict = judge(dense, directory, answer, work, num_ranks=num_ranks)
            verdicts[kind_of_export(dtype, num_ranks)] = in_dtype(verdict, dtype, answer)
            for name, kind in answer.get("cut", {}).items():
                assert cuts_inputs(name) == (kind == "RowParallelLinear"), f"{name} is a {kind}"
    results = json.loads(RESULTS.read_text())
    if os.environ.get("ERCSVD_UPDATE_FAMILIES"):
        results[family] = verdicts
        RESULTS.write_text(json.dumps(results, indent=2, sort_keys=True) + "\n")
    assert results.get(family) == verdicts
