"""The integers a matrix is stored as: grids of scales and zero points, and rounding to nearest.

A group of `group_size` consecutive input columns of one row shares a scale (and a zero point, if asymmetric).
Scales are rounded to the checkpoint's dtype as soon as they are chosen, so that everything computed from a
grid, GPTQ included, is computed from what gets served.

gptqmodel has a grid of its own; ours equals it but for two things. Its scales are float32. And its symmetric
grid cuts off the upper half of a group without negative weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor

from ercsvd_deploy.format.schema import WeightQuantization

_SEARCH_EXPONENT = 2.4  # of the |error| that the scale search minimises; gptqmodel's and GPTQ's own choice
_SEARCH_SHRINKS = tuple(1 - step / 100 for step in range(80))


@dataclass(frozen=True)
class QuantizationSettings:
    """How to quantize one matrix.

    Attributes:
        bits: bits of one stored value, 4 or 8.
        group_size: input columns that share a scale; -1 for one scale per row.
        sym: symmetric grid, no zero point.
        damping: fraction of the Gram's mean diagonal that is added to its diagonal, in (0, 1).
        mse: search each group's scale for the least error instead of covering its extremes.
        desc_act: round the columns with the largest activations first; never visible in the file.

    Raises:
        ValueError: a value out of range.
    """

    bits: int = 4
    group_size: int = 64
    sym: bool = True
    damping: float = 0.01
    mse: bool = False
    desc_act: bool = True

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise ValueError(f"bits is {self.bits}; it must be 4 or 8")
        if self.group_size != -1 and self.group_size < 1:
            raise ValueError(f"group_size is {self.group_size}; it must be -1 or at least 1")
        if not 0 < self.damping < 1:
            raise ValueError(f"damping is {self.damping}; it must lie between 0 and 1, customary is 0.01")

    @property
    def storage(self) -> WeightQuantization:
        """What of these settings the checkpoint records."""
        return WeightQuantization(
            bits=cast(Literal[4, 8], self.bits), group_size=self.group_size, sym=self.sym
        )

    def resolve_group_size(self, in_features: int) -> int:
        """Return the columns of one group in a row of `in_features` columns.

        Raises:
            ValueError: the group size does not divide `in_features`; the message names those that do.
        """
        size = in_features if self.group_size == -1 else self.group_size
        if in_features % size == 0:
            return size
        divisors = [divisor for divisor in range(1, in_features + 1) if in_features % divisor == 0]
        nearest = [max(d for d in divisors if d < size), *[d for d in divisors if d > size][:1]]
        multiples = [m for m in (in_features // size * size, (in_features // size + 1) * size) if m]
        raise ValueError(
            f"group_size {size} does not divide the in-dimension {in_features}: use group_size "
            f"{' or '.join(map(str, nearest))} (-1: one scale per row), or, where the dimension is a rank, "
            f"rank {' or '.join(map(str, multiples))}"
        )


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A matrix as integers: weight = (values - zero_point) * scale, group by group.

    Integers are signed as compressed-tensors packs them: -8..7 for 4 bits, -128..127 for 8.

    Attributes:
        values: [out, in], int8.
        scale: [out, groups] in the checkpoint's dtype; positive and finite.
        zero_point: [out, groups], int8; None if symmetric.
        storage: bits, group size and symmetry, as the checkpoint records them.
    """

    values: Tensor
    scale: Tensor
    zero_point: Tensor | None
    storage: WeightQuantization

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the dense matrix [out, in]; it is rounded once, to `dtype`, as serving kernels do."""
        out_features, groups = self.scale.shape
        grouped = self.values.view(out_features, groups, -1).float()
        if self.zero_point is not None:
            grouped = grouped - self.zero_point.unsqueeze(2)
        return (grouped * self.scale.float().unsqueeze(2)).view(self.values.shape).to(dtype)


def round_to_nearest(
    weight: Tensor, settings: QuantizationSettings, *, scale_dtype: torch.dtype
) -> QuantizedWeight:
    """Round a matrix [out, in] to the nearest points of the grid that GPTQ would use.

    Raises:
        ValueError: a weight with NaN or infinite entries, a group size that does not divide `in`, scales
            beyond `scale_dtype`.
    """
    check_weight(weight)
    dense = weight.detach().float()
    groups = dense.reshape(dense.shape[0], -1, settings.resolve_group_size(dense.shape[1]))
    return snap_to_grid(dense, choose_grid(groups, settings, scale_dtype), settings, scale_dtype)


def check_weight(weight: Tensor) -> None:
    """Refuse a matrix that cannot be quantized.

    Raises:
        ValueError: not [out, in], empty, or with NaN or infinite entries.
    """
    if weight.ndim != 2 or weight.numel() == 0:
        raise ValueError(f"the weight has shape {list(weight.shape)}; it must be [out, in] and not empty")
    if not bool(torch.isfinite(weight).all()):
        raise ValueError("the weight has NaN or infinite entries: check the checkpoint it was read from")


@dataclass(frozen=True, eq=False)
class Grid:
    """Scales and (signed) zero points of groups, float32, each [out, groups, 1]."""

    scale: Tensor
    zero_point: Tensor
    bits: int

    def level(self, groups: Tensor) -> Tensor:
        """Return the nearest integers for values [out, groups, group_size], as floats."""
        low, high = -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1
        return (torch.round(groups / self.scale) + self.zero_point).clamp_(low, high)

    def round(self, groups: Tensor) -> Tensor:
        """Return the nearest representable values, [out, groups, group_size]."""
        return (self.level(groups) - self.zero_point) * self.scale


def choose_grid(groups: Tensor, settings: QuantizationSettings, scale_dtype: torch.dtype) -> Grid:
    """Return the grid of groups [out, groups, group_size], its scales already rounded to `scale_dtype`.

    Raises:
        ValueError: a scale is too large for `scale_dtype`.
    """
    low, high = groups.amin(2, keepdim=True).clamp(max=0), groups.amax(2, keepdim=True).clamp(min=0)
    if settings.sym:
        high = torch.maximum(-low, high)
        low = -high
    grid = _span(low, high, settings, scale_dtype)
    if not settings.mse:
        return grid
    least = torch.full_like(low, torch.inf)
    for shrink in _SEARCH_SHRINKS:
        candidate = _span(low * shrink, high * shrink, settings, scale_dtype)
        error = (candidate.round(groups) - groups).abs_().pow_(_SEARCH_EXPONENT).sum(2, keepdim=True)
        better = error < least
        least = torch.where(better, error, least)
        grid = Grid(
            torch.where(better, candidate.scale, grid.scale),
            torch.where(better, candidate.zero_point, grid.zero_point),
            settings.bits,
        )
    return grid


def _span(low: Tensor, high: Tensor, settings: QuantizationSettings, scale_dtype: torch.dtype) -> Grid:
    """Return the grid from `low` to `high`, [out, groups, 1] each."""
    exact = (high - low) / (2**settings.bits - 1)
    limits = torch.finfo(scale_dtype)
    # Below this a scale would round to zero or be flushed to it; float16 may use its subnormals. It is the
    # scale of a group of zeros, too, which any scale stores exactly.
    least = max(limits.smallest_normal * limits.eps, torch.finfo(torch.float32).smallest_normal)
    scale = exact.clamp(min=least).to(scale_dtype).float()
    if not bool(torch.isfinite(scale).all()):
        raise ValueError(
            f"a scale of {float(exact.max()):.3g} does not fit {str(scale_dtype).removeprefix('torch.')} "
            f"(at most {limits.max:.3g}): store the scales in bfloat16"
        )
    lowest = -(2 ** (settings.bits - 1))
    if settings.sym:
        return Grid(scale, torch.zeros_like(scale), settings.bits)
    zero_point = (lowest - torch.round(low / scale)).clamp_(lowest, -lowest - 1)
    return Grid(scale, zero_point, settings.bits)


def snap_to_grid(
    dense: Tensor, grid: Grid, settings: QuantizationSettings, scale_dtype: torch.dtype
) -> QuantizedWeight:
    """Round a dense matrix [out, in] to its grid and keep the integers."""
    groups = dense.reshape(dense.shape[0], grid.scale.shape[1], -1)
    return QuantizedWeight(
        values=grid.level(groups).to(torch.int8).reshape(dense.shape),
        scale=grid.scale.squeeze(2).to(scale_dtype),
        zero_point=None if settings.sym else grid.zero_point.squeeze(2).to(torch.int8),
        storage=settings.storage,
    )
