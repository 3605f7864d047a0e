"""Recipes that store the input embedding and the output layer as integers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import ercsvd_deploy.hf  # noqa: F401 - registers the loader of compressed checkpoints
from ercsvd_deploy.data.texts import load_tokenizer
from ercsvd_deploy.format.packing import unpack
from ercsvd_deploy.format.schema import WeightQuantization
from ercsvd_deploy.models.description.meta import read_architecture
from ercsvd_deploy.pipelines.flow import run_recipe
from ercsvd_deploy.pipelines.inputs.texts import evaluation_windows
from ercsvd_deploy.pipelines.planning.plan import make_plan
from ercsvd_deploy.pipelines.reporting.description import describe_treatment
from ercsvd_deploy.pipelines.stages.quantize.planning.vocabulary import plan_vocabulary
from ercsvd_deploy.pipelines.stages.storage_rules import StorageRules
from ercsvd_deploy.quantization.losses import proxy_loss
from ercsvd_deploy.recipe.fields import PlanError
from ercsvd_deploy.recipe.load import load_recipe
from ercsvd_deploy.recipe.quantize import Quantize, VocabularyIntegers
from tests.families import tiny_vision_families
from tests.families.tiny_families import save_tiny_family
from tests.recipe_runs import RecipeWriter, factorize, modules_of, recipe_writer
from tests.stages.naive_factors import inputs_of
from tests.stages.vocabulary_runs import EMBEDDING, OUTPUT_LAYER, quantize
from tests.state.interrupted_runs import half_run, hashes, whole_run
from tests.tiny_models import WEIGHTS_FILE, save_tiny_model

pytestmark = pytest.mark.slow  # whole runs


@pytest.fixture
def write_tied(tmp_path: Path, excerpts: Path) -> RecipeWriter:
    """Return a writer of recipes for a model that ties its output layer."""
    model = save_tiny_model(tmp_path / "tied", "llama", tie_word_embeddings=True)
    return recipe_writer(tmp_path, model, excerpts)


def restored(directory: Path, name: str) -> torch.Tensor:
    """Return a matrix of integers as an export has it, dequantized."""
    storage = modules_of(directory)[name]
    assert storage.weight is not None
    tensors = load_file(directory / WEIGHTS_FILE)
    leaves = {leaf: tensors[f"{name}.{leaf}"] for leaf in storage.weight.leaf_shapes(*storage.shape)}
    return unpack(leaves, storage.weight, storage.shape).dequantize()


def perplexity_by_transformers(recipe: Path, directory: Path) -> float:
    loaded = load_recipe(recipe)
    tokens = evaluation_windows(loaded, load_tokenizer(loaded.model.path), 256)[0]["held_out"]
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        return float(model(input_ids=tokens, labels=tokens).loss.exp())


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"lm_head": {"bits": 8}}, {OUTPUT_LAYER}),
        ({"embeddings": {"bits": 8}}, {EMBEDDING}),
        ({"lm_head": {"bits": 8}, "embeddings": {"bits": 8}}, {OUTPUT_LAYER, EMBEDDING}),
    ],
)
def test_what_is_outside_the_layers_can_be_all_that_is_quantized(
    keys: dict[str, Any], expected: set[str], write_recipe: RecipeWriter
) -> None:
    recipe = write_recipe(quantize(ignore=["*"], **keys))
    report, directory = run_recipe(load_recipe(recipe))
    assert set(modules_of(directory)) == expected
    assert report.compressed.perplexity["held_out"] == pytest.approx(
        perplexity_by_transformers(recipe, directory), rel=1e-3
    )


def test_an_output_layer_with_another_name_in_checkpoints_is_found(tmp_path: Path, excerpts: Path) -> None:
    write = recipe_writer(tmp_path, save_tiny_family(tmp_path / "gpt-neox", "gpt_neox"), excerpts)
    recipe = write(quantize(bits=4, lm_head={"bits": 5}, embeddings={"bits": 8}))
    report, directory = run_recipe(load_recipe(recipe))
    assert {"embed_out", "gpt_neox.embed_in"} <= modules_of(directory).keys()
    assert report.compressed.perplexity["held_out"] == pytest.approx(
        perplexity_by_transformers(recipe, directory), rel=1e-3
    )


@pytest.mark.parametrize("prefix", [True, False])
def test_judged_model_is_the_one_that_transformers_loads(prefix: bool, write_recipe: RecipeWriter) -> None:
    recipe = write_recipe(
        factorize(num_compressed_layers=2, rank_multiple="auto"),
        quantize(
            lm_head={"bits": 5}, embeddings={"bits": 4, "group_size": -1}, compressed_prefix_inputs=prefix
        ),
    )
    report, directory = run_recipe(load_recipe(recipe))
    assert modules_of(directory)[OUTPUT_LAYER].weight == WeightQuantization(bits=5, group_size=32)
    assert modules_of(directory)[EMBEDDING].weight == WeightQuantization(bits=4, group_size=-1)
    assert report.compressed.perplexity["held_out"] == pytest.approx(
        perplexity_by_transformers(recipe, directory), rel=1e-3
    )
    assert not [warning for warning in report.warnings if "the plan foresaw" in warning]
    told = describe_treatment(report)
    assert told.endswith("The output layer is stored as int5. The input embedding is stored as int4.")
    assert "as int8, in groups of" in told


def test_tied_matrix_is_stored_once_and_read_for_both(write_tied: RecipeWriter) -> None:
    recipe = write_tied(quantize(lm_head={"bits": 4}))
    report, directory = run_recipe(load_recipe(recipe))
    modules = modules_of(directory)
    assert EMBEDDING in modules
    assert OUTPUT_LAYER not in modules
    assert not any(name.startswith(OUTPUT_LAYER) for name in load_file(directory / WEIGHTS_FILE))
    assert report.compressed.perplexity["held_out"] == pytest.approx(
        perplexity_by_transformers(recipe, directory), rel=1e-3
    )
    assert report.results["quantize"] is not None
    assert report.results["quantize"].embedding.name == EMBEDDING
    assert report.results["quantize"].matrices[-1].name == EMBEDDING
    one_matrix = "Input embedding and output layer, which are one matrix, are stored as int4."
    assert describe_treatment(report).endswith(one_matrix)
    assert not [warning for warning in report.warnings if "the plan foresaw" in warning]


def test_output_layer_is_rounded_on_its_own_inputs(write_recipe: RecipeWriter, llama: Path) -> None:
    """GPTQ's loss, on the inputs that the exported layers hand the output layer, is what the report says."""
    recipe = write_recipe(quantize(lm_head={"bits": 4}, damping=0.1))
    report, directory = run_recipe(load_recipe(recipe))
    [inputs] = inputs_of(directory, recipe, [OUTPUT_LAYER]).values()
    rows = inputs.flatten(0, 1)
    gram = rows.T @ rows
    original = load_file(llama / WEIGHTS_FILE)[f"{OUTPUT_LAYER}.weight"]
    loss = proxy_loss(original, restored(directory, OUTPUT_LAYER), gram)
    assert report.results["quantize"] is not None
    linear = report.results["quantize"].linears[-1]
    assert linear.name == OUTPUT_LAYER
    assert linear.loss == pytest.approx(loss, rel=0.01)
    matrix = report.results["quantize"].matrices[-1]
    assert matrix.gptq_loss < matrix.rtn_loss


