"""Single vLLM layers without an engine: every kind of layer, rank by rank, against y = x W^T."""

from __future__ import annotations

import gc
import json
import re
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file

from ercsvd_deploy.exporters.vllm.kernels import lowrank_linear as ops  # noqa: F401 - defines torch.ops.ercsvd
from ercsvd_deploy.exporters.vllm.plugin import register
from ercsvd_deploy.format.schema import CheckpointFormatError
from tests.conftest import ModelDirectory
from tests.tiny_models import (
    HEAD_DIM,
    HIDDEN_SIZE,
    INTERMEDIATE_SIZE,
    NUM_HEADS,
    NUM_KV_HEADS,
    compress_at_random,
)
from tests.vllm.in_process import vllm_in_process  # noqa: F401 - a fixture of this module

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("vllm_in_process")]

ATTENTION = "model.layers.0.self_attn"
MLP = "model.layers.0.mlp"
# vLLM's layer -> its projections in the checkpoint, with the shard id that vLLM's loaders pass
LAYERS: dict[str, dict[str, str | int | None]] = {
    f"{ATTENTION}.qkv_proj": {f"{ATTENTION}.{name}_proj": name for name in "qkv"},
    f"{MLP}.gate_up_proj": {f"{MLP}.gate_proj": 0, f"{MLP}.up_proj": 1},
    f"{ATTENTION}.o_proj": {f"{ATTENTION}.o_proj": None},
    f"{MLP}.down_proj": {f"{MLP}.down_proj": None},
}
ROW_PARALLEL = re.compile(r"\.(o_proj|down_proj)$")


class Served:
    """The layers of a compressed directory's first decoder layer, on one tensor-parallel rank.

    Args:
        directory: the compressed checkpoint.
        dtype: of the activations.
        rank: (tensor-parallel rank, size), which the layers are told.
        patch: the test's monkeypatch.
        edit: changes the description before it is read.
        replicate: whether every rank holds the whole of the layers that are otherwise row-parallel.
    """

    def __init__(
        self,
        directory: Path,
        dtype: torch.dtype,
        patch: pytest.MonkeyPatch,
        rank: tuple[int, int] = (0, 1),
        edit: Callable[[dict[str, Any]], None] = lambda _: None,
        replicate: bool = False,
    ) -> None:
        from vllm.model_executor.layers import linear
        from vllm.model_executor.layers.quantization import get_quantization_config

        register()
        patch.setattr(linear, "get_tensor_model_parallel_rank", lambda: rank[0])
        patch.setattr(linear, "get_tensor_model_parallel_world_size", lambda: rank[1])
        described = json.loads((directory / "config.json").read_text())["quantization_config"]
        described["modules"] = {
            name: module for name, module in described["modules"].items() if ".layers.0." in name
        }
        edit(described["modules"])
        self.config = get_quantization_config("ercsvd").from_config(described)
        self.tensors = load_file(directory / "model.safetensors")
        self.layers: dict[str, Any] = {}
        shared = {"bias": False, "params_dtype": dtype, "quant_config": self.config}
        for name in LAYERS:
            if name.endswith("qkv_proj"):
                layer = linear.QKVParallelLinear(
                    HIDDEN_SIZE, HEAD_DIM, NUM_HEADS, NUM_KV_HEADS, prefix=name, **shared
                )
            elif name.endswith("gate_up_proj"):
                layer = linear.MergedColumnParallelLinear(
                    HIDDEN_SIZE, [INTERMEDIATE_SIZE] * 2, prefix=name, **shared
                )
            else:
                width = INTERMEDIATE_SIZE if name.endswith("down_proj") else NUM_HEADS * HEAD_DIM
                layer = (
                    linear.ReplicatedLinear(width, HIDDEN_SIZE, prefix=name, **shared)
                    if replicate
                    else linear.RowParallelLinear(
                        width, HIDDEN_SIZE, reduce_results=False, prefix=name, **shared
                    )
                )
            self.layers[name] = layer

    def load(self) -> None:
        """Route every tensor as vLLM's model loaders do: parameter by name, its loader with the shard id."""
        for name, projections in LAYERS.items():
            parameters = dict(self.layers[name].named_parameters())
            for projection, shard_id in projections.items():
                for tensor_name, tensor in self.tensors.items():
                    if not tensor_name.startswith(f"{projection}."):
                        continue
                    parameter = parameters[tensor_name.removeprefix(f"{projection}.")]
                    extra = () if shard_id is None else (shard_id,)
                    parameter.weight_loader(parameter, tensor, *extra)

    def finalize(self) -> None:
        for layer in self.layers.values():
            layer.quant_method.process_weights_after_loading(layer)

    def ready(self) -> dict[str, Any]:
        self.load()
        self.finalize()
        return self.layers


