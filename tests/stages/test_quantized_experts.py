"""Routed experts of integers: what each is measured on, what falls back, and what is written and read."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn
from transformers import AutoModelForCausalLM

import ercsvd_deploy.hf  # noqa: F401 - registers the loader of compressed checkpoints
from ercsvd_deploy.data.texts import load_tokenizer
from ercsvd_deploy.format.files.weight_files import open_directory
from ercsvd_deploy.format.packing import unpack
from ercsvd_deploy.format.schema import WeightQuantization
from ercsvd_deploy.models.description.meta import load_config, read_architecture
from ercsvd_deploy.pipelines.flow import run_recipe
from ercsvd_deploy.pipelines.inputs.texts import calibration_windows
from ercsvd_deploy.pipelines.planning.plan import make_plan
from ercsvd_deploy.pipelines.stages.quantize.planning.storage import QuantizePlanError
from ercsvd_deploy.quantization.grid import QuantizationSettings, round_to_nearest
from ercsvd_deploy.recipe.load import load_recipe
from tests.families.tiny_families import save_tiny_family
from tests.quantization.one_at_a_time import quantize_weight
from tests.recipe_runs import TEXT, modules_of
from tests.state.interrupted_runs import half_run, hashes, whole_run
from tests.tiny_models import materialise

pytestmark = pytest.mark.slow  # whole runs

LENGTH = 48
FAMILIES = ("qwen3_moe", "mixtral")


def recipe(model: Path, output: Path, num_samples: int, **settings: Any) -> Path:
    """Write a recipe of the quantize stage alone, for as many sequences; return its file."""
    sections = {
        "model": {"path": str(model)},
        "calibration": {
            "dataset": {"text": str(TEXT / "calibration.txt")},
            "num_samples": num_samples,
            "sequence_length": LENGTH,
            "token_weight": "uniform",
        },
        "stages": [{"quantize": {"bits": 4, "group_size": 32} | settings}],
        "export": {"path": str(output)},
    }
    file = output.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(sections))
    return file


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_experts_of_integers_are_written_and_read(family: str, tmp_path: Path) -> None:
    original = save_tiny_family(tmp_path / "model", family)
    overrides = {"experts.3.*": {"bits": 2}, "experts.5.*": {"sym": False}}
    file = recipe(original, tmp_path / "out", 16, overrides=overrides, ignore=["layers.2.*experts.*"])
    report, export = run_recipe(load_recipe(file))
    architecture = read_architecture(load_config(str(original)))
    matrices = {matrix.name: matrix for matrix in report.results["quantize"].matrices}
    for linear in architecture.expert_linears:
        assert (linear.name in matrices) == (linear.layer != 2)
        if linear.layer != 2:
            assert matrices[linear.name].bits == (2 if ".experts.3." in linear.name else 4)
            assert matrices[linear.name].sym == (".experts.5." not in linear.name)
    assert all(matrix.routed_tokens is None for name, matrix in matrices.items() if "experts" not in name)
    stored = open_directory(export)
    assert report.compressed.num_bytes == sum(stored.info(name).num_bytes for name in stored.names())
    assert make_plan(load_recipe(file)).candidates[0].num_bytes == report.compressed.num_bytes
    tokens = torch.randint(3, 250, (2, 40), generator=torch.Generator().manual_seed(1))
    expected = AutoModelForCausalLM.from_pretrained(materialise(export, tmp_path / "dense"))(tokens).logits
    model = AutoModelForCausalLM.from_pretrained(export)
    assert float((model(tokens).logits - expected).abs().max()) <= 1e-4 * float(expected.abs().max())
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(again(tokens).logits, model(tokens).logits)


class _Tapped(nn.Module):
    """transformers' own experts, which note what they are given."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.experts = experts
        self.calls: list[tuple[torch.Tensor, torch.Tensor]] = []

    def forward(self, states: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        self.calls.append((states, chosen))
        output: torch.Tensor = self.experts(states, chosen, weights)
        return output


@pytest.mark.parametrize(("num_samples", "kinds"), [(10, {True, False}), (200, {False})])
@torch.no_grad()
def test_each_expert_is_quantized_by_the_tokens_it_gets(
    num_samples: int, kinds: set[bool], tmp_path: Path
) -> None:
    """The first layer's experts, from transformers' own pass; ten samples are too few for some of them."""
    original = save_tiny_family(tmp_path / "model", "mixtral")
    file = recipe(
        original, tmp_path / "out", num_samples, damping=0.01, mse=False, ignore=["self_attn.*"], bits=3
    )
    loaded = load_recipe(file)
    report, export = run_recipe(loaded)
    matrices = {matrix.name: matrix for matrix in report.results["quantize"].matrices}
    model = AutoModelForCausalLM.from_pretrained(original)
    block = model.model.layers[0].mlp
    block.experts = _Tapped(block.experts)
    assert loaded.calibration is not None
    model(calibration_windows(loaded.calibration, load_tokenizer(str(original)), 256)[0])
    states = torch.cat([call[0] for call in block.experts.calls])
    chosen = torch.cat([call[1] for call in block.experts.calls])
    experts, stored = block.experts.experts, open_directory(export)
    width = experts.down_proj.shape[2]
    seen = set()
    for number in range(len(experts.down_proj)):
        own = (chosen == number).any(-1)
        gate, up = experts.gate_up_proj[number].split(width)
        for leaf, weight in (("w1", gate), ("w3", up), ("w2", experts.down_proj[number])):
            name = f"model.layers.0.mlp.experts.{number}.{leaf}"
            matrix = matrices[name]
            assert matrix.routed_tokens == int(own.sum())
            seen.add(matrix.is_pooled)
            inputs = states if matrix.is_pooled else states[own]
            if leaf == "w2":
                inputs = nn.functional.silu(inputs @ gate.T) * (inputs @ up.T)
            settings = QuantizationSettings(bits=3, group_size=32, damping=0.01)
            expected = quantize_weight(weight, inputs.T @ inputs, settings, scale_dtype=torch.float32)
            prefix = name.replace(".mlp.", ".block_sparse_moe.")
            leaves = {
                leaf_name: stored.read([f"{prefix}.{leaf_name}"])[f"{prefix}.{leaf_name}"]
                for leaf_name in ("weight_packed", "weight_scale", "weight_shape")
            }
            found = unpack(leaves, expected.quantization, (weight.shape[0], weight.shape[1])).dequantize()
            if matrix.method == "gptq":
                differing = (found - expected.dequantize()).abs() > 1e-6
                assert float(differing.float().mean()) < 0.01  # a tie or two, decided by the last bit
            assert tuple(matrix.shape) == tuple(weight.shape)
    assert seen == kinds


def test_a_run_that_was_cut_short_goes_on_with_the_experts_that_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = save_tiny_family(tmp_path / "model", "qwen3_moe")
    whole, resumed = (recipe(original, tmp_path / name, 16) for name in ("whole", "resumed"))
    _, export = run_recipe(load_recipe(whole))
    half_run(resumed, monkeypatch, 2)
    num_pieces, said = whole_run(resumed, monkeypatch)
    assert num_pieces == 2  # layers 2 and 3
    assert said
    assert hashes(tmp_path / "resumed") == hashes(export)


def test_what_nobody_does_to_experts_is_refused(tmp_path: Path) -> None:
    original = save_tiny_family(tmp_path / "model", "mixtral")
    corrected = {"experts.*": {"correction": {"rank": 8}}}
    with pytest.raises(QuantizePlanError, match=r"corrects model\.layers\.0\.mlp\.experts.*no factors"):
        make_plan(load_recipe(recipe(original, tmp_path / "corrected", 10, overrides=corrected)))


def test_a_budget_chooses_the_bits_of_the_experts_of_every_layer(tmp_path: Path) -> None:
    original = save_tiny_family(tmp_path / "model", "mixtral")
    file = recipe(original, tmp_path / "out", 40)
    budget = yaml.safe_load(file.read_text())
    budget |= {"target": {"overall_bits": 4.6, "bits": [2, 3, 4, 8]}}
    file.write_text(yaml.safe_dump(budget))
    report, export = run_recipe(load_recipe(file))
    architecture = read_architecture(load_config(str(original)))
    weights = architecture.linear_parameters + architecture.expert_parameters
    chosen = report.results["factorize"].chosen
    assert chosen.budget.allowed == math.floor(4.6 * weights)
    assert 0.99 * chosen.budget.allowed <= chosen.budget.spent <= chosen.budget.allowed
    # `linear_bits_per_weight` counts the 16 bytes of stored shapes as well, as costs do
    assert report.compressed.linear_bits_per_weight == pytest.approx(chosen.budget.spent / weights)
    bits = {matrix.name: matrix.bits for matrix in report.results["quantize"].matrices}
    entries = {entry.name: entry for entry in chosen.allocation}
    experts = [linear.name for linear in architecture.expert_linears]
    assert entries.keys() == {linear.name for linear in architecture.all_linears}
    of_layers = [
        {bits.get(linear.name, 16) for linear in layer.experts.linears}
        for layer in architecture.layers
        if layer.experts is not None
    ]
    assert all(len(kinds) == 1 for kinds in of_layers)  # kernels take the experts of a layer alike
    assert len(set.union(*of_layers)) > 1
    for name in experts:
        damages = [damage for _, _, damage in entries[name].alternatives]
        assert damages == sorted(damages, reverse=True)  # the cheapest first, the dearest does no harm
        assert damages[-1] == 0
    stored = open_directory(export)
    assert report.compressed.num_bytes == sum(stored.info(name).num_bytes for name in stored.names())


def kinds_of_experts(export: Path) -> list[set[WeightQuantization | None]]:
    """Return the kinds of integers that the experts of each layer have."""
    kinds: dict[str, set[WeightQuantization | None]] = {}
    for name, storage in modules_of(export).items():
        layer, _, expert = name.partition(".experts.")
        if expert:
            kinds.setdefault(layer, set()).add(storage.weight)
    return list(kinds.values())


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])  # of the latter all matrices have one shape
@pytest.mark.parametrize("target", [None, {"overall_bits": 4.8, "bits": [4, 8]}])
def test_groups_fit_all_matrices_of_a_layers_experts(
    family: str, target: dict[str, Any] | None, tmp_path: Path
) -> None:
    """Tensor parallelism cuts the columns of the last matrix, and fused kernels take all of them alike."""
    original = save_tiny_family(tmp_path / "model", family)
    file = recipe(original, tmp_path / "out", 40, group_size=128)
    serving = {"tensor_parallel_sizes": [1, 2 if family == "qwen3_moe" else 4]}
    values = yaml.safe_load(file.read_text()) | {"serving": serving, "target": target}
    file.write_text(yaml.safe_dump(values))
    report, export = run_recipe(load_recipe(file))
    kinds = kinds_of_experts(export)
    assert all(len(of_layer) == 1 for of_layer in kinds)
    assert {integers.group_size for of_layer in kinds for integers in of_layer if integers} == {64}
    assert any("those of other matrices of the same experts" in warning for warning in report.warnings)


