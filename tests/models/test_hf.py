"""Compressed checkpoints in transformers: logits against the dense model they stand for, saving, refusals."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedModel,
)

import ercsvd_deploy.hf
from ercsvd_deploy.format.llava_names import to_module
from ercsvd_deploy.format.schema import CheckpointConfig, CheckpointFormatError
from ercsvd_deploy.models.compressed.modules import (
    CorrectedLinear,
    LowRankLinear,
    PackedLinear,
    PivotedLinear,
)
from tests.tiny_models import (
    FAMILIES,
    HIDDEN_SIZE,
    VISION_FAMILIES,
    VOCAB_SIZE,
    WEIGHTS_FILE,
    compress_at_random,
    materialise,
)

ModelDirectory = Callable[[str], Path]
Tensors = dict[str, torch.Tensor]

TOKENS = torch.randint(3, VOCAB_SIZE, (2, 17), generator=torch.Generator().manual_seed(0))
NOISE = np.random.default_rng(0).integers(0, 256, (2, 48, 80, 3), dtype=np.uint8)
IMAGES = [Image.fromarray(pixels) for pixels in NOISE]
# Matrices of the first layer that `compress_at_random` always makes low-rank and plain, or dense and int4.
PLAIN_LOW_RANK = "model.layers.0.self_attn.v_proj"
INT4_DENSE = "model.layers.0.self_attn.k_proj"


def load(directory: Path, **arguments: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(directory, **arguments)


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    result: torch.Tensor = model(TOKENS).logits
    return result


def load_reading_images(directory: Path, **arguments: Any) -> PreTrainedModel:
    return AutoModelForImageTextToText.from_pretrained(directory, **arguments)


@torch.no_grad()
def logits_about(image: Image.Image, model: PreTrainedModel) -> torch.Tensor:
    processor = AutoProcessor.from_pretrained(model.config.name_or_path)
    result: torch.Tensor = model(**processor(text="<image>?", images=image, return_tensors="pt")).logits
    return result


def edited(source: Path, target: Path, edit: Callable[[Tensors], None]) -> Path:
    """Copy a checkpoint with its tensors changed."""
    shutil.copytree(source, target)
    tensors = load_file(source / WEIGHTS_FILE)
    edit(tensors)
    save_file(tensors, target / WEIGHTS_FILE, metadata={"format": "pt"})
    return target


def edit_config(directory: Path, edit: Callable[[dict[str, Any]], None]) -> Path:
    """Change the quantization_config of a checkpoint in place."""
    file = directory / "config.json"
    config = json.loads(file.read_text())
    edit(config["quantization_config"])
    file.write_text(json.dumps(config))
    return directory


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["low_rank_model", "mixed_model"])
def test_logits_equal_the_dense_model_that_the_checkpoint_stands_for(
    family: str, kind: str, request: pytest.FixtureRequest, materialised: Callable[[Path], Path]
) -> None:
    directory = request.getfixturevalue(kind)(family)
    model = load(directory)
    classes = {type(module) for module in model.modules()}
    assert {LowRankLinear, PivotedLinear} <= classes
    assert (PackedLinear in classes) is (kind == "mixed_model")
    torch.testing.assert_close(logits(model), logits(load(materialised(directory))), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "quantization",
    [
        {"bits": 4, "group_size": 32, "sym": False},
        {"bits": 4, "group_size": 64, "sym": True},
        {"bits": 8, "group_size": -1, "sym": True},
        {"bits": 8, "group_size": 32, "sym": False},
    ],
    ids=lambda quantization: "-".join(map(str, quantization.values())),
)
def test_logits_of_every_integer_layout(
    quantization: dict[str, Any], tiny_model: ModelDirectory, tmp_path: Path
) -> None:
    compress_at_random(tiny_model("qwen2"), tmp_path / "packed", quantization=quantization)
    dense = load(materialise(tmp_path / "packed", tmp_path / "dense"))
    torch.testing.assert_close(logits(load(tmp_path / "packed")), logits(dense), rtol=0, atol=1e-4)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_logits_of_integers_with_corrections(bits: int, tiny_model: ModelDirectory, tmp_path: Path) -> None:
    quantization = {"bits": bits, "group_size": 32, "sym": True}
    compress_at_random(tiny_model("qwen2"), tmp_path / "packed", quantization=quantization, corrected="all")
    model = load(tmp_path / "packed")
    assert sum(isinstance(module, CorrectedLinear) for module in model.modules()) == 7
    dense = load(materialise(tmp_path / "packed", tmp_path / "dense"))
    torch.testing.assert_close(logits(model), logits(dense), rtol=0, atol=1e-4)
    model.save_pretrained(tmp_path / "saved")
    torch.testing.assert_close(logits(load(tmp_path / "saved")), logits(model), rtol=0, atol=0)


@pytest.mark.parametrize("family", ["qwen2", "opt"])
def test_biases_are_the_original_ones(
    family: str, tiny_model: ModelDirectory, mixed_model: ModelDirectory
) -> None:
    original = load_file(tiny_model(family) / WEIGHTS_FILE)
    model = load(mixed_model(family))
    compressed = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, LowRankLinear | PackedLinear) and module.bias is not None
    ]
    assert compressed
    for name, module in compressed:
        assert module.bias is not None
        assert module.bias.abs().max() > 0
        assert torch.equal(module.bias, original[f"{name}.bias"])


@pytest.mark.parametrize("family", FAMILIES)
def test_saving_writes_the_same_checkpoint(family: str, mixed_model: ModelDirectory, tmp_path: Path) -> None:
    source = mixed_model(family)
    model = load(source)
    model.save_pretrained(tmp_path)
    before, after = load_file(source / WEIGHTS_FILE), load_file(tmp_path / WEIGHTS_FILE)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype, name
        assert torch.equal(tensor, after[name]), name
    configs = [json.loads((directory / "config.json").read_text()) for directory in (source, tmp_path)]
    assert configs[0] == configs[1]
    assert torch.equal(logits(load(tmp_path)), logits(model))


def test_sharded_checkpoints_load(mixed_model: ModelDirectory, tmp_path: Path) -> None:
    model = load(mixed_model("llama"))
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert torch.equal(logits(load(tmp_path)), logits(model))


# AutoModel has no head: its tensors are renamed while loading, which transformers treats differently.
@pytest.mark.parametrize("auto_class", [AutoModelForCausalLM, AutoModel])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_any_dtype_applies_to_floats_and_leaves_integers_alone(
    dtype: torch.dtype, auto_class: Any, mixed_model: ModelDirectory
) -> None:
    source = load_file(mixed_model("llama") / WEIGHTS_FILE)
    model = auto_class.from_pretrained(mixed_model("llama"), dtype=dtype)
    state = model.state_dict()
    assert {tensor.dtype for tensor in state.values()} == {dtype, torch.int32, torch.int64}
    prefix = "" if auto_class is AutoModelForCausalLM else "model."
    for name, tensor in state.items():
        assert torch.equal(tensor, source[prefix + name].to(tensor.dtype)), name


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
def test_device_maps(device_map: Any, mixed_model: ModelDirectory) -> None:
    model = load(mixed_model("llama"), device_map=device_map)
    if device_map != "auto":  # "auto" may choose an accelerator
        assert {tensor.device.type for tensor in model.state_dict().values()} == {"cpu"}
    expected = logits(load(mixed_model("llama")))
    with torch.no_grad():
        found = model(TOKENS.to(model.device)).logits.cpu()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_layers_on_disk(mixed_model: ModelDirectory, tmp_path: Path) -> None:
    device_map = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    device_map |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    model = load(mixed_model("llama"), device_map=device_map, offload_folder=tmp_path)
    assert all(parameter.is_meta for parameter in model.get_submodule("model.layers.1").parameters())
    assert torch.equal(logits(model), logits(load(mixed_model("llama"))))


def test_a_config_object_may_be_passed(mixed_model: ModelDirectory) -> None:
    directory = mixed_model("llama")
    model = load(directory, config=AutoConfig.from_pretrained(directory))
    assert torch.equal(logits(model), logits(load(directory)))


@pytest.mark.parametrize("family", FAMILIES)
def test_generate_continues_like_the_dense_model(
    family: str, mixed_model: ModelDirectory, materialised: Callable[[Path], Path]
) -> None:
    directory = mixed_model(family)
    arguments = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(TOKENS)}
    generated = load(directory).generate(TOKENS, **arguments)
    expected = load(materialised(directory)).generate(TOKENS, **arguments)
    assert torch.equal(generated, expected)


def test_gradients_reach_plain_factors(low_rank_model: ModelDirectory) -> None:
    model = load(low_rank_model("llama"))
    assert model.hf_quantizer.is_trainable
    model(TOKENS, labels=TOKENS).loss.backward()
    factors = model.get_submodule(PLAIN_LOW_RANK)
    assert factors.factor_a.weight.grad.abs().sum() > 0
    assert factors.factor_b.weight.grad.abs().sum() > 0


def test_integer_models_are_not_trainable(mixed_model: ModelDirectory) -> None:
    assert not load(mixed_model("llama")).hf_quantizer.is_trainable


def test_lm_eval_scores_what_the_model_says(mixed_model: ModelDirectory) -> None:
    directory = mixed_model("llama")
    requests = [("The answer is", " forty-two"), ("Eins, zwei,", " drei")]
    evaluated = HFLM(pretrained=str(directory), device="cpu", batch_size=1).loglikelihood(
        [Instance("loglikelihood", {}, request, index) for index, request in enumerate(requests)],
        disable_tqdm=True,
    )
    model, tokenizer = load(directory), AutoTokenizer.from_pretrained(directory)
    for (context, continuation), (found, _) in zip(requests, evaluated, strict=True):
        prefix_length = tokenizer(context, return_tensors="pt").input_ids.shape[1]
        tokens = tokenizer(context + continuation, return_tensors="pt").input_ids
        with torch.no_grad():
            log_probabilities = model(tokens[:, :-1]).logits.log_softmax(-1)[0, prefix_length - 1 :]
        expected = log_probabilities.gather(1, tokens[0, prefix_length:, None]).sum().item()
        assert found == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("family", VISION_FAMILIES)
@pytest.mark.parametrize("throughout", [False, True], ids=["decoder", "throughout"])
def test_vision_language_models_load_by_their_hub_names(
    family: str, throughout: bool, tiny_model: ModelDirectory, tmp_path: Path
) -> None:
    """On disk `language_model.model.layers`, in transformers 5 `model.language_model.layers`; and so on."""
    config = compress_at_random(
        tiny_model(family),
        tmp_path / "compressed",
        quantization={"bits": 4, "group_size": 32},
        include_vision=throughout,
    )
    parts = {name.partition(".")[0] for name in config.modules}
    vision = {"vision_tower", "multi_modal_projector"}
    assert parts == {"language_model"} | (vision if throughout else set())
    dense = materialise(tmp_path / "compressed", tmp_path / "dense")

    model = load_reading_images(tmp_path / "compressed")
    found, expected = logits_about(IMAGES[0], model), logits_about(IMAGES[0], load_reading_images(dense))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert (logits_about(IMAGES[1], model) - found).abs().max() > 0.1
    model.save_pretrained(tmp_path / "again")
    stored, saved = (load_file(tmp_path / name / WEIGHTS_FILE) for name in ("compressed", "again"))
    assert {to_module(name) for name in saved} == {to_module(name) for name in stored}
    half = load_reading_images(tmp_path / "compressed", dtype=torch.bfloat16)
    dtypes = {tensor.dtype for tensor in half.state_dict().values()}
    assert dtypes == {torch.bfloat16, torch.int32, torch.int64}


def test_every_tensor_that_does_not_fit_is_named(mixed_model: ModelDirectory, tmp_path: Path) -> None:
    undescribed = "model.layers.0.mlp.gate_proj"

    def damage(tensors: Tensors) -> None:
        del tensors[f"{PLAIN_LOW_RANK}.factor_a.weight"]
        del tensors[f"{INT4_DENSE}.weight"]  # the guard
        del tensors[f"{INT4_DENSE}.weight_scale"]
        factor_b = tensors[f"{PLAIN_LOW_RANK}.factor_b.weight"]
        # a whole divisor of the right rank: a loader that only slices would take it
        tensors[f"{PLAIN_LOW_RANK}.factor_b.weight"] = factor_b[:, : factor_b.shape[1] // 2].contiguous()
        tensors[f"{INT4_DENSE}.weight_packed"] = tensors[f"{INT4_DENSE}.weight_packed"].float()
        tensors[f"{PLAIN_LOW_RANK}.factor_c.weight"] = torch.zeros(1)
        tensors[f"{undescribed}.factor_a.weight"] = torch.zeros(1)

    broken = edited(mixed_model("llama"), tmp_path / "broken", damage)
    with pytest.raises(CheckpointFormatError) as caught:
        load(broken, ignore_mismatched_sizes=True)
    message = str(caught.value)
    assert message.startswith(f"7 tensors in {broken} do not fit its quantization_config")
    assert f"{PLAIN_LOW_RANK}.factor_a.weight: missing" in message
    assert f"{INT4_DENSE}.weight: missing" in message
    assert f"{INT4_DENSE}.weight_scale: missing" in message
    rank = load_file(mixed_model("llama") / WEIGHTS_FILE)[f"{PLAIN_LOW_RANK}.factor_a.weight"].shape[0]
    assert f"{PLAIN_LOW_RANK}.factor_b.weight: shape [64, {rank // 2}], expected [64, {rank}]" in message
    assert f"{INT4_DENSE}.weight_packed: dtype F32, expected integers" in message
    assert f"{PLAIN_LOW_RANK}.factor_c.weight: surplus, its module's description" in message
    assert f"{undescribed}.factor_a.weight: surplus, its module is not described" in message


def test_a_missing_bias_is_refused(mixed_model: ModelDirectory, tmp_path: Path) -> None:
    name = f"{PLAIN_LOW_RANK}.bias"

    def damage(tensors: Tensors) -> None:
        del tensors[name]

    broken = edited(mixed_model("qwen2"), tmp_path / "broken", damage)
    with pytest.raises(CheckpointFormatError, match=f"{name}: missing"):
        load(broken)


def test_an_unaltered_tensor_of_the_wrong_shape_is_refused(
    mixed_model: ModelDirectory, tmp_path: Path
) -> None:
    """transformers looks at no shape when a model has a quantizer."""

    def damage(tensors: Tensors) -> None:
        tensors["model.norm.weight"] = torch.ones(HIDDEN_SIZE // 2)

    with pytest.raises(CheckpointFormatError, match=r"model\.norm\.weight: shape \[64\], expected \[128\]"):
        load(edited(mixed_model("llama"), tmp_path / "broken", damage))


def test_a_packed_matrix_that_records_another_shape_is_refused(
    mixed_model: ModelDirectory, tmp_path: Path
) -> None:
    def damage(tensors: Tensors) -> None:
        tensors[f"{INT4_DENSE}.weight_shape"] = torch.tensor([64, 127])

    with pytest.raises(CheckpointFormatError, match=r"weight_shape: says \[64, 127\], expected \[64, 128\]"):
        load(edited(mixed_model("llama"), tmp_path / "broken", damage))


def test_another_format_version_is_refused(low_rank_model: ModelDirectory, tmp_path: Path) -> None:
    directory = shutil.copytree(low_rank_model("llama"), tmp_path / "newer")
    edit_config(directory, lambda config: config.update(format_version=99, written_by="ercsvd-deploy 7.0"))
    with pytest.raises(CheckpointFormatError, match=r"format_version is 99.*ercsvd-deploy 7\.0"):
        load(directory)


def test_a_description_of_another_model_is_refused(low_rank_model: ModelDirectory, tmp_path: Path) -> None:
    directory = shutil.copytree(low_rank_model("llama"), tmp_path / "other")

    def rename(config: dict[str, Any]) -> None:
        config["modules"]["model.layers.0.self_attn.w_proj"] = config["modules"].pop(PLAIN_LOW_RANK)

    edit_config(directory, rename)
    with pytest.raises(CheckpointFormatError, match=r"w_proj is no Linear of the model \(did you mean"):
        load(directory)


def test_weights_from_elsewhere_are_refused(low_rank_model: ModelDirectory) -> None:
    directory = low_rank_model("llama")
    with pytest.raises(CheckpointFormatError, match="without state_dict"):
        LlamaForCausalLM.from_pretrained(
            None, config=AutoConfig.from_pretrained(directory), state_dict=load_file(directory / WEIGHTS_FILE)
        )


def test_a_dense_model_cannot_be_given_a_compressed_description(tiny_model: ModelDirectory) -> None:
    description = ercsvd_deploy.hf.ErcSvdConfig(**CheckpointConfig(modules={}).write())
    with pytest.raises(ValueError, match="does require the model to be pre-quantized"):
        load(tiny_model("llama"), quantization_config=description)


def test_importing_twice_changes_nothing(low_rank_model: ModelDirectory) -> None:
    ercsvd_deploy.hf.register()
    importlib.reload(ercsvd_deploy.hf)
    assert isinstance(load(low_rank_model("llama")).get_submodule(PLAIN_LOW_RANK), LowRankLinear)


UNREGISTERED = """
import sys
from transformers import AutoModelForCausalLM
try:
    AutoModelForCausalLM.from_pretrained(sys.argv[1])
