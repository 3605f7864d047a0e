"""Recipes with a low-rank correction of integers: what is planned, written, loaded, resumed and recovered."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import ercsvd_deploy.hf  # noqa: F401 - registers the loader of compressed checkpoints
from ercsvd_deploy.data.texts import load_tokenizer
from ercsvd_deploy.format.schema import CheckpointConfig, Storage, WeightQuantization
from ercsvd_deploy.models.compressed.modules import CorrectedLinear
from ercsvd_deploy.models.description.families import describe
from ercsvd_deploy.models.description.meta import build_meta_model, load_config
from ercsvd_deploy.pipelines.flow import run_recipe
from ercsvd_deploy.pipelines.inputs.texts import evaluation_windows
from ercsvd_deploy.pipelines.planning.plan import make_plan
from ercsvd_deploy.pipelines.stages.quantize.planning.serving_notes import serving_warnings
from ercsvd_deploy.pipelines.stages.quantize.planning.storage import (
    QuantizePlanError,
    check_shapes,
    plan_quantization,
)
from ercsvd_deploy.recipe.fields import RecipeError
from ercsvd_deploy.recipe.load import load_recipe
from ercsvd_deploy.recipe.quantize import Correction, Quantize, QuantizeOverride
from tests.recipe_runs import TEXT, RecipeWriter, factorize, invoke
from tests.state.interrupted_runs import half_run, hashes, whole_run

pytestmark = pytest.mark.slow  # whole runs

CALIBRATION = {"dataset": {"text": str(TEXT / "calibration.txt")}, "num_samples": 24, "sequence_length": 48}


def quantize(**settings: Any) -> dict[str, Any]:
    return {"quantize": {"bits": 3, "group_size": 32, "correction": {"rank": 16}} | settings}


def described(directory: Path) -> dict[str, Storage]:
    config = json.loads((directory / "config.json").read_text())["quantization_config"]
    return dict(CheckpointConfig.read(config).modules)


def test_streamed_model_is_the_one_that_transformers_loads_and_the_plan_its_size(
    write_recipe: RecipeWriter, llama: Path
) -> None:
    overrides = {
        "*.q_proj": {"bits": 2, "correction": {"rank": 32, "bits": 4}},
        "*.v_proj": {"correction": {"rank": 8, "bits": 16}},
        "*.o_proj": {"bits": 8, "correction": "none"},
    }
    recipe = load_recipe(write_recipe(quantize(overrides=overrides), calibration=CALIBRATION))
    planned = make_plan(recipe)
    report, directory = run_recipe(recipe)
    storages = described(directory)
    for name, storage in storages.items():
        kind = name.rpartition(".")[2]
        expected = {"q_proj": (2, 32, 4), "v_proj": (3, 8, None), "o_proj": (8, None, None)}
        bits, rank, factor_bits = expected.get(kind, (3, 16, 8))
        assert storage.weight is not None
        assert (storage.weight.bits, storage.rank) == (bits, rank)
        assert storage.layout == ("dense" if rank is None else "corrected")
        assert [each.bits if each else None for each in (storage.factor_a, storage.factor_b)] == [
            factor_bits
        ] * 2
    [candidate] = planned.candidates
    assert candidate.num_bytes == report.compressed.num_bytes
    assert candidate.linear_parameters == report.compressed.linear_parameters
    assert candidate.linear_parameters == sum(storage.num_parameters for storage in storages.values())
    assert candidate.linear_bits_per_weight == pytest.approx(report.compressed.linear_bits_per_weight)
    assert candidate.layers[0].correction_ranks["self_attn.q_proj"] == 32
    assert set(candidate.layers[0].ranks.values()) == {None}
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    assert sum(isinstance(module, CorrectedLinear) for module in model.modules()) == 6 * 4
    tokens = evaluation_windows(recipe, load_tokenizer(str(llama)), 256)[0]["held_out"]
    with torch.no_grad():
        loss = model(input_ids=tokens, labels=tokens).loss
    assert report.compressed.perplexity["held_out"] == pytest.approx(float(loss.exp()), rel=1e-3)


def test_a_correction_comes_nearer_to_the_original(write_recipe: RecipeWriter) -> None:
    losses = {}
    for name, correction in {"none": None, "16": {"rank": 16}, "32": {"rank": 32}}.items():
        recipe = load_recipe(write_recipe(quantize(correction=correction), calibration=CALIBRATION))
        report, _ = run_recipe(recipe)
        quantized = report.results["quantize"]
        losses[name] = sum(linear.loss for linear in quantized.linears)
        for linear in quantized.linears:
            assert (linear.correction is None) == (correction is None)
            if linear.correction is not None:
                assert linear.loss == pytest.approx(min(linear.correction.loss_by_round), rel=1e-4)
                assert linear.loss <= linear.correction.loss_uncorrected
    assert losses["32"] < losses["16"] < 0.9 * losses["none"]


def test_report_page_and_card_tell_of_corrections(write_recipe: RecipeWriter) -> None:
    _, directory = run_recipe(load_recipe(write_recipe(quantize(), calibration=CALIBRATION)))
    card = (directory / "README.md").read_text()
    assert "Low-rank corrections of rank 16 correct the integers of 28 Linears." in card
    page = (directory / "ercsvd_report.html").read_text()
    assert "Low-rank corrections of integers" in page
    report = json.loads((directory / "ercsvd_report.json").read_text())
    assert report["components"][0]["treatment"] == "28 Linears corrected int3/int8"


def test_the_plan_shows_ranks_of_corrections(write_recipe: RecipeWriter) -> None:
    code, shown, _ = invoke("plan", write_recipe(quantize(), calibration=CALIBRATION))
    assert code == 0
    assert "int3 + 16" in " ".join(shown.split())


def test_an_interrupted_run_goes_on_to_the_same_bytes(
    write_recipe: RecipeWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(quantize(overrides={"*.v_proj": {"correction": {"rank": 8, "bits": 16}}}))
    targets = [tmp_path / name for name in ("whole", "interrupted")]
    whole, interrupted = (f"export.path={target}" for target in targets)
    everything, _ = whole_run(recipe, monkeypatch, whole)
    half_run(
        recipe, monkeypatch, 7, interrupted
    )  # five for the original, which is judged first, and two layers
    computed, notes = whole_run(recipe, monkeypatch, interrupted)
    assert computed == everything - 7
    assert any(note.startswith("quantize: ") for note in notes)
    assert hashes(targets[0]) == hashes(targets[1])


def test_scales_and_plain_factors_of_corrections_are_recovered(write_recipe: RecipeWriter) -> None:
    stages = (
        quantize(bits=2, overrides={"*.up_proj": {"correction": {"rank": 16, "bits": 16}}}),
        {"recover": {"steps": 12, "batch_size": 4}},
    )
    report, directory = run_recipe(load_recipe(write_recipe(*stages, calibration=CALIBRATION)))
    recovered = report.results["recover_quantized"]
    assert any(layer.is_kept for layer in recovered.layers)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    assert torch.isfinite(model(torch.arange(16)[None]).logits).all()


def test_linears_with_a_rank_get_no_correction(write_recipe: RecipeWriter) -> None:
    stages = (factorize(num_compressed_layers=2, rank_multiple="auto"), quantize())
    _, directory = run_recipe(load_recipe(write_recipe(*stages, calibration=CALIBRATION)))
    by_layer = {int(name.split(".")[2]): storage.layout for name, storage in described(directory).items()}
    assert by_layer == {0: "corrected", 1: "corrected", 2: "low_rank", 3: "low_rank"}


@pytest.fixture
def names(llama: Path) -> list[str]:
    config = load_config(str(llama))
    return [linear.name for linear in describe(build_meta_model(config), config).linears]


def test_overrides_change_take_and_give_corrections(names: list[str]) -> None:
    settings = Quantize(
        bits=2,
        group_size=32,
        correction=Correction(rank=16),
        ignore=("0.mlp.*",),
        overrides={
            "*.down_proj": QuantizeOverride(correction=Correction(rank=32, bits=16)),
            "*.up_proj": QuantizeOverride(correction="none"),
            "*.q_proj": QuantizeOverride(bits=4),
        },
    )
    plan = plan_quantization(settings, names)
    assert plan.corrections["model.layers.1.mlp.down_proj"] == Correction(rank=32, bits=16)
    assert plan.corrections["model.layers.1.self_attn.q_proj"] == Correction(rank=16)
    assert plan.integers["model.layers.1.self_attn.q_proj"] == WeightQuantization(bits=4, group_size=32)
    assert "model.layers.1.mlp.up_proj" not in plan.corrections
    assert "model.layers.0.mlp.down_proj" not in plan.corrections
    some = Quantize(group_size=32, overrides={"*.up_proj": QuantizeOverride(correction=Correction(rank=8))})
    assert some.corrections == (Correction(rank=8),)
    assert not Quantize(overrides={"*.up_proj": QuantizeOverride(correction="none")}).corrections
    assert set(plan_quantization(some, names).corrections) == {name for name in names if "up_proj" in name}


@pytest.mark.parametrize("sizes", [(1,), (1, 2, 4)])
def test_groups_of_corrections_fit_ranks_and_parts(
    sizes: tuple[int, ...], llama: Path, names: list[str]
) -> None:
    config = load_config(str(llama))
    architecture = describe(build_meta_model(config), config)
    settings = Quantize(bits=2, group_size=128, correction=Correction(rank=24))
    plan = replace(plan_quantization(settings, names), fitted_to=sizes)
    check_shapes(plan, {}, architecture, sizes)
    storages = plan.describe({}, architecture)
    for name, storage in storages.items():
        assert storage.weight is not None
        assert storage.factor_a is not None
        assert storage.factor_b is not None
        assert storage.factor_a.group_size == storage.weight.group_size
        assert storage.factor_b.group_size == -1, name  # 24 is no multiple of 32
    warnings = serving_warnings(plan, storages, architecture, sizes, "bfloat16")
    assert not any("factor" in warning and "get groups" in warning for warning in warnings)


def test_a_correction_as_large_as_its_matrix_is_refused(llama: Path, names: list[str]) -> None:
    config = load_config(str(llama))
    architecture = describe(build_meta_model(config), config)
    plan = plan_quantization(Quantize(group_size=32, correction=Correction(rank=64)), names)
    with pytest.raises(QuantizePlanError, match=r"q_proj: a correction of rank 64 is as large .*lower"):
        check_shapes(plan, {}, architecture, [1])
    check_shapes(plan, dict.fromkeys(names, 32), architecture, [1])  # they have a rank, and no correction


@pytest.mark.parametrize(
    ("stages", "sections", "message"),
    [
        ((quantize(correction={"rank": 12}),), {}, "correction.rank"),
        ((quantize(correction={"rank": 16, "bits": 3}),), {}, "correction.bits"),
        ((quantize(correction={}),), {}, "correction.rank"),
        ((quantize(overrides={"*": {"correction": 3}}),), {}, "it must be 'none', or a mapping with rank"),
        (
            (quantize(bits=4),),
            {"export": {"path": "out", "format": "compressed-tensors"}},
            "has no low-rank matrices; set vllm, or remove quantize.correction",
        ),
        (
            (factorize(allocation="error_controlled"), quantize()),
            {},
            "given beside factorize.allocation error_controlled",
        ),
    ],
)
def test_contradictions_are_told(
    stages: tuple[dict[str, Any], ...], sections: dict[str, Any], message: str, write_recipe: RecipeWriter
) -> None:
    with pytest.raises(RecipeError, match=message.replace(".", r"\.")):
        load_recipe(write_recipe(*stages, **sections))


def test_corrections_are_fitted_by_what_predictions_mind(write_recipe: RecipeWriter) -> None:
    divergences = {}
    for output_metric in ("identity", "fisher"):
        stage = quantize(bits=2, correction={"rank": 16}, output_metric=output_metric)
        recipe = load_recipe(write_recipe(stage, calibration=CALIBRATION))
        stages = [planned.name for planned in make_plan(recipe).stages]
        assert ("sensitivity" in stages) is (output_metric == "fisher")
        report, directory = run_recipe(recipe)
        divergences[output_metric] = report.change.logprob_kl["held_out"]
        assert not list(directory.parent.glob(f".{directory.name}.work*/sensitivity"))
    assert divergences["fisher"] < 0.9 * divergences["identity"]


def test_the_metric_of_outputs_serves_corrections_alone(write_recipe: RecipeWriter) -> None:
    """A factorize stage before it, which does not ask for it, makes the same factors as without."""
    factors = []
    for output_metric in ("identity", "fisher"):
        stages = (
            factorize(num_compressed_layers=2, rank_multiple="auto"),
            quantize(output_metric=output_metric, ignore=["*.2.*", "*.3.*"]),
        )
        _, directory = run_recipe(load_recipe(write_recipe(*stages, calibration=CALIBRATION)))
        tensors = load_file(directory / "model.safetensors")
        factors.append({name: tensor for name, tensor in tensors.items() if name.endswith("factor_a.weight")})
    assert factors[0].keys() == factors[1].keys() != set()
    assert all(torch.equal(tensor, factors[1][name]) for name, tensor in factors[0].items())


def test_a_metric_without_a_correction_is_refused(write_recipe: RecipeWriter) -> None:
    with pytest.raises(RecipeError, match="only a low-rank correction is fitted by it"):
        load_recipe(write_recipe(quantize(correction=None, output_metric="fisher")))


def error_controlled(**target: Any) -> tuple[tuple[dict[str, Any], ...], dict[str, Any]]:
    """Return stages and sections of a recipe whose storages are chosen under a target."""
    factorization = {
        "method": "svd_llm",
        "allocation": "error_controlled",
        "output_metric": "fisher",
        "num_fisher_samples": 24,
    }
    stages = ({"factorize": factorization}, {"quantize": {"bits": 4, "group_size": 32}})
    return stages, {"target": {"overall_bits": 3.2} | target, "calibration": CALIBRATION}


def test_a_target_chooses_corrections_where_they_pay(write_recipe: RecipeWriter) -> None:
    predicted, measured = {}, {}
    corrections = [{"rank": 8, "bits": 8}, {"rank": 16, "bits": 4}]
    for name, on_offer in {"with": corrections, "without": []}.items():
        stages, sections = error_controlled(corrections=on_offer, bits=[2])
        report, directory = run_recipe(load_recipe(write_recipe(*stages, **sections)))
        factorized = report.results["factorize"].chosen
        predicted[name] = sum(linear.predicted_kl for linear in factorized.allocation)
        measured[name] = report.change.logprob_kl["held_out"]
        storages = described(directory)
        assert any(storage.layout == "corrected" for storage in storages.values()) is (name == "with")
        assert factorized.budget.spent <= factorized.budget.allowed
        assert report.compressed.linear_bits_per_weight <= 3.2
        for linear in factorized.allocation:
            label = storages[linear.name].label if linear.name in storages else "dense"
            assert linear.chosen == label
    assert predicted["with"] < predicted["without"]
    assert measured["with"] < measured["without"]


def test_the_predicted_damage_of_a_correction_is_that_of_what_is_made(write_recipe: RecipeWriter) -> None:
    """All are corrected: there is nothing else to choose, and the layers' inputs are the original's."""
    stages, sections = error_controlled(bits=[2], corrections=[{"rank": 16, "bits": 8}], overall_bits=3.2)
    stages[1]["quantize"]["compressed_prefix_inputs"] = False
    report, _ = run_recipe(load_recipe(write_recipe(*stages, **sections)))
    quantized = {linear.name: linear for linear in report.results["quantize"].linears}
    corrected = [
        linear for linear in report.results["factorize"].chosen.allocation if "+ rank 16" in linear.chosen
    ]
    assert corrected
    for linear in corrected:
        without = next(each for label, _, each in linear.alternatives if label == "dense, int2 g32")
        fitted = quantized[linear.name].correction
        assert fitted is not None
        # The stage chooses the damping on held-out tokens, and the prediction takes a fixed one.
        assert linear.predicted_kl / without == pytest.approx(fitted.loss / fitted.loss_uncorrected, rel=0.3)


def test_corrections_of_a_target_need_integers(write_recipe: RecipeWriter) -> None:
    stages, sections = error_controlled(corrections=[{"rank": 8}])
    with pytest.raises(RecipeError, match=r"target\.corrections.*there is no quantize stage"):
        load_recipe(write_recipe(stages[0], **sections))
