"""Factors made on the compressed prefix, against naive ones from both models' own inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import ercsvd_deploy.hf  # noqa: F401 - registers the loader of compressed checkpoints
from ercsvd_deploy.data.samples import text_samples
from ercsvd_deploy.data.texts import load_tokenizer
from ercsvd_deploy.linalg.compensation import compensated_weight
from ercsvd_deploy.linalg.decomposition import decompose
from ercsvd_deploy.linalg.errors import compensated_error
from ercsvd_deploy.linalg.truncation import truncate
from ercsvd_deploy.models.streaming.statistics import InputStatistics, PairedStatistics
from ercsvd_deploy.pipelines.flow import run_recipe
from ercsvd_deploy.pipelines.inputs.texts import calibration_windows
from ercsvd_deploy.pipelines.reporting.report.document import Report
from ercsvd_deploy.recipe.load import load_recipe
from tests.linalg.references import random_inputs, random_weight
from tests.models.streamed import CPU, streamed
from tests.recipe_runs import TEXT, RecipeWriter, factorize
from tests.stages.naive_factors import inputs_of, naive_erc, unit_rows
from tests.state.interrupted_runs import half_run, hashes, whole_run

pytestmark = pytest.mark.slow  # whole runs

ALL = factorize(num_compressed_layers="all")["factorize"]
INT8 = {"quantize": {"bits": 8, "group_size": 32}}
CONTROLLED: dict[str, Any] = {
    "method": "svd_llm",
    "compression_ratio": 0.3,
    "rank_multiple": 8,
    "allocation": "error_controlled",
    "output_metric": "fisher",
    "num_fisher_samples": 4,
}


def run(write_recipe: RecipeWriter, settings: dict[str, Any], **changes: Any) -> tuple[Path, Report, Path]:
    recipe = write_recipe({"factorize": settings | changes})
    report, directory = run_recipe(load_recipe(recipe))
    return recipe, report, directory


def stored_product(tensors: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    factor_a, factor_b = (tensors[f"{name}.{part}.weight"].double() for part in ("factor_a", "factor_b"))
    return factor_b @ factor_a


def test_every_matrix_is_made_for_the_inputs_it_has_in_the_export(
    write_recipe: RecipeWriter, llama: Path
) -> None:
    """The export's own inputs, seen by transformers, give the factors by the formula, Cholesky and SVD."""
    recipe, report, directory = run(write_recipe, ALL, compressed_prefix_inputs=True)
    assert report.results["factorize"] is not None
    ranks = {each.name: each for each in report.results["factorize"].linears}
    originals, written = load_file(llama / "model.safetensors"), load_file(directory / "model.safetensors")
    ends = ("q_proj", "o_proj", "up_proj", "down_proj")
    names = [name for name in ranks if name.endswith(ends)]
    original, compressed = inputs_of(llama, recipe, names), inputs_of(directory, recipe, names)
    for name in names:
        weight, rank = originals[f"{name}.weight"].double(), ranks[name].rank
        assert rank is not None
        x, other = unit_rows(original[name]), unit_rows(compressed[name], original[name])
        seen = other.T @ other
        ridge = 0.01 * seen.diagonal().mean() * torch.eye(len(seen), dtype=torch.float64)
        target = weight @ (x.T @ other + ridge) @ torch.linalg.inv(seen + ridge)
        expected = naive_erc(target, seen, rank, 0)
        product = stored_product(written, name)
        assert float((other @ (product - expected).T).norm() / (other @ expected.T).norm()) < 1e-3, name
        error = float((x @ weight.T - other @ product.T).norm() / (x @ weight.T).norm())
        assert ranks[name].calibration_error == pytest.approx(error, rel=5e-3), name


def test_first_inputs_are_the_original_ones(write_recipe: RecipeWriter) -> None:
    """Before anything is compressed the target is the weight: its factors are those without the option."""
    tensors = {}
    for prefix in (False, True):
        _, _, directory = run(write_recipe, ALL, num_compressed_layers=2, compressed_prefix_inputs=prefix)
        tensors[prefix] = load_file(directory / "model.safetensors")
    for end in ("q_proj", "k_proj", "v_proj"):
        name = f"model.layers.2.self_attn.{end}"
        torch.testing.assert_close(
            stored_product(tensors[True], name), stored_product(tensors[False], name), rtol=1e-3, atol=1e-5
        )
    later = "model.layers.3.mlp.down_proj"
    assert not torch.allclose(stored_product(tensors[True], later), stored_product(tensors[False], later))


@pytest.mark.parametrize(
    ("settings", "layout", "further"),
    [(ALL, "pivoted", []), (CONTROLLED, "low_rank", []), (ALL | {"rank_multiple": 32}, "low_rank", [INT8])],
    ids=["all", "error_controlled", "integers"],
)
def test_the_last_layers_error_on_calibration_data_falls(
    settings: dict[str, Any],
    layout: str,
    further: list[dict[str, Any]],
    write_recipe: RecipeWriter,
    llama: Path,
) -> None:
    """Integers keep what was gained: re-fitted to the original weight, second factors would lose it."""

    def last_layer_output(path: Path, tokens: torch.Tensor) -> torch.Tensor:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        seen: list[torch.Tensor] = []
        model.model.layers[-1].register_forward_hook(lambda _m, _i, output: seen.append(output))
        with torch.no_grad():
            model(tokens)
        return seen[0].double()

    dataset = {"text": str(TEXT / "calibration.txt")}
    calibration = {"dataset": dataset, "num_samples": 12, "sequence_length": 48}
    errors, kept = {}, {}
    for prefix in (False, True):
        stage = settings | {"layout": layout, "compressed_prefix_inputs": prefix}
        recipe = load_recipe(write_recipe({"factorize": stage}, *further, calibration=calibration))
        report, directory = run_recipe(recipe)
        assert recipe.calibration is not None
        assert report.results["factorize"] is not None
        tokens = calibration_windows(recipe.calibration, load_tokenizer(str(llama)), 256)[0]
        true = last_layer_output(llama, tokens)
        errors[prefix] = float((last_layer_output(directory, tokens) - true).norm() / true.norm())
        kept[prefix] = report.results["factorize"].plan.ranks
    assert kept[True] == kept[False]
    assert errors[True] < 0.8 * errors[False]


