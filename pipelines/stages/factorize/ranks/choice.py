"""The interface of the ways to choose ranks, and their decision."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

from ercsvd_deploy.pipelines.stages.factorize.linear import FactorizedLinear, Spectrum
from ercsvd_deploy.pipelines.stages.factorize.ranks.chosen import ChosenRanks


@dataclass(frozen=True)
class RankDecision:
    """The decision from which the factors are written.

    Attributes:
        chosen: The chosen ranks.
        residual_ranks: Linear -> the residual's part of its rank; None without a residual.
        measured: Linear -> its report entry, if a search has measured it already.
        spectra: Decomposed Linear -> its spectrum.
    """

    chosen: ChosenRanks
    residual_ranks: Mapping[str, int | None]
    measured: Mapping[str, FactorizedLinear]
    spectra: Mapping[str, Spectrum]


class RankChoice(ABC):
    """A way to choose ranks."""

    @abstractmethod
    def choose(self) -> RankDecision:
        """Choose ranks; afterwards the decomposition of every Linear that gets a rank is on disk."""