@pytest.mark.parametrize(
    ("pattern", "override"), [("experts.7.*", {"bits": 8}), ("experts.*.w2", {"group_size": 64})]
)
def test_experts_that_overrides_set_apart_are_chosen_one_by_one(
    pattern: str, override: dict[str, int], tmp_path: Path
) -> None:
    """They cannot be alike within the budget, or would be so in 16 bits alone."""
    original = save_tiny_family(tmp_path / "model", "mixtral")
    file = recipe(original, tmp_path / "out", 40, overrides={pattern: override})
    values = yaml.safe_load(file.read_text()) | {"target": {"overall_bits": 5.8, "bits": [4, 8]}}
    file.write_text(yaml.safe_dump(values))
    report, export = run_recipe(load_recipe(file))
    assert 5.7 < report.compressed.linear_bits_per_weight <= 5.8
    assert max(map(len, kinds_of_experts(export))) > 1
    assert any("the experts of a layer are stored in several ways" in warning for warning in report.warnings)


def test_a_run_warns_of_what_was_chosen_not_of_what_was_on_offer(tmp_path: Path) -> None:
    original = save_tiny_family(tmp_path / "model", "mixtral")
    file = recipe(original, tmp_path / "out", 40)
    values = yaml.safe_load(file.read_text()) | {"target": {"overall_bits": 8.4, "bits": [2, 4, 5, 8]}}
    file.write_text(yaml.safe_dump(values))
    loaded = load_recipe(file)
    report, export = run_recipe(loaded)
    used = {matrix.bits for matrix in report.results["quantize"].matrices}
    assert used < {2, 4, 5, 8}
    without_kernel = "no kernel for {} weights on a CPU"
    for bits, warnings in (({2, 5, 8}, make_plan(loaded).warnings), (used - {4}, report.warnings)):
        kinds = ", ".join(f"{each}-bit" for each in sorted(bits))
        assert any(without_kernel.format(kinds) in warning for warning in warnings)
    assert without_kernel.format("2-bit, 5-bit, 8-bit") not in (export / "README.md").read_text()


