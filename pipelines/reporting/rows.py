"""A report's rows: computed once, shown on the terminal, the page and the model card."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ercsvd_deploy.pipelines.judging.gates import GateResult, Verdict
from ercsvd_deploy.pipelines.judging.uncertainty import Estimate, negated
from ercsvd_deploy.pipelines.reporting.numbers import (
    difference,
    number,
    percent,
    points,
    readable_bytes,
    readable_count,
    relative,
    signed,
    with_unit,
)
from ercsvd_deploy.recipe.gates import GATES, GateKind

if TYPE_CHECKING:
    from ercsvd_deploy.pipelines.reporting.report.document import Report

INTERVALS = "Below each figure its 95 % interval; that of a change is of both models on the same items."


@dataclass(frozen=True)
class Row:
    """One row of the table that compares the original model with the compressed one.

    Attributes:
        name: The measured quantity, and the data it was measured on.
        original: The original model's figure.
        compressed: The compressed model's figure.
        change: The change between the two.
        measured_on: Number and kind of items; empty for exact figures such as sizes.
        original_interval: 95 % interval of the original's figure; empty if there is none.
        compressed_interval: 95 % interval of the compressed model's figure.
        change_interval: 95 % interval of the change, both models paired item by item.
    """

    name: str
    original: str
    compressed: str
    change: str = ""
    measured_on: str = ""
    original_interval: str = ""
    compressed_interval: str = ""
    change_interval: str = ""


@dataclass(frozen=True)
class PartRow:
    """Bytes of one part of the model; `share` is its fraction of the compressed model's bytes."""

    name: str
    original: str
    compressed: str
    share: float


@dataclass(frozen=True)
class GateRow:
    """One gate as text.

    Attributes:
        name: The limited quantity, and the data it is measured on.
        value: The measured value.
        interval: 95 % interval of the value; empty if there is none.
        limit: The largest value allowed.
        verdict: `passed`, `missed` or `undecided`.
        remedy: What would decide an undecided gate; empty otherwise.
        is_failing: Whether the run counts as failed because of it.
    """

    name: str
    value: str
    interval: str
    limit: str
    verdict: Verdict
    remedy: str
    is_failing: bool


def size_rows(report: Report) -> list[Row]:
    """Return the rows of the model's size, before and after."""
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
        Row(
            "Bits per weight of the model",
            number(before.model_bits_per_weight, 2),
            number(after.model_bits_per_weight, 2),
            relative(before.model_bits_per_weight, after.model_bits_per_weight),
        ),
    ]


def quality_rows(report: Report) -> list[Row]:
    """Return a row for every measured quality, before and after, with intervals and counts."""
    return [
        *_perplexity_rows(report),
        *_exact_match_rows(report),
        *_task_rows(report),
        *_distance_rows(report),
    ]


def _perplexity_rows(report: Report) -> Iterator[Row]:
    before, after = report.original, report.compressed
    for text, old in before.perplexity.items():
        new = after.perplexity.get(text)
        estimates = (
            before.estimates.perplexity.get(text),
            after.estimates.perplexity.get(text),
            report.differences.perplexity_increase.get(text),
        )
        row = Row(f"Perplexity, {text}", number(old), number(new), relative(old, new))
        yield _with_intervals(row, estimates, number, _signed_percent)


def _exact_match_rows(report: Report) -> Iterator[Row]:
    before, after = report.original, report.compressed
    for name, old in before.exact_match.items():
        new = after.exact_match.get(name)
        estimates = (
            before.estimates.exact_match.get(name),
            after.estimates.exact_match.get(name),
            negated(report.differences.exact_match_drop.get(name)),
        )
        row = Row(f"Exact match, {name}", percent(old), percent(new), points(old, new))
        yield _with_intervals(row, estimates, percent, _signed_points)


def _task_rows(report: Report) -> Iterator[Row]:
    before, after = report.original, report.compressed
    for task, metrics in before.tasks.items():
        for metric, old in metrics.items():
            new = after.tasks.get(task, {}).get(metric)
            loss = report.differences.task_drop.get(task, {}).get(metric)
            is_falling = loss is None or new is None or loss.value == 0 or (old - new) * loss.value > 0
            estimates = (
                before.estimates.tasks.get(task, {}).get(metric),
                after.estimates.tasks.get(task, {}).get(metric),
                negated(loss) if is_falling else loss,
            )
            row = Row(f"{task}, {metric}", number(old, 4), number(new, 4), difference(old, new))
            yield _with_intervals(row, estimates, _four_digits, _signed_number)


