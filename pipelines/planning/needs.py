"""The needs of a run, stage by stage: those that each stage declares, the process, and files kept on disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ercsvd_deploy.pipelines.stages.contract import Candidate, Stage

if TYPE_CHECKING:
    from ercsvd_deploy.pipelines.stages.workload import Workload

_MIB = 2**20
# Resident memory of a run that has imported its libraries and computed something small, without and with a
# CUDA context, tokenizing a text included; measured on x86-64 with torch 2.13 and transformers 5.19.
_PROCESS, _CUDA_PROCESS = 700 * _MIB, 2500 * _MIB
_CUDA_CONTEXT = 600 * _MIB  # of GPU memory, cuBLAS and cuSOLVER workspaces included
_ALLOCATED = 1.2  # resident memory relative to live tensors, because not all freed blocks are returned


@dataclass(frozen=True)
class PlannedStage:
    """A stage of a plan, with the candidates after it."""

    stage: Stage
    candidates: Sequence[Candidate]

    def only(self, index: int) -> PlannedStage:
        """Return the stage for one of the final candidates."""
        return PlannedStage(self.stage, self.candidates[index : index + 1] or self.candidates)


@dataclass(frozen=True)
class StageNeeds:
    """Peak needs of one stage.

    Attributes:
        stage: The stage's name, as in the report's `seconds`.
        host_bytes: Resident memory of the process, including imported libraries.
        device_bytes: GPU memory; 0 if layers run on the CPU.
        scratch_bytes: Size of the work directory beside the output.
        shared_bytes: Size of it where runs share stages: what only one later stage reads is not removed then.
        flops: Lower bound of the floating-point operations.
        memory_remedy: The settings that lower its memory.
    """

    stage: str
    host_bytes: int
    device_bytes: int
    scratch_bytes: int
    shared_bytes: int
    flops: float
    memory_remedy: str


def add_up_needs(planned: Sequence[PlannedStage], work: Workload, *, on_gpu: bool) -> tuple[StageNeeds, ...]:
    """Return the needs of every stage of a recipe, in the order in which they run.

    Args:
        planned: The stages.
        work: The amount of work.
        on_gpu: Whether layers run on a GPU.
    """
    kept_bytes: dict[str, int] = {}  # stage -> bytes that it keeps in the work directory
    left = 0  # by all stages so far
    all_needs = []
    for planned_stage in planned:
        stage, needs = planned_stage.stage, planned_stage.stage.needs(work, planned_stage.candidates)
        scratch = sum(kept_bytes.values()) + needs.scratch_bytes
        if on_gpu:
            host, device = _CUDA_PROCESS + needs.beside_bytes, _CUDA_CONTEXT + needs.working_bytes
        else:
            host, device = _PROCESS + int(_ALLOCATED * max(needs.working_bytes, needs.beside_bytes)), 0
        of_stage = StageNeeds(
            stage.name,
            work.pixels + host,
            device,
            scratch,
            left + needs.scratch_bytes,
            needs.flops,
            stage.memory_remedy,
        )
        all_needs.append(of_stage)
        kept_bytes[stage.name] = needs.kept_bytes
        left += needs.kept_bytes
        for earlier in planned:
            if earlier.stage.temporary_for == stage.name and not earlier.stage.is_kept:
                kept_bytes.pop(earlier.stage.name, None)
    return tuple(all_needs)
