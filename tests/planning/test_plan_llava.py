"""The LLaVA recipes are planned from the models' configs alone: no weights, no processor, no data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from ercsvd_deploy.models.description.architecture import LANGUAGE_PART, PROJECTOR_PART, TOWER_PART
from ercsvd_deploy.pipelines.planning.components import LEFT_ALONE
from ercsvd_deploy.pipelines.planning.plan import make_plan
from ercsvd_deploy.recipe.fields import PlanError
from ercsvd_deploy.recipe.load import load_recipe
from tests.conftest import ModelDirectory
from tests.families.tiny_vision_families import tiny_config
from tests.planning.counted import declared, run_counted
from tests.planning.llava_configs import (
    MODELS,
    TOWER_PARAMETERS,
)
from tests.recipe_runs import RecipeWriter

RECIPES = Path(__file__).parents[2] / "recipes"


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


@pytest.mark.parametrize("family", ["qwen3_vl", "gemma3", "llava-siglip"])
def test_other_vision_parts_are_not_compressed(family: str, tmp_path: Path) -> None:
    tiny_config(family).save_pretrained(tmp_path)
    size = [
        "factorize.rank_multiple=8",
        "factorize.num_compressed_layers=all",
        "calibration.sequence_length=256",
        f"model.path={tmp_path}",
    ]
    parts = (
        make_plan(load_recipe(RECIPES / "llava-1.5-7b.yaml", [*size, "serving=null"]))
        .candidates[0]
        .components
    )
    assert [part.treatment for part in parts[1:]] == [LEFT_ALONE] * (len(parts) - 1)
    assert len(parts) > 1
    for field in ("compress_tower", "compress_projector"):
        asked = load_recipe(RECIPES / "llava-1.5-7b.yaml", [*size, f"vision.{field}=true"])
        with pytest.raises(PlanError, match=rf"vision: {field} is true, but only .* LLaVA with CLIP"):
            make_plan(asked)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_vision_parts_take_what_they_declare(
    family: str,
    tiny_model: ModelDirectory,
    write_picture_recipe: RecipeWriter,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = write_picture_recipe(model=tiny_model(family))
    switched_on = {"compress_tower": True, "compress_projector": True}
    vision = yaml.safe_load(path.read_text())["vision"] | switched_on
    recipe = load_recipe(write_picture_recipe(model=tiny_model(family), vision=vision))
    needs = declared(recipe)["vision"]
    most, flops = run_counted(recipe, monkeypatch)["vision"]
    if family == "llava":
        assert needs.working_bytes == pytest.approx(most, rel=0.25)
    else:  # memory is for five tiles, operations are for two; the pictures have two or three
        assert most <= needs.working_bytes <= 2.5 * most
    assert 0.3 * flops <= needs.flops <= flops
    assert needs.kept_bytes == needs.scratch_bytes > 0


def test_tasks_in_vllm_are_for_text_models(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(MODELS["llava-1.5-7b"][0]))
    asked = [
        "evaluation.lm_eval={tasks: [mmmu_val], engine: vllm}",
        "export.path=out",
        f"model.path={tmp_path}",
    ]
    with pytest.raises(PlanError, match="engine: vllm is for text models"):
        make_plan(load_recipe(RECIPES / "llava-1.5-7b.yaml", asked))


def test_precision_that_the_language_model_names(tmp_path: Path) -> None:
    """Qwen3-VL's config says it in `text_config` alone."""
    raw = tiny_config("qwen3_vl").to_dict()
    raw.pop("dtype")
    raw["text_config"]["dtype"] = "bfloat16"
    (tmp_path / "config.json").write_text(json.dumps(raw))
    size = ["factorize.rank_multiple=8", "calibration.sequence_length=256", f"model.path={tmp_path}"]
    assert make_plan(load_recipe(RECIPES / "qwen3-vl-8b.yaml", size)).dtype == "bfloat16"


def test_conversations_of_a_model_without_a_chat_template_are_refused(tmp_path: Path) -> None:
    tiny_config("paligemma").save_pretrained(tmp_path)
    asked = ["factorize.rank_multiple=8", "calibration.sequence_length=256", f"model.path={tmp_path}"]
    with pytest.raises(PlanError, match=r"has vision, but paligemma has no conversations: .* on text"):
        make_plan(load_recipe(RECIPES / "gemma-3-12b.yaml", asked))
    make_plan(load_recipe(RECIPES / "gemma-3-12b.yaml", [*asked, "vision=null", "evaluation.lm_eval=null"]))


def test_pictures_are_calibration_tokens_too(tmp_path: Path) -> None:
    """How many a picture has is not known before it is read: with pictures a plan refuses no short text."""
    (tmp_path / "config.json").write_text(json.dumps(MODELS["llava-1.5-7b"][0]))
    few = ["calibration.num_samples=16", "calibration.sequence_length=64", f"model.path={tmp_path}"]
    few.append("stages=[{quantize: {bits: 4}}]")
    assert make_plan(load_recipe(RECIPES / "llava-1.5-7b.yaml", few)).candidates
    without = ["vision=null", "evaluation.visual_questions=null", "gates=null"]
    with pytest.raises(PlanError, match="1024 calibration tokens are too few for GPTQ"):
        make_plan(load_recipe(RECIPES / "llava-1.5-7b.yaml", [*few, *without]))
