"""The parts of a model (language model, vision tower, projector) and their treatment."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from ercsvd_deploy.format.described import Count
from ercsvd_deploy.models.description.architecture import LANGUAGE_PART, Architecture

if TYPE_CHECKING:
    from ercsvd_deploy.format.schema import Storage
    from ercsvd_deploy.models.description.vocabulary import Vocabulary

LEFT_ALONE = "left alone"


@dataclass(frozen=True)
class Component:
    """One part of the compressed model: language model, vision tower or projector."""

    name: Annotated[str, Field(description="Name of the part.")]
    original_parameters: Annotated[Count, Field(description="Its parameters before.")]
    parameters: Annotated[Count, Field(description="Its parameters now.")]
    num_bytes: Annotated[Count, Field(description="Its bytes now.")]
    treatment: Annotated[
        str,
        Field(description=f"`{LEFT_ALONE}`, or how many of its Linears are stored in which way."),
    ]


def describe_components(
    sizes: Mapping[str, int], described: Mapping[str, Storage], architecture: Architecture
) -> tuple[Component, ...]:
    """Return the parts of a model; a text model has one.

    Args:
        sizes: Bytes of every tensor of the compressed model.
        described: Name -> storage of every changed Linear.
        architecture: The original model.
    """
    return tuple(_describe(part, sizes, described, architecture) for part in architecture.components)


def _describe(
    part: str,
    sizes: Mapping[str, int],
    described: Mapping[str, Storage],
    architecture: Architecture,
) -> Component:
    storages = {
        name: description
        for name, description in described.items()
        if architecture.component_of(name) == part
    }
    original = sum(
        math.prod(shape)
        for name, shape in architecture.other_tensors.items()
        if architecture.component_of(name) == part
    )
    if part == LANGUAGE_PART:
        original += architecture.linear_parameters
    removed = sum(
        math.prod(description.shape) - description.num_parameters for description in storages.values()
    )
    return Component(
        name=part,
        original_parameters=original,
        parameters=original - removed,
        num_bytes=sum(
            num_bytes for name, num_bytes in sizes.items() if architecture.component_of(name) == part
        ),
        treatment=in_words(*count_kinds(storages, architecture.vocabulary)),
    )


def count_kinds(
    described: Mapping[str, Storage], vocabulary: Vocabulary
) -> tuple[Counter[str], Sequence[str]]:
    """Return kind of storage -> number of Linears, and the storage of input embedding and output layer."""
    altered = {name: storage for name, storage in described.items() if storage.is_altered}
    kinds = Counter(_kind(storage) for name, storage in altered.items() if not vocabulary.has(name))
    vocabulary_kinds = []
    embedding = vocabulary.embedding
    for name in (name for name in altered if vocabulary.has(name)):
        is_embedding = embedding is not None and embedding.name == name
        vocabulary_kinds.append(
            f"{'input embedding' if is_embedding else 'output layer'} {_kind(altered[name])}"
        )
    return kinds, vocabulary_kinds


def in_words(kinds: Counter[str], vocabulary_kinds: Sequence[str]) -> str:
    """Return the number of Linears of each kind of storage as text, the most common kind first."""
    parts = [f"{n} Linear{'s' if n > 1 else ''} {kind}" for kind, n in kinds.most_common()]
    return ", ".join([*parts, *vocabulary_kinds]) or LEFT_ALONE


def _kind(description: Storage) -> str:
    bits = sorted({storage.bits for _, storage in description.parts.values() if storage is not None})
    integers = "/".join(f"int{width}" for width in bits)
    if description.layout == "dense":
        return integers
    return f"{description.layout.replace('_', '-')} {integers}".rstrip()
