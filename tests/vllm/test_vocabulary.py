"""Input embeddings and output layers of integers in real vLLM engines, tied and not, cut by vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from tests.tiny_models import WEIGHTS_FILE, compress_at_random, materialise, save_tiny_model
from tests.vllm.engines import TRACED, deviation, engine, generate

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

EMBEDDING, OUTPUT_LAYER = "model.embed_tokens", "lm_head"
FOUR = {"bits": 4, "group_size": 32}
SIX = {"bits": 6, "group_size": -1}
EIGHT = {"bits": 8, "group_size": 64}
# what is served -> family, a seed with which all greedy tokens lead by more than float16 can change, whether
# it ties both matrices, and their integers
MODELS: dict[str, tuple[str, int, bool, dict[str, dict[str, int]]]] = {
    "both": ("llama", 8, False, {EMBEDDING: SIX, OUTPUT_LAYER: FOUR}),
    "output layer": ("qwen2", 2, False, {OUTPUT_LAYER: EIGHT}),
    "embedding": ("qwen2", 15, False, {EMBEDDING: FOUR}),
    "tied": ("llama", 0, True, {EMBEDDING: EIGHT}),
    "tied four": ("llama", 2, True, {EMBEDDING: FOUR}),
}
MOST = 0.03  # of float16: the deviation that integers are allowed everywhere

Compressed = Callable[[str], Path]


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> Compressed:
    """Return a function that gives the directory of one of `MODELS`; its vocabulary is no multiple of 64."""
    made: dict[str, Path] = {}

    def of(name: str) -> Path:
        if name not in made:
            family, seed, is_tied, integers = MODELS[name]
            folder = tmp_path_factory.mktemp("vocabulary")
            source = save_tiny_model(
                folder / "source", family, seed=seed, tie_word_embeddings=is_tied, vocab_size=282
            )
            if is_tied:
                _shrink_embedding(source)
            compress_at_random(source, folder / "compressed", quantization=FOUR, vocabulary=integers)
            made[name] = folder / "compressed"
        return made[name]

    return of


@pytest.fixture(scope="module")
def served(
    compressed: Compressed, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[int], dict[str, Any]]:
    """Return a function that gives what engines of so many ranks generated: model -> answer."""

    @cache
    def by_ranks(num_ranks: int) -> dict[str, Any]:
        names = {1: tuple(MODELS), 2: ("both", "tied")}[num_ranks]
        compiled = {1: "both", 2: "tied"}[num_ranks]
        engines = [
            engine(compressed(name), "float16", num_ranks=num_ranks)
            | (TRACED | {"enforce_eager": False} if name == compiled else {})
            for name in names
        ]
        answers = generate(engines, tmp_path_factory.mktemp("engines") / "answer.json")
        return dict(zip(names, answers, strict=True))

    return by_ranks


def _shrink_embedding(directory: Path) -> None:
    """Give a tied model logits as large as those of random output layers, and so as large rounding errors."""
    tensors = load_file(directory / WEIGHTS_FILE)
    tensors[f"{EMBEDDING}.weight"] *= 0.6
    save_file(tensors, directory / WEIGHTS_FILE, metadata={"format": "pt"})


@pytest.mark.parametrize(("name", "ranks"), [*((name, 1) for name in MODELS), ("both", 2), ("tied", 2)])
def test_served_as_the_model_that_it_stands_for(
    name: str,
    ranks: int,
    compressed: Compressed,
    served: Callable[[int], dict[str, Any]],
    tmp_path: Path,
) -> None:
    found = deviation(materialise(compressed(name), tmp_path), served(ranks)[name]["outputs"])
    assert found.largest <= MOST
    assert found.same_tokens
