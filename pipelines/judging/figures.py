"""What is measured of one model: its size and its quality."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

from pydantic import Field

from ercsvd_deploy.format.described import Count, Finite, Measured


@dataclass(frozen=True)
class ModelFigures:
    """Size and quality of one model."""

    num_bytes: Annotated[Count, Field(description="Bytes of all tensors, tied ones once.")]
    bytes_by_part: Annotated[Mapping[str, Count], Field(description="The same, by what they belong to.")]
    linear_bits_per_weight: Annotated[
        Finite,
        Field(description="Stored bits of the decoder's Linears, scales included, for each original weight."),
    ]
    parameters: Annotated[Count, Field(description="All parameters.")]
    linear_parameters: Annotated[Count, Field(description="Parameters of the decoder's Linears.")]
    perplexity: Annotated[Mapping[str, Measured], Field(description="Text -> perplexity.")] = field(
        default_factory=dict
    )
    exact_match: Annotated[
        Mapping[str, Measured],
        Field(description="Set of questions about pictures -> share answered word for word."),
    ] = field(default_factory=dict)
    tasks: Annotated[
        Mapping[str, Mapping[str, Measured]], Field(description="lm-eval task -> metric -> value.")
    ] = field(default_factory=dict)
