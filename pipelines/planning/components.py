"""What becomes of each part of a model: language model, vision tower, projector."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from ercsvd_deploy.format.described import Count
from ercsvd_deploy.models.architecture import LANGUAGE_PART, Architecture

if TYPE_CHECKING:
    from ercsvd_deploy.format.schema import Storage
    from ercsvd_deploy.models.vocabulary import Vocabulary

LEFT_ALONE = "left alone"


@dataclass(frozen=True)
class Component:
    """What became of the language model, the vision tower or the projector."""

    name: Annotated[str, Field(description="Which of them.")]
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
    """Return the parts of a model; one alone for a text model.

    Args:
        sizes: Bytes of every tensor of the compressed model.
        described: Description of every altered Linear.
        architecture: The original model.
    """
    return tuple(_describe(part, sizes, described, architecture) for part in architecture.components)


def _describe(
    part: str,
    sizes: Mapping[str, int],
    described: Mapping[str, Storage],
    architecture: Architecture,
) -> Component:
    own = {
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
    removed = sum(math.prod(description.shape) - description.num_parameters for description in own.values())
    return Component(
        name=part,
        original_parameters=original,
        parameters=original - removed,
        num_bytes=sum(
            num_bytes for name, num_bytes in sizes.items() if architecture.component_of(name) == part
        ),
        treatment=in_words(*count_kinds(own, architecture.vocabulary)),
    )


def count_kinds(
    described: Mapping[str, Storage], vocabulary: Vocabulary
) -> tuple[Counter[str], Sequence[str]]:
    """Return in words how Linears are stored -> how many are; then the same of input and output."""
    altered = {name: each for name, each in described.items() if each.is_altered}
    kinds = Counter(_kind(each) for name, each in altered.items() if not vocabulary.has(name))
    outside = []
    embedding = vocabulary.embedding
    for name in (name for name in altered if vocabulary.has(name)):
        is_embedding = embedding is not None and embedding.name == name
        outside.append(f"{'input embedding' if is_embedding else 'output layer'} {_kind(altered[name])}")
    return kinds, outside


def in_words(kinds: Counter[str], outside: Sequence[str]) -> str:
    """Return how many Linears are stored in which way, the commonest first; then input and output."""
    parts = [f"{n} Linear{'s' if n > 1 else ''} {kind}" for kind, n in kinds.most_common()]
    return ", ".join([*parts, *outside]) or LEFT_ALONE


def _kind(description: Storage) -> str:
    bits = sorted({storage.bits for _, storage in description.parts.values() if storage is not None})
    integers = "/".join(f"int{width}" for width in bits)
    if description.layout == "dense":
        return integers
    return f"{description.layout.replace('_', '-')} {integers}".rstrip()
