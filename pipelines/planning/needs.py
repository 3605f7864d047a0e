"""What a run needs, stage by stage: what each declares, the process itself, and what is left on disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ercsvd_deploy.pipelines.stages.contract import Candidate, Stage

if TYPE_CHECKING:
    from ercsvd_deploy.pipelines.stages.workload import Workload

_MIB = 2**20
# Resident memory of a run that has imported its libraries and computed something small, without and with a
# CUDA context; measured on x86-64 with torch 2.13 and transformers 5.19. Tokenizing a text is in it.
_PROCESS, _CUDA_PROCESS = 700 * _MIB, 2500 * _MIB
_CUDA_CONTEXT = 600 * _MIB  # of GPU memory, cuBLAS and cuSOLVER workspaces included
_ALLOCATED = 1.2  # memory that a process has by tensors that are alive: freed blocks are not all given back


@dataclass(frozen=True)
class PlannedStage:
    """A stage of a plan, and how the model may be stored behind it."""

    stage: Stage
    candidates: Sequence[Candidate]

    def only(self, index: int) -> PlannedStage:
        """Return the stage for one of the candidates that the run ends with."""
        return PlannedStage(self.stage, self.candidates[index : index + 1] or self.candidates)


@dataclass(frozen=True)
class StageNeeds:
    """What one stage needs at its highest.

    Attributes:
        stage: Its name, as in the report's `seconds`.
        host_bytes: Resident memory of the process, imported libraries included.
        device_bytes: GPU memory; 0 where layers run on the CPU.
        scratch_bytes: Size of the work directory beside the output.
        shared_bytes: Size of it where runs share stages: what only one later stage reads is not removed then.
        flops: Floating-point operations, at least.
        memory_remedy: What lowers its needs of memory.
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
        work: What there is to compute.
        on_gpu: Whether layers run on a GPU.
    """
    kept: dict[str, int] = {}  # stage -> what it has left in the work directory
    left = 0  # by all stages so far
    found = []
    for each in planned:
        stage, needs = each.stage, each.stage.needs(work, each.candidates)
        scratch = sum(kept.values()) + needs.scratch_bytes
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
        found.append(of_stage)
        kept[stage.name] = needs.kept_bytes
        left += needs.kept_bytes
        for other in planned:
            if other.stage.temporary_for == stage.name and not other.stage.is_kept:
                kept.pop(other.stage.name, None)
    return tuple(found)
