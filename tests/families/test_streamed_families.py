"""Every family, run layer by layer, computes what transformers computes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from ercsvd_deploy.models.description.families import attention_implementation
from ercsvd_deploy.models.description.meta import load_config, read_architecture
from ercsvd_deploy.pipelines import plan
from ercsvd_deploy.pipelines.inputs.model import open_model, stream
from ercsvd_deploy.recipe.sections import ModelSource
from tests.families.tiny_families import FAMILIES, save_tiny_family
from tests.models.streamed import CPU, streamed_logits
from tests.recipe_runs import RecipeWriter


@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_logits_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    assert_streamed_like_transformers(save_tiny_family(tmp_path, family))


def test_attention_within_chunks_is_streamed(tmp_path: Path) -> None:
    """Llama 4's layers with rotary positions attend within chunks, here shorter than the sequences."""
    directory = save_tiny_family(tmp_path, "llama4_text")
    raw = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(raw | {"attention_chunk_size": 16}))
    assert_streamed_like_transformers(directory)


def assert_streamed_like_transformers(directory: Path) -> None:
    tokens = torch.randint(3, 250, (3, 40), generator=torch.Generator().manual_seed(1))
    attention = attention_implementation(load_config(str(directory)))
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation=attention
    )
    with torch.no_grad():
        expected = model.eval()(tokens).logits
    layerwise = stream(open_model(ModelSource(path=str(directory))), CPU)
    found = streamed_logits(layerwise, tokens)
    assert float((found - expected).abs().max()) <= 1e-5 * max(1.0, float(expected.abs().max()))
    assert read_architecture(load_config(str(directory))) == layerwise.architecture


@pytest.mark.parametrize("sizes", [[1], [1, 2]])
def test_pivots_of_rows_that_vllm_sorts_are_refused(
    sizes: list[int], tmp_path: Path, write_recipe: RecipeWriter
) -> None:
    """Falcon's files have queries, keys and values head by head; vLLM sorts them, but cannot sort pivots."""
    model = {"path": str(save_tiny_family(tmp_path / "model", "falcon"))}
    serving = {"tensor_parallel_sizes": sizes}
    stage = {"method": "svd", "compression_ratio": 0.3, "num_compressed_layers": "all", "layout": "pivoted"}
    with pytest.raises(ValueError, match=r"query_key_value: vLLM sorts its rows .* layout low_rank can"):
        plan(write_recipe({"factorize": stage}, model=model, serving=serving))
    plan(write_recipe({"factorize": stage | {"layout": "low_rank"}}, model=model, serving=serving))
