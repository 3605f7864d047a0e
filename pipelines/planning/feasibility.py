"""The memory, disk and time that a run needs, compared with this machine or another one.

An estimate is made for one machine and one device; it is part of the plan.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ercsvd_deploy.exporters.vllm.directory.target import ExportError, check_target
from ercsvd_deploy.pipelines.planning.machine import Machine, inspect_machine
from ercsvd_deploy.pipelines.planning.needs import PlannedStage, StageNeeds, add_up_needs
from ercsvd_deploy.pipelines.state.lock import work_path

if TYPE_CHECKING:
    from ercsvd_deploy.pipelines.stages.workload import Workload

_CERTAINLY = 0.75  # of an estimate: measured ones are within 25 %


class TooLittleDiskError(ValueError):
    """The output's disk has too little space for what the run writes."""


@dataclass(frozen=True)
class Estimate:
    """A run's needs, and what the machine lacks.

    Attributes:
        device: Type of the device that layers run on, "cpu" or "cuda".
        stages: Needs of the stages, in the order in which they run.
        peak_host_bytes: Peak resident memory of the process.
        peak_device_bytes: Peak GPU memory; 0 without a GPU.
        scratch_bytes: Peak size of the work directory beside the output, including the unfinished export.
        least_scratch_bytes: Peak size of that directory if the search chooses the candidate with the smallest
            files.
        flops: Lower bound of the floating-point operations of all stages.
        least_seconds: Lower bound of the time, at the machine's peak FLOP/s; None if that is unknown.
        final_bytes: Bytes of the finished export's tensors, for the largest candidate.
        machine: The machine that the needs are compared with.
        problems: Why the run cannot work on any machine, one line each.
        shortages: What the machine lacks, one line each.
        assumptions: Assumptions of the estimate.
    """

    device: str
    stages: tuple[StageNeeds, ...]
    peak_host_bytes: int
    peak_device_bytes: int
    scratch_bytes: int
    least_scratch_bytes: int
    final_bytes: int
    flops: float
    least_seconds: float | None
    machine: Machine
    problems: tuple[str, ...]
    shortages: tuple[str, ...]
    assumptions: tuple[str, ...]


def estimate(
    work: Workload,
    planned: Sequence[PlannedStage],
    final_bytes: Sequence[int],
    device: torch.device,
    machine: Machine | None = None,
) -> Estimate:
    """Estimate a run on a machine.

    Args:
        work: The amount of work.
        planned: The stages.
        final_bytes: Bytes of every candidate's export.
        device: Where layers run.
        machine: The machine to compare with; None for this one.
    """
    largest = max(final_bytes)
    on_gpu = device.type == "cuda"
    stages = add_up_needs(planned, work, on_gpu=on_gpu)
    of_candidates = [
        add_up_needs([stage.only(index) for stage in planned], work, on_gpu=on_gpu)
        for index in range(len(final_bytes))
    ]
    target = work.recipe.export.path
    target = None if target is None else target.absolute()
    machine = machine or inspect_machine(device, target)
    needs_estimate = Estimate(
        device=device.type,
        stages=stages,
        peak_host_bytes=max(stage.host_bytes for stage in stages),
        peak_device_bytes=max(stage.device_bytes for stage in stages),
        scratch_bytes=max(stage.scratch_bytes for stage in stages),
        least_scratch_bytes=min(max(stage.scratch_bytes for stage in needs) for needs in of_candidates),
        final_bytes=largest,
        flops=sum(stage.flops for stage in stages),
        least_seconds=None,
        machine=machine,
        problems=tuple(_target_problems(work, target)),
        shortages=(),
        assumptions=work.assumptions,
    )
    return on_machine(replace(needs_estimate, shortages=tuple(_shortages(needs_estimate, target))), machine)


def on_machine(needs: Estimate, machine: Machine) -> Estimate:
    """Return an estimate with the lower bound of the time at a machine's peak FLOP/s, if known."""
    seconds = needs.flops / machine.flops if machine.flops else None
    return replace(needs, machine=machine, least_seconds=seconds)


def check_resources(needs: Estimate, output: Path | None) -> list[str]:
    """Return a warning for every resource that this machine seems to lack for a planned run.

    Args:
        needs: What the run needs.
        output: The output directory; None if nothing is exported.

    Raises:
        TooLittleDiskError: the disk has less space than 75 % of what the run writes.
    """
    free = needs.machine.disk_bytes
    if free is not None and output is not None:
        shortage_bytes = _CERTAINLY * needs.least_scratch_bytes - _already_written(output) - free
        if shortage_bytes > 0:
            raise TooLittleDiskError(f"{_disk_problem(needs, output)}; nothing has been computed yet")
    return [f"{needs.machine.name} may not suffice: {shortage}" for shortage in needs.shortages]


def _target_problems(work: Workload, target: Path | None) -> list[str]:
    """Return why the recipe's output cannot be written."""
    if target is None:
        return []
    try:
        check_target(target, Path(work.recipe.model.path))
    except ExportError as error:
        return [str(error)]
    return []


def _shortages(needs: Estimate, target: Path | None) -> Iterable[str]:
    machine = needs.machine
    if machine.memory_bytes is not None and needs.peak_host_bytes > machine.memory_bytes:
        stage = max(needs.stages, key=lambda needs: needs.host_bytes)
        yield (
            f"{stage.stage} needs about {_size(needs.peak_host_bytes)} of memory, "
            f"{_size(machine.memory_bytes)} are available: {stage.memory_remedy}"
        )
    if machine.gpu_bytes and needs.peak_device_bytes > machine.gpu_bytes:
        stage = max(needs.stages, key=lambda needs: needs.device_bytes)
        yield (
            f"{stage.stage} needs about {_size(needs.peak_device_bytes)} of GPU memory, "
            f"{_size(machine.gpu_bytes)} are free: {stage.memory_remedy}, or use --device cpu"
        )
    if machine.disk_bytes is None:
        return
    reusable_bytes = _already_written(target) if machine.is_this_one and target is not None else 0
    if needs.scratch_bytes > machine.disk_bytes + reusable_bytes:
        yield _disk_problem(needs, target)


def _disk_problem(needs: Estimate, target: Path | None) -> str:
    assert needs.machine.disk_bytes is not None
    where = target or "the output"
    return (
        f"the run writes up to {_size(needs.scratch_bytes)} to the disk of {where}, which has "
        f"{_size(needs.machine.disk_bytes)} free: make room, or choose another output"
    )


def _already_written(target: Path) -> int:
    """Return the bytes of an unfinished run's work directory, which a continued run reuses or removes."""
    work = work_path(target)
    return sum(path.stat().st_size for path in work.rglob("*") if path.is_file()) if work.is_dir() else 0


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:,.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:,.0f} MiB"
