"""The memory and disk that a sweep needs, how many points fit side by side, and what this machine lacks."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ercsvd_deploy.pipelines.planning.feasibility import TooLittleDiskError
from ercsvd_deploy.pipelines.planning.machine import available_memory, free_disk
from ercsvd_deploy.pipelines.planning.plan import Plan, make_plan

if TYPE_CHECKING:
    from ercsvd_deploy.pipelines.sweeping.file import Point

_CERTAINLY = 0.85  # of an estimate: measured ones are within 15 %


@dataclass(frozen=True)
class SweepNeeds:
    """What a sweep needs, in bytes.

    Attributes:
        peak_host_bytes: Peak memory of the largest point's process.
        scratch_bytes: Disk for all points' stages, if no stage were shared; an upper bound.
        least_scratch_bytes: Disk for the stages of the largest point; a lower bound.
    """

    peak_host_bytes: int
    scratch_bytes: int
    least_scratch_bytes: int


def plan_points(
    points: Sequence[Point], device: torch.device | None
) -> tuple[dict[str, Plan], dict[str, str]]:
    """Plan every point; a recipe that cannot work fails only its own point.

    Returns:
        Point name -> plan, and point name -> why it has no plan.
    """
    plans, failures = {}, {}
    for point in points:
        try:
            plans[point.name] = make_plan(point.recipe.without_export(), device=device)
        except Exception as error:  # noqa: BLE001 - many points survive any one of them
            failures[point.name] = str(error) or type(error).__name__
    return plans, failures


def sweep_needs(plans: Mapping[str, Plan]) -> SweepNeeds:
    """Return the needs of all points of a sweep together."""
    scratch = [
        max((stage.shared_bytes for stage in plan.estimate.stages if stage.stage != "export"), default=0)
        for plan in plans.values()
    ]
    peak = max((plan.estimate.peak_host_bytes for plan in plans.values()), default=0)
    return SweepNeeds(peak, sum(scratch), max(scratch, default=0))


def affordable_jobs(needs: SweepNeeds, num_points: int, device: torch.device) -> int:
    """Return the number of points that can run in parallel, limited by cores and memory; 1 on a GPU."""
    available = available_memory()
    if device.type == "cuda" or available is None:
        return 1
    return max(
        1,
        min(len(os.sched_getaffinity(0)), int(available // max(1, needs.peak_host_bytes)), num_points),
    )


def check_needs(needs: SweepNeeds, output: Path, jobs: int, reusable_bytes: int = 0) -> list[str]:
    """Return a warning for each resource that this machine seems to lack for a sweep.

    Args:
        needs: The needs of the sweep, see `sweep_needs`.
        output: The sweep's output.
        jobs: Points at a time.
        reusable_bytes: Bytes on disk from an earlier sweep, which this one reuses.

    Raises:
        TooLittleDiskError: not even one point's stages surely fit.
    """
    free = free_disk(output) + reusable_bytes
    if _CERTAINLY * needs.least_scratch_bytes > free:
        raise TooLittleDiskError(
            f"a point of the sweep writes up to {_size(needs.least_scratch_bytes)} to the disk of {output}, "
            f"which has {_size(free)} free: make room, or choose another output; nothing has "
            "been computed yet"
        )
    warnings = []
    if needs.scratch_bytes > free:
        warnings.append(
            f"the sweep writes up to {_size(needs.scratch_bytes)} to the disk of {output}, less what points "
            f"share, and {_size(free)} are free: points that find it full fail; run the command again then"
        )
    available = available_memory()
    if available is not None and jobs * needs.peak_host_bytes > available:
        warnings.append(
            f"{jobs} points at a time need about {_size(jobs * needs.peak_host_bytes)} of memory, "
            f"{_size(available)} are available: lower --jobs, or calibration.num_samples"
        )
    return warnings


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:,.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:,.0f} MiB"
