"""Which Linears are found in a model's layers, which of them read the same tensor, and what is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig

from ercsvd_deploy.models.description.architecture import (
    PROJECTOR_PART,
    TOWER_PART,
    Architecture,
    ArchitectureError,
    LayerLinears,
)
from ercsvd_deploy.models.description.discovery import find_decoder, on_meta
from ercsvd_deploy.models.description.families import describe
from ercsvd_deploy.models.description.meta import build_meta_model, load_config, read_architecture
from tests.conftest import ModelDirectory
from tests.families.tiny_families import FAMILIES, tiny_config
from tests.tiny_models import VISION_FAMILIES, randomise

# What stood in a table before groups were found: names and their order enter plans, fingerprints and files.
LLAMA_GROUPS = [
    ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    ["self_attn.o_proj"],
    ["mlp.gate_proj", "mlp.up_proj"],
    ["mlp.down_proj"],
]
OPT_GROUPS = [
    ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    ["self_attn.out_proj"],
    ["fc1"],
    ["fc2"],
]
CLIP_GROUPS = [*OPT_GROUPS[:2], ["mlp.fc1"], ["mlp.fc2"]]
# Those that read the same tensor as others and are not called next to them, or are several in one.
OTHER_GROUPS = {
    "phi": [[*LLAMA_GROUPS[0], "mlp.fc1"], ["self_attn.dense"], ["mlp.fc2"]],
    "phi3": [["self_attn.qkv_proj"], ["self_attn.o_proj"], ["mlp.gate_up_proj"], ["mlp.down_proj"]],
    "cohere": [[*LLAMA_GROUPS[0], *LLAMA_GROUPS[2]], ["self_attn.o_proj"], ["mlp.down_proj"]],
    "glm4": [*LLAMA_GROUPS[:2], ["mlp.gate_up_proj"], ["mlp.down_proj"]],
    "starcoder2": [*LLAMA_GROUPS[:2], ["mlp.c_fc"], ["mlp.c_proj"]],
    # two norms before the parallel blocks
    "falcon": [
        ["self_attention.query_key_value"],
        ["self_attention.dense"],
        ["mlp.dense_h_to_4h"],
        ["mlp.dense_4h_to_h"],
    ],
    "falcon-multi-query": [
        ["self_attention.query_key_value", "mlp.dense_h_to_4h"],
        ["self_attention.dense"],
        ["mlp.dense_4h_to_h"],
    ],
}


def groups(layer: LayerLinears) -> list[list[str]]:
    return [[layer.local_name(linear) for linear in group] for group in layer.groups]


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "opt", *VISION_FAMILIES])
def test_families_of_the_former_table(family: str, tiny_model: ModelDirectory) -> None:
    architecture = read_architecture(load_config(str(tiny_model(family))))
    prefix = {"opt": "model.decoder.layers"}.get(family, "model.layers")
    if family in VISION_FAMILIES:
        prefix = "model.language_model.layers"
        assert [groups(layer) for layer in architecture.vision_layers[TOWER_PART]] == [CLIP_GROUPS] * 2
        [projector] = architecture.vision_layers[PROJECTOR_PART]
        assert groups(projector) == [["linear_1"], ["linear_2"]]
        assert projector.prefix == "model.multi_modal_projector"
        assert architecture.vision_layers[TOWER_PART][1].prefix == "model.vision_tower.encoder.layers.1"
    assert architecture.layers_prefix == prefix
    expected = OPT_GROUPS if family == "opt" else LLAMA_GROUPS
    assert [groups(layer) for layer in architecture.layers] == [expected] * 2
    assert [layer.prefix for layer in architecture.layers] == [f"{prefix}.0", f"{prefix}.1"]


@pytest.mark.parametrize("family", OTHER_GROUPS)
def test_groups_are_by_the_tensor_that_is_read(family: str) -> None:
    architecture = read_architecture(tiny_config(family))
    assert [groups(layer) for layer in architecture.layers] == [OTHER_GROUPS[family]] * 4


@pytest.mark.parametrize("family", ["qwen3_next", "qwen3_5_text"])
def test_layers_of_linear_attention_and_of_attention(family: str) -> None:
    """Both read the block's input; what gates the states of a linear attention is left alone."""
    architecture = read_architecture(tiny_config(family))
    delta_net = [["linear_attn.in_proj_qkv", "linear_attn.in_proj_z"], ["linear_attn.out_proj"]]
    if family == "qwen3_next":
        delta_net[0] = ["linear_attn.in_proj_qkvz"]
    blocks = [groups(layer)[:2] for layer in architecture.layers]
    assert blocks == [delta_net, LLAMA_GROUPS[:2]] * 2
    gates = {"qwen3_next": {"in_proj_ba"}, "qwen3_5_text": {"in_proj_b", "in_proj_a"}}[family]
    left = {f"model.layers.0.linear_attn.{leaf}.weight" for leaf in (*gates, "conv1d")}
    assert left <= architecture.other_tensors.keys()
    assert architecture.linear_key_size == 256


