"""Count the amount of work of a recipe, from the recipe and the model's config alone.

What only the data can tell, such as a text's number of windows, is assumed and listed as an assumption.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from ercsvd_deploy.models.description.architecture import LANGUAGE_PART, Architecture
from ercsvd_deploy.models.streaming.ends import max_tokens_per_batch
from ercsvd_deploy.pipelines.stages.workload import Sequences, Tower, Workload
from ercsvd_deploy.recipe.sections import HeldOutText, Recipe, TextFile

_CHARACTERS_PER_TOKEN = 4  # of ordinary text and a tokenizer of 32,000 tokens or more
_TOKENS_OF_UNSEEN_TEXT = 350_000  # the size of WikiText-2's test split
_UNSEEN_QUESTIONS = 1000
_TOKENS_OF_QUESTION = 64  # beside its pictures
# Model type -> fewest and most tiles of one picture, in the usual tilings.
_TILES = {"llava_next": (2, 5), "llava_onevision": (2, 10), "idefics3": (2, 17), "internvl": (2, 13)}
_ASSUMED_SIDE = 1024  # pixels of a picture, where the tower takes pictures of any size


def measure_workload(
    recipe: Recipe,
    architecture: Architecture,
    config: Any,
    *,
    stored: int,
    computed: int,
    device: torch.device,
) -> Workload:
    """Count the amount of work of a recipe.

    Args:
        recipe: The recipe.
        architecture: The model's architecture.
        config: The model's config.
        stored: Bytes of a value in the files.
        computed: Bytes of a value where layers run.
        device: The device that layers run on.
    """
    assumptions: list[str] = []
    tower = _tower(architecture, config, assumptions)
    calibration = None
    if recipe.calibration is not None:
        count = recipe.calibration.num_samples
        pictures = round(recipe.picture_share * count)
        calibration = Sequences(count, recipe.calibration.sequence_length, pictures)
    judged = [_text(recipe, name, assumptions) for name in recipe.judged_texts]
    judged += [
        _questions(name, questions.max_questions, tower, assumptions)
        for name, questions in recipe.evaluation.visual_questions.items()
    ]
    if tower is not None and tower.most_tiles > 1:
        assumptions.append(
            f"every picture is cut into {tower.most_tiles} tiles, the most in the usual tilings"
        )
    if recipe.evaluation.lm_eval is not None:
        assumptions.append("of lm-eval only the weights are counted, and none of its computing")
    return Workload(
        recipe,
        architecture,
        stored,
        computed,
        max_tokens_per_batch(architecture, device),
        calibration,
        tuple(judged),
        tower,
        tuple(assumptions),
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
    """Return a text's approximate number of tokens, and the basis of the estimate, None if there is none."""
    if isinstance(text, TextFile) and Path(text.text).is_file():
        size = Path(text.text).stat().st_size
        return size // _CHARACTERS_PER_TOKEN, f"its bytes by {_CHARACTERS_PER_TOKEN}"
    return _TOKENS_OF_UNSEEN_TEXT, None


def _questions(name: str, most: int | None, tower: Tower | None, assumptions: list[str]) -> Sequences:
    count = most or _UNSEEN_QUESTIONS
    if most is None:
        assumptions.append(f"{name} has {count:,} questions")
    features = tower.most_tiles * tower.features if tower is not None else 0
    return Sequences(count, features + _TOKENS_OF_QUESTION, count)


def _tower(architecture: Architecture, config: Any, assumptions: list[str]) -> Tower | None:
    if not architecture.reads_images:
        return None
    vision = config.vision_config
    fewest, most = _TILES.get(architecture.model_type, (1, 1))
    side = _first_of(vision, ("image_size",))
    if side is None:
        side = _ASSUMED_SIDE
        assumptions.append(f"pictures have {side} x {side} pixels")
    tokens = (side // (_first_of(vision, ("patch_size",)) or 1)) ** 2
    hidden = _first_of(vision, ("hidden_size", "embed_dim")) or 0
    intermediate = _first_of(vision, ("intermediate_size",)) or int(hidden * getattr(vision, "mlp_ratio", 4))
    return Tower(
        pixels=(_first_of(vision, ("num_channels", "in_channels", "in_chans")) or 3) * side**2,
        tokens=tokens,
        widest=3 * intermediate + 2 * hidden,
        features=_features(config, tokens),
        parameters=sum(
            math.prod(shape)
            for name, shape in architecture.other_tensors.items()
            if architecture.component_of(name) != LANGUAGE_PART
        ),
        fewest_tiles=fewest,
        most_tiles=most,
        additions=len(getattr(vision, "deepstack_visual_indexes", None) or ()),
    )


def _features(config: Any, patches: int) -> int:
    """Return the number of language-model tokens for the patches of one tile."""
    fixed = _first_of(config, ("mm_tokens_per_image",))
    if fixed is not None:
        return fixed
    merged = _first_of(config.vision_config, ("spatial_merge_size",)) or _first_of(
        config, ("scale_factor", "spatial_merge_size")
    )
    return patches // (merged or 1) ** 2


def _first_of(config: Any, keys: tuple[str, ...]) -> int | None:
    """Return the first number that a config has under one of several keys; of a pair, the larger one."""
    for key in keys:
        value = getattr(config, key, None)
        if isinstance(value, list | tuple):
            value = max(value, default=None)
        if isinstance(value, int):
            return value
    return None
