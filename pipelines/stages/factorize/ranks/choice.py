"""What a way to choose ranks is, and what it decides."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

from ercsvd_deploy.pipelines.stages.factorize.linear import FactorizedLinear, Spectrum
from ercsvd_deploy.pipelines.stages.factorize.ranks.chosen import ChosenRanks


@dataclass(frozen=True)
class RankDecision:
    """What is needed to write the factors.

    Attributes:
        chosen: The ranks.
        residual_ranks: Linear -> what of its rank belongs to the residual; None: it has none.
        measured: Linear -> what it loses, where a search has measured that already.
        spectra: Linear that was decomposed -> its spectrum.
    """

    chosen: ChosenRanks
    residual_ranks: Mapping[str, int | None]
    measured: Mapping[str, FactorizedLinear]
    spectra: Mapping[str, Spectrum]


class RankChoice(ABC):
    """A way to choose ranks."""

    @abstractmethod
    def choose(self) -> RankDecision:
        """Decide; afterwards the decomposition of every Linear that gets a rank is on disk."""
