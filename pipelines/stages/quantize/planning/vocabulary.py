"""The planned storage of input embedding and output layer, from names and shapes alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ercsvd_deploy.exporters.vllm.vocabulary_support import find_unservable_vocabulary
from ercsvd_deploy.format.schema import Storage, WeightQuantization
from ercsvd_deploy.recipe.fields import PlanError

if TYPE_CHECKING:
    from ercsvd_deploy.models.description.architecture import Architecture
    from ercsvd_deploy.pipelines.stages.storage_rules import StorageRules
    from ercsvd_deploy.recipe.quantize import Quantize, VocabularyIntegers


def plan_vocabulary(settings: Quantize, rules: StorageRules) -> dict[str, Storage]:
    """Return name -> storage of those of the two matrices that are quantized.

    Args:
        settings: The recipe's stage.
        rules: Make groups fit whole columns, which no tensor parallel size cuts.

    Raises:
        PlanError: the model has no such matrix, or ties both with two different settings, or vLLM would not
            load it.
    """
    architecture, vocabulary = rules.architecture, rules.architecture.vocabulary
    if vocabulary.is_tied and settings.lm_head and settings.embeddings:
        _check_same(settings.lm_head, settings.embeddings, settings.group_size)
    lacks_head = "output layer is no Linear" if architecture.predicts_tokens else "output layer is missing"
    storages = {}
    for key, reason, matrix, integers in (
        ("lm_head", lacks_head, vocabulary.multiplied, settings.lm_head),
        ("embeddings", "input embedding is none of torch's", vocabulary.embedding, settings.embeddings),
    ):
        if integers is None:
            continue
        if matrix is None:
            raise PlanError(
                f"quantize.{key}: the {reason} in {architecture.model_type} models; remove the key"
            )
        group_size = integers.group_size or settings.group_size
        quantization = WeightQuantization(bits=integers.bits, group_size=group_size)
        storages[matrix.name] = rules.storage(matrix, None, quantization)
    problems = find_unservable_vocabulary(storages, architecture)
    if problems:
        raise PlanError("quantize: " + "\n  ".join(problems) + "\nremove embeddings or lm_head")
    return {name: storage for name, storage in storages.items() if storage.is_altered}


def describe_tied(storages: Mapping[str, Storage], architecture: Architecture) -> list[str]:
    """Return a note on the cost of a quantized tied matrix; empty if there is none."""
    vocabulary = architecture.vocabulary
    if not vocabulary.is_tied or not any(name in storages for name in vocabulary.names):
        return []
    return [
        "quantize: the output layer is tied to the input embedding. One copy of the integers serves both, in "
        "an order in which no kernel multiplies them: GPUs unpack them a few rows at a time in every step, "
        "which costs time; on a CPU the matrix takes 16 bits"
    ]


def _check_same(lm_head: VocabularyIntegers, embeddings: VocabularyIntegers, group_size: int) -> None:
    """Refuse two settings of one matrix; `group_size` is that of the stage, which they have by default.

    Raises:
        PlanError: they differ.
    """
    written_out = ((each.bits, each.group_size or group_size) for each in (lm_head, embeddings))
    if len(set(written_out)) > 1:
        raise PlanError(
            "quantize.lm_head and quantize.embeddings differ, but the model ties its output layer to the "
            "input embedding (tie_word_embeddings): they are one matrix; remove one of the two keys"
        )