except RuntimeError as error:
    print("RAISED", error)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], ignore_mismatched_sizes=True)
print("FORCED", tuple(model.get_submodule(sys.argv[2]).weight.shape))
print("PLUGIN", "ercsvd_deploy.hf" in sys.modules)
"""


@pytest.mark.slow
@pytest.mark.parametrize("module", [PLAIN_LOW_RANK, INT4_DENSE])
def test_without_the_import_transformers_stops_on_the_guards(
    module: str, mixed_model: ModelDirectory, tmp_path: Path
) -> None:
    """One guard is enough. With ignore_mismatched_sizes=True transformers makes up weights, and says so."""
    config = json.loads((mixed_model("llama") / "config.json").read_text())
    described = config["quantization_config"]["modules"]

    def leave_one_guard(tensors: Tensors) -> None:
        for name in described.keys() - {module}:
            del tensors[f"{name}.weight"]

    directory = edited(mixed_model("llama"), tmp_path / "guarded", leave_one_guard)
    result = subprocess.run(
        [sys.executable, "-c", UNREGISTERED, str(directory), module],
        capture_output=True,
        text=True,
        # The command line, where it ran in this process before, has asked for silence.
        env=os.environ | {"OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "warning"},
        check=True,
    )
    assert "RAISED You set `ignore_mismatched_sizes` to `False`" in result.stdout
    assert "FORCED (64, 128)" in result.stdout
    assert "PLUGIN False" in result.stdout
    assert f"{module}.weight" in result.stderr
    assert "Reinit due to size mismatch" in result.stderr
