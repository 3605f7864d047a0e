"""What stages work on: the model as the stages before have left it, the data, and a folder."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ercsvd_deploy.format.schema import CheckpointConfig, Storage
from ercsvd_deploy.format.store_views import OverlayStore
from ercsvd_deploy.format.tensor_store import FileStore, TensorStore
from ercsvd_deploy.models.streaming import LayerwiseModel
from ercsvd_deploy.pipelines.inputs.model import OpenedModel, stream
from ercsvd_deploy.pipelines.inputs.run_data import RunData
from ercsvd_deploy.pipelines.state.cache import FinishedWork
from ercsvd_deploy.pipelines.state.progress import ProgressReporter
from ercsvd_deploy.recipe.sections import Recipe

if TYPE_CHECKING:
    from ercsvd_deploy.data.samples import Sample


@dataclass
class CompressedModel:
    """The model as the stages so far have left it."""

    opened: OpenedModel
    device: torch.device
    original: LayerwiseModel
    modules: dict[str, Storage] = field(default_factory=dict)
    store: TensorStore = field(init=False)

    def __post_init__(self) -> None:
        """Start from the original weights."""
        self.store = self.original.store

    def overlay(self, files: Iterable[Path], described: Mapping[str, Storage]) -> None:
        """Put a stage's tensors in the place of the modules that it describes."""
        self.store = OverlayStore(self.store, FileStore(files), described)
        self.modules |= described

    def stream(self) -> LayerwiseModel:
        """Return the model ready to run layer by layer."""
        if not self.modules:
            return self.original
        config = copy.deepcopy(self.opened.config)
        config.quantization_config = CheckpointConfig(modules=self.modules).write()
        return stream(
            replace(self.opened, config=config),
            self.device,
            self.store,
            token_weight=self.original.token_weight,
            described=self.original.architecture,
        )


@dataclass(frozen=True)
class StageRun:
    """Everything a stage is given when it runs.

    Attributes:
        recipe: The recipe.
        data: Calibration samples, held-out texts and questions.
        model: The model as the stages before have left it; a stage that changes it overlays its tensors.
        results: Name of a stage that has run -> its result.
        cache: The stage's folder: pieces of its result, finished by this run or an earlier one.
        cache_of: Gives the folder of a stage before, whose result stays on disk.
        progress: Told about long work.
        directory: The run's work directory, on the output's disk.
        write_report: Writes report, page and card, as far as they are known, into a directory.
        is_forced: Whether an export replaces what somebody has changed in an earlier one.
    """

    recipe: Recipe
    data: RunData
    model: CompressedModel
    results: Mapping[str, Any]
    cache: FinishedWork
    cache_of: Callable[[str], FinishedWork]
    progress: ProgressReporter
    directory: Path
    write_report: Callable[[Path], None]
    is_forced: bool = False

    @property
    def samples(self) -> Sequence[Sample]:
        """The calibration samples; the schema asks for them where a stage needs them."""
        assert self.data.samples is not None, "the schema asks for calibration where a stage needs it"
        return self.data.samples
