"""Judge a report by a recipe's gates. It reads the report's JSON alone, so that `check` can do it again."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from junitparser import Failure, JUnitXml, TestCase, TestSuite

from ercsvd_deploy.exporters.vllm.engines.failure import one_line
from ercsvd_deploy.recipe.fields import parse_size
from ercsvd_deploy.recipe.gates import Gates

_NOT_IN_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_TASK_METRICS = ("acc_norm", "acc", "exact_match")  # what `task_drop` judges, the first that a task has


@dataclass(frozen=True)
class GateResult:
    """One gate for one text, set of questions or task."""

    gate: str
    subject: str | None  # None: the whole model
    limit: float
    value: float | None  # None: not measured, or not finite
    passed: bool
    reason: str | None = None  # why nothing was measured, where that is known

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


def judge_gates(gates: Gates, report: Mapping[str, Any]) -> list[GateResult]:
    """Compare what was measured with every limit; a missing measurement fails.

    Args:
        gates: The limits.
        report: A report as plain JSON values.
    """
    original, compressed = report.get("original") or {}, report.get("compressed") or {}
    change = report.get("change") or {}
    results = []

    def judge(
        gate: str, limit: float | Mapping[str, float], subjects: Iterable[str], value_of: _ValueOf
    ) -> None:
        limits = limit if isinstance(limit, Mapping) else dict.fromkeys(subjects, limit)
        if not limits:
            assert not isinstance(limit, Mapping), "the schema refuses an empty mapping"
            results.append(_result(gate, None, limit, None))
        results.extend(_result(gate, subject, most, value_of(subject)) for subject, most in limits.items())

    perplexity = compressed.get("perplexity") or {}
    if gates.perplexity_increase is not None:
        judge(
            "perplexity_increase",
            gates.perplexity_increase,
            perplexity,
            lambda text: _increase((original.get("perplexity") or {}).get(text), perplexity.get(text)),
        )
    for gate, limit in (
        ("logprob_kl", gates.logprob_kl),
        ("final_layer_error", gates.final_layer_error),
    ):
        if limit is not None:
            found = change.get(gate) or {}
            judge(gate, limit, perplexity, found.get)
    if gates.exact_match_drop is not None:
        before, after = original.get("exact_match") or {}, compressed.get("exact_match") or {}
        judge(
            "exact_match_drop",
            gates.exact_match_drop,
            after,
            lambda name: _drop(before.get(name), after.get(name)),
        )
    if gates.task_drop is not None:
        tasks_before, tasks_after = original.get("tasks") or {}, compressed.get("tasks") or {}
        judge(
            "task_drop",
            gates.task_drop,
            tasks_after,
            lambda name: _drop(_accuracy(tasks_before, name), _accuracy(tasks_after, name)),
        )
    size = compressed.get("num_bytes")
    if gates.max_size is not None:
        results.append(_result("max_size", None, parse_size(gates.max_size), size))
    if gates.max_size_ratio is not None:
        whole = original.get("num_bytes")
        ratio = size / whole if size is not None and whole else None
        results.append(_result("max_size_ratio", None, gates.max_size_ratio, ratio))
    if gates.serving_parity is not None:
        serving = report.get("serving") or {}
        value = serving.get("mean_difference")
        result = _result("serving_parity", None, gates.serving_parity.mean_difference, value)
        results.append(result if value is not None else replace(result, reason=_why_not_served(serving)))
    return results


def junit_xml(results: Iterable[GateResult], title: str) -> str:
    """Return verdicts as JUnit XML, one test case for each gate and subject."""
    suite = TestSuite(_printable(title))
    for result in results:
        case = TestCase(_printable(result.subject or "model"), classname=f"gates.{result.gate}")
        if not result.passed:
            case.result = [Failure(_printable(result.explain()), "GateMissed")]
        suite.add_testcase(case)
    document = JUnitXml("ercsvd gates")
    document.add_testsuite(suite)
    text: bytes = document.tostring()  # type: ignore[no-untyped-call]
    return text.decode("utf-8")


def _printable(text: str) -> str:
    """Return a text without the characters that XML cannot hold."""
    return _NOT_IN_XML.sub("\ufffd", text)


_ValueOf = Callable[[str], float | None]


def _result(gate: str, subject: str | None, limit: float, value: float | None) -> GateResult:
    return GateResult(gate, subject, limit, value, value is not None and value <= limit)


def _why_not_served(serving: Mapping[str, Any]) -> str | None:
    """Return on one line why serving parity was not measured; None if the report does not say."""
    failures = serving.get("failures") or ()
    if failures:
        first = failures[0]
        where = f"vLLM failed at tensor-parallel size {first['tensor_parallel_size']}"
        return f"{where}: {one_line(first['process'], first['exception'])}"
    reasons = serving.get("not_measured") or {}
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
