"""The ways in which people start vLLM, with a compressed model: adapters, caches, speculators, pipelines.

The README's table "How vLLM may be started" says what holds of each. A mode that leaves the numbers as they
are is compared with the same engine without it; adapters and pipelines are compared with transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ModelDirectory
from tests.vllm.adapters import RANK, merge, write_adapter
from tests.vllm.engines import MAX_TOKENS, PROMPTS, TRACED, deviation, engine, generate

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

Materialised = Callable[[Path], Path]
Answer = dict[str, Any]

REPEATING = [1, *[40, 41, 42, 43] * 12]  # what a lookup of n-grams proposes from
ASKED = [*PROMPTS, REPEATING]
ROUNDING = 0.01  # nats in float16: a sum is rounded by how many tokens are computed together
NUM_PROPOSED = 3


@dataclass(frozen=True)
class Exports:
    """The same model uncompressed and compressed: low-rank and int4 matrices, mixed in fused layers."""

    dense: Path
    mixed: Path
    low_rank: Path


@pytest.fixture(scope="module")
def exports(
    tiny_model: ModelDirectory, mixed_model: ModelDirectory, low_rank_model: ModelDirectory
) -> Exports:
    return Exports(tiny_model("llama"), mixed_model("llama"), low_rank_model("llama"))


def speculator(**settings: Any) -> dict[str, Any]:
    """Return the arguments of an engine that speculates, and counts what it accepts of that."""
    return {
        "speculative_config": settings | {"num_speculative_tokens": NUM_PROPOSED},
        "disable_log_stats": False,
    }


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory, exports: Exports) -> dict[str, Answer]:
    """Return what engines answered, started in different ways one after the other in one process."""
    mixed, dense = engine(exports.mixed, "float16"), engine(exports.dense, "float16")
    in_small_pieces = {"enable_chunked_prefill": True, "max_num_batched_tokens": 16}
    sleeping = {"enable_sleep_mode": True}
    engines = {
        "cached": mixed | in_small_pieces | {"enable_prefix_caching": True, "block_size": 32},
        "dense": dense,
        "plain": mixed,
        "draft": mixed | speculator(method="draft_model", model=str(exports.mixed)),
        "drafted by another": dense | speculator(method="draft_model", model=str(exports.mixed)),
        "sleeping": mixed | sleeping,
        "dense sleeping": dense | sleeping,
        # the last: once it has imported numba, vLLM 0.32 starts no further engine in this process
        "n-gram": mixed | speculator(method="ngram", prompt_lookup_max=3, prompt_lookup_min=1),
    }
    answer = tmp_path_factory.mktemp("modes") / "answer.json"
    # twice, for the prefix cache
    found = generate(list(engines.values()), answer, [*ASKED, *ASKED], goes_on=True, scores_prompts=False)
    return dict(zip(engines, found, strict=True))


def assert_same(answer: Answer, expected: Answer) -> None:
    """Assert that two engines generated the same tokens, with the same log-probabilities."""
    assert "error" not in answer, answer.get("error")
    for output, reference in zip(answer["outputs"], expected["outputs"], strict=True):
        assert output["tokens"] == reference["tokens"]
        for ours, theirs in zip(output["logprobs"], reference["logprobs"], strict=True):
            both = ours.keys() & theirs.keys()
            assert len(both) >= len(ours) - 1  # the last two may change places
            assert max(abs(ours[token] - theirs[token]) for token in both) <= ROUNDING


def test_prefix_cache_with_chunked_prefill(answers: dict[str, Answer]) -> None:
    assert_same(answers["cached"], answers["plain"])
    cached = [output["cached"] for output in answers["cached"]["outputs"]]
    # the second time whole blocks of 32 tokens are taken from the cache
    assert cached[len(ASKED) :] == [len(prompt) // 32 * 32 for prompt in ASKED]


def test_n_gram_speculator(answers: dict[str, Answer]) -> None:
    assert_same(answers["n-gram"], answers["plain"])
    assert answers["n-gram"]["accepted"] > 0


def test_draft_model(answers: dict[str, Answer]) -> None:
    assert_same(answers["draft"], answers["plain"])
    # the model drafts for itself: whatever it proposes is accepted, all but what rounding changes
    assert answers["draft"]["accepted"] >= 0.6 * MAX_TOKENS * 2 * len(ASKED)


def test_compressed_model_drafts_for_the_original(answers: dict[str, Answer]) -> None:
    assert_same(answers["drafted by another"], answers["dense"])


def test_models_one_after_the_other_in_one_process(answers: dict[str, Answer]) -> None:
    before, dense, behind = (answers[name] for name in ("cached", "dense", "plain"))
    assert_same(behind, before)
    assert dense["outputs"] != behind["outputs"]
    assert not dense["cut"]
    assert behind["cut"]


def test_sleep_mode_is_refused_on_cpus_as_it_is_for_the_original(answers: dict[str, Answer]) -> None:
    for mode in ("sleeping", "dense sleeping"):
        assert "Sleep mode is not supported on current platform" in answers[mode]["error"]


@dataclass(frozen=True)
class Adapted:
    """What engines answered with adapters on top: each prompt as it is, then with each adapter.

    Attributes:
        adapters: Their directories.
        answers: Of the compressed models, by the kind of activations, and of the uncompressed one, whose
            engine has no slot to spare.
        log: What vLLM printed.
    """

    adapters: list[Path]
    answers: dict[str, Answer]
    log: str


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory, exports: Exports) -> Adapted:
    folder = tmp_path_factory.mktemp("adapters")
    adapters = [write_adapter(exports.dense, folder / f"adapter-{seed}", seed) for seed in (1, 2)]
    prompts = [
        {"tokens": tokens} | ({} if adapter is None else {"adapter": str(adapter)})
        for tokens in PROMPTS
        for adapter in (None, *adapters)
    ]
    with_slots = [{"enable_lora": True, "max_lora_rank": RANK, "max_loras": number} for number in (2, 3)]
    engines = {
        "float32": engine(exports.low_rank, "float32") | with_slots[1],
        "float16": engine(exports.mixed, "float16") | with_slots[1],
        "dense": engine(exports.dense, "float32") | with_slots[0],
    }
    # vLLM 0.32 cannot score prompts beside adapters, of whatever model
    answers = generate(list(engines.values()), folder / "answer.json", prompts, scores_prompts=False)
    log = (folder / "answer.log").read_text()
    return Adapted(adapters, dict(zip(engines, answers, strict=True)), log)


@pytest.mark.parametrize(("dtype", "largest"), [("float32", 1e-4), ("float16", 0.03)])
def test_adapters(
    dtype: str,
    largest: float,
    adapted: Adapted,
    exports: Exports,
    materialised: Materialised,
    tmp_path: Path,
) -> None:
    dense = materialised(exports.low_rank if dtype == "float32" else exports.mixed)
    merged = [merge(dense, adapter, tmp_path / adapter.name) for adapter in adapted.adapters]
    outputs = adapted.answers[dtype]["outputs"]
    for number, reference in enumerate([dense, *merged]):
        found = deviation(reference, outputs[number :: 1 + len(merged)], scores_prompts=False)
        assert found.largest <= largest
        assert found.same_tokens


def test_adapters_need_a_slot_to_spare_on_cpus_whatever_the_model(
    adapted: Adapted, exports: Exports, tmp_path: Path
) -> None:
    outputs = adapted.answers["dense"]["outputs"][:: 1 + len(adapted.adapters)]  # of prompts without one
    merged = [merge(exports.dense, adapter, tmp_path / adapter.name) for adapter in adapted.adapters]
    as_asked, *as_adapted = (
        deviation(reference, outputs, scores_prompts=False).largest for reference in (exports.dense, *merged)
    )
    assert as_asked > 1
    assert min(as_adapted) <= 1e-4  # one of the adapters is in the last slot
    assert adapted.log.count("--max-loras one larger than the number of adapters") == 2  # compressed models


def test_pipeline_of_two(exports: Exports, materialised: Materialised, tmp_path: Path) -> None:
    # Traced: without a warm-up, which eager engines skip on CPUs, vLLM 0.32
    # fails at the first request, whatever the model.
    pipeline = {"pipeline_parallel_size": 2, "distributed_executor_backend": "mp", **TRACED}
    (answer,) = generate([engine(exports.mixed, "float16", eager=False) | pipeline], tmp_path / "answer.json")
    found = deviation(materialised(exports.mixed), answer["outputs"])
    assert found.largest <= 0.03
    assert found.same_tokens
