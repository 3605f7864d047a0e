"""The inputs of a running stage: the model after the stages before it, the data, and the stage's folder."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ercsvd_deploy.format.files.store_views import OverlayStore
from ercsvd_deploy.format.files.tensor_store import FileStore, TensorStore
from ercsvd_deploy.format.schema import CheckpointConfig, Storage
from ercsvd_deploy.models.streaming.layerwise import LayerwiseModel
from ercsvd_deploy.pipelines.inputs.model import OpenedModel, stream
from ercsvd_deploy.pipelines.inputs.run_data import RunData
from ercsvd_deploy.pipelines.state.cache import CacheFolder
from ercsvd_deploy.pipelines.state.progress import ProgressReporter
from ercsvd_deploy.recipe.sections import Recipe

if TYPE_CHECKING:
    from ercsvd_deploy.data.samples import Sample


@dataclass
class CompressedModel:
    """The model after the stages that have run."""

    opened: OpenedModel
    device: torch.device
    original: LayerwiseModel
    modules: dict[str, Storage] = field(default_factory=dict)
    store: TensorStore = field(init=False)

    def __post_init__(self) -> None:
        """Start from the original weights."""
        self.store = self.original.store

    def overlay(self, files: Iterable[Path], described: Mapping[str, Storage]) -> None:
        """Replace the tensors of the modules that a stage has changed."""
        self.store = OverlayStore(self.store, FileStore(files), described)
        self.modules |= described

    def stream(self, dtype: torch.dtype | None = None) -> LayerwiseModel:
        """Return the model ready to run layer by layer.

        Args:
            dtype: Of weights and computation; default that of the original's.
        """
        if not self.modules and dtype in (None, self.original.dtype):
            return self.original
        config = copy.deepcopy(self.opened.config)
        if self.modules:
            config.quantization_config = CheckpointConfig(modules=self.modules).write()
        return stream(
            replace(self.opened, config=config),
            self.device,
            self.store,
            token_weight=self.original.token_weight,
            described=self.original.architecture,
            dtype=dtype,
        )


@dataclass(frozen=True)
class StageRun:
    """Everything that a stage receives when it runs.

    Attributes:
        recipe: The recipe.
        data: Calibration samples, held-out texts and questions.
        model: The model after the stages before; a stage that changes it overlays its tensors.
        results: Stage name -> its result, for the stages that have run.
        cache: The stage's folder with cache entries of this run and of earlier ones.
        cache_of: Returns the folder of an earlier stage whose result stays on disk.
        progress: Receives the steps of long work.
        directory: The run's work directory, on the output's disk.
        write_report: Writes the report so far, its page and its card into a directory.
        is_forced: Whether the export replaces files that somebody has changed in an earlier export.
    """

    recipe: Recipe
    data: RunData
    model: CompressedModel
    results: Mapping[str, Any]
    cache: CacheFolder
    cache_of: Callable[[str], CacheFolder]
    progress: ProgressReporter
    directory: Path
    write_report: Callable[[Path], None]
    is_forced: bool = False

    @property
    def samples(self) -> Sequence[Sample]:
        """The calibration samples, which the recipe's schema requires wherever a stage needs them."""
        assert self.data.samples is not None, "the schema asks for calibration where a stage needs it"
        return self.data.samples
