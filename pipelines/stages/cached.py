"""Run stages one after the other, timed, with results cached in folders that fingerprints identify."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ercsvd_deploy.pipelines.stages.stage_run import CompressedModel, StageRun
from ercsvd_deploy.pipelines.state.cache import CacheFolder
from ercsvd_deploy.pipelines.state.fingerprint import short_digest
from ercsvd_deploy.pipelines.state.lock import exclusive
from ercsvd_deploy.pipelines.state.memory_errors import exhausted_memory, first_sentence
from ercsvd_deploy.pipelines.state.shared import lock_of

if TYPE_CHECKING:
    from ercsvd_deploy.pipelines.inputs.run_data import RunData
    from ercsvd_deploy.pipelines.stages.contract import Stage
    from ercsvd_deploy.pipelines.state.progress import ProgressReporter
    from ercsvd_deploy.recipe.sections import Recipe

logger = logging.getLogger(__name__)


class StageMemoryError(MemoryError):
    """A stage ran out of memory; the message names the settings that need less."""


@dataclass
class StageCache:
    """The folders of a run's stages.

    Attributes:
        directory: The run's work directory.
        fingerprints: Stage name -> its fingerprint.
        shared: Directory of folders that several runs share, one run at a time; None: in `directory`.
        notes: What was reused from an earlier run, and what had to be computed again.
    """

    directory: Path
    fingerprints: Mapping[str, Mapping[str, Any]]
    shared: Path | None = None
    notes: list[str] = field(default_factory=list)

    @contextmanager
    def open(self, stage: str) -> Iterator[CacheFolder]:
        """Open a stage's folder, with the cache entries of earlier runs with the same fingerprint."""
        fingerprint = self.fingerprints[stage]
        if self.shared is None:
            yield self._noted(CacheFolder(self.directory / stage, fingerprint))
            return
        folder = self._shared_folder(stage)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with exclusive(lock_of(folder), stage):
            yield self._noted(CacheFolder(folder, fingerprint))

    def peek(self, stage: str) -> CacheFolder:
        """Return a stage's folder for reading; nothing in it is removed, and no note is made."""
        folder = self.directory / stage if self.shared is None else self._shared_folder(stage)
        return CacheFolder(folder, self.fingerprints[stage], is_reading=True)

    def discard(self, stage: str) -> None:
        """Remove the folder of a stage whose result is no longer needed; a shared folder stays."""
        if self.shared is None:
            shutil.rmtree(self.directory / stage, ignore_errors=True)

    def _noted(self, finished: CacheFolder) -> CacheFolder:
        self.notes += finished.notes
        for note in finished.notes:
            logger.info(note)
        return finished

    def _shared_folder(self, stage: str) -> Path:
        assert self.shared is not None
        return self.shared / f"{stage}-{short_digest(self.fingerprints[stage])}"


@dataclass
class RunState:
    """The state of a run.

    Attributes:
        model: The model after the stages that have run.
        results: Stage name -> its result, for the stages that have run.
        seconds: Stage name -> seconds it took in this run.
    """

    model: CompressedModel
    results: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


def run_stages(
    stages: Sequence[Stage],
    recipe: Recipe,
    data: RunData,
    state: RunState,
    cache: StageCache,
    progress: ProgressReporter,
    write_report: Callable[[Path], None] = lambda _directory: None,
    is_forced: bool = False,
) -> None:
    """Run stages in order, reusing results in `cache`, and record them in `state`."""
    for stage in stages:
        if stage.temporary_for is not None and cache.peek(stage.temporary_for).is_complete:
            continue
        started = time.monotonic()
        with _memory_errors_explained(stage), cache.open(stage.name) as folder:
            state.results[stage.name] = stage.run(
                StageRun(
                    recipe=recipe,
                    data=data,
                    model=state.model,
                    results=state.results,
                    cache=folder,
                    cache_of=cache.peek,
                    progress=progress,
                    directory=cache.directory,
                    write_report=write_report,
                    is_forced=is_forced,
                )
            )
        state.seconds[stage.name] = round(time.monotonic() - started, 2)
        logger.info("%s: done in %.0f s", stage.title, state.seconds[stage.name])
        for earlier_stage in stages:
            if earlier_stage.temporary_for == stage.name and not earlier_stage.is_kept:
                cache.discard(earlier_stage.name)


@contextmanager
def _memory_errors_explained(stage: Stage) -> Iterator[None]:
    """Turn an out-of-memory error into one that names the stage and its remedy."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        kind = exhausted_memory(error)
        if kind is None:
            raise
        device = ", or use --device cpu" if kind == "GPU memory" else ""
        raise StageMemoryError(
            f"{stage.title} ran out of {kind} ({first_sentence(error)}): {stage.memory_remedy}{device}"
        ) from error
