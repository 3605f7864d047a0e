"""`token_weight: sensitivity` against autograd on whole models, and against factors by the formula."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional
from transformers import AutoModelForCausalLM

from ercsvd_deploy.data.samples import Sample, text_samples
from ercsvd_deploy.data.texts import load_tokenizer
from ercsvd_deploy.pipelines import plan
from ercsvd_deploy.pipelines.flow import run_recipe
from ercsvd_deploy.pipelines.inputs.texts import calibration_windows
from ercsvd_deploy.pipelines.stages.sensitivity.tokens import TokenSensitivity, measure_token_sensitivity
from ercsvd_deploy.pipelines.state.cache import CacheFolder
from ercsvd_deploy.recipe.load import load_recipe
from tests.models.streamed import streamed
from tests.recipe_runs import TEXT, RecipeWriter, factorize
from tests.stages.naive_factors import inputs_of, naive_erc
from tests.state.interrupted_runs import half_run, hashes, whole_run
from tests.tiny_models import save_tiny_model

pytestmark = pytest.mark.slow  # whole runs

CALIBRATION = {
    "dataset": {"text": str(TEXT / "calibration.txt")},
    "num_samples": 12,
    "sequence_length": 24,
    "token_weight": "sensitivity",
}


def quantize(**settings: Any) -> dict[str, Any]:
    return {"quantize": {"bits": 4, "group_size": 32} | settings}


def squared_gradients(directory: Path, tokens: torch.Tensor, names: list[str]) -> dict[str, torch.Tensor]:
    """[rows, tokens] by Linear, of the loss on drawn tokens; few short sequences are one batch in a run."""
    whole = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    found: dict[str, torch.Tensor] = {}
    for name in names:
        whole.get_submodule(name).register_full_backward_hook(
            lambda _m, _i, out, name=name: found.__setitem__(name, out[0].square().sum(-1).view_as(tokens))
        )
    logits = whole(input_ids=tokens).logits.flatten(0, 1)
    drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=torch.Generator().manual_seed(0))
    functional.cross_entropy(logits, drawn[:, 0], reduction="sum").backward()  # type: ignore[no-untyped-call]
    return found


@pytest.mark.parametrize("family", ["llama", "qwen2", "opt"])
def test_weights_are_the_squared_gradients_of_all_linears_that_share_inputs(
    tmp_path: Path, family: str
) -> None:
    directory = save_tiny_model(tmp_path / "model", family)
    model = streamed(directory)
    tokens = torch.randint(3, 250, (6, 24), generator=torch.Generator().manual_seed(2))
    found = measure_token_sensitivity(model, text_samples(tokens), CacheFolder(tmp_path / "work"))
    gradients = squared_gradients(directory, tokens, [each.name for each in model.architecture.linears])
    [batch] = model.batches(text_samples(tokens))
    for layer in model.architecture.layers:
        [weights] = found.weights(layer, [batch])
        assert isinstance(weights, dict)
        assert len(weights) == len(layer.groups)
        for group in layer.groups:
            expected = torch.stack([gradients[linear.name] for linear in group]).sum(0)
            torch.testing.assert_close(
                weights[layer.local_name(group[0])], expected / expected.mean(), rtol=1e-3, atol=1e-6
            )


def test_samples_of_other_lengths_and_with_weights_of_their_own(tmp_path: Path) -> None:
    model = streamed(save_tiny_model(tmp_path / "model", "llama"))
    generator = torch.Generator().manual_seed(4)
    samples = [
        Sample(
            torch.randint(3, 250, (length,), generator=generator),
            token_weights=torch.rand(length) if own else None,
        )
        for length, own in ((24, False), (10, False), (24, True))
    ]
    measured = measure_token_sensitivity(model, samples, CacheFolder(tmp_path / "work"))
    layer = model.architecture.layers[0]
    name = layer.local_name(layer.groups[0][0])
    for batch in model.batches(samples):
        [weights] = measured.weights(layer, [batch])
        assert isinstance(weights, dict)
        assert weights[name].shape == batch.tokens.shape
        assert (weights[name] > 0).all()
    everything = load_file(tmp_path / "work" / "layer-00000.safetensors")[layer.groups[0][0].name]
    assert everything.sum() == pytest.approx(24 + 10 + 24, rel=1e-4)  # one a token on average
    assert not everything[1, 10:].any()


def test_factors_are_made_for_the_weighted_inputs(write_recipe: RecipeWriter, llama: Path) -> None:
    recipe = write_recipe(factorize(method="svd_llm", num_compressed_layers="all"), calibration=CALIBRATION)
    report, directory = run_recipe(load_recipe(recipe))
    assert report.results["factorize"] is not None
    ranks = {each.name: each.rank for each in report.results["factorize"].linears}
    calibration = load_recipe(recipe).calibration
    assert calibration is not None
    tokens = calibration_windows(calibration, load_tokenizer(str(llama)), 256)[0]
    names = [name for name in ranks if name.endswith(("q_proj", "k_proj", "v_proj", "down_proj"))]
    gradients, inputs = squared_gradients(llama, tokens, names), inputs_of(llama, recipe, names)
    originals, written = load_file(llama / "model.safetensors"), load_file(directory / "model.safetensors")
    for name in names:
        if name.endswith(("k_proj", "v_proj")):
            continue
        siblings = [name.replace("q_proj", end) for end in ("q_proj", "k_proj", "v_proj")]
        weights = torch.stack([gradients[each] for each in dict.fromkeys(siblings)]).sum(0).double().flatten()
        rows = inputs[name].flatten(0, 1)
        weight, rank = originals[f"{name}.weight"].double(), ranks[name]
        assert rank is not None
        expected = naive_erc(weight, rows.T @ (weights[:, None] * rows), rank, 0)
        product = written[f"{name}.factor_b.weight"].double() @ written[f"{name}.factor_a.weight"].double()
        difference = weights.sqrt()[:, None] * (rows @ (product - expected).T)
        assert difference.norm() / (weights.sqrt()[:, None] * (rows @ expected.T)).norm() < 2e-3, name


def test_an_interrupted_run_goes_on_to_the_same_bytes(
    write_recipe: RecipeWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = [factorize(compressed_prefix_inputs=True, rank_multiple=32), quantize()]
    recipe = write_recipe(*stages, calibration=CALIBRATION)
    everything, _ = whole_run(recipe, monkeypatch)
    expected = hashes(tmp_path / "out")
    for pieces in (9, everything - 6):  # within the passes of the gradients, and behind them
        half_run(recipe, monkeypatch, pieces)
        computed, _ = whole_run(recipe, monkeypatch)
        assert hashes(tmp_path / "out") == expected
        assert computed < everything


def test_stages_that_read_no_inputs_measure_nothing(write_recipe: RecipeWriter) -> None:
    reading = write_recipe(quantize(), calibration=CALIBRATION)
    assert "token_sensitivity" in [stage.name for stage in plan(reading).stages]
    blind = write_recipe(factorize(method="svd", num_compressed_layers="all"), calibration=CALIBRATION)
    assert "token_sensitivity" not in [stage.name for stage in plan(blind).stages]


def test_a_model_that_nothing_matters_to_counts_all_tokens_alike(tmp_path: Path) -> None:
    """All logits equal: a random draw tells the same of every token, and gradients stop at the head."""
    directory = save_tiny_model(tmp_path / "model", "llama")
    whole = AutoModelForCausalLM.from_pretrained(directory)
    whole.get_output_embeddings().weight.data.zero_()
    whole.save_pretrained(directory)
    model = streamed(directory)
    tokens = torch.randint(3, 250, (2, 8), generator=torch.Generator().manual_seed(2))
    found: TokenSensitivity = measure_token_sensitivity(
        model, text_samples(tokens), CacheFolder(tmp_path / "work")
    )
    [weights] = found.weights(model.architecture.layers[0], model.batches(text_samples(tokens)))
    assert isinstance(weights, dict)
    assert all(torch.equal(each, torch.ones(2, 8)) for each in weights.values())
