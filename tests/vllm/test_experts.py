"""Routed experts in vLLM's own layer, without an engine: what arrives there, and what is noticed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from ercsvd_deploy.exporters.vllm.plugin import register
from ercsvd_deploy.format.packing import pack
from ercsvd_deploy.format.schema import CheckpointConfig, CheckpointFormatError, Storage, WeightQuantization
from ercsvd_deploy.quantization.grid import QuantizationSettings, round_to_nearest
from tests.vllm.in_process import vllm_in_process  # noqa: F401 - a fixture of this module

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("vllm_in_process")]

NAME = "model.layers.0.mlp.experts"
NUM_EXPERTS, HIDDEN, INTERMEDIATE = 4, 64, 32
SHAPES = {
    "gate_proj": (INTERMEDIATE, HIDDEN),
    "up_proj": (INTERMEDIATE, HIDDEN),
    "down_proj": (HIDDEN, INTERMEDIATE),
}
Kinds = Callable[[int, str], WeightQuantization | None]


class Checkpoint:
    """The experts of one layer: tensors by name within it, the dense matrices, and their description."""

    def __init__(self, kinds: Kinds) -> None:
        generator = torch.Generator().manual_seed(0)
        self.tensors: dict[str, torch.Tensor] = {}
        self.dense: dict[str, torch.Tensor] = {}
        modules = {}
        for number in range(NUM_EXPERTS):
            for leaf, shape in SHAPES.items():
                weight, kind = torch.randn(shape, generator=generator), kinds(number, leaf)
                name = f"{number}.{leaf}"
                if kind is None:
                    self.dense[name] = self.tensors[f"{name}.weight"] = weight
                    continue
                settings = QuantizationSettings(bits=kind.bits, group_size=kind.group_size, sym=kind.sym)
                quantized = round_to_nearest(weight, settings, scale_dtype=torch.float32)
                self.dense[name] = quantized.dequantize()
                self.tensors[f"{name}.weight"] = torch.empty(0)
                leaves = pack(quantized, torch.float32)
                self.tensors |= {f"{name}.{tensor}": value for tensor, value in leaves.items()}
                modules[f"{NAME}.{name}"] = Storage.dense(shape, kind)
        self.config = CheckpointConfig(modules=modules)

    def layer(self, dtype: torch.dtype = torch.float32) -> Any:
        """Return vLLM's routed experts for it, with nothing loaded."""
        from vllm.config import get_current_vllm_config
        from vllm.model_executor.layers.fused_moe.layer import FusedMoEFactory

        from ercsvd_deploy.exporters.vllm.config import ErcSvdConfig

        register()
        get_current_vllm_config().compilation_config.static_forward_context.clear()  # names are unique there
        config = ErcSvdConfig(self.config)
        config.packed_modules_mapping = {}
        runner = FusedMoEFactory(
            num_experts=NUM_EXPERTS,
            top_k=2,
            hidden_size=HIDDEN,
            intermediate_size=INTERMEDIATE,
            params_dtype=dtype,
            quant_config=config,
            prefix=NAME,
        )
        return runner.routed_experts

    def load(self, layer: Any, *, but: str = "-") -> None:
        """Load all tensors but those whose name ends so."""

        def tensors() -> Iterator[tuple[str, torch.Tensor]]:
            yield from ((name, each) for name, each in self.tensors.items() if not name.endswith(but))

        list(layer.load_weights(tensors()))


def int4(sym: bool = True) -> WeightQuantization:
    return WeightQuantization(bits=4, group_size=32, sym=sym)


def mixed(number: int, leaf: str) -> WeightQuantization | None:
    """Return another kind for every expert, one of which is plain, and bits that differ within one."""
    bits: Any = {"gate_proj": 2, "up_proj": 3, "down_proj": 8}[leaf]
    kinds = (int4(), int4(sym=False), None, WeightQuantization(bits=bits, group_size=-1))
    return kinds[number]


