"""Every family: a recipe runs, transformers loads what it wrote, and vLLM serves it with the same numbers.

An engine takes 15 to 25 seconds to start, so these tests are run by `make test-families` alone. What they
find is in `results.json`, from which `python -m tests.families.table` makes the README's table; with
ERCSVD_UPDATE_FAMILIES=1 they write it.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import ercsvd_deploy.hf  # noqa: F401 - registers the loader of compressed checkpoints
from ercsvd_deploy.format.schema import CheckpointConfig
from ercsvd_deploy.models.families import attention_implementation
from ercsvd_deploy.models.meta import load_config
from ercsvd_deploy.models.tensor_parallel import cuts_inputs
from tests.families.served import TOLERANCES, compress, reference, serve
from tests.families.table import RESULTS
from tests.families.tiny_families import FAMILIES, save_tiny_family
from tests.tiny_models import materialise

pytestmark = [pytest.mark.families, pytest.mark.slow]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def dense(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_family(tmp_path_factory.mktemp(f"{family}-original") / "model", family)


@pytest.fixture(scope="module")
def exports(family: str, dense: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return dtype in which it is served -> what a recipe made of the model."""
    directory = tmp_path_factory.mktemp(f"{family}-exports")
    return {dtype: compress(dense, directory / dtype, dtype) for dtype in TOLERANCES}


@torch.no_grad()
def test_transformers_loads_what_was_written(exports: dict[str, Path], tmp_path: Path) -> None:
    tokens = torch.randint(3, 250, (2, 40), generator=torch.Generator().manual_seed(1))
    for dtype, directory in exports.items():
        described = CheckpointConfig.read(
            json.loads((directory / "config.json").read_text())["quantization_config"]
        )
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
def test_vllm_serves_it_with_the_same_numbers(
    family: str, dense: Path, exports: dict[str, Path], tmp_path: Path
) -> None:
    served, classes = serve(dense, exports, tmp_path)
    for name, kind in classes.items():
        assert cuts_inputs(name) == (kind == "RowParallelLinear"), f"{name} is a {kind}"
    results = json.loads(RESULTS.read_text())
    if os.environ.get("ERCSVD_UPDATE_FAMILIES"):
        results[family] = served.as_json()
        RESULTS.write_text(json.dumps(results, indent=2, sort_keys=True) + "\n")
    assert results.get(family) == served.as_json()
