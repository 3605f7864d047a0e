"""Error-controlled allocation: damages against naive ones, budgets kept, resumed, served, and worth it."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import ercsvd_deploy.hf  # noqa: F401 - registers the loader of compressed checkpoints
from ercsvd_deploy.pipelines.flow import run_recipe
from ercsvd_deploy.pipelines.reporting.report.document import REPORT_FILE, Report
from ercsvd_deploy.pipelines.stages.cached import StageCache
from ercsvd_deploy.pipelines.stages.factorize.damages.probing import interpolate, spread
from ercsvd_deploy.pipelines.stages.quantize import decoder
from ercsvd_deploy.pipelines.stages.sensitivity import measure
from ercsvd_deploy.recipe.load import load_recipe
from tests.recipe_runs import TEXT, RecipeWriter, factorize, invoke, modules_of
from tests.state.interrupted_runs import half_run, hashes, whole_run

pytestmark = pytest.mark.slow  # whole runs

TINY_LLAMA = str(TEXT.parent / "tiny-llama")
CONTROLLED = {"factorize": {"method": "svd_llm", "allocation": "error_controlled", "output_metric": "fisher"}}


def controlled(**settings: Any) -> dict[str, Any]:
    return {"factorize": CONTROLLED["factorize"] | {"rank_multiple": 8, "num_fisher_samples": 6} | settings}


def run(recipe: Path) -> tuple[Report, Path]:
    return run_recipe(load_recipe(recipe))


def told_budget(report: Report) -> tuple[str, int, int]:
    """Return unit, what was allowed and what is spent, as the report's JSON has it."""
    budget = report.as_json()["factorize"]["budget"]
    return budget["unit"], budget["allowed"], budget["spent"]


@pytest.mark.parametrize("metric", ["identity", "fisher"])
@pytest.mark.parametrize("layout", ["low_rank", "pivoted"])
def test_budget_in_parameters_is_kept_and_used(write_recipe: RecipeWriter, metric: str, layout: str) -> None:
    report, directory = run(
        write_recipe(controlled(compression_ratio=0.3, output_metric=metric, layout=layout))
    )
    assert report.results["factorize"] is not None
    plan = report.results["factorize"].plan
    assert 0.3 <= plan.achieved_compression_ratio < 0.34
    assert told_budget(report) == ("parameters", plan.parameter_budget, plan.kept_parameters)
    assert len({rank for rank in plan.ranks.values() if rank is not None}) > 1
    assert all(rank is None or rank % 8 == 0 for rank in plan.ranks.values())
    assert not [warning for warning in report.warnings if "foresaw" in warning]
    logits = AutoModelForCausalLM.from_pretrained(directory)(torch.arange(3, 20)[None]).logits
    assert torch.isfinite(logits).all()


def test_predictions_are_the_sum_of_naive_damages(
    write_recipe: RecipeWriter, monkeypatch: pytest.MonkeyPatch, llama: Path
) -> None:
    """Every chosen damage is tr(F E G E^T) / 2 of what was written, from the inputs and gradients kept."""
    kept: dict[str, dict[str, torch.Tensor]] = {"sensitivity": {}, "damages": {}}
    discard = StageCache.discard

    def keep(self: StageCache, stage: str) -> None:
        if stage in kept:
            for file in (self.directory / stage).glob("*.safetensors"):
                kept[stage].update(load_file(file))
        discard(self, stage)

    monkeypatch.setattr(StageCache, "discard", keep)
    report, directory = run(write_recipe(controlled(compression_ratio=0.4)))
    assert report.results["factorize"] is not None
    original = AutoModelForCausalLM.from_pretrained(llama)
    compressed = AutoModelForCausalLM.from_pretrained(directory)
    checked = 0
    for linear in report.results["factorize"].allocation:
        module = compressed.get_submodule(linear.name)
        if linear.chosen == "dense":
            assert linear.predicted_kl == 0
            continue
        shared = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
        head, _, end = linear.name.rpartition(".")
        gram = kept["damages"][f"{head}.{shared.get(end, end)}.gram"].double()
        product = module.factor_b.weight.double() @ module.factor_a.weight.double()
        error = original.get_submodule(linear.name).weight.double() - product
        damage = torch.trace(kept["sensitivity"][linear.name].double() @ error @ gram @ error.T) / 2
        assert linear.predicted_kl == pytest.approx(float(damage.detach()), rel=2e-2, abs=1e-9)
        checked += 1
    assert checked > 4


