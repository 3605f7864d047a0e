"""The LLaVA recipes are planned from the models' configs alone: no weights, no processor, no data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from ercsvd_deploy.models.families import LANGUAGE_PART, PROJECTOR_PART, TOWER_PART
from ercsvd_deploy.pipelines.planning.components import LEFT_ALONE
from ercsvd_deploy.pipelines.planning.plan import make_plan
from ercsvd_deploy.pipelines.stages.contract import PlanError
from ercsvd_deploy.recipe.load import load_recipe
from tests.conftest import ModelDirectory
from tests.flow.test_run_llava import RecipeWriter, pictures, write_recipe
from tests.planning.counted import declared, run_counted

__all__ = ["pictures", "write_recipe"]  # fixtures

RECIPES = Path(__file__).parents[2] / "recipes"

# The published configs, as far as they matter. CLIP ViT-L/14 at 336 pixels in all of them.
TOWER = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
TOWER_PARAMETERS = 303_507_456
VICUNA_7B = {
    "model_type": "llama",
    "vocab_size": 32064,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
}
VICUNA_13B = VICUNA_7B | {
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "num_key_value_heads": 40,
}
MISTRAL_7B = {
    "model_type": "mistral",
    "vocab_size": 32064,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
}
TILINGS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]


def config(text: dict[str, Any], **settings: Any) -> dict[str, Any]:
    return {
        "model_type": "llava",
        "image_token_index": 32000,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "projector_hidden_act": "gelu",
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "text_config": text,
        "vision_config": TOWER,
    } | settings


NEXT = {"model_type": "llava_next", "image_grid_pinpoints": TILINGS}
# Recipe -> config, parameters of the projector and of the language model.
MODELS = {
    "llava-1.5-7b": (config(VICUNA_7B), 20_979_712, 6_738_939_904),
    "llava-1.5-13b": (config(VICUNA_13B), 31_467_520, 13_016_519_680),
    "llava-v1.6-vicuna-7b": (config(VICUNA_7B, **NEXT), 20_983_808, 6_738_939_904),
    "llava-v1.6-mistral-7b": (config(MISTRAL_7B, **NEXT), 20_983_808, 7_242_256_384),
}


@pytest.mark.parametrize("name", MODELS)
def test_recipe_is_planned_from_the_config_alone(name: str, tmp_path: Path) -> None:
    model_config, projector, language_model = MODELS[name]
    (tmp_path / "config.json").write_text(json.dumps(model_config))
    plan = make_plan(load_recipe(RECIPES / f"{name}.yaml", [f"model.path={tmp_path}"]))
    assert plan.dtype == "float16"
    every_layer = plan.candidates[-1]
    parts = {part.name: part for part in every_layer.components}
    assert {name: part.original_parameters for name, part in parts.items()} == {
        LANGUAGE_PART: language_model,
        TOWER_PART: TOWER_PARAMETERS,
        PROJECTOR_PART: projector,
    }
    for part in (TOWER_PART, PROJECTOR_PART):
        assert parts[part].treatment == LEFT_ALONE
        assert parts[part].num_bytes == 2 * parts[part].original_parameters
    assert "low-rank" in parts[LANGUAGE_PART].treatment
    assert every_layer.achieved_compression_ratio == pytest.approx(0.2, abs=0.005)
    assert every_layer.num_bytes == sum(part.num_bytes for part in parts.values())
    assert every_layer.gpu_bytes[4] < every_layer.gpu_bytes[1] / 2


def test_vision_parts_are_planned_when_asked_for(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(MODELS["llava-1.5-7b"][0]))
    overrides = ["vision.compress_tower=true", "vision.compress_projector=true", f"model.path={tmp_path}"]
    parts = make_plan(load_recipe(RECIPES / "llava-1.5-7b.yaml", overrides)).candidates[-1].components
    tower, projector = parts[1:]
    # The last of CLIP's layers is not run and stays as it is: 23 of 24 are left with 80 % of their Linears.
    in_linears = 12 * 1024 * 1024
    assert tower.original_parameters - tower.parameters == pytest.approx(0.2 * 23 * in_linears, rel=0.05)
    assert projector.parameters / projector.original_parameters == pytest.approx(0.8, abs=0.02)
    assert tower.treatment.endswith("Linears low-rank")


def test_text_model_with_a_vision_section_is_refused(tiny_model: ModelDirectory) -> None:
    recipe = load_recipe(RECIPES / "llava-1.5-7b.yaml", [f"model.path={tiny_model('llama')}"])
    with pytest.raises(
        PlanError, match=r"has vision, but .* is a llama model, which is not one that reads images"
    ):
        make_plan(recipe)


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_vision_parts_take_what_they_declare(
    family: str, tiny_model: ModelDirectory, write_recipe: RecipeWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_recipe(model=tiny_model(family))
    switched_on = {"compress_tower": True, "compress_projector": True}
    vision = yaml.safe_load(path.read_text())["vision"] | switched_on
    recipe = load_recipe(write_recipe(model=tiny_model(family), vision=vision))
    needs = declared(recipe)["vision"]
    most, flops = run_counted(recipe, monkeypatch)["vision"]
    if family == "llava":
        assert needs.working_bytes == pytest.approx(most, rel=0.25)
    else:  # memory is for five tiles, operations are for two; the pictures have two or three
        assert most <= needs.working_bytes <= 2.5 * most
    assert 0.3 * flops <= needs.flops <= flops
    assert needs.kept_bytes == needs.scratch_bytes > 0
