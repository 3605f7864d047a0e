"""Judge measurements by a recipe's gates: those of a run that has just ended, or of its report.

A gate is passed or missed where the measurement's whole 95 % interval lies on one side of the limit, and
undecided where the limit is within it. Whether a run counts as failed follows from the measured value in
either case (docs/decisions/0016).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Literal, Protocol

from pydantic import Field

from ercsvd_deploy.exporters.vllm.engines.failure import one_line
from ercsvd_deploy.format.described import Count
from ercsvd_deploy.pipelines.judging.tasks import find_metric
from ercsvd_deploy.pipelines.judging.uncertainty import LEVEL, Estimate, deciding_count
from ercsvd_deploy.recipe.fields import parse_size

if TYPE_CHECKING:
    from ercsvd_deploy.evaluation.comparison import OutputChange
    from ercsvd_deploy.pipelines.judging.measurements import Differences, ModelFigures
    from ercsvd_deploy.pipelines.judging.parity.measure import ServingParity
    from ercsvd_deploy.recipe.gates import Gates

Verdict = Literal["passed", "missed", "undecided"]


@dataclass(frozen=True)
class GateResult:
    """One gate for one text, set of questions or task."""

    gate: Annotated[str, Field(description="The gate's key in the recipe.")]
    subject: Annotated[
        str | None, Field(description="The text, set of questions or task; null: the whole model.")
    ]
    limit: Annotated[float, Field(description="The largest value allowed.")]
    value: Annotated[
        float | None, Field(description="The measured value; null if nothing finite was measured.")
    ]
    passed: Annotated[
        bool, Field(description="Whether the value is within the limit; the exit code follows this.")
    ]
    reason: Annotated[
        str | None,
        Field(description="Why nothing was measured, on one line, where that is known."),
    ] = None
    low: Annotated[
        float | None, Field(description="Lower end of the value's 95 % interval; null: it has none.")
    ] = None
    high: Annotated[float | None, Field(description="Upper end.")] = None
    count: Annotated[
        Count | None, Field(description="Number of items it was measured on; null if there are no items.")
    ] = None
    unit: Annotated[
        str | None, Field(description="What the items are: `windows`, `questions` or `documents`.")
    ] = None
    deciding_count: Annotated[
        Count | None,
        Field(
            description="About how many items would decide an undecided gate, if its value stays the same."
        ),
    ] = None

    verdict: Annotated[
        Verdict,
        Field(description="`undecided` where the limit lies within the interval, else as `passed` says."),
    ] = None  # type: ignore[assignment] # what follows from the others is filled in, for older reports too

    def __post_init__(self) -> None:
        """Derive the verdict from value, interval and limit, where a report does not have it."""
        if self.verdict is None:
            object.__setattr__(self, "verdict", self._verdict())  # type: ignore[unreachable]

    def _verdict(self) -> Verdict:
        if self.low is not None and self.high is not None and self.low <= self.limit < self.high:
            return "undecided"
        return "passed" if self.passed else "missed"

    @property
    def name(self) -> str:
        """Gate and subject, as people and test reports name it."""
        return self.gate if self.subject is None else f"{self.gate}, {self.subject}"

    def explain(self) -> str:
        """Return the verdict in one line."""
        if self.value is None:
            why = f" ({self.reason})" if self.reason else ", or not finite"
            return f"{self.name}: not measured{why}; the limit is {self.limit:g}"
        sign = "<=" if self.passed else ">"
        explanation = f"{self.name}: {self.value:.4g} {sign} {self.limit:.4g}"
        if self.low is not None and self.high is not None:
            explanation += (
                f" ({LEVEL:.0%} interval {self.low:.4g} to {self.high:.4g} over {self.count} {self.unit})"
            )
        return explanation if self.verdict != "undecided" else f"{explanation}, undecided{self.remedy}"

    @property
    def remedy(self) -> str:
        """The number of items that would decide an undecided gate, as a continuation of its verdict."""
        if self.deciding_count is None:
            return ""
        return f"; about {self.deciding_count:,} {self.unit} would decide"


class Measurements(Protocol):
    """The measurements that gates read, from a report or from a point of a sweep."""

    @property
    def original(self) -> ModelFigures:
        """The original model."""
        ...

    @property
    def compressed(self) -> ModelFigures:
        """The compressed model."""
        ...

    @property
    def change(self) -> OutputChange:
        """The distance between both models' outputs."""
        ...

    @property
    def differences(self) -> Differences:
        """The paired differences in quality, with intervals."""
        ...

    @property
    def serving(self) -> ServingParity | None:
        """The export in vLLM."""
        ...


