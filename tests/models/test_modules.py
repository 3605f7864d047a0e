"""The stand-in modules against naive arithmetic."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ercsvd_deploy.format.integer_words import pack_columns, pack_rows
from ercsvd_deploy.format.schema import (
    Bits,
    CheckpointConfig,
    CheckpointFormatError,
    Storage,
    WeightQuantization,
)
from ercsvd_deploy.models.compressed.modules import (
    CorrectedLinear,
    LowRankLinear,
    PackedLinear,
    PivotedLinear,
)
from ercsvd_deploy.models.compressed.replacement import build_linear, canonical_name, replace_linears

OUT, IN, RANK = 24, 64, 8


class Block(nn.Module):
    """Two Linears under names like a language model's."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.ModuleDict(
            {"up_proj": nn.Linear(IN, OUT), "down_proj": nn.Linear(OUT, IN, bias=False)}
        )
        self.norm = nn.LayerNorm(IN)


def low_rank(shape: tuple[int, int] = (OUT, IN)) -> Storage:
    return Storage(layout="low_rank", shape=shape, rank=RANK)


def filled_packed_linear(
    quantization: WeightQuantization, seed: int, *, bias: bool = False
) -> tuple[PackedLinear, torch.Tensor]:
    """Return a PackedLinear of random content, and its weight computed one element at a time."""
    generator = torch.Generator().manual_seed(seed)
    half = 1 << (quantization.bits - 1)
    groups = quantization.num_groups(IN)
    values = torch.randint(-half, half, (OUT, IN), generator=generator, dtype=torch.int8)
    zero_points = torch.randint(-half, half, (OUT, groups), generator=generator, dtype=torch.int8)
    scales = torch.rand(OUT, groups, generator=generator) + 0.1
    linear = PackedLinear(IN, OUT, quantization, bias=bias)
    linear.weight_packed = pack_columns(values.int() + half, quantization.bits)
    linear.weight_scale = scales
    if not quantization.sym:
        linear.weight_zero_point = pack_rows(zero_points.int() + half, quantization.bits)
    weight = torch.empty(OUT, IN)
    for row in range(OUT):
        for column in range(IN):
            group = column // (IN // groups)
            zero = 0 if quantization.sym else int(zero_points[row, group])
            weight[row, column] = (int(values[row, column]) - zero) * scales[row, group]
    return linear, weight


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("group_size", [32, 64, -1])
def test_packed_linear_equals_its_weight_element_by_element(bits: Bits, sym: bool, group_size: int) -> None:
    quantization = WeightQuantization(bits=bits, group_size=group_size, sym=sym)
    linear, weight = filled_packed_linear(quantization, seed=bits, bias=True)
    assert linear.bias is not None
    nn.init.normal_(linear.bias, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(linear.dequantize(), weight, rtol=0, atol=0)
    inputs = torch.randn(2, 3, IN, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(linear(inputs), inputs @ weight.T + linear.bias)


def test_low_rank_linear_is_b_a_x_plus_bias() -> None:
    linear = LowRankLinear(low_rank(), bias=True)
    generator = torch.Generator().manual_seed(0)
    for parameter in linear.parameters():
        nn.init.normal_(parameter, generator=generator)
    state = linear.state_dict()
    inputs = torch.randn(3, IN, generator=generator)
    expected = inputs @ (state["factor_b.weight"] @ state["factor_a.weight"]).T + state["bias"]
    torch.testing.assert_close(linear(inputs), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("factors", [None, WeightQuantization(bits=8, group_size=-1)])
def test_corrected_linear_adds_b_a_x_to_its_integers(factors: WeightQuantization | None) -> None:
    integers = WeightQuantization(bits=3, group_size=32)
    linear = build_linear(Storage.corrected((OUT, IN), integers, RANK, factors, factors), bias=True)
    assert isinstance(linear, CorrectedLinear)
    packed, weight = filled_packed_linear(integers, seed=0)
    linear.weight_packed, linear.weight_scale = packed.weight_packed, packed.weight_scale
    generator = torch.Generator().manual_seed(0)
    for parameter in linear.parameters():
        nn.init.normal_(parameter, generator=generator)
    matrices = {}
    for name in ("factor_a", "factor_b"):
        factor = linear.get_submodule(name)
        if isinstance(factor, PackedLinear):
            factor.weight_packed.random_(generator=generator)
            factor.weight_scale.uniform_(0.1, 1.0, generator=generator)
            matrices[name] = factor.dequantize()
        else:
            matrices[name] = linear.state_dict()[f"{name}.weight"]
    inputs = torch.randn(3, IN, generator=generator)
    whole = weight.double() + matrices["factor_b"].double() @ matrices["factor_a"].double()
    expected = inputs.double() @ whole.T + linear.state_dict()["bias"]
    torch.testing.assert_close(linear(inputs).double(), expected, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("quantization", [None, WeightQuantization(bits=4, group_size=8)])
def test_pivoted_linear_gives_pivot_and_other_outputs_in_order(
    quantization: WeightQuantization | None,
) -> None:
    description = Storage(
        layout="pivoted", shape=(OUT, IN), rank=RANK, pivot_blocks=2, pivot_rows=quantization
    )
    linear = build_linear(description, bias=True)
    assert isinstance(linear, PivotedLinear)
    generator = torch.Generator().manual_seed(0)
    for parameter in linear.parameters():
        nn.init.normal_(parameter, generator=generator)
    first = linear.get_submodule("pivot_rows")
    if isinstance(first, PackedLinear):
        first.weight_packed.random_(generator=generator)
        first.weight_scale.uniform_(0.1, 1.0, generator=generator)
    assert linear.row_order_problem() is not None
    pivots = [0, 3, 4, 11, 12, 20, 22, 23]
    others = [row for row in range(OUT) if row not in pivots]
    linear.row_order.copy_(torch.tensor([(pivots + others).index(row) for row in range(OUT)]))
    assert linear.row_order_problem() is None
    inputs = torch.randn(3, IN, generator=generator)
    hidden = first(inputs)
    expected = torch.empty(3, OUT)
    expected[:, pivots] = hidden
    expected[:, others] = hidden @ linear.state_dict()["other_rows.weight"].T
    assert linear.bias is not None
    torch.testing.assert_close(linear(inputs), expected + linear.bias, rtol=1e-4, atol=1e-4)
    assert set(linear.state_dict()) == set(description.tensor_shapes) | {"bias"}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "description",
    [
        Storage(layout="dense", shape=(OUT, IN)),
        Storage(layout="dense", shape=(OUT, IN), weight=WeightQuantization(bits=4, group_size=32)),
        low_rank(),
        Storage(
            layout="low_rank",
            shape=(OUT, IN),
            rank=RANK,
            factor_a=WeightQuantization(bits=8, group_size=-1, sym=False),
            factor_b=WeightQuantization(bits=4, group_size=8, sym=False),
        ),
        Storage.corrected(
            (OUT, IN),
            WeightQuantization(bits=2, group_size=32, sym=False),
            RANK,
            WeightQuantization(bits=8, group_size=-1),
        ),
    ],
    ids=["dense", "dense-int4", "low-rank", "low-rank-mixed", "corrected"],
)
def test_the_state_dict_is_the_format(description: Storage, bias: bool) -> None:
    state = build_linear(description, bias=bias, dtype=torch.bfloat16).state_dict()
    expected = dict(description.tensor_shapes) | ({"bias": (OUT,)} if bias else {})
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == expected
    for name, tensor in state.items():
        is_integer = name.endswith(("packed", "zero_point", "weight_shape"))
        assert (tensor.dtype == torch.bfloat16) is not is_integer, name


def test_a_dense_description_makes_no_low_rank_linear() -> None:
    with pytest.raises(ValueError, match="layout is 'dense'"):
        LowRankLinear(Storage(layout="dense", shape=(OUT, IN)), bias=False)
    with pytest.raises(ValueError, match="layout is 'low_rank'"):
        CorrectedLinear(low_rank(), bias=False)


def test_the_representation_tells_the_rank() -> None:
    assert f"in_features={IN}, out_features={OUT}, rank={RANK}, bias=True" in repr(
        LowRankLinear(low_rank(), bias=True)
    )
    packed = PackedLinear(IN, OUT, WeightQuantization(bits=4, group_size=32))
    assert "bits=4, group_size=32, sym=True, bias=False" in repr(packed)


@pytest.mark.parametrize(
    ("name", "canonical"),
    [
        ("model.layers.0.mlp.up_proj", "layers.0.mlp.up_proj"),
        ("language_model.model.layers.0.mlp.up_proj", "layers.0.mlp.up_proj"),
        ("model.language_model.layers.0.mlp.up_proj", "layers.0.mlp.up_proj"),
        ("model.vision_tower.encoder.layers.0.mlp.fc1", "vision_tower.encoder.layers.0.mlp.fc1"),
        # Llama 4: its tower's layers are called like its decoder's
        ("vision_model.model.layers.0.self_attn.v_proj", "vision_model.layers.0.self_attn.v_proj"),
        ("language_model.model.layers.0.self_attn.v_proj", "layers.0.self_attn.v_proj"),
    ],
)
def test_canonical_names(name: str, canonical: str) -> None:
    assert canonical_name(name) == canonical


@pytest.mark.parametrize("name", ["model.up_proj", "language_model.model.up_proj", "up_proj"])
def test_replacing_keeps_device_dtype_and_bias(name: str) -> None:
    with torch.device("meta"):
        block = Block().to(torch.float16)
    replaced = replace_linears(block, CheckpointConfig(modules={name: low_rank()}))
    linear = block.model["up_proj"]
    assert isinstance(linear, LowRankLinear)
    assert replaced == {name: linear}
    assert linear.bias is not None
    assert {(tensor.device.type, tensor.dtype) for tensor in linear.state_dict().values()} == {
        ("meta", torch.float16)
    }
    assert isinstance(block.model["down_proj"], nn.Linear)


def test_every_module_that_does_not_fit_is_named_and_nothing_is_replaced() -> None:
    block = Block()
    modules = {
        "model.up_proj": low_rank(),
        "model.upp_proj": low_rank(),
        "norm": low_rank(),
        "model.down_proj": low_rank((IN + 1, OUT)),
    }
    with pytest.raises(CheckpointFormatError) as caught:
        replace_linears(block, CheckpointConfig(modules=modules))
    message = str(caught.value)
    assert "3 of 4 modules" in message
    assert "model.upp_proj is no Linear of the model (did you mean model.up_proj" in message
    assert "norm is no Linear of the model" in message
    assert (
        f"model.down_proj has shape [{IN}, {OUT}] in the model, [{IN + 1}, {OUT}] in the checkpoint"
        in message
    )
    assert isinstance(block.model["up_proj"], nn.Linear)


def test_an_ambiguous_name_is_refused_unless_exact() -> None:
    block = nn.ModuleDict({"model": nn.ModuleDict({"up": nn.Linear(IN, OUT)}), "up": nn.Linear(IN, OUT)})
    with pytest.raises(CheckpointFormatError, match=r"matches each of model\.up, up"):
        replace_linears(block, CheckpointConfig(modules={"language_model.up": low_rank()}))
    replace_linears(block, CheckpointConfig(modules={"model.up": low_rank()}))
    assert isinstance(block.get_submodule("model.up"), LowRankLinear)
    assert isinstance(block["up"], nn.Linear)
