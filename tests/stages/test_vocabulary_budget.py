"""Budgets of the whole model: what is predicted of input embedding and output layer, and what is chosen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import ercsvd_deploy.hf  # noqa: F401 - registers the loader of compressed checkpoints
from ercsvd_deploy.data.samples import text_samples
from ercsvd_deploy.format.schema import Storage, WeightQuantization
from ercsvd_deploy.models.description.meta import load_config, read_architecture
from ercsvd_deploy.pipelines.flow import run_recipe
from ercsvd_deploy.pipelines.planning.plan import make_plan
from ercsvd_deploy.pipelines.stages.factorize.damages.vocabulary import VocabularyDamages
from ercsvd_deploy.pipelines.stages.factorize.ranks.plans import plan_allocation
from ercsvd_deploy.pipelines.stages.quantize.vocabulary import row_rounding
from ercsvd_deploy.pipelines.stages.sensitivity import vocabulary
from ercsvd_deploy.pipelines.stages.sensitivity.measure import measure_sensitivity
from ercsvd_deploy.pipelines.state.cache import CacheFolder
from ercsvd_deploy.recipe.fields import PlanError
from ercsvd_deploy.recipe.load import load_recipe
from ercsvd_deploy.recipe.quantize import Quantize
from tests.models.streamed import streamed
from tests.recipe_runs import RecipeWriter, modules_of
from tests.stages.vocabulary_runs import EMBEDDING, OUTPUT_LAYER, quantize
from tests.state.interrupted_runs import half_run, hashes, whole_run
from tests.tiny_models import save_tiny_model

pytestmark = pytest.mark.slow  # whole runs

VOCABULARY = {"lm_head": {"bits": 8}, "embeddings": {"bits": 8}}
CPU = torch.device("cpu")


@pytest.mark.parametrize("is_tied", [False, True])
def test_predicted_damage_is_the_divergence(is_tied: bool, tmp_path: Path) -> None:
    """In each matrix alone, and in one that is both, against the KL divergence itself."""
    directory = save_tiny_model(tmp_path / "model", "llama", tie_word_embeddings=is_tied)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    tokens = torch.randint(3, 256, (32, 48), generator=torch.Generator().manual_seed(5))
    work = CacheFolder(tmp_path / "work")
    sensitivity = measure_sensitivity(streamed(directory), text_samples(tokens), work, with_vocabulary=True)
    stage = Quantize(method="rtn", group_size=32)
    damages = VocabularyDamages(streamed(directory), stage, sensitivity.vocabulary(CPU))
    with torch.no_grad():
        before = model(tokens).logits.double().log_softmax(-1)
    for name in (EMBEDDING,) if is_tied else (EMBEDDING, OUTPUT_LAYER):
        weight = model.get_parameter(f"{name}.weight").data
        original = weight.clone()
        found = {}
        for bits in (4, 5, 6):
            integers = WeightQuantization(bits=bits, group_size=32)
            storage = Storage.dense((256, 128), integers)
            [damage] = damages.damages(name, [storage])
            is_multiplied = is_tied or name == OUTPUT_LAYER
            gram = torch.eye(128) if is_multiplied else None
            [(_, rounded)] = row_rounding(stage, integers, torch.float32, gram).blocks(original, CPU)
            with torch.no_grad():
                weight.copy_(rounded.dequantize())
                after = model(tokens).logits.double().log_softmax(-1)
                weight.copy_(original)
            found[bits] = damage / float((before.exp() * (before - after)).sum(-1).mean())
        assert found == pytest.approx(dict.fromkeys(found, 1.0), rel=0.35), (name, found)
    assert damages.damages(EMBEDDING, [Storage.dense((256, 128))]) == [0]


def test_a_small_sample_of_inputs_does_not_flatter_the_output_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounding fitted to fewer inputs than there are columns would lose next to nothing on them."""
    directory = save_tiny_model(tmp_path / "model", "llama")
    tokens = torch.randint(3, 256, (32, 48), generator=torch.Generator().manual_seed(5))
    storage = Storage.dense((256, 128), WeightQuantization(bits=4, group_size=32))
    found = {}
    for most in (1536, 32):  # of 128 columns
        monkeypatch.setattr(vocabulary, "MOST_INPUTS", most)
        work = CacheFolder(tmp_path / str(most))
        sensitivity = measure_sensitivity(
            streamed(directory), text_samples(tokens), work, with_vocabulary=True
        ).vocabulary(CPU)
        assert len(sensitivity.inputs) == most
        [found[most]] = VocabularyDamages(streamed(directory), Quantize(group_size=32), sensitivity).damages(
            OUTPUT_LAYER, [storage]
        )
    assert found[32] == pytest.approx(found[1536], rel=0.2)


