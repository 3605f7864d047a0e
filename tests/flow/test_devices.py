"""Whole runs on a GPU give what they give on a CPU.

Where there is none, the same runs compute in 16 bits on the CPU, as layers do on a GPU.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ercsvd_deploy.pipelines.flow import run_recipe
from ercsvd_deploy.recipe.load import load_recipe
from tests.recipe_runs import TEXT, RecipeWriter, factorize
from tests.tiny_models import save_tiny_model

pytestmark = pytest.mark.slow  # whole runs

INTEGERS = {"quantize": {"bits": 4, "group_size": -1}}
ERROR_CONTROL = {
    "method": "svd_llm",
    "output_metric": "fisher",
    "allocation": "error_controlled",
    "num_fisher_samples": 4,
    "compressed_prefix_inputs": True,
    "rank_multiple": 8,
}
RECOVER = {"recover": {"steps": 2, "batch_size": 2}}
TARGET = {
    "overall_bits": 6.0,
    "bits": [3, 8],
    "factor_bits": [8],
    "corrections": [{"rank": 8, "bits": 8}],
}
TRAINED = "corrections, rounding learned"
RUNS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "residual compensation, searched": ([factorize(method="erc_svd", num_compressed_layers="auto")], {}),
    "activation-aware, asymmetric factors": (
        [factorize(method="asvd"), {"quantize": {"bits": 4, "group_size": -1, "sym": False}}],
        {},
    ),
    "error control, pivoted, recovered": (
        [{"factorize": ERROR_CONTROL | {"compression_ratio": 0.3, "layout": "pivoted"}}, INTEGERS, RECOVER],
        {},
    ),
    "three bits and the embedding": (
        [{"quantize": {"bits": 3, "group_size": 32, "embeddings": {"bits": 8, "group_size": 32}}}],
        {},
    ),
    TRAINED: (
        [
            {"quantize": {"bits": 3, "group_size": 32, "correction": {"rank": 8}}},
            {"recover": {"steps": 2, "batch_size": 2, "rounding": True, "end_to_end_steps": 2}},
        ],
        {},
    ),
    "a budget": ([{"factorize": ERROR_CONTROL}, {"quantize": {"group_size": -1}}], {"target": TARGET}),
}


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, torch.bfloat16) for name in RUNS), (TRAINED, torch.float16)]
)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_runs_give_what_a_cpu_gives(
    device: str,
    name: str,
    dtype: torch.dtype,
    write_recipe: RecipeWriter,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stages, sections = RUNS[name]
    calibration = {
        "dataset": {"text": str(TEXT / "calibration.txt")},
        "num_samples": 8,
        "sequence_length": 48,
    }
    model = save_tiny_model(tmp_path / "model", "llama", num_layers=2, dtype=dtype)
    recipe = write_recipe(*stages, **sections, model={"path": str(model)}, calibration=calibration)
    reference, _ = run_recipe(load_recipe(recipe), device=torch.device("cpu"))
    monkeypatch.setattr("ercsvd_deploy.pipelines.inputs.model.compute_dtype", lambda *_: dtype)
    found, _ = run_recipe(load_recipe(recipe, output=tmp_path / "other"), device=torch.device(device))
    lost, expected = (report.change.logprob_kl["held_out"] for report in (found, reference))
    assert lost == pytest.approx(expected, rel=0.15)
    assert found.compressed.num_bytes == pytest.approx(reference.compressed.num_bytes, rel=0.03)