def test_embedding_is_rounded_with_searched_scales(write_recipe: RecipeWriter, llama: Path) -> None:
    report, directory = run_recipe(load_recipe(write_recipe(quantize(embeddings={"bits": 4}))))
    original = load_file(llama / WEIGHTS_FILE)[f"{EMBEDDING}.weight"]
    found = restored(directory, EMBEDDING)
    groups = original.view(len(original), -1, 32)
    scale = groups.abs().amax(2, keepdim=True) / 7.5  # covers the largest weight
    plain = ((groups / scale).round().clamp(-8, 7) * scale).view_as(original)
    error = (found - original).square().sum()
    assert error < (plain - original).square().sum()
    assert report.results["quantize"] is not None
    assert report.results["quantize"].embedding.error == pytest.approx(
        float(error / original.square().sum()), rel=1e-4
    )


def test_killed_runs_go_on(
    write_recipe: RecipeWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether a run ends before the embedding, between layers or before the output layer: the bytes agree."""
    recipe = write_recipe(
        quantize(lm_head={"bits": 4}, embeddings={"bits": 6}), evaluation={"max_sequences": 4}
    )
    whole_run(recipe, monkeypatch)
    expected = hashes(tmp_path / "out")
    for pieces in (1, 3, 5):  # the embedding, two of four layers, all layers
        (tmp_path / "out").rename(tmp_path / f"out-{pieces}")
        half_run(recipe, monkeypatch, pieces)
        count, resumed = whole_run(recipe, monkeypatch)
        assert count == 6 - pieces
        assert any("finished pieces of an earlier run" in line for line in resumed)
        assert hashes(tmp_path / "out") == expected


def test_plan_counts_them_and_says_what_a_tied_one_costs(
    write_recipe: RecipeWriter, write_tied: RecipeWriter
) -> None:
    plain = make_plan(load_recipe(write_recipe(quantize())))
    asked = make_plan(
        load_recipe(
            write_recipe(
                quantize(lm_head={"bits": 8}, embeddings={"bits": 4, "group_size": -1}),
                serving={"tensor_parallel_sizes": [1, 2]},
            )
        )
    )
    weights, scale = 256 * 128, 4
    saved = 2 * weights * 4 - (weights + weights // 32 * scale + 16) - (weights // 2 + 256 * scale + 16)
    assert plain.candidates[-1].num_bytes - asked.candidates[-1].num_bytes == saved
    [kernels] = {use.storage for use in asked.kernels if use.matrices == (OUTPUT_LAYER,)}
    assert kernels == "int8, groups of 32"
    assert [use.rows for use in asked.kernels if use.matrices == (OUTPUT_LAYER,)] == [256, 128]
    assert not [line for line in asked.warnings if "tied" in line]
    tied = make_plan(load_recipe(write_tied(quantize(embeddings={"bits": 8}))))
    assert [line for line in tied.warnings if "tied to the input embedding" in line]


def test_what_cannot_be_is_refused(write_tied: RecipeWriter, tmp_path: Path, excerpts: Path) -> None:
    with pytest.raises(PlanError, match="are one matrix; remove one of the two keys"):
        make_plan(load_recipe(write_tied(quantize(lm_head={"bits": 8}, embeddings={"bits": 4}))))
    written_out = quantize(group_size=32, lm_head={}, embeddings={"bits": 8, "group_size": 32})
    assert make_plan(load_recipe(write_tied(written_out))).candidates
    write_opt = recipe_writer(tmp_path, save_tiny_model(tmp_path / "opt", "opt"), excerpts)
    with pytest.raises(PlanError, match="no integers for the input embeddings of opt models"):
        make_plan(load_recipe(write_opt(quantize(embeddings={"bits": 8}))))


def test_the_decoder_in_a_vision_language_model_decides() -> None:
    """PaliGemma's is a Gemma, whose embedding vLLM builds plain."""
    architecture = read_architecture(tiny_vision_families.tiny_config("paligemma"))
    with pytest.raises(PlanError, match="no integers for the input embeddings of gemma models"):
        plan_vocabulary(Quantize(embeddings=VocabularyIntegers()), StorageRules(architecture, fitted_to=(1,)))


def test_recovery_says_that_it_has_nothing_to_train(write_recipe: RecipeWriter) -> None:
    stage = quantize(group_size=32, ignore=["*"], lm_head={"bits": 8})
    recover = {"recover": {"rounding": True, "steps": 4, "batch_size": 2, "end_to_end_steps": 2}}
    report, _ = run_recipe(load_recipe(write_recipe(stage, recover)))
    assert [warning for warning in report.warnings if "recovery had nothing to train" in warning]


def test_recovery_leaves_them_as_they_are(write_recipe: RecipeWriter) -> None:
    """Layers are trained on what the rounded embedding gives; both matrices stay to the bit."""
    stage = quantize(bits=4, lm_head={"bits": 6}, embeddings={"bits": 6})
    written = []
    for stages in ([stage], [stage, {"recover": {"steps": 4, "batch_size": 2}}]):
        report, directory = run_recipe(load_recipe(write_recipe(*stages)))
        written.append(load_file(directory / WEIGHTS_FILE))
        assert report.compressed.perplexity["held_out"] > 0
    plain, recovered = written
    own = [name for name in plain if name.startswith((EMBEDDING, OUTPUT_LAYER))]
    assert len(own) == 8
    assert all(torch.equal(plain[name], recovered[name]) for name in own)
    assert any(not torch.equal(plain[name], recovered[name]) for name in plain)
