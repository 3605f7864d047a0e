"""Input embeddings and output layers of integers in real vLLM engines, tied and not, cut by vocabulary."""

from __future__ import annotations

from collections.abc import Callable
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
def served(compressed: Compressed, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], Any]:
    """Return what engines generated: model and number of ranks -> answer."""
    engines = {(name, 1): engine(compressed(name), "float16") for name in MODELS}
    engines["both", 1] = engine(compressed("both"), "float16", eager=False) | TRACED
    engines["both", 2] = engine(compressed("both"), "float16", num_ranks=2)
    engines["tied", 2] = engine(compressed("tied"), "float16", num_ranks=2, eager=False) | TRACED
    folder = tmp_path_factory.mktemp("engines")
    answers = generate([each for (_, ranks), each in engines.items() if ranks == 1], folder / "one.json")
    answers += generate([each for (_, ranks), each in engines.items() if ranks == 2], folder / "two.json")
    return dict(zip(engines, answers, strict=True))


def _shrink_embedding(directory: Path) -> None:
    """Give a tied model logits as large as those of random output layers, and so as large rounding errors."""
    tensors = load_file(directory / WEIGHTS_FILE)
    tensors[f"{EMBEDDING}.weight"] *= 0.6
    save_file(tensors, directory / WEIGHTS_FILE, metadata={"format": "pt"})


@pytest.mark.parametrize(("name", "ranks"), [*((name, 1) for name in MODELS), ("both", 2), ("tied", 2)])
def test_served_as_the_model_that_it_stands_for(
    name: str, ranks: int, compressed: Compressed, served: dict[tuple[str, int], Any], tmp_path: Path
) -> None:
    found = deviation(materialise(compressed(name), tmp_path), served[name, ranks]["outputs"])
    assert found.largest <= MOST
    assert found.same_tokens
