"""The result dataclasses for one model's size and quality, and for the differences between two models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

from pydantic import Field

from ercsvd_deploy.format.described import Count, Finite, Measured
from ercsvd_deploy.pipelines.judging.uncertainty import Estimate

Estimates = Mapping[str, Estimate]


@dataclass(frozen=True)
class QualityEstimates:
    """Quality with 95 % intervals."""

    perplexity: Annotated[Estimates, Field(description="Text -> perplexity; t interval over windows.")] = (
        field(default_factory=dict)
    )
    exact_match: Annotated[
        Estimates, Field(description="Set of questions -> share right; Wilson's interval.")
    ] = field(default_factory=dict)
    tasks: Annotated[
        Mapping[str, Estimates],
        Field(description="lm-eval task -> metric -> value; from lm-eval's own standard error."),
    ] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelFigures:
    """Size and quality of one model."""

    num_bytes: Annotated[Count, Field(description="Bytes of all tensors, tied ones once.")]
    bytes_by_part: Annotated[Mapping[str, Count], Field(description="Part of the model -> its bytes.")]
    linear_bits_per_weight: Annotated[
        Finite,
        Field(description="Stored bits of the decoder's Linears, scales included, for each original weight."),
    ]
    parameters: Annotated[Count, Field(description="All parameters.")]
    linear_parameters: Annotated[Count, Field(description="Parameters of the decoder's Linears.")]
    model_bits_per_weight: Annotated[
        float | None,
        Field(
            description="Stored bits of all tensors for each original weight of the whole model; null in "
            "older reports."
        ),
    ] = None
    perplexity: Annotated[Mapping[str, Measured], Field(description="Text -> perplexity.")] = field(
        default_factory=dict
    )
    exact_match: Annotated[
        Mapping[str, Measured],
        Field(description="Set of questions about pictures -> share answered word for word."),
    ] = field(default_factory=dict)
    tasks: Annotated[
        Mapping[str, Mapping[str, Measured]],
        Field(
            description="lm-eval task -> metric -> value; a metric behind another filter than lm-eval's "
            "first is named with it, as `exact_match,strict-match`."
        ),
    ] = field(default_factory=dict)
    estimates: Annotated[
        QualityEstimates,
        Field(description="Perplexity, exact match and tasks with their intervals and counts."),
    ] = field(default_factory=QualityEstimates)


@dataclass(frozen=True)
class Differences:
    """Differences in quality, from both models' values on the same items, with 95 % intervals."""

    perplexity_increase: Annotated[
        Estimates,
        Field(description="Text -> relative increase of the perplexity; paired t interval over windows."),
    ] = field(default_factory=dict)
    logprob_kl: Annotated[
        Estimates,
        Field(description="Text -> mean KL divergence in nats per token; t interval over windows."),
    ] = field(default_factory=dict)
    exact_match_drop: Annotated[
        Estimates,
        Field(
            description="Set of questions -> fall of the share right; from the questions that only one "
            "model answers (McNemar)."
        ),
    ] = field(default_factory=dict)
    task_drop: Annotated[
        Mapping[str, Estimates],
        Field(
            description="lm-eval task -> metric -> its loss; paired over documents, or from "
            "both standard errors where lm-eval averages otherwise."
        ),
    ] = field(default_factory=dict)
