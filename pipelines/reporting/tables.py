"""The tables of a report: what the stages show, the parts of the model, and the export in vLLM."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ercsvd_deploy.pipelines.reporting.numbers import number
from ercsvd_deploy.pipelines.stages.contract import Table

if TYPE_CHECKING:
    from ercsvd_deploy.pipelines.judging.parity.comparison import Difference
    from ercsvd_deploy.pipelines.judging.parity.measure import ServingFailure, ServingParity
    from ercsvd_deploy.pipelines.planning.components import Component
    from ercsvd_deploy.pipelines.reporting.document import Report


def report_tables(report: Report) -> list[Table]:
    """Return all tables but those of before and after, in the order in which things happened."""
    return [table for table in _tables(report) if table.rows]


def _tables(report: Report) -> Iterator[Table]:
    if len(report.components) > 1:
        yield component_table(report.components)
    yield from report.tables
    if report.serving is not None:
        yield _serving_table(report.serving)


def component_table(components: Sequence[Component]) -> Table:
    """One row for each part of a vision-language model."""
    columns = ("part", "parameters before", "now", "bytes now", "treatment")
    rows = tuple(
        (
            part.name,
            f"{part.original_parameters:,}",
            f"{part.parameters:,}",
            f"{part.num_bytes:,}",
            part.treatment,
        )
        for part in components
    )
    return Table("Parts of the model", columns, rows, columns[1:4])


def _serving_table(serving: ServingParity) -> Table:
    """One row for each tensor-parallel size and kind of prompt that was measured."""
    columns = (
        "tensor-parallel size",
        "on",
        "prompts",
        "decoding",
        "together",
        "tokens",
        "greedy tokens alike",
    )
    rows = tuple(
        (
            f"{size.tensor_parallel_size}, {size.mode}",
            found.subject,
            _difference(found.prompt),
            _difference(found.decoded),
            _difference(found.together),
            f"{found.together.num_tokens:,}",
            f"{found.greedy_agreeing} of {found.decoded.num_tokens}",
        )
        for size in serving.sizes
        for found in size.agreements
    )
    title = "vLLM beside this package: mean and largest difference of log-probs, in nats"
    return Table(title, columns, rows, columns[2:])


def _difference(found: Difference) -> str:
    return f"{number(found.mean, 4)}, {number(found.largest, 4)}"


def failure_title(failure: ServingFailure) -> str:
    """Return on one line at which size vLLM failed, and which of its processes first."""
    first = f"; {failure.process} failed first" if failure.process else ""
    return f"vLLM failed at tensor-parallel size {failure.tensor_parallel_size}{first}"


def failure_text(failure: ServingFailure, *, with_excerpt: bool) -> str:
    """Return why vLLM failed, as preformatted text: the exception, where its log is, what was printed."""
    parts = [failure.exception]
    if failure.log:
        parts.append(f"The whole log: {failure.log}")
    if with_excerpt and failure.excerpt:
        parts.append(failure.excerpt)
    return "\n\n".join(parts) if with_excerpt else "\n".join(parts)
