"""Experts as Linears of their own: beside transformers' module, and as checkpoints have them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ercsvd_deploy.format.files.weight_files import open_directory
from ercsvd_deploy.models.description.architecture import ArchitectureError
from ercsvd_deploy.models.description.families import describe
from ercsvd_deploy.models.description.meta import build_meta_model, load_config
from ercsvd_deploy.models.experts.modules import ExpertsOfScaledTokens, SeparateExperts
from ercsvd_deploy.models.experts.routed import separate_experts
from ercsvd_deploy.models.streaming.layerwise import LayerwiseModel
from ercsvd_deploy.models.streaming.recording import capture_arguments
from tests.families.tiny_families import save_tiny_family, tiny_config
from tests.models.streamed import CPU
from tests.peak_memory import growth
from tests.planning.public_configs import PUBLIC_MODELS

SEPARATE = ("mixtral", "qwen3_moe", "olmoe", "deepseek_v3", "ernie4_5_moe")


@torch.no_grad()
def test_separate_experts_compute_what_transformers_computes() -> None:
    model = AutoModelForCausalLM.from_config(
        tiny_config("mixtral"), dtype=torch.float64, experts_implementation="eager"
    )
    together = model.model.layers[0].mlp.experts
    for parameter in together.parameters():
        parameter.normal_(generator=torch.Generator().manual_seed(0))
    separate_experts(model)
    separate = model.model.layers[0].mlp.experts
    assert isinstance(separate, SeparateExperts)
    for number, expert in enumerate(separate):
        gate, up = together.gate_up_proj[number].chunk(2)
        for name, weight in {"w1": gate, "w3": up, "w2": together.down_proj[number]}.items():
            expert.get_submodule(name).get_parameter("weight").copy_(weight)
    states = torch.randn(40, 128, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    chosen = torch.stack([torch.randperm(7)[:2] for _ in range(40)])  # the last one gets no token
    weights = torch.rand(40, 2, dtype=torch.float64)
    assert torch.allclose(separate(states, chosen, weights), together(states, chosen, weights))


@torch.no_grad()
def test_scaled_tokens_are_those_that_each_expert_of_llama_4_reads() -> None:
    model = AutoModelForCausalLM.from_config(tiny_config("llama4_text"), dtype=torch.float64)
    block = model.model.layers[1].feed_forward
    for parameter in block.parameters():
        parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    together = block.experts
    separate_experts(model)
    separate = block.experts
    assert isinstance(separate, ExpertsOfScaledTokens)
    for number, expert in enumerate(separate):
        gate, up = together.gate_up_proj[number].chunk(2, dim=-1)
        matrices = {"gate_proj": gate.T, "up_proj": up.T, "down_proj": together.down_proj[number].T}
        for name, weight in matrices.items():
            expert.get_submodule(name).get_parameter("weight").copy_(weight)
    states = torch.randn(40, 128, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    arguments = capture_arguments(block, "experts", lambda: block(states))
    assert torch.allclose(separate(*arguments), together(*arguments))
    tokens, chosen = separate.tokens_and_experts(arguments)
    scores, indices = (states @ block.router.weight.T).max(-1)
    assert torch.equal(chosen, indices[:, None])
    assert torch.allclose(tokens, states * scores.sigmoid()[:, None])


def test_experts_of_llama_4_stay_as_they_are_where_a_token_has_several() -> None:
    config = tiny_config("llama4_text")
    config.num_experts_per_tok = 2
    architecture = describe(build_meta_model(config), config)
    assert architecture.expert_parameters
    assert not architecture.expert_linears


@pytest.mark.parametrize("family", SEPARATE)
def test_experts_are_found_under_the_names_of_checkpoints(family: str, tmp_path: Path) -> None:
    directory = save_tiny_family(tmp_path, family)
    config = load_config(str(directory))
    architecture = describe(build_meta_model(config), config)
    store = open_directory(directory)
    assert architecture.expert_linears
    for linear in architecture.expert_linears:
        name = f"{architecture.checkpoint_name(linear.name)}.weight"
        assert store.info(name).shape == (linear.out_features, linear.in_features)
    routers = [
        name for name in architecture.other_tensors if name.endswith((".gate.weight", "router.weight"))
    ]
    assert len(routers) == sum(layer.experts is not None for layer in architecture.layers)
    stored = sum(torch.Size(store.info(name).shape).numel() for name in store.names())
    buffers = sum(each.numel() for name, each in _router_buffers(config))
    assert architecture.total_parameters + buffers == stored
    bare = architecture.without_experts
    assert bare.expert_parameters == 0
    assert bare.linears == architecture.linears
    assert bare.total_parameters + architecture.expert_parameters == architecture.total_parameters


def test_what_corrects_a_routers_scores_stays_in_float32(tmp_path: Path) -> None:
    directory = save_tiny_family(tmp_path, "deepseek_v3")
    config = load_config(str(directory))
    model = LayerwiseModel(config, open_directory(directory), CPU, torch.bfloat16)
    with model.layer(2) as layer:
        gate = cast(Any, layer).mlp.gate
        assert gate.e_score_correction_bias.dtype == torch.float32
        assert gate.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("key", ["num_experts", "moe_intermediate_size"])
def test_absurd_numbers_of_experts_are_refused_before_anything_is_built(key: str, tmp_path: Path) -> None:
    config = AutoConfig.for_model("qwen3_moe").to_dict() | {key: 10**9}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArchitectureError, match=rf"{key} is 1,000,000,000; it must be from 0 to"):
        load_config(str(tmp_path))


def _router_buffers(config: Any) -> list[tuple[str, torch.Tensor]]:
    model = build_meta_model(config)
    return [(name, each) for name, each in model.named_buffers() if name.endswith("e_score_correction_bias")]


def test_a_model_of_large_experts_is_built_without_memory(tmp_path: Path) -> None:
    """Llama 4 makes 43 GB of zeros for the experts of one layer before a library could move them away."""
    (tmp_path / "config.json").write_text(json.dumps(PUBLIC_MODELS["Llama-4-Maverick"]))
    config = load_config(str(tmp_path))
    with growth() as grown:
        model = build_meta_model(config)
    assert grown() < 1_000_000_000
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not any(buffer.is_meta for buffer in model.buffers())
