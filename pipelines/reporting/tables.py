"""The tables of a report: those of the stages, the parts of the model, and the export in vLLM."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ercsvd_deploy.pipelines.reporting.numbers import number
from ercsvd_deploy.pipelines.stages.contract import Table

if TYPE_CHECKING:
    from ercsvd_deploy.pipelines.judging.parity.comparison import Difference
    from ercsvd_deploy.pipelines.judging.parity.measure import ServingFailure, ServingParity
    from ercsvd_deploy.pipelines.planning.components import Component
    from ercsvd_deploy.pipelines.reporting.report.document import Report


def report_tables(report: Report) -> list[Table]:
    """Return all tables except those that compare before and after, in the order of the stages."""
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
            agreement.subject,
            _difference(agreement.prompt),
            _difference(agreement.decoded),
            _difference(agreement.together),
            f"{agreement.together.num_tokens:,}",
            f"{agreement.greedy_agreeing} of {agreement.decoded.num_tokens}",
        )
        for size in serving.sizes
        for agreement in size.agreements
    )
    title = "vLLM beside this package: mean and largest difference of log-probs, in nats"
    return Table(title, columns, rows, columns[2:])


def _difference(difference: Difference) -> str:
    return f"{number(difference.mean, 4)}, {number(difference.largest, 4)}"


def failure_title(failure: ServingFailure) -> str:
    """Return one line with the tensor-parallel size at which vLLM failed and its first failed process."""
    which_process = f"; {failure.process} failed first" if failure.process else ""
    return f"vLLM failed at tensor-parallel size {failure.tensor_parallel_size}{which_process}"


def failure_text(failure: ServingFailure, *, with_excerpt: bool) -> str:
    """Return why vLLM failed, as preformatted text: the exception, the log's path, and its output."""
    paragraphs = [failure.exception]
    if failure.log:
        paragraphs.append(f"The whole log: {failure.log}")
    if with_excerpt and failure.excerpt:
        paragraphs.append(failure.excerpt)
    return "\n\n".join(paragraphs) if with_excerpt else "\n".join(paragraphs)
