"""The status of an output: finished, running or interrupted, and which stages have results."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ercsvd_deploy.exporters.vllm.directory.target import is_export
from ercsvd_deploy.pipelines.state.lock import is_in_use, work_path
from ercsvd_deploy.pipelines.state.shared import shared_stages


@dataclass(frozen=True)
class StageStatus:
    """Number and bytes of one stage's cache entries."""

    name: str
    pieces: int
    num_bytes: int


@dataclass(frozen=True)
class OutputStatus:
    """The status of an output.

    Attributes:
        output: The directory a recipe writes.
        finished: Whether a complete export is there.
        running: Whether a run is writing to it now.
        stages: The stages with cache entries, of an unfinished run or shared by runs.
        is_shared: Whether the directory holds stages' results that runs share.
    """

    output: str
    finished: bool
    running: bool
    stages: tuple[StageStatus, ...]
    is_shared: bool = False


def output_status(output: Path) -> OutputStatus:
    """Return the status of an output, or of a directory that runs share, without changing anything."""
    work = work_path(output.absolute())
    folders = [folder for folder in sorted(work.glob("*")) if folder.is_dir()] + shared_stages(output)
    stages = [_stage_status(folder) for folder in folders]
    return OutputStatus(
        output=str(output),
        finished=output.is_dir() and any(output.iterdir()) and is_export(output),
        running=is_in_use(output.absolute()),
        stages=tuple(stage for stage in stages if stage.pieces),
        is_shared=bool(shared_stages(output)),
    )


def _stage_status(folder: Path) -> StageStatus:
    return StageStatus(
        folder.name,
        len(list(folder.glob("*.entry.json"))),
        sum(path.stat().st_size for path in folder.iterdir() if path.is_file()),
    )
