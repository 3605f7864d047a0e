"""Checks of a recipe against its model before a text or a weight is read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ercsvd_deploy.format.files.tensor_store import CheckpointError
from ercsvd_deploy.pipelines.inputs.model import OpenedModel, stream
from ercsvd_deploy.pipelines.inputs.texts import check_length

if TYPE_CHECKING:
    from ercsvd_deploy.recipe.sections import Recipe


def check_lengths(recipe: Recipe, config: Any) -> None:
    """Check a recipe's sequence lengths against the model's config.

    Raises:
        PlanError: sequences are longer than the model's positions.
    """
    if recipe.calibration is not None:
        check_length(recipe.calibration.sequence_length, config, "calibration.sequence_length")
    if recipe.judged_texts and recipe.evaluation_sequence_length is not None:
        check_length(recipe.evaluation_sequence_length, config, "evaluation.sequence_length")


def check_weights(opened: OpenedModel) -> None:
    """Compare the names and shapes of a model's weights with its config, if the weights can be read.

    Raises:
        CheckpointError: the weights do not belong to the config.
    """
    try:
        store = opened.store()
    except CheckpointError:
        return  # reported when the weights are needed
    stream(opened, torch.device("cpu"), store)
