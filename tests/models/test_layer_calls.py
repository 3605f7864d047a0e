"""Calls of layers: shared where batches are called alike, gone with the last of them; additions in place."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from ercsvd_deploy.data.samples import Batch
from ercsvd_deploy.models.streaming.layer_calls import Addition, CallRecorder, LayerCall, LayerCalls
from ercsvd_deploy.models.streaming.recording import EmbeddingDone


def batch(rows: int, tokens: int) -> Batch:
    return Batch(torch.zeros(rows, tokens, dtype=torch.long), {}, None, tuple(range(rows)))


def calls(mask: torch.Tensor) -> list[LayerCall]:
    return [LayerCall({"mask": mask, "rotary": (torch.ones(2), None), "flag": True}) for _ in range(3)]


def test_batches_that_are_called_alike_share_a_record() -> None:
    kept = LayerCalls()
    first, alike, other, longer = batch(2, 4), batch(2, 4), batch(2, 4), batch(2, 5)
    for each, mask in ((first, [1]), (alike, [1]), (other, [2]), (longer, [1])):
        kept.record(each, calls(torch.tensor(mask)))
    assert kept.find(alike, 1) is kept.find(first, 1)
    assert kept.find(other, 1) is not kept.find(first, 1)
    assert kept.find(other, 1).arguments["mask"].item() == 2
    assert kept.find(longer, 1) is not kept.find(first, 1)


def test_a_record_goes_with_its_last_batch() -> None:
    kept, first, alike = LayerCalls(), batch(1, 3), batch(1, 3)
    for each in (first, alike):
        kept.record(each, calls(torch.tensor([1])))
    record = weakref.ref(kept.find(first, 0))
    del first, each
    gc.collect()
    assert record() is not None
    del alike
    gc.collect()
    assert record() is None


def test_what_a_model_adds_between_layers_is_recorded_and_added() -> None:
    """As a model with features behind its first layer: the second layer's input is not the first's output."""
    features = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
    where = (torch.tensor([0, 1]), torch.tensor([2, 0]))

    def run(layer: CallRecorder, states: torch.Tensor) -> None:
        for index in range(3):
            states = layer(states, {"index": index})
            if index == 0:
                states = states.index_put(where, features, accumulate=True)

    recorder, states = CallRecorder(3), torch.ones(2, 4, 6)
    with pytest.raises(EmbeddingDone):
        run(recorder, states)
    assert recorder.first_input is states
    assert [call.arguments["index"] for call in recorder.calls] == [0, 1, 2]
    first, second, third = recorder.calls
    assert first.addition is third.addition is None
    outputs = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(1), requires_grad=True)
    expected = outputs.detach().clone()
    expected[where] += features
    assert torch.equal(second.inputs(outputs), expected)
    assert first.inputs(outputs) is outputs
    [gradient] = torch.autograd.grad(second.inputs(outputs).sum(), outputs)
    assert torch.equal(gradient, torch.ones_like(outputs))


def test_additions_take_the_precision_of_the_states() -> None:
    addition = Addition.of(torch.eye(3)[None])
    assert addition is not None
    assert addition.to(torch.zeros(1, 3, 3, dtype=torch.bfloat16)).dtype == torch.bfloat16
