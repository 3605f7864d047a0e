"""The damage of each storage of a Linear, in nats per token: tr(F E G E^T) / 2.

E is the storage's error, F the Fisher information of the Linear's outputs and G the mean of x x^T over its
inputs (`sensitivity`). The damage of a rank follows from the spectrum alone. The damage that quantization
adds is measured, with the quantize stage's own code, and for most storages interpolated (`probing`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import torch
from torch import nn

from ercsvd_deploy.budget.ranks import LinearShape
from ercsvd_deploy.format.schema import Storage
from ercsvd_deploy.linalg.decomposition import Decomposition
from ercsvd_deploy.linalg.errors import output_error
from ercsvd_deploy.linalg.pivoting import PivotedFactors, to_pivoted
from ercsvd_deploy.linalg.truncation import Factors
from ercsvd_deploy.pipelines.stages.factorize.damages.probing import (
    by_correction,
    fitted_corrections,
    interpolate,
    spread,
)
from ercsvd_deploy.pipelines.stages.factorize.decompositions.kept import read_decomposed
from ercsvd_deploy.pipelines.stages.factorize.linear import (
    linear_of,
    planned_residual_rank,
    truncate_linear,
)
from ercsvd_deploy.pipelines.stages.quantize.corrected import correction_task
from ercsvd_deploy.pipelines.stages.quantize.pair import (
    dequantized_product,
    quantization_settings,
    start_pair,
)
from ercsvd_deploy.quantization.correction import quantize_corrected
from ercsvd_deploy.quantization.gptq import SharedFactors, quantize_together
from ercsvd_deploy.quantization.gptq_loop import HessianFactor, factor_hessian
from ercsvd_deploy.quantization.grid import put_on_grid
from ercsvd_deploy.quantization.held_out import DEFAULT_DAMPING
from ercsvd_deploy.quantization.pairs import FactorsTask
from ercsvd_deploy.quantization.pivoted import PivotedTask
from ercsvd_deploy.recipe.quantize import Quantize
from ercsvd_deploy.recipe.stages import Factorize

if TYPE_CHECKING:
    from ercsvd_deploy.models.description.architecture import LayerLinears
    from ercsvd_deploy.pipelines.stages.factorize.context import Factorization

_PROBED_RANKS = 3  # at which the damage of quantizing factors is measured


@dataclass(frozen=True)
class _Probe:
    """A factorized storage whose quantization is measured."""

    storage: Storage
    pair: Factors | PivotedFactors
    task: FactorsTask | PivotedTask


@dataclass(frozen=True)
class DamagePrediction:
    """The inputs from which the damages of one Linear are predicted.

    Attributes:
        linear: The Linear.
        settings: The factorize stage.
        quantize: The quantize stage that follows, if its damage counts.
        weight: [out, in].
        gram: Mean of x x^T over its inputs, [in, in].
        metric: Fisher information of its outputs, [out, out].
        decomposition: Decomposition up to the highest rank on offer; None if no rank is.
        scale_dtype: Dtype in which scales of integers are stored.
    """

    linear: LinearShape
    settings: Factorize
    quantize: Quantize | None
    weight: torch.Tensor
    gram: torch.Tensor
    metric: torch.Tensor
    decomposition: Decomposition | None
    scale_dtype: torch.dtype

    @classmethod
    def of(
        cls,
        work: Factorization,
        quantize: Quantize | None,
        layer: LayerLinears,
        linear: LinearShape,
        module: nn.Module,
    ) -> Self:
        """Return the prediction for a Linear of a loaded layer, from its stored decomposition."""
        decomposed, metric = read_decomposed(work, layer, linear), work.metric(layer, linear)
        assert decomposed.gram is not None
        assert metric is not None, "error control measures sensitivities"
        return cls(
            linear,
            work.settings,
            quantize,
            linear_of(module, layer, linear).weight.data,
            decomposed.gram,
            metric,
            decomposed.decomposition,
            work.stored_dtype(linear),
        )

    def hessian_factor(self) -> HessianFactor | None:
        """Return the Hessian factor for GPTQ, shared by all options of all Linears with these inputs."""
        if self.quantize is None:
            return None
        damping = DEFAULT_DAMPING if self.quantize.damping == "auto" else self.quantize.damping
        return factor_hessian(self.gram, damping=damping, desc_act=self.quantize.desc_act)

    def damages(self, storages: Collection[Storage], factor: HessianFactor | None) -> dict[Storage, float]:
        """Return storage -> damage; `factor` is `hessian_factor` of these inputs."""
        of_ranks = self._truncation_damages()
        added = self._quantization_damages(storages, of_ranks, factor)
        added |= self._correction_damages(storages, added, factor)
        return {
            storage: (0.0 if storage.truncated_rank is None else of_ranks[storage.truncated_rank])
            + added.get(storage, 0.0)
            for storage in storages
        }

    def _correction_damages(
        self, storages: Collection[Storage], added: Mapping[Storage, float], factor: HessianFactor | None
    ) -> dict[Storage, float]:
        """Return storage -> damage of integers with corrections, given those of all other integers."""
        fitted = self._fit_corrections(fitted_corrections(storages), factor)
        if not fitted:
            return {}
        plain = {storage.weight: damage for storage, damage in added.items() if storage.layout == "dense"}
        damages = dict(fitted)
        for by_integers in by_correction(storages):
            shares: dict[int, float] = {
                integers.bits: fitted[storage] / plain[integers] if plain[integers] else 0.0
                for integers, storage in by_integers.items()
                if storage in fitted and integers in plain
            }
            damages |= {
                storage: plain[integers] * interpolate(shares, integers.bits)
                for integers, storage in by_integers.items()
                if storage not in fitted
            }
        return damages

    def _fit_corrections(
        self, corrected: Sequence[Storage], factor: HessianFactor | None
    ) -> dict[Storage, float]:
        """Return storage -> damage of integers with corrections, fitted as the quantize stage fits them."""
        if self.quantize is None or not corrected:
            return {}
        tasks = [
            correction_task(self.quantize, storage, self.weight, self.scale_dtype, output_metric=self.metric)
            for storage in corrected
        ]
        fitted = quantize_corrected(tasks, self.gram, factor=factor, method=self.quantize.method)
        return {
            storage: self._damage(weight.dequantize())
            for storage, weight in zip(corrected, fitted, strict=True)
        }

    def _damage(self, approximation: torch.Tensor) -> float:
        """Return the predicted increase of the KL divergence, in nats per token."""
        return output_error(self.weight, approximation, self.gram, self.metric) / 2

    def _truncation_damages(self) -> dict[int, float]:
        """Return rank -> damage of the truncation, from one exact value and the spectrum.

        Directions are orthogonal in the inputs' metric, so that damages of dropping them add up: direction i
        with basis vector b_i and singular value s_i costs s_i^2 b_i^T F b_i / 2.
        """
        decomposition = self.decomposition
        if decomposition is None:
            return {}
        least = self._damage(self._truncate(decomposition.max_rank).product())
        metric = self.metric.to(decomposition.basis)
        sensitivities = ((metric @ decomposition.basis) * decomposition.basis).sum(0)
        dropped = decomposition.singular_values[: decomposition.max_rank].square() * sensitivities / 2
        tails = (dropped.flip(0).cumsum(0).flip(0) + least).tolist()
        return {
            rank: tails[rank] if rank < decomposition.max_rank else least
            for rank in range(1, decomposition.max_rank + 1)
        }

    def _truncate(self, rank: int) -> Factors:
        residual_rank = planned_residual_rank(self.settings, self.linear, rank)
        assert self.decomposition is not None, "a rank is on offer"
        return truncate_linear(
            self.settings, self.decomposition, self.weight, rank, residual_rank, exact=False
        )

    def _quantization_damages(
        self, storages: Collection[Storage], of_ranks: Mapping[int, float], factor: HessianFactor | None
    ) -> dict[Storage, float]:
        """Return storage -> damage that quantization adds; empty if it does not count."""
        if self.quantize is None:
            return {}
        dense = {
            storage: storage.weight
            for storage in storages
            if storage.layout == "dense" and storage.weight is not None
        }
        by_bits: dict[tuple[int, ...], dict[int, Storage]] = {}  # of the two matrices -> rank -> storage
        for storage in storages:
            if storage.truncated_rank is not None and storage.is_quantized:
                bits = tuple(integers.bits for _, integers in storage.parts.values() if integers is not None)
                by_bits.setdefault(bits, {})[storage.truncated_rank] = storage
        probed = [
            by_rank[rank] for by_rank in by_bits.values() for rank in spread(list(by_rank), _PROBED_RANKS)
        ]
        pairs: dict[tuple[int | None, int | None], Factors | PivotedFactors] = {}  # one for all bits
        for storage in probed:
            key = (storage.rank, storage.pivot_blocks)
            if key not in pairs:
                pairs[key] = self._truncated_pair(storage)
        probes = [
            self._start_probe(self.quantize, storage, pairs[storage.rank, storage.pivot_blocks])
            for storage in probed
        ]
        matrices = [
            put_on_grid(self.weight, quantization_settings(self.quantize, integers), self.scale_dtype)
            for integers in dense.values()
        ]
        matrices += [probe.task.first for probe in probes]
        if not matrices:
            return {}
        quantized = quantize_together(
            matrices, self.gram, factors=SharedFactors(factor), method=self.quantize.method
        )
        added = {
            storage: self._damage(weight.dequantize())
            for storage, (weight, _) in zip(dense, quantized[: len(dense)], strict=True)
        }
        measured: dict[Storage, float] = {}
        for probe, (first, report) in zip(probes, quantized[len(dense) :], strict=True):
            product = dequantized_product(probe.task.finish(first, report, self.gram), probe.pair)
            assert probe.storage.rank is not None
            measured[probe.storage] = max(0.0, self._damage(product) - of_ranks[probe.storage.rank])
        for by_rank in by_bits.values():
            by_probed_rank = {
                rank: measured[storage] for rank, storage in by_rank.items() if storage in measured
            }
            added |= {storage: interpolate(by_probed_rank, rank) for rank, storage in by_rank.items()}
        return added

    def _truncated_pair(self, storage: Storage) -> Factors | PivotedFactors:
        """Return the unquantized matrices of a storage's rank and layout."""
        assert storage.rank is not None
        factors = self._truncate(storage.rank)
        return factors if storage.pivot_blocks is None else to_pivoted(factors, storage.pivot_blocks)

    def _start_probe(self, quantize: Quantize, storage: Storage, pair: Factors | PivotedFactors) -> _Probe:
        """Return a probe: a pair of matrices whose first one is on its grid."""
        first, second = (integers for _, integers in storage.parts.values())
        assert first is not None
        assert second is not None
        task = start_pair(quantize, self.weight, pair, (first, second), self.scale_dtype)
        return _Probe(storage, pair, task)
