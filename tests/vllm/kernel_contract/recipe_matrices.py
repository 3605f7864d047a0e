"""The integer matrices of every shipped recipe, from the published sizes of the models that they name.

A recipe without a quantize stage is taken with int4 in the largest groups that its model allows at the
tensor-parallel sizes it names: nothing else would be left of it here. Where a target chooses the bits of
dense matrices, each of them is taken with all that are on offer.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ercsvd_deploy.budget.ranks import RankPlan
from ercsvd_deploy.exporters.vllm.kernels.choice import KernelUse, plan_matrices
from ercsvd_deploy.models.description.architecture import Architecture
from ercsvd_deploy.models.description.families import describe
from ercsvd_deploy.models.description.meta import build_meta_model
from ercsvd_deploy.pipelines.inputs.model import open_config
from ercsvd_deploy.pipelines.stages.factorize.ranks.plans import rank_plans
from ercsvd_deploy.pipelines.stages.quantize.planning.storage import (
    QuantizePlan,
    QuantizePlanError,
    check_shapes,
    plan_quantization,
    quantize_plan_of,
)
from ercsvd_deploy.recipe.load import load_recipe
from ercsvd_deploy.recipe.quantize import Quantize
from ercsvd_deploy.recipe.sections import Recipe
from tests.planning.llava_configs import MISTRAL_7B, MODELS, VICUNA_13B
from tests.planning.public_configs import RECIPES_OF_INTEGERS, text_config

REPOSITORY = Path(__file__).parents[3]
RECIPES = sorted(path.stem for path in (REPOSITORY / "recipes").glob("*.yaml"))


def _seeing(model_type: str, text: dict[str, Any]) -> dict[str, Any]:
    """Return the config of a model around a decoder, whose vision parts, of any size, hold no integers."""
    return {"model_type": model_type, "text_config": text}


_LLAMA_2_7B = {"model_type": "llama", "vocab_size": 32000}
_LLAMA_3_8B = MISTRAL_7B | {"model_type": "llama", "vocab_size": 128256}
_QWEN_2_5_7B = text_config("qwen2", 3584, 18944, 28, 28, 4, 152064)
_QWEN_3_8B = text_config("qwen3", 4096, 12288, 36, 32, 8, 151936, head_dim=128)
# Hub id -> the published config, as far as shapes depend on it; models in this repository have their own.
_CONFIGS: dict[str, dict[str, Any]] = {
    "meta-llama/Llama-2-7b-hf": _LLAMA_2_7B,
    "meta-llama/Llama-2-13b-hf": VICUNA_13B | {"vocab_size": 32000},
    "lmsys/vicuna-7b-v1.5": _LLAMA_2_7B,
    "meta-llama/Meta-Llama-3-8B": _LLAMA_3_8B,
    "mistralai/Mistral-7B-v0.1": MISTRAL_7B | {"vocab_size": 32000},
    "Qwen/Qwen2.5-7B": _QWEN_2_5_7B,
    "Qwen/Qwen3-8B": _QWEN_3_8B,
    "Qwen/Qwen3-30B-A3B": text_config(
        "qwen3_moe", 2048, 6144, 48, 32, 4, 151936, head_dim=128, num_experts=128, moe_intermediate_size=768
    ),
    "Qwen/Qwen2.5-VL-7B-Instruct": _seeing("qwen2_5_vl", _QWEN_2_5_7B | {"model_type": "qwen2_5_vl_text"}),
    "Qwen/Qwen3-VL-8B-Instruct": _seeing("qwen3_vl", _QWEN_3_8B | {"model_type": "qwen3_vl_text"}),
    "google/gemma-3-12b-it": _seeing(
        "gemma3", text_config("gemma3_text", 3840, 15360, 48, 16, 8, 262208, head_dim=256)
    ),
    "llava-hf/llava-onevision-qwen2-7b-ov-hf": _seeing("llava_onevision", _QWEN_2_5_7B),
    "facebook/opt-6.7b": {
        "model_type": "opt",
        "vocab_size": 50272,
        "hidden_size": 4096,
        "word_embed_proj_dim": 4096,
        "ffn_dim": 16384,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    # examples/real_model.py makes it; the tests need its sizes alone.
    "out/SmolLM2-135M-Instruct": {
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
    **RECIPES_OF_INTEGERS,
} | {f"llava-hf/{name}-hf": config for name, (config, *_) in MODELS.items()}


def integer_matrices(
    recipe: str, tensor_parallel_sizes: Iterable[int], folder: Path
) -> tuple[KernelUse, ...]:
    """Return the integer matrices of every candidate of a recipe.

    Args:
        recipe: name of its file.
        tensor_parallel_sizes: at which its layers are cut, those that cut groups left out unless the recipe
            names them.
        folder: where a config may be written.
    """
    path = REPOSITORY / "recipes" / f"{recipe}.yaml"
    loaded = load_recipe(path)
    directory = REPOSITORY / loaded.model.path
    if loaded.model.path in _CONFIGS:
        directory = folder
        (folder / "config.json").write_text(json.dumps(_CONFIGS[loaded.model.path]))
    loaded = load_recipe(path, [f"model.path={directory}"])
    config = open_config(loaded.model)
    architecture = describe(build_meta_model(config), config)
    plans = rank_plans(loaded, architecture, 2)
    served = loaded.serving.tensor_parallel_sizes
    storages = list(_storages(loaded, plans, architecture))
    candidates = [plan.ranks for plan in plans.values()] or [{}]  # no ranks: every matrix stays dense
    return tuple(
        use
        for storage in storages
        for ranks in candidates
        for use in plan_matrices(storage.describe(ranks, architecture), architecture, tensor_parallel_sizes)
        if use.quantization is not None
        and (use.tensor_parallel_size in served or use.columns % max(use.quantization["group_size"], 32) == 0)
    )


def _storages(
    recipe: Recipe, plans: Mapping[int, RankPlan], architecture: Architecture
) -> Iterator[QuantizePlan]:
    plan = _storage(recipe, plans, architecture)
    yield plan
    if recipe.target is not None and not recipe.may_factorize:
        for bits in recipe.target.bits or ():
            integers = {
                name: quantization and quantization.model_copy(update={"bits": bits})
                for name, quantization in plan.integers.items()
            }
            yield replace(plan, integers=integers)


def _storage(recipe: Recipe, plans: Mapping[int, RankPlan], architecture: Architecture) -> QuantizePlan:
    if recipe.quantize is not None:
        return quantize_plan_of(recipe, architecture)
    for group_size in (128, 64):
        settings = Quantize(bits=4, group_size=group_size)
        storage = plan_quantization(settings, [linear.name for linear in architecture.linears])
        with contextlib.suppress(QuantizePlanError):
            for plan in plans.values():
                check_shapes(storage, plan.ranks, architecture, recipe.serving.tensor_parallel_sizes)
            return storage
    return plan_quantization(
        Quantize(bits=4, group_size=32), [linear.name for linear in architecture.linears]
    )
