"""Compressed models that embed or score texts: vLLM's pooling runner gives the vectors of transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from tests.families.served import STAGES, compress
from tests.tiny_models import materialise, save_tiny_model
from tests.tiny_pooling import KINDS, last_hidden_states, save_tiny_pooling_model
from tests.vllm.engines import PROMPTS, engine, generate

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
_GATES = {"evaluation": {"max_sequences": 2}, "gates": {"final_layer_error": 1.0}}
_TOLERANCES = {"float32": 1e-4, "float16": 0.01}  # of vectors of length one, and of probabilities
Exports = dict[tuple[str, str], Path]


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Exports:
    """Return (kind, dtype) -> what the recipe for that dtype makes of a model of that kind."""
    found = {}
    for kind in KINDS:
        work = tmp_path_factory.mktemp(kind)
        model = save_tiny_pooling_model(work / "model", kind)
        for dtype in STAGES:
            found[kind, dtype] = compress(model, work / dtype, dtype, _GATES)
    return found


@pytest.fixture(scope="module")
def answers(
    exports: Exports, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], list[list[float]]]:
    """Return what vLLM makes of every prompt: one runner was asked for, the others are vLLM's choice."""
    jobs = [engine(directory, dtype) | {"runner": "pooling"} for (_, dtype), directory in exports.items()]
    found = generate(jobs, tmp_path_factory.mktemp("engines") / "answer.json")
    return {key: answer["outputs"] for key, answer in zip(exports, found, strict=True)}


@pytest.mark.parametrize("dtype", STAGES)
@pytest.mark.parametrize("kind", KINDS)
def test_vectors_are_those_of_transformers(
    kind: str,
    dtype: str,
    exports: Exports,
    answers: dict[tuple[str, str], list[list[float]]],
    tmp_path: Path,
) -> None:
    dense = materialise(exports[kind, dtype], tmp_path / "dense")
    for prompt, found in zip(PROMPTS, answers[kind, dtype], strict=True):
        expected = _expected(kind, dense, torch.tensor([prompt]))
        assert torch.tensor(found).shape == expected.shape
        assert float((torch.tensor(found) - expected).abs().max()) <= _TOLERANCES[dtype]


@torch.no_grad()
def test_a_language_model_that_is_asked_for_yes_or_no(tmp_path: Path) -> None:
    """Qwen3-Reranker: vLLM makes its score of two rows of the output layer, which stays as it is."""
    no, yes = "a", "b"
    model = save_tiny_model(tmp_path / "model", "qwen3", num_layers=4)
    exported = {dtype: compress(model, tmp_path / dtype, dtype) for dtype in STAGES}
    overrides = {
        "architectures": ["Qwen3ForSequenceClassification"],
        "classifier_from_token": [no, yes],
        "is_original_qwen3_reranker": True,
    }
    jobs = [
        engine(directory, dtype) | {"runner": "pooling", "hf_overrides": overrides}
        for dtype, directory in exported.items()
    ]
    found = generate(jobs, tmp_path / "answer.json")
    for (dtype, directory), answer in zip(exported.items(), found, strict=True):
        dense = materialise(directory, tmp_path / f"{dtype}-dense")
        reference = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
        rows = AutoTokenizer.from_pretrained(dense).convert_tokens_to_ids([no, yes])
        for prompt, scores in zip(PROMPTS, answer["outputs"], strict=True):
            logits = reference(torch.tensor([prompt])).logits[0, -1, rows]
            expected = float(logits.softmax(-1)[1])
            assert scores == pytest.approx([expected], abs=_TOLERANCES[dtype])


@torch.no_grad()
def _expected(kind: str, dense: Path, tokens: torch.Tensor) -> torch.Tensor:
    """Return the last token's vector in length one, or probabilities of classes."""
    if kind not in ("classifier", "reranker"):
        return functional.normalize(last_hidden_states(dense, tokens)[0, -1], dim=0)
    model = AutoModelForSequenceClassification.from_pretrained(dense, dtype=torch.float32)
    logits: torch.Tensor = model(tokens).logits[0]
    return logits.softmax(-1) if len(logits) > 1 else logits.sigmoid()
