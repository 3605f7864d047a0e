"""What a report comes to, in rows: computed once, shown on the terminal, the page and the model card."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ercsvd_deploy.pipelines.judging.figures import ModelFigures
from ercsvd_deploy.pipelines.judging.gates import GateResult
from ercsvd_deploy.pipelines.reporting.document import Report
from ercsvd_deploy.pipelines.reporting.numbers import (
    difference,
    number,
    percent,
    points,
    readable_bytes,
    readable_count,
    relative,
)

_GATES = {
    "perplexity_increase": "Increase of perplexity",
    "logprob_kl": "Log-prob KL",
    "final_layer_error": "Final-layer error",
    "exact_match_drop": "Loss of exact match",
    "task_drop": "Loss of accuracy",
    "max_size": "Size",
    "max_size_ratio": "Size against the original",
    "serving_parity": "Difference of vLLM's log-probs",
}


@dataclass(frozen=True)
class Row:
    """One line of a table of before and after."""

    name: str
    original: str
    compressed: str
    change: str = ""


@dataclass(frozen=True)
class PartRow:
    """One part of the model's bytes; `share` is of all bytes now."""

    name: str
    original: str
    compressed: str
    share: float


@dataclass(frozen=True)
class GateRow:
    """One gate, as people read it."""

    name: str
    value: str
    limit: str
    verdict: str


def size_rows(report: Report) -> list[Row]:
    """Return how large the model was and is."""
    before, after = report.original, report.compressed
    return [
        Row(
            "Size of all tensors",
            readable_bytes(before.num_bytes),
            readable_bytes(after.num_bytes),
            relative(before.num_bytes, after.num_bytes),
        ),
        Row(
            "Parameters",
            readable_count(before.parameters),
            readable_count(after.parameters),
            relative(before.parameters, after.parameters),
        ),
        Row(
            "Parameters of decoder Linears",
            readable_count(before.linear_parameters),
            readable_count(after.linear_parameters),
            relative(before.linear_parameters, after.linear_parameters),
        ),
        Row(
            "Bits per decoder weight",
            f"{before.linear_bits_per_weight:.2f}",
            f"{after.linear_bits_per_weight:.2f}",
            relative(before.linear_bits_per_weight, after.linear_bits_per_weight),
        ),
    ]


def quality_rows(report: Report) -> list[Row]:
    """Return how good the model was and is, on everything that was measured."""
    return [*_quality_rows(report.original, report.compressed), *_distance_rows(report)]


def _quality_rows(before: ModelFigures, after: ModelFigures) -> Iterator[Row]:
    for text, old in before.perplexity.items():
        new = after.perplexity.get(text)
        yield Row(f"Perplexity, {text}", number(old), number(new), relative(old, new))
    for name, old in before.exact_match.items():
        new = after.exact_match.get(name)
        yield Row(f"Exact match, {name}", percent(old), percent(new), points(old, new))
    for task, metrics in before.tasks.items():
        for metric, old in metrics.items():
            new = after.tasks.get(task, {}).get(metric)
            yield Row(f"{task}, {metric}", number(old, 4), number(new, 4), difference(old, new))


def _distance_rows(report: Report) -> Iterator[Row]:
    for text, found in report.change.logprob_kl.items():
        yield Row(f"Log-prob KL, {text}", "", f"{number(found, 4)} nats")
    for text, found in report.change.final_layer_error.items():
        yield Row(f"Final-layer error, {text}", "", number(found, 4))


def part_rows(report: Report) -> list[PartRow]:
    """Return where the bytes were and are."""
    before, after = report.original.bytes_by_part, report.compressed.bytes_by_part
    whole = max(1, sum(after.values()))
    found = ((part, before.get(part, 0), after.get(part, 0)) for part in dict.fromkeys([*before, *after]))
    return [
        PartRow(part, readable_bytes(old), readable_bytes(new), new / whole)
        for part, old, new in found
        if old or new
    ]


def gate_rows(gates: Sequence[GateResult]) -> list[GateRow]:
    """Return the verdict of every gate."""
    return [
        GateRow(
            _gate_name(gate),
            _gate_value(gate, gate.value),
            _gate_value(gate, gate.limit),
            "passed" if gate.passed else "missed",
        )
        for gate in gates
    ]


def _gate_name(gate: GateResult) -> str:
    """Return what a gate limits, and on what, for people."""
    limited = _GATES.get(gate.gate, gate.gate)
    return limited if gate.subject is None else f"{limited}, {gate.subject}"


def _gate_value(gate: GateResult, value: float | None) -> str:
    """Return a gate's limit or measurement with its unit."""
    if value is None:
        return "not measured"
    if gate.gate == "max_size":
        return readable_bytes(value)
    if gate.gate in ("perplexity_increase", "max_size_ratio"):
        return f"{100 * value:.1f} %"
    if gate.gate in ("exact_match_drop", "task_drop"):
        return f"{100 * value:.1f} points"
    return f"{value:.4f} nats" if gate.gate in ("logprob_kl", "serving_parity") else f"{value:.4f}"
