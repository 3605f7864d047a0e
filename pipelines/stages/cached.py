"""Run stages one after the other: each in a folder named by what its result depends on, timed, resumed."""

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
from ercsvd_deploy.pipelines.state.cache import FinishedWork
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
    """A stage ran out of memory; the message says what takes less."""


@dataclass
class StageCache:
    """The folders of a run's stages.

    Attributes:
        directory: The run's work directory.
        fingerprints: Stage -> what its result depends on.
        shared: Where folders are that several runs have in common, one run's at a time; None: in `directory`.
        notes: What of an earlier run was used or had to be made again.
    """

    directory: Path
    fingerprints: Mapping[str, Mapping[str, Any]]
    shared: Path | None = None
    notes: list[str] = field(default_factory=list)

    @contextmanager
    def open(self, stage: str) -> Iterator[FinishedWork]:
        """Give a stage's folder, with what an earlier run with the same fingerprint left in it."""
        fingerprint = self.fingerprints[stage]
        if self.shared is None:
            yield self._noted(FinishedWork(self.directory / stage, fingerprint))
            return
        folder = self._shared_folder(stage)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with exclusive(lock_of(folder), stage):
            yield self._noted(FinishedWork(folder, fingerprint))

    def peek(self, stage: str) -> FinishedWork:
        """Return a stage's folder to read from; nothing in it is removed or noted."""
        folder = self.directory / stage if self.shared is None else self._shared_folder(stage)
        return FinishedWork(folder, self.fingerprints[stage], is_reading=True)

    def discard(self, stage: str) -> None:
        """Remove the folder of a stage whose result nobody reads any more; a shared one serves other runs."""
        if self.shared is None:
            shutil.rmtree(self.directory / stage, ignore_errors=True)

    def _noted(self, finished: FinishedWork) -> FinishedWork:
        self.notes += finished.notes
        for note in finished.notes:
            logger.info(note)
        return finished

    def _shared_folder(self, stage: str) -> Path:
        assert self.shared is not None
        return self.shared / f"{stage}-{short_digest(self.fingerprints[stage])}"


@dataclass
class RunState:
    """How far a run is.

    Attributes:
        model: The model as the stages so far have left it.
        results: Stage -> result of those that have run.
        seconds: Stage -> how long it took in this run.
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
    """Run stages in order, as far as `cache` has not their results; `state` follows them."""
    for stage in stages:
        if stage.temporary_for is not None and cache.peek(stage.temporary_for).is_complete:
            continue
        started = time.monotonic()
        with _explained(stage), cache.open(stage.name) as folder:
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
        for other in stages:
            if other.temporary_for == stage.name and not other.is_kept:
                cache.discard(other.name)


@contextmanager
def _explained(stage: Stage) -> Iterator[None]:
    """Say of memory that runs out where it did, and what takes less."""
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
