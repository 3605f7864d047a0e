"""Whole runs on small random vision-language models: what changes, what must not, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

import ercsvd_deploy.hf  # noqa: F401 - registers the loader of compressed checkpoints
from ercsvd_deploy.budget.ranks import LinearShape
from ercsvd_deploy.format.schema import CheckpointConfig
from ercsvd_deploy.pipelines.flow import run_recipe
from ercsvd_deploy.pipelines.inputs.model import open_model, stream
from ercsvd_deploy.pipelines.planning.components import LEFT_ALONE
from ercsvd_deploy.pipelines.planning.plan import make_plan
from ercsvd_deploy.pipelines.stages.factorize.linear import FactorizationError
from ercsvd_deploy.pipelines.stages.factorize.residual import residual_ranks_on_offer
from ercsvd_deploy.recipe.load import load_recipe
from ercsvd_deploy.recipe.sections import ModelSource
from tests.conftest import ModelDirectory
from tests.hub_names import to_checkpoint
from tests.models.streamed import picture_samples
from tests.recipe_runs import RecipeWriter, factorize, invoke
from tests.tiny_models import VISION_FAMILIES

pytestmark = pytest.mark.slow  # whole runs

INT4 = {"quantize": {"bits": 4, "group_size": 32}}
VISION_NAMES = ("vision_tower.", "multi_modal_projector.", "image_newline")


def logits(directory: Path) -> list[torch.Tensor]:
    """Return the logits of transformers' whole model on pictures and text."""
    model = AutoModelForImageTextToText.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        return [
            model(input_ids=sample.tokens[None], **sample.images).logits[0]
            for sample in picture_samples(directory)
        ]


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_vision_parts_keep_every_bit(
    family: str, write_picture_recipe: RecipeWriter, tiny_model: ModelDirectory
) -> None:
    path = write_picture_recipe(factorize(rank_multiple="auto"), INT4, model=tiny_model(family))
    report, directory = run_recipe(load_recipe(path))
    before = load_file(tiny_model(family) / "model.safetensors")
    after = load_file(directory / "model.safetensors")
    watched = [name for name in before if name.startswith(VISION_NAMES)]
    assert len(watched) > 50
    for name in watched:
        assert after[name].dtype == before[name].dtype, name
        assert torch.equal(after[name].view(torch.uint8), before[name].view(torch.uint8)), name
    assert not [name for name in after if name.startswith(VISION_NAMES) and name not in before]
    assert [part.treatment for part in report.components[1:]] == [LEFT_ALONE, LEFT_ALONE]
    assert "low-rank int4" in report.components[0].treatment
    assert sum(part.num_bytes for part in report.components) == report.compressed.num_bytes
    assert sum(part.parameters for part in report.components) == report.compressed.parameters


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_export_has_the_hubs_names_and_loads(
    family: str, write_picture_recipe: RecipeWriter, tiny_model: ModelDirectory
) -> None:
    _, directory = run_recipe(load_recipe(write_picture_recipe(model=tiny_model(family))))
    config = json.loads((directory / "config.json").read_text())
    modules = CheckpointConfig.read(config["quantization_config"]).modules
    assert all(name.startswith("language_model.model.layers.") for name in modules)
    names = set(load_file(directory / "model.safetensors"))
    for name, description in modules.items():
        assert {f"{name}.{leaf}" for leaf in description.tensor_shapes} <= names
    assert AutoProcessor.from_pretrained(directory).chat_template
    # The streamed reader of our own and transformers' whole model read the same directory alike.
    model, given = (
        stream(open_model(ModelSource(path=str(directory))), torch.device("cpu")),
        picture_samples(directory),
    )
    batches = model.batches(given)
    hidden = model.embed(batches)
    for index in range(model.num_layers):
        model.advance(index, batches, hidden)
    expected = logits(directory)
    for row, _, found in model.logits(batches, hidden):
        torch.testing.assert_close(found, expected[row], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("layout", ["transformers", "mixed"])
def test_other_layouts_give_the_same_export(
    layout: str, write_picture_recipe: RecipeWriter, tiny_model: ModelDirectory, tmp_path: Path
) -> None:
    """A checkpoint with transformers 5's own names, or a mixture, is read too, and written with the hub's."""
    source = shutil.copytree(tiny_model("llava"), tmp_path / "source")
    renamed = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        new = name.replace("language_model.model.", "model.language_model.")
        new = new.replace("language_model.lm_head.", "lm_head.")
        if layout == "transformers":
            new = new.replace("vision_tower.vision_model.", "model.vision_tower.")
            new = new.replace("multi_modal_projector.", "model.multi_modal_projector.")
        renamed[new] = tensor
    assert set(renamed) != set(load_file(source / "model.safetensors"))
    save_file(renamed, source / "model.safetensors", metadata={"format": "pt"})
    _, directory = run_recipe(load_recipe(write_picture_recipe(), output=tmp_path / "usual"))
    _, other = run_recipe(load_recipe(write_picture_recipe(model=source), output=tmp_path / "other"))
    usual_tensors = load_file(directory / "model.safetensors")
    other_tensors = load_file(other / "model.safetensors")
    assert set(usual_tensors) == set(other_tensors)
    assert all(torch.equal(usual_tensors[name], other_tensors[name]) for name in usual_tensors)


def test_tensor_under_two_names_is_refused(
    write_picture_recipe: RecipeWriter, tiny_model: ModelDirectory, tmp_path: Path
) -> None:
    source = shutil.copytree(tiny_model("llava"), tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors["language_model.lm_head.weight"].clone()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    code, _, error = invoke("run", write_picture_recipe(model=source))
    assert code == 1
    assert "lm_head.weight under two names" in error


@pytest.mark.draws
@pytest.mark.parametrize("layout", ["low_rank", "pivoted"])
def test_compressed_vision_parts(
    layout: str, write_picture_recipe: RecipeWriter, tiny_model: ModelDirectory
) -> None:
    switched_on = {"compress_tower": True, "compress_projector": True}
    stage = factorize(num_compressed_layers="all", layout=layout)
    path = write_picture_recipe(stage)
    vision = yaml.safe_load(path.read_text())["vision"] | switched_on
    path = write_picture_recipe(stage, vision=vision)
    planned = make_plan(load_recipe(path)).candidates[0]
    report, directory = run_recipe(load_recipe(path))
    assert not [warning for warning in report.warnings if "plan" in warning]
    assert [part.num_bytes for part in planned.components] == [part.num_bytes for part in report.components]
    for part in report.components[1:]:
        assert f"Linears {layout.replace('_', '-')}" in part.treatment
        assert part.parameters < part.original_parameters
    modules = CheckpointConfig.read(
        json.loads((directory / "config.json").read_text())["quantization_config"]
    ).modules
    tower = [name for name in modules if name.startswith("vision_tower.")]
    assert tower
    assert {description.layout for description in modules.values()} == {layout}
    # The last layer of the tower is not run: there is nothing to measure, and vLLM does not build it.
    assert not [name for name in tower if ".layers.2." in name]
    assert report.results["vision"] is not None
    assert {to_checkpoint(linear.name) for linear in report.results["vision"].linears} == {
        name for name in modules if name.startswith(VISION_NAMES)
    }
    assert all(0 < (linear.calibration_error or 0) < 1 for linear in report.results["vision"].linears)
    original, compressed = logits(tiny_model("llava"))[0], logits(directory)[0]
    assert 0 < float((original - compressed).abs().max()) < 100


def test_residuals_of_vision_parts_are_chosen_on_held_out_pictures(
    write_picture_recipe: RecipeWriter,
) -> None:
    stage = factorize(method="erc_svd", beta="auto", num_compressed_layers="all")
    path = write_picture_recipe(stage)
    vision = yaml.safe_load(path.read_text())["vision"] | {"compress_tower": True, "compress_projector": True}
    report, _ = run_recipe(load_recipe(write_picture_recipe(stage, vision=vision)))
    assert report.results["vision"] is not None
    for linear in report.results["vision"].linears:
        assert linear.rank is not None
        assert linear.residual_rank is not None
        shape = LinearShape(linear.name, 0, *linear.shape)
        assert linear.residual_rank in residual_ranks_on_offer(shape, linear.rank)
    with pytest.raises(FactorizationError, match=r"there are 3; use at least 4"):
        run_recipe(load_recipe(write_picture_recipe(stage, vision=vision | {"share": 0.19})))


def test_token_weight_zero_ignores_what_images_show(
    write_picture_recipe: RecipeWriter, tmp_path: Path
) -> None:
    """Weight is what it says: at 0 the Grams hold text tokens alone, so factors differ from those at 1."""
    factors = {}
    for weight in (0.0, 1.0):
        path = write_picture_recipe()
        vision = yaml.safe_load(path.read_text())["vision"] | {"token_weight": weight}
        _, directory = run_recipe(
            load_recipe(write_picture_recipe(vision=vision), output=tmp_path / f"w{weight}")
        )
        stored = load_file(directory / "model.safetensors")
        factors[weight] = next(tensor for name, tensor in sorted(stored.items()) if "factor_a" in name)
    assert not torch.allclose(factors[0.0], factors[1.0])


def test_two_runs_write_the_same_bytes(write_picture_recipe: RecipeWriter, tmp_path: Path) -> None:
    written = [
        run_recipe(load_recipe(write_picture_recipe(), output=tmp_path / name))[1] / "model.safetensors"
        for name in ("one", "two")
    ]
    assert written[0].read_bytes() == written[1].read_bytes()


def test_damaged_images_are_counted_and_named(
    write_picture_recipe: RecipeWriter, pictures: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(pictures, tmp_path / "damaged")
    (folder / "3.png").write_bytes((folder / "3.png").read_bytes()[:100])
    (folder / "5.png").write_text("not a picture")
    vision = {"calibration": {"conversations": str(folder / "conversations.jsonl")}, "share": 0.75}
    report, _ = run_recipe(load_recipe(write_picture_recipe(vision=vision, evaluation={})))
    warnings = "\n".join(report.warnings)
    assert "vision.calibration: 2 left out because a picture is damaged" in warnings
    assert "3.png" in warnings
    assert "5.png" in warnings


BAD_RECORDS = {
    "no image token": ({"from": "human", "value": "What?"}, "<image>"),
    "too many image tokens": ({"from": "human", "value": "<image><image>\nWhat?"}, "<image>"),
}


@pytest.mark.parametrize("fault", [*BAD_RECORDS, "all damaged", "no processor", "outside"])
def test_bad_input_is_one_clear_error_before_the_weights_are_read(
    fault: str, write_picture_recipe: RecipeWriter, tiny_model: ModelDirectory, pictures: Path, tmp_path: Path
) -> None:
    source = shutil.copytree(tiny_model("llava"), tmp_path / "source")
    # Whoever touched the weights would stumble over this.
    (source / "model.safetensors").write_bytes(b"no weights")
    folder = shutil.copytree(pictures, tmp_path / "faulty")
    records = [json.loads(line) for line in (folder / "conversations.jsonl").read_text().splitlines()]
    expected = [f"{folder}/conversations.jsonl:1"]
    if fault in BAD_RECORDS:
        records[0]["conversations"][0], words = BAD_RECORDS[fault]
        expected.append(words)
    elif fault == "outside":
        records[0]["image"] = "../source/config.json"
        expected.append("../source/config.json")
    elif fault == "all damaged":
        for image in folder.glob("*.png"):
            image.write_text("not a picture")
        expected = ["vision.calibration", "0.png"]
    elif fault == "no processor":
        (source / "processor_config.json").unlink()
        (source / "preprocessor_config.json").unlink(missing_ok=True)
        expected = [str(source), "processor"]
    (folder / "conversations.jsonl").write_text("\n".join(json.dumps(record) for record in records))
    vision = {"calibration": {"conversations": str(folder / "conversations.jsonl")}}
    path = write_picture_recipe(
        model=source, vision=vision, calibration={"num_samples": 8, "sequence_length": 120}, evaluation={}
    )
    code, output, error = invoke("run", path)
    assert code == 1
    assert output == ""
    assert error.startswith("error: ")
    assert "Traceback" not in error
    for words in expected:
        assert words in error
    assert not (tmp_path / "out").exists()


def test_text_model_with_pictures_is_refused(
    write_picture_recipe: RecipeWriter, tiny_model: ModelDirectory
) -> None:
    code, _, error = invoke("run", write_picture_recipe(model=tiny_model("llama")))
    assert code == 2
    assert "has vision and evaluation.visual_questions, but" in error
    assert "is not one that reads images: remove them, or choose a vision-language model" in error


def test_sequences_too_short_for_an_image(write_picture_recipe: RecipeWriter) -> None:
    code, _, error = invoke(
        "run",
        write_picture_recipe(
            calibration={"num_samples": 8, "sequence_length": 12}, vision=None, evaluation={}
        ),
    )
    assert code == 2  # without pictures or text there is nothing to calibrate on
    path = write_picture_recipe(calibration={"num_samples": 8, "sequence_length": 12}, evaluation={})
    recipe = yaml.safe_load(path.read_text())
    recipe["vision"].pop("share")
    path.write_text(yaml.safe_dump(recipe))
    code, _, error = invoke("run", path)
    assert code == 1
    assert "vision.calibration" in error
    assert "12" in error


PROCESSOR_FAULTS = {
    "patch_size": 4,
    "num_additional_image_tokens": 0,
    "vision_feature_select_strategy": "full",
    "crop_size": {"height": 60000, "width": 60000},
}


@pytest.mark.parametrize("field", PROCESSOR_FAULTS)
def test_a_processor_of_another_model_is_refused_by_name(
    field: str, write_picture_recipe: RecipeWriter, tiny_model: ModelDirectory, tmp_path: Path
) -> None:
    source = shutil.copytree(tiny_model("llava"), tmp_path / "source")
    path = source / "processor_config.json"
    settings = json.loads(path.read_text())
    holder = settings["image_processor"] if field == "crop_size" else settings
    holder[field] = PROCESSOR_FAULTS[field]
    path.write_text(json.dumps(settings))
    code, _, error = invoke("run", write_picture_recipe(model=source))
    assert code == 1
    assert f"processor and model do not belong together: {field} is" in error


@pytest.mark.parametrize(("layer", "ok"), [(-99, False), (99, False), ([], False), ([-2, -3], True)])
def test_vision_feature_layer_is_checked(
    layer: Any, ok: bool, write_picture_recipe: RecipeWriter, tiny_model: ModelDirectory, tmp_path: Path
) -> None:
    source = shutil.copytree(tiny_model("llava"), tmp_path / "source")
    config = json.loads((source / "config.json").read_text()) | {"vision_feature_layer": layer}
    (source / "config.json").write_text(json.dumps(config))
    code, _, error = invoke("plan", write_picture_recipe(model=source))
    assert code == (0 if ok else 1)
    assert ok or f"vision_feature_layer {layer} of config.json is not in the vision tower" in error


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.float8_e4m3fn])
def test_weights_of_a_strange_dtype_are_refused_by_name(
    dtype: torch.dtype, write_picture_recipe: RecipeWriter, tiny_model: ModelDirectory, tmp_path: Path
) -> None:
    source = shutil.copytree(tiny_model("llava"), tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    name = "multi_modal_projector.linear_1.weight"
    tensors[name] = tensors[name].to(dtype)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    code, _, error = invoke("run", write_picture_recipe(model=source))
    assert code == 1
    assert "model.multi_modal_projector.linear_1.weight is stored as" in error


def test_eval_names_damaged_pictures(tiny_model: ModelDirectory, pictures: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(pictures, tmp_path / "damaged")
    (folder / "5.png").write_text("not a picture")
    arguments = ("eval", tiny_model("llava"), "--questions", f"q={folder}/conversations.jsonl")
    code, output, _ = invoke(*arguments, "--json")
    assert code == 0
    found = json.loads(output)
    assert found["num_questions"] == {"q": 11}
    assert "--questions.q: 1 left out because a picture is damaged" in found["notes"][0]
    assert "5.png" in invoke(*arguments)[1]