@pytest.mark.parametrize("settings", [ALL, CONTROLLED], ids=["all", "error_controlled"])
@pytest.mark.parametrize("pieces", [4, 6])
def test_an_interrupted_run_goes_on_to_the_same_bytes(
    settings: dict[str, Any],
    pieces: int,
    write_recipe: RecipeWriter,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if settings is CONTROLLED:
        pieces += 17  # sensitivity, decompositions and damages come first
    recipe = write_recipe({"factorize": settings | {"compressed_prefix_inputs": True}})
    everything, _ = whole_run(recipe, monkeypatch)
    expected = hashes(tmp_path / "out")
    half_run(recipe, monkeypatch, pieces)
    computed, notes = whole_run(recipe, monkeypatch)
    assert hashes(tmp_path / "out") == expected
    assert computed == everything - pieces
    assert notes


def test_compensated_weight_is_the_damped_least_squares_solution() -> None:
    weight, inputs = random_weight(24, 40), random_inputs(40)
    noise = torch.randn(40, 200, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    others = inputs + 0.1 * noise
    target = compensated_weight(weight, others @ others.T, inputs @ others.T, damping=0.02)
    strength = float((0.02 * (others @ others.T).diagonal().mean()).sqrt())
    # Damping as further equations: W = M on the axes, each counted by the root of lambda.
    axes = strength * torch.eye(40, dtype=torch.float64)
    expected = torch.linalg.lstsq(
        torch.cat([others.T, axes]), torch.cat([inputs.T @ weight.T, axes @ weight.T])
    ).solution.T
    torch.testing.assert_close(target, expected)
    torch.testing.assert_close(compensated_weight(weight, inputs @ inputs.T, inputs @ inputs.T), weight)


def test_weight_stays_where_nothing_was_seen() -> None:
    weight = random_weight(24, 40)
    unseen = torch.zeros(40, 40)
    assert torch.equal(compensated_weight(weight, unseen, unseen), weight)
    seen, cross = unseen.clone(), unseen.clone()
    seen[:3, :3], cross[:3, :3] = 5 * torch.eye(3), 10 * torch.eye(3)
    target = compensated_weight(weight, seen, cross, damping=1e-6)
    torch.testing.assert_close(target[:, 3:], weight[:, 3:])
    torch.testing.assert_close(target[:, :3], 2 * weight[:, :3], rtol=1e-5, atol=1e-5)


def test_no_other_factors_of_the_rank_come_closer_to_the_original_outputs() -> None:
    weight, inputs = random_weight(24, 40), random_inputs(40, condition=50)
    generator = torch.Generator().manual_seed(6)
    others = inputs + 0.3 * torch.randn(40, 200, generator=generator, dtype=torch.float64)
    moments = inputs @ inputs.T, others @ others.T, inputs @ others.T
    target = compensated_weight(weight, moments[1], moments[2], damping=1e-12)
    best = truncate(decompose(target, method="svd_llm", gram=moments[1]), target, 8)
    lowest = compensated_error(weight, best, *moments)
    naive = (weight @ inputs - best.product() @ others).norm() / (weight @ inputs).norm()
    assert lowest == pytest.approx(float(naive), rel=1e-6)
    for _ in range(20):
        moved = type(best)(
            best.factor_a + 1e-3 * torch.randn(8, 40, generator=generator, dtype=torch.float64),
            best.factor_b + 1e-3 * torch.randn(24, 8, generator=generator, dtype=torch.float64),
        )
        assert compensated_error(weight, moved, *moments) > lowest
    plain = truncate(decompose(weight, method="svd_llm", gram=moments[0]), weight, 8)
    assert lowest < compensated_error(weight, plain, *moments)


def test_paired_statistics_are_sums_over_tokens() -> None:
    generator = torch.Generator().manual_seed(7)
    x, other = (torch.randn(2, 5, 3, generator=generator) for _ in range(2))
    weights = torch.rand(2, 5, generator=generator)
    for counted in (None, weights):
        seen = PairedStatistics.zeros(3, CPU)
        seen.add(x, other, counted)
        scale = torch.ones(2, 5) if counted is None else counted
        for found, left, right in (
            (seen.original, x, x),
            (seen.gram, other, other),
            (seen.cross_moment, x, other),
        ):
            torch.testing.assert_close(found, torch.einsum("bt,bti,btj->ij", scale, left, right))


def test_inputs_of_a_linear_are_those_of_the_whole_layer(llama: Path) -> None:
    model = streamed(llama)
    tokens = torch.randint(3, 250, (3, 12), generator=torch.Generator().manual_seed(8))
    batches = model.batches(text_samples(tokens))
    hidden = model.embed(batches)
    with model.layer(0) as module:
        for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"):
            linear = module.get_submodule(name)
            statistics = InputStatistics.zeros(int(linear.in_features), CPU)  # type: ignore[arg-type]
            model.advance(0, batches, list(hidden), observe={name: statistics}, module=module)
            rows = model.linear_inputs(module, 0, batches[0], hidden[0], name).flatten(0, 1)
            torch.testing.assert_close(rows.T @ rows, statistics.gram)
            assert not linear._forward_pre_hooks
