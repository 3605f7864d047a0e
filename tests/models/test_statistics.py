"""Statistics of a Linear's inputs against naive sums over tokens."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from ercsvd_deploy.data.samples import text_samples
from ercsvd_deploy.models.streaming.statistics import InputStatistics
from tests.models.streamed import CPU, streamed
from tests.tiny_models import save_tiny_model


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(3, 250, (5, 24), generator=torch.Generator().manual_seed(1))


def test_statistics_of_inputs(tmp_path: Path, tokens: torch.Tensor) -> None:
    save_tiny_model(tmp_path, "llama")
    model = streamed(tmp_path)
    batches = model.batches(text_samples(tokens))
    hidden = model.embed(batches)
    expected_input: list[torch.Tensor] = []
    with model.layer(0) as layer:
        norm = copy.deepcopy(layer.get_submodule("input_layernorm"))
        expected_input = [norm(states).reshape(-1, states.shape[-1]) for states in hidden]
    statistics = InputStatistics.zeros(expected_input[0].shape[1], CPU)
    model.advance(0, batches, hidden, observe={"self_attn.q_proj": statistics})
    rows = torch.cat(expected_input).detach()
    torch.testing.assert_close(statistics.gram, rows.T @ rows, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(statistics.mean_absolute, rows.abs().mean(0))
    assert statistics.num_tokens == tokens.numel()


def test_weighted_tokens_count_by_their_weight() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(2, 5, 3, generator=generator)
    weights = torch.tensor([[1.0, 0.0, 2.0, 1.0, 0.5], [1.0, 1.0, 1.0, 1.0, 0.0]])
    statistics = InputStatistics.zeros(3, CPU)
    statistics.add(inputs, weights)
    gram, absolute, total = torch.zeros(3, 3), torch.zeros(3), 0.0
    for row, row_weights in zip(inputs, weights, strict=True):
        for x, weight in zip(row, row_weights.tolist(), strict=True):
            gram, absolute, total = (
                gram + weight * x[:, None] * x,
                absolute + weight * x.abs(),
                total + weight,
            )
    torch.testing.assert_close(statistics.gram, gram)
    torch.testing.assert_close(statistics.mean_absolute, absolute / total)
    twice = InputStatistics.zeros(3, CPU)
    twice.add(inputs, torch.ones(2, 5))
    plain = InputStatistics.zeros(3, CPU)
    plain.add(inputs)
    torch.testing.assert_close(twice.gram, plain.gram)
    assert twice.num_tokens == plain.num_tokens == 10