def _distance_rows(report: Report) -> Iterator[Row]:
    for text, distance in report.change.logprob_kl.items():
        row = Row(f"Log-prob KL, {text}", "", with_unit(number(distance, 4), "nats"))
        estimate = report.differences.logprob_kl.get(text)
        yield _with_intervals(row, (None, estimate, None), _four_digits, _signed_number)
    for text, distance in report.change.final_layer_error.items():
        yield Row(f"Final-layer error, {text}", "", number(distance, 4))


_Estimates = tuple[Estimate | None, Estimate | None, Estimate | None]  # original, compressed, change


def _with_intervals(
    row: Row, estimates: _Estimates, figure: Callable[[float], str], change: Callable[[float], str]
) -> Row:
    """Return a row with its intervals and its count."""
    first_estimate = next((estimate for estimate in estimates if estimate is not None), None)
    original, compressed, changed = estimates
    return replace(
        row,
        measured_on="" if first_estimate is None else f"{first_estimate.count:,} {first_estimate.unit}",
        original_interval=_interval(original, figure),
        compressed_interval=_interval(compressed, figure),
        change_interval=_interval(changed, change),
    )


def _interval(estimate: Estimate | None, form: Callable[[float], str]) -> str:
    if estimate is None or not estimate.has_interval:
        return ""
    low, high = form(estimate.low), form(estimate.high)
    unit = _UNIT.search(low)
    # A unit that both ends share is written once.
    if unit and high.endswith(unit[0]):
        low = low.removesuffix(unit[0])
    return f"{low} to {high}"


_UNIT = re.compile(r" \D+$")


def _four_digits(value: float) -> str:
    return number(value, 4)


def _signed_percent(value: float) -> str:
    return f"{signed(100 * value, '.1f')} %"


def _signed_points(value: float) -> str:
    return f"{signed(100 * value, '.1f')} points"


def _signed_number(value: float) -> str:
    return signed(value, ".4f")


def part_rows(report: Report) -> list[PartRow]:
    """Return the bytes of each part of the model, before and after."""
    before, after = report.original.bytes_by_part, report.compressed.bytes_by_part
    total = max(1, sum(after.values()))
    sizes = ((part, before.get(part, 0), after.get(part, 0)) for part in dict.fromkeys([*before, *after]))
    return [
        PartRow(part, readable_bytes(old), readable_bytes(new), new / total)
        for part, old, new in sizes
        if old or new
    ]


def gate_rows(gates: Sequence[GateResult]) -> list[GateRow]:
    """Return the verdict of every gate."""
    return [
        GateRow(
            name=_gate_name(gate),
            value=_gate_value(gate, gate.value),
            interval=_gate_interval(gate),
            limit=_gate_value(gate, gate.limit),
            verdict=gate.verdict,
            remedy=gate.remedy.removeprefix("; ") if gate.verdict == "undecided" else "",
            is_failing=not gate.passed,
        )
        for gate in gates
    ]


def _kind_of(gate: GateResult) -> GateKind:
    return GATES.get(gate.gate, GateKind(gate.gate, ""))  # a later release's report may have others


def _gate_name(gate: GateResult) -> str:
    """Return the quantity that a gate limits, and its subject, as text."""
    limited = _kind_of(gate).label
    return limited if gate.subject is None else f"{limited}, {gate.subject}"


def _gate_value(gate: GateResult, value: float | None) -> str:
    """Return a gate's limit or measurement with its unit."""
    if value is None:
        return "not measured"
    match _kind_of(gate).unit:
        case "bytes":
            return readable_bytes(value)
        case "percent":
            return f"{number(100 * value, 1)} %"
        case "points":
            return f"{number(100 * value, 1)} points"
        case "nats":
            return f"{number(value, 4)} nats"
        case "":
            return number(value, 4)


def _gate_interval(gate: GateResult) -> str:
    if gate.low is None or gate.high is None:
        return ""
    estimate = Estimate(gate.value or 0.0, gate.low, gate.high, gate.count or 0, gate.unit or "")
    return _interval(estimate, lambda value: _gate_value(gate, value))