def judge_gates(gates: Gates, measured: Measurements) -> list[GateResult]:
    """Compare the measurements with every limit; a missing measurement fails."""
    original, compressed, paired = measured.original, measured.compressed, measured.differences
    results = []

    def judge(
        gate: str,
        limit: float | Mapping[str, float] | None,
        subjects: Iterable[str],
        estimate_of: Callable[[str], Estimate | None],
    ) -> None:
        if limit is None:
            return
        limits = limit if isinstance(limit, Mapping) else dict.fromkeys(subjects, limit)
        if not limits:
            assert not isinstance(limit, Mapping), "the schema refuses an empty mapping"
            results.append(_result(gate, None, limit, None))
        results.extend(_result(gate, subject, most, estimate_of(subject)) for subject, most in limits.items())

    judge(
        "perplexity_increase",
        gates.perplexity_increase,
        compressed.perplexity,
        lambda text: (
            paired.perplexity_increase.get(text)
            or _increase(original.perplexity.get(text), compressed.perplexity.get(text))
        ),
    )
    judge(
        "logprob_kl",
        gates.logprob_kl,
        compressed.perplexity,
        lambda text: paired.logprob_kl.get(text) or _without_interval(measured.change.logprob_kl.get(text)),
    )
    judge(
        "final_layer_error",
        gates.final_layer_error,
        measured.change.final_layer_error,
        lambda text: _without_interval(measured.change.final_layer_error.get(text)),
    )
    judge(
        "exact_match_drop",
        gates.exact_match_drop,
        compressed.exact_match,
        lambda name: (
            paired.exact_match_drop.get(name)
            or _drop(original.exact_match.get(name), compressed.exact_match.get(name))
        ),
    )
    judge("task_drop", gates.task_drop, compressed.tasks, lambda name: _task_drop(measured, name))
    if gates.max_size is not None:
        results.append(
            _result("max_size", None, parse_size(gates.max_size), _without_interval(compressed.num_bytes))
        )
    if gates.max_size_ratio is not None:
        ratio = compressed.num_bytes / original.num_bytes if original.num_bytes else None
        results.append(_result("max_size_ratio", None, gates.max_size_ratio, _without_interval(ratio)))
    if gates.serving_parity is not None:
        value = None if measured.serving is None else measured.serving.mean_difference
        result = _result(
            "serving_parity", None, gates.serving_parity.mean_difference, _without_interval(value)
        )
        failed_serving = measured.serving if result.value is None else None
        results.append(
            result if failed_serving is None else replace(result, reason=_why_not_served(failed_serving))
        )
    return results


def _result(gate: str, subject: str | None, limit: float, estimate: Estimate | None) -> GateResult:
    if estimate is None or not math.isfinite(estimate.value):
        return GateResult(gate, subject, limit, None, passed=False)
    return GateResult(
        gate,
        subject,
        limit,
        estimate.value,
        passed=estimate.value <= limit,
        low=estimate.low if estimate.has_interval else None,
        high=estimate.high if estimate.has_interval else None,
        count=estimate.count or None,
        unit=estimate.unit or None,
        deciding_count=deciding_count(estimate, limit),
    )


def _why_not_served(serving: ServingParity) -> str | None:
    """Return one line that says why serving parity was not measured; None if unknown."""
    if serving.failures:
        failure = serving.failures[0]
        where = f"vLLM failed at tensor-parallel size {failure.tensor_parallel_size}"
        return f"{where}: {one_line(failure.process, failure.exception)}"
    reasons = serving.not_measured
    return "; ".join(f"tensor-parallel size {size}: {reason}" for size, reason in reasons.items()) or None


def _without_interval(value: float | None) -> Estimate | None:
    """Return a value as an estimate without an interval: it is exact, or its report has no interval."""
    return None if value is None else Estimate(value, math.nan, math.nan, 0, "")


def _increase(before: float | None, after: float | None) -> Estimate | None:
    return _without_interval(after / before - 1 if before and after is not None else None)


def _drop(before: float | None, after: float | None) -> Estimate | None:
    return _without_interval(before - after if before is not None and after is not None else None)


def _task_drop(measured: Measurements, name: str) -> Estimate | None:
    """Return a task's loss on the metric that `TASK/METRIC` names, or on the first judged metric."""
    task, _, metric_name = name.partition("/")
    before, after = measured.original.tasks.get(task, {}), measured.compressed.tasks.get(task, {})
    metric = find_metric(after, metric_name)
    if metric is None:
        return None
    paired = measured.differences.task_drop.get(task, {}).get(metric)
    return paired or _drop(before.get(metric), after.get(metric))
