"""Judge what was measured by a recipe's gates: in a run that has just ended, or from its report."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Protocol

from pydantic import Field

from ercsvd_deploy.evaluation.comparison import OutputChange
from ercsvd_deploy.exporters.vllm.engines.failure import one_line
from ercsvd_deploy.pipelines.judging.figures import ModelFigures
from ercsvd_deploy.pipelines.judging.parity.measure import ServingParity
from ercsvd_deploy.recipe.fields import parse_size
from ercsvd_deploy.recipe.gates import Gates

_TASK_METRICS = ("acc_norm", "acc", "exact_match")  # what `task_drop` judges, the first that a task has


@dataclass(frozen=True)
class GateResult:
    """One gate for one text, set of questions or task."""

    gate: Annotated[str, Field(description="The gate's key in the recipe.")]
    subject: Annotated[
        str | None, Field(description="The text, set of questions or task; null: the whole model.")
    ]
    limit: Annotated[float, Field(description="The largest value allowed.")]
    value: Annotated[
        float | None, Field(description="What was measured; null if nothing was, or nothing finite.")
    ]
    passed: Annotated[bool, Field(description="Whether the value is within the limit.")]
    reason: Annotated[
        str | None,
        Field(description="Why nothing was measured, on one line, where that is known."),
    ] = None

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
        return f"{self.name}: {self.value:.4g} {sign} {self.limit:.4g}"


class Measurements(Protocol):
    """What gates read: a report, or what a point of a sweep has of one."""

    @property
    def original(self) -> ModelFigures:
        """The model before."""
        ...

    @property
    def compressed(self) -> ModelFigures:
        """The model now."""
        ...

    @property
    def change(self) -> OutputChange:
        """How far the outputs moved."""
        ...

    @property
    def serving(self) -> ServingParity | None:
        """The export in vLLM."""
        ...


def judge_gates(gates: Gates, measured: Measurements) -> list[GateResult]:
    """Compare what was measured with every limit; a missing measurement fails."""
    original, compressed, change = measured.original, measured.compressed, measured.change
    results = []

    def judge(
        gate: str, limit: float | Mapping[str, float], subjects: Iterable[str], value_of: _ValueOf
    ) -> None:
        limits = limit if isinstance(limit, Mapping) else dict.fromkeys(subjects, limit)
        if not limits:
            assert not isinstance(limit, Mapping), "the schema refuses an empty mapping"
            results.append(_result(gate, None, limit, None))
        results.extend(_result(gate, subject, most, value_of(subject)) for subject, most in limits.items())

    if gates.perplexity_increase is not None:
        judge(
            "perplexity_increase",
            gates.perplexity_increase,
            compressed.perplexity,
            lambda text: _increase(original.perplexity.get(text), compressed.perplexity.get(text)),
        )
    for gate, limit, found in (
        ("logprob_kl", gates.logprob_kl, change.logprob_kl),
        ("final_layer_error", gates.final_layer_error, change.final_layer_error),
    ):
        if limit is not None:
            judge(gate, limit, compressed.perplexity, found.get)
    if gates.exact_match_drop is not None:
        judge(
            "exact_match_drop",
            gates.exact_match_drop,
            compressed.exact_match,
            lambda name: _drop(original.exact_match.get(name), compressed.exact_match.get(name)),
        )
    if gates.task_drop is not None:
        judge(
            "task_drop",
            gates.task_drop,
            compressed.tasks,
            lambda name: _drop(_accuracy(original.tasks, name), _accuracy(compressed.tasks, name)),
        )
    if gates.max_size is not None:
        results.append(_result("max_size", None, parse_size(gates.max_size), compressed.num_bytes))
    if gates.max_size_ratio is not None:
        ratio = compressed.num_bytes / original.num_bytes if original.num_bytes else None
        results.append(_result("max_size_ratio", None, gates.max_size_ratio, ratio))
    if gates.serving_parity is not None:
        value = None if measured.serving is None else measured.serving.mean_difference
        result = _result("serving_parity", None, gates.serving_parity.mean_difference, value)
        known = measured.serving if result.value is None else None
        results.append(result if known is None else replace(result, reason=_why_not_served(known)))
    return results


_ValueOf = Callable[[str], float | None]


def _result(gate: str, subject: str | None, limit: float, value: float | None) -> GateResult:
    if value is not None and not math.isfinite(value):
        value = None
    return GateResult(gate, subject, limit, value, value is not None and value <= limit)


def _why_not_served(serving: ServingParity) -> str | None:
    """Return on one line why serving parity was not measured; None if that is not known."""
    if serving.failures:
        first = serving.failures[0]
        where = f"vLLM failed at tensor-parallel size {first.tensor_parallel_size}"
        return f"{where}: {one_line(first.process, first.exception)}"
    reasons = serving.not_measured
    return "; ".join(f"tensor-parallel size {size}: {reason}" for size, reason in reasons.items()) or None


def _increase(before: float | None, after: float | None) -> float | None:
    return after / before - 1 if before and after is not None else None


def _drop(before: float | None, after: float | None) -> float | None:
    return before - after if before is not None and after is not None else None


def _accuracy(tasks: Mapping[str, Mapping[str, float]], name: str) -> float | None:
    """Return a task's accuracy; `TASK/METRIC` names the metric."""
    task, _, metric = name.partition("/")
    metrics = tasks.get(task) or {}
    return next((metrics[each] for each in ([metric] if metric else _TASK_METRICS) if each in metrics), None)
