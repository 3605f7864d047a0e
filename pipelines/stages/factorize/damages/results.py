"""What the damages stage has measured, for the choice of ranks and bits."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ercsvd_deploy.pipelines.stages.factorize.linear import Spectrum
from ercsvd_deploy.pipelines.state.cache import CacheFolder

if TYPE_CHECKING:
    from ercsvd_deploy.format.schema import Storage

Offer = Mapping[str, Collection["Storage"]]  # matrix -> the ways to store it
MeasuredDamages = dict[str, list[float]]  # matrix -> nats per token, in the order of its offer


@dataclass(frozen=True)
class Damages:
    """What storing each matrix in each way would cost the model.

    Attributes:
        by_matrix: Linear, embedding or output layer -> damage of every way to store it.
        spectra: Linear that was decomposed -> its spectrum.
        folder: Where its decompositions are.
    """

    by_matrix: MeasuredDamages
    spectra: Mapping[str, Spectrum]
    folder: CacheFolder
