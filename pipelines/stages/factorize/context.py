"""The shared context of all steps of the factorize stage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ercsvd_deploy.data.samples import Sample
from ercsvd_deploy.format.schema import WEIGHT
from ercsvd_deploy.models.streaming.layerwise import LayerwiseModel
from ercsvd_deploy.pipelines.stages.sensitivity.measure import Sensitivity
from ercsvd_deploy.pipelines.stages.sensitivity.tokens import TokenSensitivity
from ercsvd_deploy.pipelines.stages.storage_rules import StorageRules
from ercsvd_deploy.pipelines.state.cache import CacheFolder
from ercsvd_deploy.recipe.stages import Factorize

if TYPE_CHECKING:
    from ercsvd_deploy.budget.ranks import LinearShape
    from ercsvd_deploy.models.description.architecture import LayerLinears


@dataclass(frozen=True)
class Factorization:
    """The context of one run of the stage.

    Attributes:
        model: The original model.
        samples: Calibration sequences; None for a data-free method.
        settings: The recipe's stage.
        cache: The stage's folder: finished pieces, which are not computed again.
        sensitivity: Fisher information of the Linears' outputs; None if it is not used.
        token_sensitivity: Measured token weights; None if they were not measured.
        on_layer: Called after every decoder layer of a pass.
        decomposed_in: Folder of the stage that has left the decompositions; None: it is this one.
    """

    model: LayerwiseModel
    samples: Sequence[Sample] | None
    settings: Factorize
    cache: CacheFolder
    sensitivity: Sensitivity | None = None
    token_sensitivity: TokenSensitivity | None = None
    on_layer: Callable[[], None] = lambda: None
    decomposed_in: CacheFolder | None = None

    @property
    def rules(self) -> StorageRules:
        """The storage rules of Linears with a rank, before quantization."""
        return StorageRules(self.model.architecture, self.settings.layout)

    def metric(self, layer: LayerLinears, linear: LinearShape) -> torch.Tensor | None:
        """Return the Fisher information [out, out] of a Linear's outputs; None if it was not measured."""
        if self.sensitivity is None:
            return None
        return self.sensitivity.metric(layer, linear, self.model.device)

    def stored_dtype(self, linear: LinearShape) -> torch.dtype:
        """Return the dtype in which a Linear's weight, and so its factors, are stored."""
        return self.model.stored_dtype(f"{linear.name}.{WEIGHT}")


def factors_piece(layer: int) -> str:
    """Return the name of the piece that holds the factors of a layer."""
    return f"layer-{layer:05d}"
