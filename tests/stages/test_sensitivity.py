"""Fisher information by the streamed passes, against autograd on whole models; and what it predicts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM

from ercsvd_deploy.data.samples import text_samples
from ercsvd_deploy.data.texts import load_tokenizer, token_windows
from ercsvd_deploy.evaluation.comparison import compare_models
from ercsvd_deploy.linalg.decomposition import decompose
from ercsvd_deploy.linalg.errors import output_error
from ercsvd_deploy.linalg.truncation import truncate
from ercsvd_deploy.models.streaming.layerwise import LayerwiseModel
from ercsvd_deploy.pipelines.stages.sensitivity.measure import Sensitivity, measure_sensitivity
from ercsvd_deploy.pipelines.state.cache import CacheFolder
from tests.models.streamed import streamed
from tests.tiny_models import save_tiny_model

TINY_LLAMA = Path(__file__).parents[2] / "examples" / "tiny-llama"


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(3, 250, (6, 24), generator=torch.Generator().manual_seed(2))


def metric_of(sensitivity: Sensitivity, model: LayerwiseModel, name: str) -> torch.Tensor:
    for layer in model.architecture.layers:
        for linear in layer.linears:
            if linear.name == name:
                return sensitivity.metric(layer, linear, model.device)
    raise AssertionError(name)


@pytest.mark.parametrize("family", ["llama", "qwen2", "opt"])
def test_metrics_equal_those_of_a_whole_model(tmp_path: Path, tokens: torch.Tensor, family: str) -> None:
    directory = save_tiny_model(tmp_path / "model", family)
    model = streamed(directory)
    sensitivity = measure_sensitivity(model, text_samples(tokens), CacheFolder(tmp_path / "work"))

    whole = AutoModelForCausalLM.from_pretrained(directory).eval()
    linear_names = [linear.name for linear in model.architecture.linears]
    gradients: dict[str, torch.Tensor] = {}
    for name in linear_names:
        whole.get_submodule(name).register_full_backward_hook(
            lambda _m, _i, out, name=name: gradients.__setitem__(name, out[0].flatten(0, -2))
        )
    logits = whole(input_ids=tokens).logits.flatten(0, 1)
    # The same draw as in the stage: six short sequences are one batch.
    drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=torch.Generator().manual_seed(0))
    loss = functional.cross_entropy(logits, drawn[:, 0], reduction="sum")
    loss.backward()  # type: ignore[no-untyped-call]
    for name in linear_names:
        expected = gradients[name].T @ gradients[name] / tokens.numel()
        torch.testing.assert_close(metric_of(sensitivity, model, name), expected, rtol=1e-3, atol=1e-8)


@pytest.mark.slow
def test_predicted_divergence_is_about_the_measured_one(tmp_path: Path) -> None:
    """On the trained model: truncate one Linear, and compare the prediction with the real divergence."""
    model = streamed(TINY_LLAMA)
    text = (TINY_LLAMA.parent / "text" / "calibration.txt").read_text(encoding="utf-8")[:200_000]
    windows = token_windows(text, load_tokenizer(str(TINY_LLAMA)), 128, 4096)[:48]
    sensitivity = measure_sensitivity(model, text_samples(windows), CacheFolder(tmp_path / "work"))
    layer = model.architecture.layers[5]
    linear = next(each for each in layer.linears if each.name.endswith("gate_proj"))
    metric = sensitivity.metric(layer, linear, model.device)
    statistics = model.input_statistics(layer)
    batches = model.batches(text_samples(windows))
    hidden = model.embed(batches)
    for index in range(6):
        model.advance(index, batches, hidden, observe=statistics if index == 5 else None)
    gram = statistics["mlp.gate_proj"].gram
    whole = AutoModelForCausalLM.from_pretrained(TINY_LLAMA, dtype=torch.float32)
    module = whole.get_submodule(linear.name)
    weight = module.weight.data.clone()
    decomposition = decompose(weight, method="svd_llm", gram=gram, output_metric=metric)
    factors = truncate(decomposition, weight, 96)
    predicted = output_error(weight, factors.product(), gram, metric) / windows.numel() / 2
    tail = decomposition.singular_values[96:].square().sum() / windows.numel() / 2
    assert predicted == pytest.approx(float(tail), rel=0.1)  # up to the damping

    module.weight.data = factors.product()
    whole.save_pretrained(tmp_path / "changed")
    measured = compare_models(model, streamed(tmp_path / "changed"), {"text": windows}, {}).change
    assert measured.logprob_kl["text"] == pytest.approx(predicted, rel=0.5)


def test_an_interrupted_pass_back_goes_on(
    tmp_path: Path, tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = streamed(save_tiny_model(tmp_path / "model", "llama", num_layers=4))
    samples = text_samples(tokens)
    expected = measure_sensitivity(model, samples, CacheFolder(tmp_path / "undisturbed"))
    retreat = LayerwiseModel.retreat
    seen: list[int] = []

    def stopping(self: LayerwiseModel, index: int, *args: object, **kwargs: object) -> None:
        if index == 1 and seen.count(1) == 0:
            seen.append(1)
            raise KeyboardInterrupt
        seen.append(index)
        retreat(self, index, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(LayerwiseModel, "retreat", stopping)
    with pytest.raises(KeyboardInterrupt):
        measure_sensitivity(model, samples, CacheFolder(tmp_path / "work"))
    found = measure_sensitivity(model, samples, CacheFolder(tmp_path / "work"))
    assert seen == [3, 2, 1, 1, 0]
    for linear in model.architecture.linears:
        assert torch.equal(metric_of(found, model, linear.name), metric_of(expected, model, linear.name))
    kept = {path.name for path in (tmp_path / "work").glob("*.safetensors")}
    assert kept == {f"layer-{index:05d}.safetensors" for index in range(4)}