@pytest.mark.parametrize("layout", ["low_rank", "pivoted"])
def test_target_in_bits_is_met_by_ranks_and_integers(write_recipe: RecipeWriter, layout: str) -> None:
    recipe = write_recipe(
        controlled(layout=layout, rank_multiple="auto"),
        {"quantize": {"bits": 4, "group_size": 32}},
        target={"overall_bits": 4.2, "bits": [4, 8], "group_sizes": [32, -1]},
        calibration={
            "dataset": {"text": str(TEXT / "calibration.txt")},
            "num_samples": 24,
            "sequence_length": 48,
        },
    )
    report, directory = run(recipe)
    assert report.compressed.linear_bits_per_weight <= 4.2
    assert report.compressed.linear_bits_per_weight > 3.9
    weights = report.original.linear_parameters
    unit, allowed, spent = told_budget(report)
    assert (unit, allowed) == ("bits", math.floor(4.2 * weights))
    assert spent == round(report.compressed.linear_bits_per_weight * weights)
    assert report.results["factorize"] is not None
    modules = modules_of(directory)
    chosen = {linear.name: linear.chosen for linear in report.results["factorize"].allocation}
    assert len(set(chosen.values())) > 1
    for name, module in modules.items():
        label = "dense" if module.rank is None else f"rank {module.rank}"
        assert chosen[name].startswith(label)
    assert torch.isfinite(
        AutoModelForCausalLM.from_pretrained(directory)(torch.arange(3, 20)[None]).logits
    ).all()


def test_target_in_bytes_is_met(write_recipe: RecipeWriter) -> None:
    report, _ = run(write_recipe(controlled(), target={"bytes": "700KB"}))
    assert 670_000 < report.compressed.num_bytes <= 700_000


def test_impossible_target_ends_before_any_work(write_recipe: RecipeWriter, tmp_path: Path) -> None:
    for command in ("plan", "run"):
        code, _, err = invoke(command, write_recipe(controlled(), target={"overall_bits": 0.1}))
        assert code == 2
        assert "the least that is possible" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("pieces", [8, 12, 16, 21, 25, 29])
