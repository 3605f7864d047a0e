"""The result of the damages stage, from which ranks and bits are chosen."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ercsvd_deploy.pipelines.stages.factorize.linear import Spectrum
from ercsvd_deploy.pipelines.state.cache import CacheFolder

if TYPE_CHECKING:
    from ercsvd_deploy.format.schema import Storage

Offer = Mapping[str, Collection["Storage"]]  # matrix -> storages on offer
MeasuredDamages = dict[str, list[float]]  # matrix -> nats per token, in the order of its offer


@dataclass(frozen=True)
class Damages:
    """The damage of every storage on offer.

    Attributes:
        by_matrix: Linear, embedding or output layer -> damage of each of its storages on offer.
        spectra: Decomposed Linear -> its spectrum.
        folder: The stage's folder, with the decompositions.
    """

    by_matrix: MeasuredDamages
    spectra: Mapping[str, Spectrum]
    folder: CacheFolder