@pytest.mark.parametrize(("size", "held"), [(1, 1024), (2, 512)])
def test_shares_of_a_linear_attention(size: int, held: int) -> None:
    """Two heads of 128 for queries, two for keys, and four for values: each is cut by itself."""
    architecture = read_architecture(tiny_config("qwen3_5_text"))
    name = "model.layers.0.linear_attn.in_proj_qkv"
    assert [block.size for block in architecture.output_blocks(name, 1024)] == [256, 256, 512]
    assert architecture.outputs_on_rank(name, 1024, size) == held


@pytest.mark.parametrize(("layer", "head_size", "sizes"), [(0, 32, {1: 64, 2: 32}), (1, 64, {1: 64, 2: 64})])
def test_heads_are_those_of_the_layer(layer: int, head_size: int, sizes: dict[int, int]) -> None:
    """Gemma 4 has two heads of 32 for keys where attention slides, and one of 64 where it is full."""
    architecture = read_architecture(tiny_config("gemma4_text"))
    linears = {linear.name.rpartition(".")[2]: linear for linear in architecture.layers[layer].linears}
    assert linears["q_proj"].out_features == 4 * head_size
    assert ("v_proj" in linears) is (layer == 0)
    keys = linears["k_proj"]
    for size, held in sizes.items():
        assert architecture.outputs_on_rank(keys.name, keys.out_features, size) == held
        assert architecture.num_output_shards(keys.name, size) == min(size, keys.out_features // head_size)


def reads_the_same(model: nn.Module, layer: LayerLinears, kwargs: dict[str, Any]) -> dict[str, list[str]]:
    """Return, by a real pass, Linear -> those of its layer whose inputs have the same values."""
    inputs: dict[str, torch.Tensor] = {}
    for linear in layer.linears:
        model.get_submodule(linear.name).register_forward_pre_hook(
            lambda _module, args, name=linear.name: inputs.setdefault(name, args[0].clone())
        )
    with torch.no_grad():
        model(**kwargs)
    return {
        name: [other for other, seen in inputs.items() if torch.equal(seen, read)]
        for name, read in inputs.items()
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_a_real_pass_reads_the_same_values_within_a_group(family: str) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(tiny_config(family), dtype=torch.float32).eval()
    randomise(model, torch.Generator().manual_seed(0))  # two norms of one input differ in a trained model
    architecture = describe(model, model.config)
    layer = architecture.layers[-1]
    same = reads_the_same(model, layer, {"input_ids": torch.arange(3, 23)[None], "use_cache": False})
    for group in layer.groups:
        names = [linear.name for linear in group]
        for name in names:
            assert sorted(same[name]) == sorted(names)


def test_stacks_are_what_vllm_multiplies_as_one() -> None:
    layer = read_architecture(tiny_config("cohere")).layers[0]
    stacks = [[layer.local_name(linear) for linear in stack] for stack in layer.stacks]
    assert stacks == [LLAMA_GROUPS[0], LLAMA_GROUPS[2], ["self_attn.o_proj"], ["mlp.down_proj"]]
    llama = read_architecture(AutoConfig.for_model("llama", num_hidden_layers=1)).layers[0]
    assert llama.stacks == llama.groups


@pytest.mark.parametrize(
    ("family", "out_features", "size", "expected"),
    [
        ("phi3", 256, 2, 128),  # 4 heads of 32, 2 of keys and 2 of values
        ("phi3", 256, 4, 32 + 32 + 32),  # keys and values are repeated
        ("falcon-multi-query", 192, 4, 32 + 32 + 32),
    ],
)
def test_shares_of_fused_projections(family: str, out_features: int, size: int, expected: int) -> None:
    architecture = read_architecture(tiny_config(family))
    fused = architecture.layers[0].linears[0]
    assert fused.out_features == out_features
    assert architecture.outputs_on_rank(fused.name, out_features, size) == expected


def refused(config: Any) -> str:
    with pytest.raises(ArchitectureError) as caught:
        read_architecture(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("gpt2", "transformer.h.0.mlp.c_fc.weight is a weight of Conv1D, which is no Linear"),
        ("granitemoeshared", "a mixture of experts: model.layers.0.block_sparse_moe.experts is a GraniteMoe"),
        ("aria_text", "AriaExperts, whose checkpoints are not known here"),
        ("minimax", "layers of another kind than attention: linear_attention without keys, such as Mamba"),
        ("gemma4_text", "layers that read embeddings of their own"),
        ("bart", "an encoder with a decoder"),
        ("t5", "an encoder with a decoder"),
        ("mllama", "layers that attend to the features of pictures"),
        ("qwen2_audio", "a decoder among other parts"),
        ("mamba", "it has no attention heads"),
        ("vit", "transformers has no language model of this type"),
    ],
)
def test_what_is_refused_is_named(model_type: str, reason: str) -> None:
    message = refused(AutoConfig.for_model(model_type))
    assert model_type in message
    assert reason in message


@pytest.mark.parametrize(
    ("model_type", "auto_map", "reason"),
    [
        ("lama", None, "has no such models (did you mean llama?)"),
        ("internlm3", {"AutoConfig": "configuration_internlm3.Config"}, "brings its own code"),
    ],
)
def test_types_that_transformers_does_not_have(
    model_type: str, auto_map: dict[str, str] | None, reason: str, tmp_path: Path
) -> None:
    config = {"model_type": model_type} | ({"auto_map": auto_map} if auto_map else {})
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArchitectureError) as caught:
        load_config(str(tmp_path))
    assert f"{model_type!r} is not supported" in str(caught.value)
    assert reason in str(caught.value)