def test_bits_are_chosen_for_the_whole_model(write_recipe: RecipeWriter) -> None:
    target: dict[str, Any] = {"model_bits": 5.5, "bits": [4, 8], "vocabulary_bits": [4, 5, 6, 8]}
    report, directory = run_recipe(load_recipe(write_recipe(quantize(bits=4, **VOCABULARY), target=target)))
    bits = report.compressed.model_bits_per_weight
    assert bits is not None
    assert 5.2 < bits <= 5.5
    factorized = report.results["factorize"]
    assert factorized is not None
    rows = {linear.name: linear for linear in factorized.allocation}
    modules = modules_of(directory)
    for name in (EMBEDDING, OUTPUT_LAYER):
        labels = [label for label, _, _ in rows[name].alternatives]
        assert labels == [f"dense, int{each} g32" for each in (4, 5, 6, 8)] + ["dense"]
        assert rows[name].chosen == (modules[name].label if name in modules else "dense")
        damages = [damage for _, _, damage in rows[name].alternatives]
        assert damages == sorted(damages, reverse=True)
    assert factorized.chosen.budget.spent <= factorized.chosen.budget.allowed
    model = AutoModelForCausalLM.from_pretrained(directory)
    assert torch.isfinite(model(torch.arange(3, 20)[None]).logits).all()
    assert not [warning for warning in report.warnings if "the plan foresaw" in warning]


@pytest.mark.parametrize("measure", [{"model_bits": 6.0}, {"bytes": "600KB"}])
def test_fixed_bits_outside_the_layers_count(measure: dict[str, Any], write_recipe: RecipeWriter) -> None:
    """What the recipe takes away outside the layers, these get."""
    stages = {name: quantize(bits=4, **more) for name, more in (("plain", {}), ("integers", VOCABULARY))}
    budgets = {}
    for name, stage in stages.items():
        recipe = load_recipe(write_recipe(stage, target={**measure, "bits": [2, 4, 8]}))
        architecture = read_architecture(load_config(recipe.model.path))
        budgets[name] = plan_allocation(recipe, architecture, element=4).budget
    weights, groups = 256 * 128, 256 * 128 // 32
    assert budgets["integers"] - budgets["plain"] == 8 * 2 * (weights * 4 - weights - groups * 4 - 16)


def test_a_budget_below_what_is_outside_names_the_remedy(write_recipe: RecipeWriter) -> None:
    recipe = load_recipe(write_recipe(quantize(bits=4), target={"model_bits": 3.0, "bits": [4]}))
    with pytest.raises(PlanError, match=r"fewer bits for what is outside the layers \(quantize\.lm_head"):
        make_plan(recipe)


def test_killed_runs_choose_the_same(
    write_recipe: RecipeWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = {"model_bits": 5.5, "bits": [4, 8], "vocabulary_bits": [4, 8]}
    recipe = write_recipe(quantize(bits=4, **VOCABULARY), target=target, evaluation={"max_sequences": 4})
    count, _ = whole_run(recipe, monkeypatch)
    expected = hashes(tmp_path / "out")
    before_ends = 13  # inputs of four layers, outputs, and two pieces of each layer on the way back
    for pieces in (before_ends - 3, before_ends, before_ends + 7, count - 2):
        (tmp_path / "out").rename(tmp_path / f"out-{pieces}")
        half_run(recipe, monkeypatch, pieces)
        whole_run(recipe, monkeypatch)
        assert hashes(tmp_path / "out") == expected