def test_integers_become_the_matrices_that_they_stand_for() -> None:
    checkpoint = Checkpoint(mixed)
    layer = checkpoint.layer()
    checkpoint.load(layer)
    assert layer.quant_method.problems() == []
    for number in range(NUM_EXPERTS):
        gate, up = layer.w13_weight[number].split(INTERMEDIATE)
        loaded = {"gate_proj": gate, "up_proj": up, "down_proj": layer.w2_weight[number]}
        for leaf, weight in loaded.items():
            assert torch.equal(weight, checkpoint.dense[f"{number}.{leaf}"])
    layer.quant_method.process_weights_after_loading(layer)
    assert not [name for name, _ in layer.named_parameters() if "packed" in name]


def test_what_does_not_come_as_described_is_named() -> None:
    checkpoint = Checkpoint(lambda number, _leaf: int4() if number else None)
    layer = checkpoint.layer()
    checkpoint.tensors["1.up_proj.weight_scale"] = torch.ones(INTERMEDIATE, 1)
    checkpoint.tensors["0.up_proj.weight_packed"] = torch.ones(INTERMEDIATE, 8, dtype=torch.int32)
    checkpoint.load(layer, but="2.gate_proj.weight_packed")
    with pytest.raises(CheckpointFormatError) as caught:
        layer.quant_method.process_weights_after_loading(layer)
    message = str(caught.value)
    assert "3 problems" in message
    assert f"missing: {NAME}.2.gate_proj.weight_packed [32, 8]" in message
    assert f"mis-shaped: {NAME}.1.up_proj.weight_scale is [32, 1], config.json describes [32, 2]" in message
    assert f"surplus: {NAME}.0.up_proj.weight_packed [32, 8], not described in config.json" in message


def test_required_kernels_that_are_not_there_are_an_error() -> None:
    checkpoint = Checkpoint(lambda *_: int4())
    checkpoint.config = checkpoint.config.model_copy(update={"require_kernels": True})
    with pytest.raises(
        ValueError, match=r"experts: fused kernels of integer experts are used on NVIDIA GPUs"
    ):
        checkpoint.layer()


@pytest.mark.parametrize("bits", [4, 8])
def test_fused_kernels_are_given_the_words_as_they_are(bits: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU vLLM's own method holds the integers; here it believes in one, and nothing is multiplied."""
    from vllm.model_executor.layers.fused_moe.experts.marlin_moe import MarlinExperts
    from vllm.model_executor.layers.fused_moe.oracle.int_wna16 import WNA16MoEBackend
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
        compressed_tensors_moe_wna16 as stock,
    )

    from ercsvd_deploy.exporters.vllm.experts import choice

    class Platform:
        @staticmethod
        def is_cuda() -> bool:
            return True

    monkeypatch.setattr(choice, "current_platform", Platform)
    chosen = (WNA16MoEBackend.MARLIN, MarlinExperts)
    monkeypatch.setattr(stock, "select_wna16_moe_backend", lambda **_: chosen)
    monkeypatch.setattr(stock, "check_moe_marlin_supports_config", lambda *_, **__: True)
    kind = WeightQuantization(bits=bits, group_size=32)
    checkpoint = Checkpoint(lambda *_: kind)
    layer = checkpoint.layer(torch.bfloat16)
    assert isinstance(layer.quant_method, stock.CompressedTensorsWNA16MoEMethod)
    checkpoint.load(layer)
    assert layer.quant_method.problems() == []
    for leaf in ("weight_packed", "weight_scale"):
        w13, w2 = getattr(layer, f"w13_{leaf}"), getattr(layer, f"w2_{leaf}")
        for number in range(NUM_EXPERTS):
            gate, up = w13[number].split(INTERMEDIATE)
            loaded = {"gate_proj": gate, "up_proj": up, "down_proj": w2[number]}
            for projection, tensor in loaded.items():
                expected = checkpoint.tensors[f"{number}.{projection}.{leaf}"]
                assert torch.equal(tensor, expected.to(tensor.dtype))
    for other in (mixed, lambda *_: int4(sym=False), lambda *_: WeightQuantization(bits=3, group_size=32)):
        method = Checkpoint(other).layer(torch.bfloat16).quant_method
        assert not isinstance(method, stock.CompressedTensorsWNA16MoEMethod)
