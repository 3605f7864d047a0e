"""Two models side by side: layer errors and KL against whole transformers models, and quality."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from ercsvd_deploy.evaluation import comparison
from ercsvd_deploy.evaluation.comparison import compare_models, relative_error
from ercsvd_deploy.evaluation.quality import perplexities
from tests.models.streamed import streamed
from tests.tiny_models import save_tiny_model


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(3, 250, (3, 20), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def directories(tmp_path: Path) -> tuple[Path, Path]:
    """A random model, and itself with some noise."""
    original = save_tiny_model(tmp_path / "original", "llama", num_layers=3)
    model = AutoModelForCausalLM.from_pretrained(original)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.01)
    model.save_pretrained(tmp_path / "noisy")
    return original, tmp_path / "noisy"


def test_layer_errors_and_divergence_equal_those_of_whole_models(
    directories: tuple[Path, Path], tokens: torch.Tensor
) -> None:
    outputs, logprobs = [], []
    for directory in directories:
        model = AutoModelForCausalLM.from_pretrained(directory).eval()
        layers: list[torch.Tensor] = []
        for layer in model.model.layers:
            layer.register_forward_hook(
                lambda _m, _i, out: layers.append(out[0] if isinstance(out, tuple) else out)  # noqa: B023
            )
        with torch.no_grad():
            logprobs.append(model(input_ids=tokens).logits.log_softmax(-1)[:, :-1])
        outputs.append(layers)
    models = [streamed(directory) for directory in directories]
    found = compare_models(models[0], models[1], {"text": tokens}, {}).change
    expected = [float((tried - true).norm() / true.norm()) for true, tried in zip(*outputs, strict=True)]
    assert found.layer_errors["text"] == pytest.approx(expected, rel=1e-3)
    assert found.final_layer_error["text"] == found.layer_errors["text"][-1]
    true, tried = logprobs
    divergence = (true.exp() * (true - tried)).sum(-1).mean()
    assert found.logprob_kl["text"] == pytest.approx(float(divergence), rel=1e-3)
    assert found.logprob_kl["text"] > 0


def test_quality_is_what_each_model_has_alone(directories: tuple[Path, Path], tokens: torch.Tensor) -> None:
    models = [streamed(directory) for directory in directories]
    texts = {"a": tokens, "b": tokens[:1]}
    found = compare_models(models[0], models[1], texts, {})
    assert found.original.perplexity == perplexities(models[0], texts)
    assert found.compressed.perplexity == perplexities(models[1], texts)
    assert list(found.change.logprob_kl) == ["a", "b"]


def test_a_model_is_no_distance_from_itself(directories: tuple[Path, Path], tokens: torch.Tensor) -> None:
    found = compare_models(streamed(directories[0]), streamed(directories[0]), {"a": tokens}, {})
    assert found.change.layer_errors["a"] == (0.0, 0.0, 0.0)
    assert found.change.logprob_kl["a"] == pytest.approx(0, abs=1e-6)


def test_every_layer_is_counted_once(directories: tuple[Path, Path], tokens: torch.Tensor) -> None:
    calls: list[None] = []
    model = streamed(directories[0])
    compare_models(model, model, {"a": tokens}, {}, lambda: calls.append(None))
    assert len(calls) == 2 * 3  # of either model


def test_errors_of_early_layers_at_some_positions_are_near_those_at_all(
    directories: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = torch.randint(3, 250, (8, 64), generator=torch.Generator().manual_seed(2))
    models = [streamed(directory) for directory in directories]
    every = compare_models(models[0], models[1], {"a": tokens}, {}).change
    monkeypatch.setattr(comparison, "MOST_POSITIONS", 128)
    kept: dict[int, int] = {}
    comparison.judge_original(
        models[0], {"a": tokens}, {}, lambda index, outputs: kept.update({index: len(outputs["a"])})
    )
    assert kept == {0: 128, 1: 128, 2: 512}
    some = compare_models(models[0], models[1], {"a": tokens}, {}).change
    assert some.layer_errors["a"] == pytest.approx(every.layer_errors["a"], rel=0.1)
    assert some.layer_errors["a"][:2] != every.layer_errors["a"][:2]
    assert some.final_layer_error == every.final_layer_error
    assert some.logprob_kl == every.logprob_kl


def test_relative_error() -> None:
    true = [torch.tensor([3.0, 0.0]), torch.tensor([[0.0, 4.0]])]
    tried = [torch.tensor([3.0, 1.0]), torch.tensor([[0.0, 4.0]])]
    assert relative_error(tried, true) == pytest.approx(1 / 5)
    assert relative_error([torch.zeros(2)], [torch.zeros(2)]) == 0