def expected_outputs(dense: Path, name: str, x: torch.Tensor) -> torch.Tensor:
    """Return the layer's full output in float64, from the weights that the checkpoint stands for."""
    weights = load_file(dense / "model.safetensors")
    stacked = torch.cat([weights[f"{projection}.weight"] for projection in LAYERS[name]])
    return x.double() @ stacked.double().T


def inputs(name: str, dtype: torch.dtype) -> torch.Tensor:
    width = INTERMEDIATE_SIZE if name.endswith("down_proj") else HIDDEN_SIZE
    return torch.randn(5, width, generator=torch.Generator().manual_seed(2)).to(dtype)


def split_like_vllm(name: str, full: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    """Return a rank's share of a column-parallel layer's output, replicated KV heads included."""
    heads = (NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS)
    widths = [count * HEAD_DIM for count in heads] if name.endswith("qkv_proj") else [INTERMEDIATE_SIZE] * 2
    shares = []
    for index, part in enumerate(torch.split(full, widths, dim=-1)):
        blocks = min(size, heads[index]) if name.endswith("qkv_proj") else size
        shares.append(part.chunk(blocks, dim=-1)[rank * blocks // size])
    return torch.cat(shares, dim=-1)


@pytest.fixture(scope="module")
def pivoted_models(tmp_path_factory: pytest.TempPathFactory, tiny_model: ModelDirectory) -> dict[str, Path]:
    """Return kind of matrices -> directory whose first layer mixes pivoted, low-rank and dense Linears."""
    directories = {kind: tmp_path_factory.mktemp(kind) for kind in ("pivoted float32", "pivoted int4")}
    int4 = {"bits": 4, "group_size": 32, "sym": True}
    for kind, directory in directories.items():
        quantization = int4 if kind.endswith("int4") else None
        compress_at_random(
            tiny_model("llama"), directory, quantization=quantization, pivoted_layers=frozenset({"0"})
        )
    return directories


# Kind -> which Linears of the first layer have a correction, bits of their integers, layers with pivots.
CORRECTED: dict[str, tuple[Literal["some", "all"], int, frozenset[str]]] = {
    "corrected int4": ("all", 4, frozenset()),
    "corrected int3": ("all", 3, frozenset()),
    "some corrected int4": ("some", 4, frozenset()),
    "corrected beside pivots int4": ("some", 4, frozenset({"0"})),
    "corrected int4 in float32": ("all", 4, frozenset()),
}


@pytest.fixture(scope="module")
def corrected_models(tmp_path_factory: pytest.TempPathFactory, tiny_model: ModelDirectory) -> dict[str, Path]:
    """Return kind of matrices -> directory whose first layer has integers with low-rank corrections."""
    directories = {}
    for kind, (corrected, bits, pivoted_layers) in CORRECTED.items():
        directories[kind] = tmp_path_factory.mktemp("corrected")
        compress_at_random(
            tiny_model("llama"),
            directories[kind],
            quantization={"bits": bits, "group_size": 32, "sym": True},
            corrected=corrected,
            pivoted_layers=pivoted_layers,
        )
    return directories


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("kind", ["float32", "int4", "pivoted float32", "pivoted int4", *CORRECTED])
def test_every_layer_on_every_rank(
    kind: str,
    size: int,
    low_rank_model: ModelDirectory,
    mixed_model: ModelDirectory,
    pivoted_models: dict[str, Path],
    corrected_models: dict[str, Path],
    materialised: Callable[[Path], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = pivoted_models | corrected_models
    directory = made.get(kind) or (low_rank_model if kind == "float32" else mixed_model)("llama")
    dtype = torch.float32 if kind.endswith("float32") else torch.float16
    tolerance = 2e-5 if kind.endswith("float32") else 2e-2
    row_sums: dict[str, torch.Tensor] = {}
    for rank in range(size):
        for name, layer in Served(directory, dtype, monkeypatch, (rank, size)).ready().items():
            x = inputs(name, dtype)
            full = expected_outputs(materialised(directory), name, x)
            if ROW_PARALLEL.search(name):
                share = x.chunk(size, dim=-1)[rank].contiguous()
                row_sums[name] = row_sums.get(name, torch.zeros_like(full)) + layer(share)[0]
            else:
                expected = split_like_vllm(name, full, rank, size)
                torch.testing.assert_close(layer(x)[0].double(), expected, rtol=tolerance, atol=tolerance)
    for name, total in row_sums.items():
        full = expected_outputs(materialised(directory), name, inputs(name, dtype))
        torch.testing.assert_close(total, full, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "quantization",
    [
        {"bits": 4, "group_size": 64, "sym": False},
        {"bits": 4, "group_size": 32, "sym": False},
        {"bits": 4, "group_size": -1, "sym": True},
        {"bits": 2, "group_size": 32, "sym": True},
        {"bits": 3, "group_size": 32, "sym": False},
        {"bits": 5, "group_size": -1, "sym": False},
        {"bits": 6, "group_size": 32, "sym": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("size", [1, 2])
def test_other_integer_formats(
    quantization: dict[str, Any],
    size: int,
    tiny_model: ModelDirectory,
    materialised: Callable[[Path], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compress_at_random(tiny_model("llama"), tmp_path, quantization=quantization)
    for rank in range(size):
        name = f"{ATTENTION}.qkv_proj"
        layer = Served(tmp_path, torch.float16, monkeypatch, (rank, size)).ready()[name]
        x = inputs(name, torch.float16)
        expected = split_like_vllm(name, expected_outputs(materialised(tmp_path), name, x), rank, size)
        torch.testing.assert_close(layer(x)[0].double(), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("is_pivoted", [False, True])
def test_layers_whose_weights_stay_plain_use_the_operator(
    is_pivoted: bool,
    low_rank_model: ModelDirectory,
    pivoted_models: dict[str, Path],
    materialised: Callable[[Path], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod

    # as on CUDA, where vLLM does not repack plain weights
    monkeypatch.setattr(UnquantizedLinearMethod, "process_weights_after_loading", lambda *_: None)
    operator = Mock(wraps=torch.ops.ercsvd.lowrank_linear)
    monkeypatch.setattr(torch.ops.ercsvd, "lowrank_linear", operator)
    directory = pivoted_models["pivoted float32"] if is_pivoted else low_rank_model("llama")
    served = Served(directory, torch.float32, monkeypatch)
    altered = [name for name, layer in served.ready().items() if hasattr(layer, "ercsvd")]
    for name in altered:
        x = inputs(name, torch.float32)
        expected = expected_outputs(materialised(directory), name, x)
        torch.testing.assert_close(served.layers[name](x)[0].double(), expected, rtol=2e-5, atol=2e-5)
    assert operator.call_count == len(altered) > 0


def test_corrections_without_kernels_are_not_for_the_operator(
    corrected_models: dict[str, Path], materialised: Callable[[Path], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has one first matrix for a projection, and a corrected one has two, here in one stack."""
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod

    # as on CUDA, where vLLM does not repack plain weights
    monkeypatch.setattr(UnquantizedLinearMethod, "process_weights_after_loading", lambda *_: None)
    monkeypatch.setattr(
        UnquantizedLinearMethod,
        "apply",
        lambda _, layer, x, bias: torch.nn.functional.linear(x, layer.weight, bias),
    )
    directory = corrected_models["corrected int4 in float32"]
    layers = Served(directory, torch.float32, monkeypatch).ready()
    assert len(layers[f"{ATTENTION}.o_proj"].ercsvd._stacks) == 1
    for name, layer in layers.items():
        x = inputs(name, torch.float32)
        expected = expected_outputs(materialised(directory), name, x)
        torch.testing.assert_close(layer(x)[0].double(), expected, rtol=2e-5, atol=2e-5)


def test_every_missing_part_of_a_correction_is_named(
    corrected_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    served = Served(corrected_models["corrected int4"], torch.float16, monkeypatch)
    q, up = f"{ATTENTION}.q_proj", f"{MLP}.up_proj"
    for name in (f"{q}.weight_packed", f"{q}.factor_a.weight_scale", f"{up}.factor_b.weight"):
        del served.tensors[name]
    served.load()
    with pytest.raises(CheckpointFormatError) as raised:
        served.finalize()
    message = str(raised.value)
    assert "3 problems" in message
    assert f"missing: {q}.weight_packed" in message
    assert f"missing: {q}.factor_a.weight_scale" in message
    assert f"missing: {up}.factor_b.weight" in message


@pytest.mark.parametrize("kind", ["corrected int4", "corrected int3"])
def test_first_factors_of_a_fused_layer_are_stacked(
    kind: str, corrected_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    served = Served(corrected_models[kind], torch.float16, monkeypatch)
    gate_up = served.layers[f"{MLP}.gate_up_proj"].ercsvd
    # gate has factors of 4 bits, like the integers of "int4", and up plain ones
    integers, of_gate, of_up = ((0, ""), (1, "")), (0, "factor_a"), (1, "factor_a")
    expected = (
        [(*integers, of_gate), (of_up,)] if kind == "corrected int4" else [integers, (of_gate,), (of_up,)]
    )
    assert [stack.members for stack in gate_up._stacks] == expected
    qkv = served.layers[f"{ATTENTION}.qkv_proj"].ercsvd
    assert [stack.members for stack in qkv._stacks if stack.matrix._quantization.bits == 8] == [
        ((0, "factor_a"), (2, "factor_a"))
    ]


def test_a_replicated_layer_keeps_the_whole_matrix(
    low_rank_model: ModelDirectory, materialised: Callable[[Path], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = low_rank_model("llama")
    name = f"{MLP}.down_proj"
    layer = Served(directory, torch.float32, monkeypatch, (1, 2), replicate=True).ready()[name]
    x = inputs(name, torch.float32)
    expected = expected_outputs(materialised(directory), name, x)
    torch.testing.assert_close(layer(x)[0].double(), expected, rtol=2e-5, atol=2e-5)


def test_one_error_names_every_tensor_that_is_wrong(
    mixed_model: ModelDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = Served(mixed_model("llama"), torch.float16, monkeypatch)
    q, k, v, up = (f"{ATTENTION}.q_proj", f"{ATTENTION}.k_proj", f"{ATTENTION}.v_proj", f"{MLP}.up_proj")
    del served.tensors[f"{q}.factor_a.weight_scale"]
    del served.tensors[f"{v}.factor_b.weight"]
    served.tensors[f"{k}.factor_a.weight"] = torch.zeros(32, HIDDEN_SIZE)
    served.tensors[f"{v}.factor_a.weight"] = served.tensors[f"{v}.factor_a.weight"][:-1]
    served.tensors[f"{up}.factor_a.weight_shape"] = torch.tensor([1, 2])
    served.load()
    with pytest.raises(CheckpointFormatError) as raised:
        served.finalize()
    message = str(raised.value)
    assert "5 problems" in message
    assert f"missing: {q}.factor_a.weight_scale" in message
    assert f"missing: {v}.factor_b.weight" in message
    assert f"surplus: {k}.factor_a.weight [32, {HIDDEN_SIZE}]" in message
    assert f"mis-shaped: {v}.factor_a.weight is" in message
    assert f"mis-shaped: {up}.factor_a.weight_shape says [1, 2]" in message


def test_nothing_is_missing_in_layers_that_vllm_leaves_out(
    mixed_model: ModelDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A vision tower where no images are allowed is built on the meta device and not loaded."""
    with torch.device("meta"):
        left_out = Served(mixed_model("llama"), torch.float16, monkeypatch)
    left_out.config.check_loaded()
    with pytest.raises(CheckpointFormatError, match="missing: "):
        Served(mixed_model("llama"), torch.float16, monkeypatch).config.check_loaded()


def test_a_wrong_row_order_is_named(pivoted_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    served = Served(pivoted_models["pivoted float32"], torch.float32, monkeypatch)
    order = served.tensors[f"{ATTENTION}.q_proj.row_order"]
    served.tensors[f"{ATTENTION}.q_proj.row_order"] = order.flip(0)
    served.load()
    with pytest.raises(CheckpointFormatError, match=r"damaged: .*q_proj\.row_order is not an order of"):
        served.finalize()


def test_pivots_that_cannot_be_dealt_to_the_ranks_are_refused(
    pivoted_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def keep_in_one_block(modules: dict[str, Any]) -> None:
        modules[f"{ATTENTION}.q_proj"]["pivot_blocks"] = 1

    with pytest.raises(
        CheckpointFormatError, match=r"q_proj: its pivots .* a tensor_parallel_size that divides 1"
    ):
        Served(pivoted_models["pivoted float32"], torch.float32, monkeypatch, (0, 2), edit=keep_in_one_block)


def test_a_config_of_another_run_is_refused(
    mixed_model: ModelDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forget_attention(modules: dict[str, Any]) -> None:
        for projection in LAYERS[f"{ATTENTION}.qkv_proj"]:
            modules.pop(projection, None)
        modules["model.layers.0.mlp.router"] = {"layout": "low_rank", "shape": [8, 8], "rank": 4}

    served = Served(mixed_model("llama"), torch.float16, monkeypatch, edit=forget_attention)
    served.load()
    with pytest.raises(CheckpointFormatError) as raised:
        served.finalize()
    message = str(raised.value)
    assert "unknown: model.layers.0.mlp.router" in message
    for tensor_name in served.tensors:
        if tensor_name.startswith((f"{ATTENTION}.q_proj", f"{ATTENTION}.k_proj", f"{ATTENTION}.v_proj")):
            assert f"surplus: {tensor_name} " in message


def test_a_description_of_another_shape_is_refused(
    low_rank_model: ModelDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def widen(modules: dict[str, Any]) -> None:
        modules[f"{ATTENTION}.k_proj"] = {"layout": "low_rank", "shape": [128, 128], "rank": 32}

    with pytest.raises(CheckpointFormatError, match=r"k_proj: config.json describes shape \[128, 128\]"):
        Served(low_rank_model("llama"), torch.float32, monkeypatch, edit=widen)


def test_integer_matrices_that_no_kernel_takes_are_named(
    tiny_model: ModelDirectory,
    mixed_model: ModelDirectory,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ERCSVD_REQUIRE_KERNELS", "1")
    with pytest.raises(ValueError, match=r"q_proj.*16-bit activations: start vLLM with --dtype float16"):
        Served(mixed_model("llama"), torch.float32, monkeypatch)
    compress_at_random(
        tiny_model("llama"), tmp_path / "groups", quantization={"bits": 4, "group_size": 128, "sym": True}
    )
    with pytest.raises(ValueError, match=r"(o|down)_proj.* 32 columns on a rank are not whole groups of 128"):
        Served(tmp_path / "groups", torch.float16, monkeypatch, (0, 4))
    compress_at_random(
        tiny_model("llama"), tmp_path / "int8", quantization={"bits": 8, "group_size": 32, "sym": True}
    )
    with pytest.raises(ValueError, match=r"q_proj.factor_a.* int8 in groups of 32: (?s:.*)CPUWNA16"):
        Served(tmp_path / "int8", torch.float16, monkeypatch)


# What no kernel of vLLM's CPU engine takes, beside float32 activations.
WITHOUT_KERNELS = [
    {"bits": 8, "group_size": 32, "sym": True},
    {"bits": 8, "group_size": -1, "sym": True},
    {"bits": 8, "group_size": 32, "sym": False},
]


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize(
    ("quantization", "dtype"),
    [(quantization, torch.float16) for quantization in WITHOUT_KERNELS]
    + [({"bits": 4, "group_size": 32, "sym": sym}, torch.float32) for sym in (True, False)],
    ids=str,
)
def test_matrices_without_a_kernel_are_served_as_plain_ones(
    quantization: dict[str, Any],
    dtype: torch.dtype,
    size: int,
    tiny_model: ModelDirectory,
    materialised: Callable[[Path], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    told: list[str],
) -> None:
    compress_at_random(tiny_model("llama"), tmp_path, quantization=quantization)
    tolerance = 2e-5 if dtype == torch.float32 else 2e-2
    for rank in range(size):
        for name, layer in Served(tmp_path, dtype, monkeypatch, (rank, size)).ready().items():
            if ROW_PARALLEL.search(name):
                continue
            x = inputs(name, dtype)
            expected = split_like_vllm(name, expected_outputs(materialised(tmp_path), name, x), rank, size)
            torch.testing.assert_close(layer(x)[0].double(), expected, rtol=tolerance, atol=tolerance)
    assert len(told) == size
    assert "matrices are served as plain" in told[0]


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Collect what the plugin says through vLLM's log."""
    from ercsvd_deploy.exporters.vllm import config as quantization_config

    lines: list[str] = []
    monkeypatch.setattr(quantization_config, "init_logger", lambda _: Mock(warning=lines.append))
    return lines


def _without_operator(*_: Any, **__: Any) -> torch.Tensor:
    raise AttributeError("'_OpNamespace' '_C' object has no attribute 'cpu_gemm_wna16'")


def _wrong_product(x: torch.Tensor, rows: int) -> torch.Tensor:
    return torch.ones(*x.shape[:-1], rows, dtype=x.dtype)


@pytest.mark.parametrize("fault", ["no operator", "wrong product", "fails to repack"])
def test_a_kernel_that_does_not_work_in_this_build_is_not_used(
    fault: str,
    mixed_model: ModelDirectory,
    materialised: Callable[[Path], Path],
    monkeypatch: pytest.MonkeyPatch,
    told: list[str],
) -> None:
    """`can_implement` says yes on every CPU, but the operator exists in vLLM's AVX-512 builds only."""
    from vllm.model_executor.kernels.linear.mixed_precision import cpu

    kernel = cpu.CPUWNA16LinearKernel
    monkeypatch.setattr(kernel, "process_weights_after_loading", lambda *_: None)
    if fault == "no operator":
        monkeypatch.setattr(kernel, "apply_weights", _without_operator)
    elif fault == "wrong product":
        monkeypatch.setattr(
            kernel, "apply_weights", lambda _, layer, x, __: _wrong_product(x, layer.output_size)
        )
    else:
        monkeypatch.setattr(
            kernel, "process_weights_after_loading", lambda _, layer: delattr(layer, "weight_packed")
        )
    directory = mixed_model("llama")
    for name, layer in Served(directory, torch.float16, monkeypatch).ready().items():
        x = inputs(name, torch.float16)
        expected = expected_outputs(materialised(directory), name, x)
        torch.testing.assert_close(layer(x)[0].double(), expected, rtol=2e-2, atol=2e-2)
    assert len(told) == 1
    assert "CPUWNA16LinearKernel" in told[0]
    monkeypatch.setenv("ERCSVD_REQUIRE_KERNELS", "1")
    served = Served(directory, torch.float16, monkeypatch)
    served.load()
    with pytest.raises(ValueError, match="CPUWNA16LinearKernel"):
        served.finalize()


def test_what_plain_matrices_cost_is_told_to_the_byte(
    mixed_model: ModelDirectory, monkeypatch: pytest.MonkeyPatch, told: list[str]
) -> None:
    """Against the bytes of all tensors, integers before and plain matrices after."""
    served = Served(mixed_model("llama"), torch.float32, monkeypatch)
    before, integers = held(served), 0
    for layer in served.layers.values():
        integers += sum(name.endswith("weight_packed") for name, p in layer.named_parameters() if p.numel())
    monkeypatch.setattr(
        "vllm.model_executor.layers.linear.UnquantizedLinearMethod.process_weights_after_loading",
        lambda *_: None,  # vLLM's own repacking would hide the plain matrices
    )
    served.ready()
    assert re.search(rf"{integers} of {integers} integer", told[0])
    cost = re.search(r"take ([0-9.,]+) MiB more", told[0])
    assert cost is not None
    assert float(cost[1]) == round((held(served) - before) / 2**20, 1)


def test_the_integers_are_gone_once_plain_matrices_stand_for_them(
    mixed_model: ModelDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = Served(mixed_model("llama"), torch.float32, monkeypatch)
    served.load()
    integers = [
        weakref.ref(matrix)
        for layer in served.layers.values()
        for matrix in layer.modules()
        if hasattr(matrix, "weight_packed") and matrix.weight_packed.numel()
    ]
    served.finalize()
    gc.collect()
    assert integers
    assert [integer for integer in integers if integer() is not None] == []


def held(served: Served) -> int:
    """Return the bytes of the layers' parameters."""
    return sum(p.nbytes for layer in served.layers.values() for p in layer.parameters())


def test_config_json_can_require_kernels(
    mixed_model: ModelDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ercsvd_deploy.format.schema import CheckpointConfig

    described = json.loads((mixed_model("llama") / "config.json").read_text())["quantization_config"]
    assert "require_kernels" not in CheckpointConfig.read(described).write()
    required = CheckpointConfig.read(described | {"require_kernels": True})
    assert CheckpointConfig.read(required.write()).require_kernels
    monkeypatch.setattr("ercsvd_deploy.exporters.vllm.config.CheckpointConfig.read", lambda _: required)
    with pytest.raises(ValueError, match=r"q_proj.*16-bit activations"):
        Served(mixed_model("llama"), torch.float32, monkeypatch)


@pytest.mark.parametrize("value", ["0", "false", "No", "off", ""])
def test_kernels_are_not_required_where_the_variable_says_no(
    value: str, mixed_model: ModelDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ERCSVD_REQUIRE_KERNELS", value)
    Served(mixed_model("llama"), torch.float32, monkeypatch)


@pytest.mark.parametrize("value", ["1", "true", "YES", "on"])
def test_kernels_are_required_where_the_variable_says_so(
    value: str, mixed_model: ModelDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ERCSVD_REQUIRE_KERNELS", value)
    with pytest.raises(ValueError, match=r"q_proj.*16-bit activations"):
        Served(mixed_model("llama"), torch.float32, monkeypatch)


def test_a_variable_that_nobody_understands_is_refused(
    mixed_model: ModelDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ERCSVD_REQUIRE_KERNELS", "never")
    with pytest.raises(ValueError, match="ERCSVD_REQUIRE_KERNELS is 'never'; set it to 1"):
        Served(mixed_model("llama"), torch.float16, monkeypatch)


def test_weights_cannot_be_replaced_once_served(
    low_rank_model: ModelDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = Served(low_rank_model("llama"), torch.float32, monkeypatch)
    served.ready()
    with pytest.raises(RuntimeError, match="cannot be replaced; restart vLLM"):
        served.load()