def test_damages_of_experts_are_those_of_the_whole_model(tmp_path: Path) -> None:
    """Rounding one expert's matrix changes the predictions by about as much as its damage says.

    In the last layer, that is: in earlier ones errors of one token reach others, as with every Linear.
    """
    original = save_tiny_family(tmp_path / "model", "mixtral")
    file = recipe(original, tmp_path / "out", 64, mse=False, method="rtn")
    budget = yaml.safe_load(file.read_text()) | {"target": {"overall_bits": 8, "bits": [3, 4, 8]}}
    file.write_text(yaml.safe_dump(budget))
    loaded = load_recipe(file)
    report, _ = run_recipe(loaded)
    entries = {entry.name: entry for entry in report.results["factorize"].chosen.allocation}
    assert loaded.calibration is not None
    tokens = calibration_windows(loaded.calibration, load_tokenizer(str(original)), 256)[0]
    model = AutoModelForCausalLM.from_pretrained(original)
    predicted, measured = [], []
    with torch.no_grad():
        expected = model(tokens).logits.log_softmax(-1)
        for number in range(8):
            name = f"model.layers.3.mlp.experts.{number}.w2"
            [damage] = [
                each for label, _, each in entries[name].alternatives if label.startswith("dense, int3")
            ]
            weight = model.model.layers[3].mlp.experts.down_proj[number]
            before = weight.clone()
            settings = QuantizationSettings(bits=3, group_size=32)
            weight.copy_(round_to_nearest(before, settings, scale_dtype=torch.float32).dequantize())
            found = model(tokens).logits.log_softmax(-1)
            weight.copy_(before)
            predicted.append(damage)
            measured.append(float((expected.exp() * (expected - found)).sum(-1).mean()))
    ratios = [after / before for before, after in zip(predicted, measured, strict=True)]
    assert all(0.5 < ratio < 2 for ratio in ratios), ratios
    assert max(predicted) > 4 * min(predicted)  # so that this tells experts apart
