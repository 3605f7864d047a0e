"""What becomes of each part of a model: language model, vision tower, projector."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from ercsvd_deploy.format.described import Count
from ercsvd_deploy.models.architecture import LANGUAGE_PART, Architecture, component_of

if TYPE_CHECKING:
    from ercsvd_deploy.format.schema import Storage

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
    return tuple(
        _describe(part, sizes, described, architecture)
        for part in (LANGUAGE_PART, *architecture.vision_layers)
    )


def _describe(
    part: str,
    sizes: Mapping[str, int],
    described: Mapping[str, Storage],
    architecture: Architecture,
) -> Component:
    own = {name: description for name, description in described.items() if component_of(name) == part}
    original = sum(
        math.prod(shape) for name, shape in architecture.other_tensors.items() if component_of(name) == part
    )
    if part == LANGUAGE_PART:
        original += architecture.linear_parameters
    removed = sum(math.prod(description.shape) - description.num_parameters for description in own.values())
    return Component(
        name=part,
        original_parameters=original,
        parameters=original - removed,
        num_bytes=sum(num_bytes for name, num_bytes in sizes.items() if component_of(name) == part),
        treatment=in_words(count_kinds(own.values())),
    )


def count_kinds(described: Iterable[Storage]) -> Counter[str]:
    """Return in words how Linears are stored -> how many are."""
    return Counter(_kind(description) for description in described if description.is_altered)


def in_words(kinds: Counter[str]) -> str:
    """Return how many Linears are stored in which way, the commonest first."""
    counted = (f"{n} Linear{'s' if n > 1 else ''} {kind}" for kind, n in kinds.most_common())
    return ", ".join(counted) or LEFT_ALONE


def _kind(description: Storage) -> str:
    bits = sorted({storage.bits for _, storage in description.parts.values() if storage is not None})
    integers = "/".join(f"int{width}" for width in bits)
    if description.layout == "dense":
        return integers
    return f"{description.layout.replace('_', '-')} {integers}".rstrip()
