"""The plan as tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import TYPE_CHECKING, Literal

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ercsvd_deploy.exporters.vllm.kernels.choice import KernelUse, columns_that_agree, without_shape
from ercsvd_deploy.pipelines.reporting.screen.terminal import rich_table
from ercsvd_deploy.pipelines.reporting.tables import component_table
from ercsvd_deploy.pipelines.stages.contract import label_columns

if TYPE_CHECKING:
    from ercsvd_deploy.pipelines.planning.candidates import CandidatePlan, LayerPlan
    from ercsvd_deploy.pipelines.planning.plan import Plan
    from ercsvd_deploy.pipelines.stages.quantize.results import PatternMatch


def render(plan: Plan) -> RenderableType:
    """Return the output of `ercsvd plan`."""
    head = Text(
        f"{plan.model} ({plan.model_type}, {plan.dtype}): {plan.num_layers} layers, "
        f"{plan.model_parameters:,} parameters, {plan.linear_parameters:,} of them in decoder Linears, "
        f"{plan.num_bytes:,} bytes\n"
    )
    renderables: list[RenderableType] = [head, _candidate_table(plan)]
    if len(plan.candidates) > 1:
        renderables.append(
            Text("\nThe run tries all of these on calibration data. Ranks of the first and the last:")
        )
    renderables.extend(_rank_table(candidate) for candidate in _smallest_and_largest(plan).values())
    if len(plan.candidates[-1].components) > 1:
        renderables.append(rich_table(component_table(plan.candidates[-1].components)))
    renderables += [_size_table(plan), _gpu_table(plan)]
    if plan.patterns:
        renderables.append(_pattern_table(plan.patterns))
    renderables.append(_kernel_table(plan))
    if held := _held_table(plan):
        renderables.append(held)
    if plan.kernel_problem:
        renderables.append(Text(f"vLLM is needed to say which kernels multiply them: {plan.kernel_problem}"))
    renderables += [_resource_table(plan), *map(Text, filter(None, (_time_line(plan), _machine_line(plan))))]
    renderables.extend(Text(f"assumed: {assumption}") for assumption in plan.estimate.assumptions)
    renderables.extend(Text(f"note: {note}") for note in plan.notes)
    renderables.extend(Text(f"warning: {warning}", style="yellow") for warning in plan.warnings)
    return Group(*renderables)


def _candidate_table(plan: Plan) -> Table:
    table = Table(title="Admissible numbers of compressed layers", title_justify="left")
    for column in (
        "last k layers",
        "removed in each",
        "decoder-Linear parameters",
        "removed",
        "bits per weight",
        "of the model",
        "bytes",
        "change",
    ):
        table.add_column(column, justify="right")
    for candidate in plan.candidates:
        table.add_row(
            str(candidate.num_compressed_layers),
            f"{100 * candidate.layer_ratio:.1f} %",
            f"{candidate.linear_parameters:,}",
            f"{100 * candidate.achieved_compression_ratio:.2f} %",
            f"{candidate.linear_bits_per_weight:.2f}",
            f"{candidate.model_bits_per_weight:.2f}",
            f"{candidate.num_bytes:,}",
            f"{100 * (candidate.num_bytes / plan.num_bytes - 1):+.1f} %",
        )
    return table


def _size_table(plan: Plan) -> Table:
    """Bytes on disk by part of the model, for the smallest and the largest k."""
    candidates = _smallest_and_largest(plan)
    table = Table(title="Bytes", title_justify="left")
    table.add_column("")
    for k in candidates:
        table.add_column(f"k = {k}" if k else "", justify="right")
    for part in plan.candidates[0].bytes_by_part:
        if any(c.bytes_by_part[part] for c in candidates.values()):
            table.add_row(part, *(f"{c.bytes_by_part[part]:,}" for c in candidates.values()))
    table.add_row("on disk", *(f"{c.num_bytes:,}" for c in candidates.values()), style="bold")
    return table


def _gpu_table(plan: Plan) -> Table:
    """Bytes on each GPU for the smallest and the largest k, beside those of the dense model."""
    candidates = _smallest_and_largest(plan)
    table = Table(title="Weights on each GPU, by tensor-parallel size (TP)", title_justify="left")
    table.add_column("TP", justify="right")
    table.add_column("dense model", justify="right")
    for k in candidates:
        table.add_column(f"k = {k}" if k else "this model", justify="right")
        table.add_column("of dense", justify="right")
    for size, dense in plan.gpu_bytes.items():
        cells: list[str | Text] = []
        for candidate in candidates.values():
            share = candidate.gpu_share[size]
            cells += [_size(candidate.gpu_bytes[size]), Text(f"{share:.2f} x", "yellow" if share > 1 else "")]
        table.add_row(str(size), _size(dense), *cells)
    return table


def _smallest_and_largest(plan: Plan) -> dict[int, CandidatePlan]:
    """Return the candidates with the fewest and the most compressed layers."""
    return {c.num_compressed_layers: c for c in (plan.candidates[0], plan.candidates[-1])}


def _pattern_table(patterns: tuple[PatternMatch, ...]) -> Table:
    table = Table(title="Patterns of the quantize stage", title_justify="left")
    for column in ("pattern", "purpose", "Linears", "such as"):
        table.add_column(column, justify="right" if column == "Linears" else "left")
    for match in patterns:
        table.add_row(match.pattern, match.purpose, str(len(match.modules)), match.modules[0])
    return table


def _rank_table(candidate: CandidatePlan) -> Table:
    """Ranks or bits, weights and size of each layer; equal neighbours share a row."""
    has_ranks = any(rank is not None for layer in candidate.layers for rank in layer.ranks.values())
    title = f"Ranks with k = {candidate.num_compressed_layers}" if has_ranks else "Layers"
    table = Table(title=title, title_justify="left")
    labels = label_columns(name for layer in candidate.layers for name in layer.ranks)
    names = [label.removesuffix("_proj") for label in labels.values()]
    for column in ("layer", *names, "weights", "size"):
        table.add_column(column, justify="right", overflow="fold")  # narrow terminals wrap instead of cutting
    for (ranks, parameters, num_bytes), members in groupby(
        candidate.layers, lambda layer: (tuple(_rank_cells(layer, labels)), layer.parameters, layer.num_bytes)
    ):
        first_layer, *_, last_layer = 2 * [layer.index for layer in members]
        layers = str(first_layer) if first_layer == last_layer else f"{first_layer}-{last_layer}"
        table.add_row(layers, *ranks, f"{parameters / 1e6:,.1f} M", _size(num_bytes))
    return table


def _rank_cells(layer: LayerPlan, names: Iterable[str]) -> Iterator[str]:
    """Yield the cell of every Linear of a layer: its rank, `int4` or `dense`, plus its correction's rank.

    The cell is empty for a name that the layer does not have.
    """
    for name in names:
        rank = layer.ranks.get(name)
        one_matrix = f"int{layer.bits[name]}" if name in layer.bits else "dense"
        corrected = f" + {layer.correction_ranks[name]}" if name in layer.correction_ranks else ""
        yield f"{one_matrix if rank is None else rank}{corrected}" if name in layer.ranks else ""


def _kernel_table(plan: Plan) -> Table:
    """One row for matrices of equal storage and equal kernels; `--json` has every shape."""
    kernels = columns_that_agree(plan.kernels)
    named = f", and what multiplies them ({plan.kernel_source})" if plan.kernel_source else ""
    table = Table(title=f"Matrices on each device, by tensor-parallel size (TP){named}", title_justify="left")
    numbers = ("TP", "count", "smallest", "largest")
    for column in (*numbers, "stored as", *(kernels if plan.kernel_source else ())):
        justify: Literal["left", "right"] = "right" if column in numbers else "left"
        table.add_column(column, justify=justify, overflow="fold")  # narrow terminals wrap instead of cutting
    uses_by_row: dict[tuple[int, str, tuple[str, ...]], list[KernelUse]] = {}
    for use in plan.kernels:
        kernel_names = tuple(without_shape(use.kernels[name]) for name in kernels.values())
        uses_by_row.setdefault((use.tensor_parallel_size, use.storage, kernel_names), []).append(use)
    for (size, storage, kernel_names), uses in uses_by_row.items():
        smallest, *_, largest = sorted(2 * [(use.rows * use.columns, use.rows, use.columns) for use in uses])
        count = sum(use.layers for use in uses)
        shapes = (f"{rows} x {columns}" for _, rows, columns in (smallest, largest))
        table.add_row(str(size), str(count), *shapes, storage, *(kernel_names if plan.kernel_source else ()))
    return table


def _held_table(plan: Plan) -> Table | None:
    """Bytes on each device once kernels have arranged the matrices; None where that changes nothing."""
    by_size = {size: plan.held_bytes(size) for size in plan.gpu_bytes}
    stored = plan.candidates[-1].gpu_bytes
    if all(held == stored[size] for size, by_device in by_size.items() for held in by_device.values()):
        return None
    devices_by_column: dict[tuple[int | None, ...], list[str]] = {}
    for device in plan.kernels[0].kernels:
        column = tuple(by_device.get(device) for by_device in by_size.values())
        devices_by_column.setdefault(column, []).append(device)
    title = "Weights on each device as its kernels hold them: padded, or in 16 bits where there is none"
    table = Table(title=title, title_justify="left")
    for heading in ("TP", *(", ".join(devices) for devices in devices_by_column.values())):
        table.add_column(heading, justify="right", overflow="fold")
    for index, size in enumerate(by_size):
        cells = (column[index] for column in devices_by_column)
        table.add_row(str(size), *("does not start" if cell is None else _size(cell) for cell in cells))
    return table


def _resource_table(plan: Plan) -> Table:
    needs = plan.estimate
    table = Table(title=f"What the run needs at its highest, layers on {needs.device}", title_justify="left")
    table.add_column("stage")
    table.add_column("memory", justify="right")
    if needs.peak_device_bytes:
        table.add_column("GPU memory", justify="right")
    table.add_column("work directory", justify="right")
    table.add_column("FLOP, at least", justify="right")
    for stage in needs.stages:
        cells = [stage.stage, _size(stage.host_bytes)]
        cells += [_size(stage.device_bytes)] if needs.peak_device_bytes else []
        cells += [_size(stage.scratch_bytes), _count(stage.flops)]
        table.add_row(*cells)
    total = ["the run", _size(needs.peak_host_bytes)]
    total += [_size(needs.peak_device_bytes)] if needs.peak_device_bytes else []
    total += [_size(needs.scratch_bytes), _count(needs.flops)]
    table.add_row(*total, style="bold")
    return table


def _time_line(plan: Plan) -> str:
    """Return the lower bound on the run's time; empty if the machine's peak FLOP/s is unknown."""
    seconds, peak = plan.estimate.least_seconds, plan.estimate.machine.flops
    if seconds is None or peak is None:
        return ""
    source = "measured in a matrix product" if plan.estimate.machine.is_this_one else "as --machine says"
    return (
        f"At least {_duration(seconds)} at a peak of {_count(peak)}FLOP/s ({source}). This is a lower "
        "bound, not a prediction; a run tells the time left once a stage's first layer is done."
    )


def _count(number: float) -> str:
    """Return a large number in three digits: `1.25 T`."""
    for power, letter in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if number >= power:
            return f"{number / power:.3g} {letter}"
    return f"{number:.0f}" if number else "-"


def _duration(seconds: float) -> str:
    for length, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} seconds"


def _machine_line(plan: Plan) -> str:
    machine = plan.estimate.machine
    capacities = [
        f"{_size(num_bytes)} {resource}"
        for num_bytes, resource in (
            (machine.memory_bytes, "of memory"),
            (machine.gpu_bytes, "of GPU memory"),
            (machine.disk_bytes, "on the output's disk"),
        )
        if num_bytes
    ]
    name = machine.name.capitalize()
    return f"{name} has {', '.join(capacities)} to spare." if capacities else ""


def _size(num_bytes: int) -> str:
    if num_bytes >= 2**30:
        return f"{num_bytes / 2**30:,.2f} GiB"
    return f"{num_bytes / 2**20:,.{0 if num_bytes >= 10 * 2**20 else 1}f} MiB"
