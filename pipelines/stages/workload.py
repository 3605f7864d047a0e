"""How much a recipe has to compute with: sequences, widths and precisions, from recipe and config alone.

Resources and times are estimated from this. What only the data can tell (how many windows a text has) is
assumed here, and said.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ercsvd_deploy.budget.ranks import LinearShape
from ercsvd_deploy.format.schema import Storage
from ercsvd_deploy.models.families import PROJECTOR_PART, TOWER_PART, Architecture, LayerLinears, component_of
from ercsvd_deploy.models.streaming import MAX_TOKENS_PER_BATCH
from ercsvd_deploy.pipelines.stages.factorize.ranks.steps import resolve_rank_steps
from ercsvd_deploy.recipe.sections import HeldOutText, Recipe, TextFile

_CHARACTERS_PER_TOKEN = 4  # of ordinary text and a tokenizer of 32,000 tokens or more
_TOKENS_OF_UNSEEN_TEXT = 350_000  # the size of WikiText-2's test split
_UNSEEN_QUESTIONS = 1000
_TOKENS_OF_QUESTION = 64  # beside its pictures
_TILES = {"llava_next": 5}  # pictures that one picture becomes, at most of the usual tilings


@dataclass(frozen=True)
class Sequences:
    """Sequences of one length that pass through the layers."""

    count: int
    length: int
    pictures: int = 0  # that come with them, tiles counted

    @property
    def tokens(self) -> int:
        """Tokens of all sequences."""
        return self.count * self.length

    @property
    def batch_rows(self) -> int:
        """Sequences that are computed at once.

        A small model's pass in smaller batches side by side (`layerwise`): no more than this on four cores.
        """
        return min(self.count, max(1, MAX_TOKENS_PER_BATCH // self.length))

    @property
    def batch_tokens(self) -> int:
        """Tokens that are computed at once."""
        return self.batch_rows * self.length

    def first(self, count: int) -> Sequences:
        """Return the first few."""
        count = min(count, self.count)
        return Sequences(count, self.length, self.pictures * count // max(1, self.count))


@dataclass(frozen=True)
class Tower:
    """The vision tower's share of the work on one picture."""

    pixels: int  # values of one picture, tiles counted
    tokens: int  # positions in the tower, tiles counted
    widest: int  # values of one position that are alive at once
    parameters: int


@dataclass(frozen=True)
class Workload:
    """What a recipe does to a model, in numbers.

    Attributes:
        recipe: The recipe.
        architecture: The model's.
        described: For every candidate, the final description of every altered Linear.
        stored: Bytes of a value in the files.
        computed: Bytes of a value where layers run.
        calibration: What the stages are calibrated on; None where nothing is.
        judged: What both models are compared on.
        tower: None for text models.
        assumptions: What was taken for granted, for people.
        rank_steps: Linear -> what its rank is a multiple of; empty where nothing is factorized.
    """

    recipe: Recipe
    architecture: Architecture
    described: Sequence[Mapping[str, Storage]]
    stored: int
    computed: int
    calibration: Sequences | None
    judged: tuple[Sequences, ...]
    tower: Tower | None
    assumptions: tuple[str, ...]
    rank_steps: Mapping[str, int]

    @property
    def largest_layer(self) -> LayerLinears:
        """The decoder layer with the most weights; in the supported families all are alike."""
        return max(self.architecture.layers, key=lambda layer: sum(each.parameters for each in layer.linears))

    @property
    def hidden(self) -> int:
        """Values of one token between layers."""
        return self.largest_layer.linears[0].in_features

    @property
    def layer_parameters(self) -> int:
        """Weights of the largest layer."""
        return sum(linear.parameters for linear in self.largest_layer.linears)

    @property
    def outside_parameters(self) -> int:
        """Parameters outside the decoder layers: embeddings, output layer if it has its own, vision."""
        prefix = f"{self.architecture.layers_prefix}."
        return sum(
            math.prod(shape)
            for name, shape in self.architecture.other_tensors.items()
            if not name.startswith(prefix)
        )

    @property
    def embedding_parameters(self) -> int:
        """Parameters outside the layers that a pass to the first layer loads: all but the output layer."""
        head = self.architecture.vocab_size * self.hidden
        return self.outside_parameters - (head if "lm_head.weight" in self.architecture.other_tensors else 0)

    def compressed_layers(self) -> tuple[LayerLinears, ...]:
        """Return the layers that the factorize stage decomposes."""
        settings = self.recipe.factorize
        if settings is None:
            return ()
        if settings.allocation == "error_controlled":
            return self.architecture.layers
        return tuple(
            layer for layer in self.architecture.layers if any(map(self.highest_rank, layer.linears))
        )

    def highest_rank(self, linear: LinearShape) -> int:
        """Return the largest rank of a Linear that its decomposition must be good for; 0 for none."""
        settings = self.recipe.factorize
        if settings is not None and settings.allocation == "error_controlled":
            step = self.rank_steps[linear.name]
            return linear.largest_rank(step, settings.layout)
        found = [modules[linear.name] for modules in self.described if linear.name in modules]
        return max((description.rank or 0 for description in found), default=0)