def tiny_llama() -> nn.Module:
    return build_meta_model(
        AutoConfig.for_model(
            "llama",
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            vocab_size=64,
        )
    )


def test_a_linear_that_runs_twice_is_refused() -> None:
    model = on_meta(tiny_llama())
    model.set_submodule("model.layers.1.mlp", model.get_submodule("model.layers.0.mlp"))
    with pytest.raises(
        ArchitectureError, match=r"layers\.0\.mlp\.gate_proj runs 2 times in a pass, not once"
    ):
        find_decoder(model)


def test_a_linear_that_never_runs_is_refused() -> None:
    model = on_meta(tiny_llama())
    model.get_submodule("model.layers.1").add_module("adapter", nn.Linear(32, 8, device="meta"))
    with pytest.raises(ArchitectureError, match=r"layers\.1\.adapter runs never in a pass, not once"):
        find_decoder(model)


def test_linears_that_share_a_weight_are_refused() -> None:
    model = tiny_llama()
    first, second = (model.get_submodule(f"model.layers.{index}.mlp.up_proj") for index in range(2))
    second.weight = first.weight
    with pytest.raises(
        ArchitectureError, match=r"layers\.0\.mlp\.up_proj and .*layers\.1\.mlp\.up_proj share"
    ):
        find_decoder(on_meta(model))


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_llama()
    before = {name: copy.deepcopy(buffer) for name, buffer in model.named_buffers()}
    architecture: Architecture = describe(model, model.config)
    assert architecture.num_layers == 2
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name])