def test_an_interrupted_run_goes_on_to_the_same_bytes(
    pieces: int, write_recipe: RecipeWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(controlled(compression_ratio=0.3))
    everything, _ = whole_run(recipe, monkeypatch)
    expected = hashes(tmp_path / "out")
    half_run(recipe, monkeypatch, pieces)
    computed, notes = whole_run(recipe, monkeypatch)
    assert hashes(tmp_path / "out") == expected
    assert computed < everything
    assert notes


def test_metrics_leave_the_disk_with_the_last_stage_that_reads_them(
    write_recipe: RecipeWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted behind factorize, a run has no metrics left, and goes on without measuring them again."""
    quantize = {"quantize": {"bits": 4, "group_size": 32}}
    recipe = write_recipe(controlled(compression_ratio=0.3, rank_multiple=32), quantize)
    run(recipe)
    expected = hashes(tmp_path / "out")
    with monkeypatch.context() as patched:
        patched.setattr(decoder, "quantize_decoder", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(recipe)
    kept = {folder.name for folder in (tmp_path / ".out.work").iterdir() if folder.is_dir()}
    assert "factorize" in kept
    assert not {"sensitivity", "damages"} & kept
    monkeypatch.setattr(measure, "measure_sensitivity", Mock(side_effect=AssertionError))
    run(recipe)
    assert hashes(tmp_path / "out") == expected


def test_it_is_worth_it_on_a_trained_model(write_recipe: RecipeWriter) -> None:
    """At the same parameters, a fraction of what equal shares cost."""
    lost = {}
    for name, settings in (
        ("equal shares", {"num_compressed_layers": "all"}),
        ("error control", {"allocation": "error_controlled", "output_metric": "fisher"}),
    ):
        recipe = write_recipe(
            factorize(compression_ratio=0.3, **settings),
            model={"path": TINY_LLAMA},
            calibration={
                "dataset": {"text": str(TEXT / "calibration.txt")},
                "num_samples": 32,
                "sequence_length": 128,
            },
        )
        report, _ = run(recipe)
        lost[name] = report.change.logprob_kl["held_out"]
    assert lost["error control"] < 0.5 * lost["equal shares"]


BITS_ALONE: dict[str, Any] = {
    "target": {"overall_bits": 4.4, "bits": [2, 3, 4, 6, 8]},
    "calibration": {
        "dataset": {"text": str(TEXT / "calibration.txt")},
        "num_samples": 24,
        "sequence_length": 48,
    },
}
INT4 = {"quantize": {"bits": 4, "group_size": 32}}


def test_a_target_without_a_factorize_stage_chooses_bits(write_recipe: RecipeWriter) -> None:
    report, directory = run(write_recipe(INT4, **BITS_ALONE))
    outcome = report.results["factorize"]
    unit, allowed, spent = told_budget(report)
    assert (unit, spent <= allowed) == ("bits", True)
    assert spent > 0.97 * allowed
    described = modules_of(directory)
    assert {storage.layout for storage in described.values()} == {"dense"}
    chosen = {storage.weight.bits for storage in described.values() if storage.weight}
    assert len(chosen) > 1
    assert outcome.linears == []
    assert outcome.plan.num_compressed_layers == 0
    assert not [warning for warning in report.warnings if "foresaw" in warning]
    titles = {table.title for table in report.tables}
    assert "Factorized Linears" not in titles
    card = (directory / "README.md").read_text()
    assert "chosen for each by its predicted damage" in card
    assert "low-rank" not in card.partition("---\n")[2].partition("---")[0]
    logits = AutoModelForCausalLM.from_pretrained(directory)(torch.arange(3, 20)[None]).logits
    assert torch.isfinite(logits).all()


def test_bits_alone_can_be_exported_for_stock_loaders(write_recipe: RecipeWriter, tmp_path: Path) -> None:
    """All that vLLM stacks into one layer is then stored alike."""
    target = {"overall_bits": 5.5, "bits": [2, 4, 8]}
    export = {"path": str(tmp_path / "out"), "format": "compressed-tensors"}
    report, directory = run(write_recipe(INT4, **(BITS_ALONE | {"target": target, "export": export})))
    groups = json.loads((directory / "config.json").read_text())["quantization_config"]["config_groups"]
    assert len(groups) > 1
    stored = {name: group["weights"]["num_bits"] for group in groups.values() for name in group["targets"]}
    for layer in range(4):
        for stack in ("self_attn.[qkv]_proj", "mlp.(gate|up)_proj"):
            names = [name for name in stored if re.fullmatch(rf"model\.layers\.{layer}\.{stack}", name)]
            assert len({stored[name] for name in names}) <= 1
    assert told_budget(report)[2] <= told_budget(report)[1]


@pytest.mark.parametrize("pieces", [9, 16])
def test_a_choice_of_bits_that_was_interrupted_goes_on(
    pieces: int, write_recipe: RecipeWriter, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    recipe = write_recipe(INT4, **BITS_ALONE)
    everything, _ = whole_run(recipe, monkeypatch)
    (tmp_path / "out").rename(tmp_path / "undisturbed")
    half_run(recipe, monkeypatch, pieces)
    computed, notes = whole_run(recipe, monkeypatch)
    assert computed < everything
    assert notes
    assert hashes(tmp_path / "out") == hashes(tmp_path / "undisturbed")


@pytest.mark.vllm
def test_vllm_serves_what_was_chosen(write_recipe: RecipeWriter, tmp_path: Path) -> None:
    recipe = write_recipe(
        controlled(rank_multiple="auto"),
        {"quantize": {"bits": 4, "group_size": 64}},
        model={"path": TINY_LLAMA},
        target={"overall_bits": 3.2, "group_sizes": [32, 64, 128]},
        gates={"serving_parity": {"mean_difference": 0.05, "eager": True}},
        calibration={
            "dataset": {"text": str(TEXT / "calibration.txt")},
            "num_samples": 32,
            "sequence_length": 128,
        },
    )
    code, _, err = invoke("run", recipe)
    assert code == 0, err
    report = json.loads((tmp_path / "out" / REPORT_FILE).read_text())
    assert 0 < report["serving"]["mean_difference"] < 0.05


def test_probed_ranks_span_all() -> None:
    assert spread(range(32, 513, 32), 3) == [32, 128, 512]
    assert spread([64], 3) == [64]
    assert interpolate({32: 1.0, 128: 3.0}, 64) == pytest.approx(2.0)
    assert interpolate({32: 1.0, 128: 3.0}, 32) == 1.0
    assert interpolate({64: 1.0}, 640) == 1.0