def measure_workload(
    recipe: Recipe,
    architecture: Architecture,
    described: Sequence[Mapping[str, Storage]],
    config: Any,
    *,
    stored: int,
    computed: int,
) -> Workload:
    """Count what a recipe has to compute with.

    Args:
        recipe: The recipe.
        architecture: The model's.
        described: For every candidate, the final description of every altered Linear.
        config: The model's.
        stored: Bytes of a value in the files.
        computed: Bytes of a value where layers run.
    """
    assumptions: list[str] = []
    tower = _tower(architecture, config)
    tiles = _TILES.get(architecture.model_type, 1)
    calibration = None
    if recipe.calibration is not None:
        count = recipe.calibration.num_samples
        pictures = round(recipe.picture_share * count) * tiles
        calibration = Sequences(count, recipe.calibration.sequence_length, pictures)
    judged = [_text(recipe, name, assumptions) for name in recipe.judged_texts]
    judged += [
        _questions(name, asked.max_questions, tower, tiles, assumptions)
        for name, asked in recipe.evaluation.visual_questions.items()
    ]
    if recipe.evaluation.lm_eval is not None:
        assumptions.append("lm-eval, which loads both models whole, is not counted")
    return Workload(
        recipe,
        architecture,
        described,
        stored,
        computed,
        calibration,
        tuple(judged),
        tower,
        tuple(assumptions),
        resolve_rank_steps(recipe, architecture).steps if recipe.factorize is not None else {},
    )


def _text(recipe: Recipe, name: str, assumptions: list[str]) -> Sequences:
    length, most = recipe.evaluation_sequence_length, recipe.evaluation.max_sequences
    assert length is not None, "the schema asks for a length where there are texts"
    tokens, source = _tokens_of(recipe.evaluation.perplexity.get(name))
    windows = max(1, tokens // length)
    if most is not None and (most <= windows or source is None):
        return Sequences(most, length)
    assumptions.append(f"{name} has about {tokens:,} tokens" + (f" ({source})" if source else ""))
    return Sequences(windows, length)


def _tokens_of(text: HeldOutText | None) -> tuple[int, str | None]:
    """Return about how many tokens a text has, and what that was taken from; None: from nothing."""
    if isinstance(text, TextFile) and Path(text.text).is_file():
        size = Path(text.text).stat().st_size
        return size // _CHARACTERS_PER_TOKEN, f"its bytes by {_CHARACTERS_PER_TOKEN}"
    return _TOKENS_OF_UNSEEN_TEXT, None


def _questions(
    name: str, most: int | None, tower: Tower | None, tiles: int, assumptions: list[str]
) -> Sequences:
    count = most or _UNSEEN_QUESTIONS
    if most is None:
        assumptions.append(f"{name} has {count:,} questions")
    features = tower.tokens if tower is not None else 0
    return Sequences(count, features + _TOKENS_OF_QUESTION, count * tiles)


def _tower(architecture: Architecture, config: Any) -> Tower | None:
    if not architecture.vision_layers:
        return None
    vision = config.vision_config
    tiles = _TILES.get(architecture.model_type, 1)
    layer = architecture.vision_layers[TOWER_PART][0]
    hidden = layer.linears[0].in_features
    return Tower(
        pixels=tiles * vision.num_channels * vision.image_size**2,
        tokens=tiles * (vision.image_size // vision.patch_size) ** 2,
        widest=3 * max(linear.out_features for linear in layer.linears) + 2 * hidden,
        parameters=sum(
            math.prod(shape)
            for name, shape in architecture.other_tensors.items()
            if component_of(name) in (TOWER_PART, PROJECTOR_PART)
        ),
    )
