"""What does a run need, and what of that is lacking on this machine, or another?

Estimates are of one machine and one device; `plan` carries them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ercsvd_deploy.exporters.vllm.target import ExportError, check_target
from ercsvd_deploy.pipelines.planning.machine import Machine, look_around
from ercsvd_deploy.pipelines.planning.needs import PlannedStage, StageNeeds, add_up_needs
from ercsvd_deploy.pipelines.state.lock import work_path

if TYPE_CHECKING:
    from ercsvd_deploy.pipelines.stages.workload import Workload

_CERTAINLY = 0.75  # of an estimate: measured ones are within 25 %


class TooLittleDiskError(ValueError):
    """The output's disk cannot hold what the run writes."""


@dataclass(frozen=True)
class Estimate:
    """What a run needs, and whether it is there.

    Attributes:
        device: Where layers run, "cpu" or "cuda".
        stages: In the order in which they run.
        peak_host_bytes: Highest resident memory of the process.
        peak_device_bytes: Highest GPU memory; 0 without one.
        scratch_bytes: Highest size of the work directory beside the output, unfinished export included.
        least_scratch_bytes: The same if the search takes the candidate with the smallest files.
        flops: Floating-point operations of all stages, at least.
        least_seconds: What these take at the machine's peak: a lower bound; None where no peak is known.
        final_bytes: Of the finished export's tensors, of the largest candidate.
        machine: What there is: here, or on the machine asked about.
        problems: Why the run cannot work on any machine, one line each.
        shortages: What the machine lacks, one line each.
        assumptions: What the estimate takes for granted.
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
        work: What there is to compute.
        planned: The stages.
        final_bytes: Bytes of every candidate's export.
        device: Where layers run.
        machine: The machine asked about; None for this one.
    """
    largest = max(final_bytes)
    on_gpu = device.type == "cuda"
    stages = add_up_needs(planned, work, on_gpu=on_gpu)
    of_candidates = [
        add_up_needs([each.only(index) for each in planned], work, on_gpu=on_gpu)
        for index in range(len(final_bytes))
    ]
    target = work.recipe.export.path
    target = None if target is None else target.absolute()
    machine = machine or look_around(device, target)
    found = Estimate(
        device=device.type,
        stages=stages,
        peak_host_bytes=max(stage.host_bytes for stage in stages),
        peak_device_bytes=max(stage.device_bytes for stage in stages),
        scratch_bytes=max(stage.scratch_bytes for stage in stages),
        least_scratch_bytes=min(max(each.scratch_bytes for each in one) for one in of_candidates),
        final_bytes=largest,
        flops=sum(stage.flops for stage in stages),
        least_seconds=None,
        machine=machine,
        problems=tuple(_target_problems(work, target)),
        shortages=(),
        assumptions=work.assumptions,
    )
    return on_machine(replace(found, shortages=tuple(_shortages(found, target))), machine)


def on_machine(needs: Estimate, machine: Machine) -> Estimate:
    """Return an estimate with the time that a machine's peak allows, if the machine has one."""
    seconds = needs.flops / machine.flops if machine.flops else None
    return replace(needs, machine=machine, least_seconds=seconds)


def check_resources(needs: Estimate, output: Path | None) -> list[str]:
    """Return a warning for every resource that this machine seems to lack for a planned run.

    Args:
        needs: What the run needs.
        output: Where it writes; None: nowhere.

    Raises:
        TooLittleDiskError: the disk surely does not suffice: not even for 75 % of what is to be written.
    """
    free = needs.machine.disk_bytes
    if free is not None and output is not None:
        missing = _CERTAINLY * needs.least_scratch_bytes - _already_written(output) - free
        if missing > 0:
            raise TooLittleDiskError(f"{_disk_problem(needs, output)}; nothing has been computed yet")
    return [f"{needs.machine.name} may not suffice: {shortage}" for shortage in needs.shortages]


def _target_problems(work: Workload, target: Path | None) -> list[str]:
    """Say why nothing may be written where the recipe says."""
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
        stage = max(needs.stages, key=lambda each: each.host_bytes)
        yield (
            f"{stage.stage} needs about {_size(needs.peak_host_bytes)} of memory, "
            f"{_size(machine.memory_bytes)} are available: {stage.memory_remedy}"
        )
    if machine.gpu_bytes and needs.peak_device_bytes > machine.gpu_bytes:
        stage = max(needs.stages, key=lambda each: each.device_bytes)
        yield (
            f"{stage.stage} needs about {_size(needs.peak_device_bytes)} of GPU memory, "
            f"{_size(machine.gpu_bytes)} are free: {stage.memory_remedy}, or use --device cpu"
        )
    if machine.disk_bytes is None:
        return
    written = _already_written(target) if machine.is_this_one and target is not None else 0
    if needs.scratch_bytes > machine.disk_bytes + written:
        yield _disk_problem(needs, target)


def _disk_problem(needs: Estimate, target: Path | None) -> str:
    assert needs.machine.disk_bytes is not None
    where = target or "the output"
    return (
        f"the run writes up to {_size(needs.scratch_bytes)} to the disk of {where}, which has "
        f"{_size(needs.machine.disk_bytes)} free: make room, or choose another output"
    )


def _already_written(target: Path) -> int:
    """Return the bytes that an unfinished run has left, which a continued one uses or removes."""
    work = work_path(target)
    return sum(path.stat().st_size for path in work.rglob("*") if path.is_file()) if work.is_dir() else 0


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:,.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:,.0f} MiB"
