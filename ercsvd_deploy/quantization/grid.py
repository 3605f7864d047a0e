"""The grid of an integer matrix, its scales and zero points, and rounding to the nearest level.

A group of `group_size` consecutive input columns of one row shares a scale (and a zero point, if asymmetric).
Scales are rounded to the checkpoint's dtype as soon as they are chosen, so that everything computed from a
grid, GPTQ included, uses the scales that are served.

The grids are those of GPTQ's reference implementation and its successors, at 2 to 8 bits, but for two things:
theirs keep scales in float32, and their symmetric grid cuts off the upper half of a group without negative
weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import cast, get_args

import torch
from torch import Tensor

from ercsvd_deploy.format.packing import QuantizedWeight
from ercsvd_deploy.format.schema import Bits, WeightQuantization

_SEARCH_EXPONENT = 2.4  # of the |error| that the scale search minimises; GPTQ's own choice
_SEARCH_SHRINKS = tuple(1 - step / 100 for step in range(80))
_ROUNDED_DOWN = 1 - 1e-4
_FEWER = 0.8  # share of the searched groups; if fewer are open, only they are searched on
_MOST_AT_ONCE, _VALUES_AT_ONCE = 8, 2**17  # ranges of a small matrix that are tried in one pass


@dataclass(frozen=True)
class QuantizationSettings:
    """How to quantize one matrix.

    Attributes:
        bits: bits of one stored value: 2, 3, 4, 5, 6 or 8.
        group_size: input columns that share a scale; -1 for one scale per row.
        sym: symmetric grid, no zero point.
        damping: fraction of the Gram's mean diagonal that is added to its diagonal, in (0, 1); None: what
            does best on held-out tokens.
        mse: search each group's scale for the least error instead of covering its extremes.
        desc_act: round the columns with the largest activations first; never visible in the file.

    Raises:
        ValueError: a value out of range.
    """

    bits: int = 4
    group_size: int = 64
    sym: bool = True
    damping: float | None = 0.01
    mse: bool = False
    desc_act: bool = True

    def __post_init__(self) -> None:
        if self.bits not in get_args(Bits):
            *smaller, largest = get_args(Bits)
            choices = f"{', '.join(map(str, smaller))} or {largest}"
            raise ValueError(f"bits is {self.bits}; it must be {choices}")
        if self.group_size != -1 and self.group_size < 1:
            raise ValueError(f"group_size is {self.group_size}; it must be -1 or at least 1")
        if self.damping is not None and not 0 < self.damping < 1:
            raise ValueError(f"damping is {self.damping}; it must lie between 0 and 1, customary is 0.01")

    @property
    def quantization(self) -> WeightQuantization:
        """The part of these settings that the checkpoint records."""
        return WeightQuantization(bits=cast(Bits, self.bits), group_size=self.group_size, sym=self.sym)

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


def round_to_nearest(
    weight: Tensor, settings: QuantizationSettings, *, scale_dtype: torch.dtype
) -> QuantizedWeight:
    """Round a matrix [out, in] to the nearest points of the grid that GPTQ would use.

    Raises:
        ValueError: as `put_on_grid`.
    """
    return put_on_grid(weight, settings, scale_dtype).round_to_nearest()


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
    """The grid of rows: values (level - zero_point) * scale, with whole levels from `lowest` to `highest`.

    Attributes:
        scale: of each group of each row, [rows, groups], float32.
        zero_point: whole numbers, [rows, groups], float32; zeros for a symmetric grid.
        lowest: -2^(bits - 1) of each row's bits, [rows, 1], float32.
    """

    scale: Tensor
    zero_point: Tensor
    lowest: Tensor

    @property
    def highest(self) -> Tensor:
        """The largest level of each row, 2^(bits - 1) - 1: [rows, 1]."""
        return -1 - self.lowest

    def level(self, weight: Tensor) -> Tensor:
        """Return the nearest levels for a matrix [rows, in], int8."""
        groups = weight.reshape(*self.scale.shape, -1)
        scale, zero_point, lowest, highest = (
            tensor.unsqueeze(2) for tensor in (self.scale, self.zero_point, self.lowest, self.highest)
        )
        return _level(groups, scale, zero_point, lowest, highest).to(torch.int8).reshape(weight.shape)


def stack_grids(grids: Sequence[Grid]) -> Grid:
    """Return the grid of matrices [rows, in] that are stacked as rows; their group sizes may differ."""
    groups = math.lcm(*(grid.scale.shape[1] for grid in grids))

    def stacked(tensors: Iterable[Tensor]) -> Tensor:
        return torch.cat([tensor.repeat_interleave(groups // tensor.shape[1], 1) for tensor in tensors])

    return Grid(
        stacked(grid.scale for grid in grids),
        stacked(grid.zero_point for grid in grids),
        torch.cat([grid.lowest for grid in grids]),
    )


@dataclass(frozen=True, eq=False)
class GriddedWeight:
    """A matrix and the grid that it will be rounded to.

    Attributes:
        dense: [out, in], float32.
        grid: the grid of its rows.
        settings: the settings that the grid was made with.
        scale_dtype: dtype in which the scales are stored; they are rounded to it.
    """

    dense: Tensor
    grid: Grid
    settings: QuantizationSettings
    scale_dtype: torch.dtype

    def with_values(self, values: Tensor) -> QuantizedWeight:
        """Return the quantized matrix with these levels [out, in], int8, of its grid."""
        return QuantizedWeight(
            values=values,
            scale=self.grid.scale.to(self.scale_dtype),
            zero_point=None if self.settings.sym else self.grid.zero_point.to(torch.int8),
            quantization=self.settings.quantization,
        )

    def round_to_nearest(self) -> QuantizedWeight:
        """Return the matrix rounded to the nearest points."""
        return self.with_values(self.grid.level(self.dense))


def put_on_grid(weight: Tensor, settings: QuantizationSettings, scale_dtype: torch.dtype) -> GriddedWeight:
    """Choose the grid of a matrix [out, in].

    Raises:
        ValueError: a weight with NaN or infinite entries, a group size that does not divide `in`, scales
            beyond `scale_dtype`.
    """
    check_weight(weight)
    dense = weight.detach().float()
    grid = choose_grid(
        dense,
        bits=settings.bits,
        group_size=settings.resolve_group_size(dense.shape[1]),
        sym=settings.sym,
        mse=settings.mse,
        scale_dtype=scale_dtype,
    )
    return GriddedWeight(dense, grid, settings, scale_dtype)


def choose_grid(
    weight: Tensor, *, bits: int, group_size: int, sym: bool, mse: bool, scale_dtype: torch.dtype
) -> Grid:
    """Return the grid of a matrix, its scales already rounded to `scale_dtype`.

    Args:
        weight: [rows, in], float32, finite.
        bits: 2 to 8.
        group_size: input columns that share a scale; divides `in`.
        sym: no zero points.
        mse: search each group's range, over shrinks of what it covers, for the least sum of |error|^2.4; at 2
            bits, where half a step is much, also between the two zero points nearest to the exact one.
        scale_dtype: dtype in which the scales are stored.

    Raises:
        ValueError: a scale is too large for `scale_dtype`.
    """
    groups = weight.reshape(-1, group_size)
    low, high = groups.amin(1, keepdim=True).clamp(max=0), groups.amax(1, keepdim=True).clamp(min=0)
    if sym:
        high = torch.maximum(-low, high)
        low = -high
    lowest = -(2 ** (bits - 1))
    if mse:
        scale, zero_point = _search_spans(groups, low, high, lowest, sym, scale_dtype)
    else:
        [(scale, zero_point), *_] = _spans(low, high, lowest, sym, scale_dtype)
    row_lowest = torch.full_like(weight[:, :1], lowest)
    shape = len(weight), weight.shape[1] // group_size
    return Grid(scale.reshape(shape), zero_point.reshape(shape), row_lowest)


def _search_spans(
    groups: Tensor,
    low: Tensor,
    high: Tensor,
    lowest: int,
    sym: bool,
    scale_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Return scales and zero points of the shrunken range with the least sum of |error|^2.4, [groups, 1].

    Args:
        groups: [groups, group_size].
        low: what a group's levels cover before they are shrunk, at least, [groups, 1].
        high: the same at most, [groups, 1].
        lowest: the lowest level.
        sym: no zero points.
        scale_dtype: dtype in which the scales are stored.
    """
    [(scale, zero_point), *_] = _spans(low, high, lowest, sym, scale_dtype)
    smallest, largest = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    best_scale, best_zero, least = scale.clone(), zero_point.clone(), torch.full_like(low, torch.inf)
    places = torch.arange(len(groups), device=groups.device)  # of the groups that are still searched
    shrinks = torch.tensor(_SEARCH_SHRINKS, device=groups.device).reshape(-1, 1, 1)
    at_once = max(1, min(_MOST_AT_ONCE, _VALUES_AT_ONCE // max(1, groups.numel())))
    for tried in torch.split(shrinks, at_once):
        spans = _spans(low * tried, high * tried, lowest, sym, scale_dtype)
        scales, zeros = (torch.stack(tensors, 1).flatten(0, 1) for tensors in zip(*spans, strict=True))
        is_open = (_least_error(smallest, largest, scales[0], lowest, sym) < least).squeeze(1)
        num_open = int(is_open.count_nonzero())
        if num_open < _FEWER * len(places):  # the others are done: smaller ranges cut off more
            scale[places], zero_point[places] = best_scale, best_zero
            places, groups, low, high, smallest, largest, best_scale, best_zero, least = (
                tensor[is_open]
                for tensor in (places, groups, low, high, smallest, largest, best_scale, best_zero, least)
            )
            scales, zeros = scales[:, is_open], zeros[:, is_open]
        if num_open == 0:
            break
        rounded = _level(groups, scales, zeros, lowest, -1 - lowest).sub_(zeros).mul_(scales)
        error, best = _raised(rounded.sub_(groups).abs_()).sum(2, keepdim=True).min(0, keepdim=True)
        better = error[0] < least
        least = torch.where(better, error[0], least)
        best_scale = torch.where(better, scales.gather(0, best)[0], best_scale)
        best_zero = torch.where(better, zeros.gather(0, best)[0], best_zero)
    scale[places], zero_point[places] = best_scale, best_zero
    return scale, zero_point


def _raised(error: Tensor) -> Tensor:
    """Return |error|^2.4, in place; twice as fast as `pow_`, and equal to it but for the last bits."""
    return error.log2_().mul_(_SEARCH_EXPONENT).exp2_()


def _least_error(smallest: Tensor, largest: Tensor, scale: Tensor, lowest: int, sym: bool) -> Tensor:
    """Return what cutting off a group's extremes costs the scale search at least, [groups, 1].

    It grows as the scale shrinks, wherever the zero point is then.
    """
    if sym:
        cut_off = torch.maximum(lowest * scale - smallest, largest - (-1 - lowest) * scale)
    else:
        cut_off = (largest - smallest - (-1 - 2 * lowest) * scale) / 2  # of one end or of both
    # Sums of errors that are this very one may be rounded to less.
    return _raised(cut_off.clamp_(min=0)).mul_(_ROUNDED_DOWN)


def _level(
    groups: Tensor, scale: Tensor, zero_point: Tensor, lowest: float | Tensor, highest: float | Tensor
) -> Tensor:
    """Return the nearest levels for values [..., group_size], as floats."""
    return (groups / scale).round_().add_(zero_point).clamp_(lowest, highest)  # type: ignore[arg-type]


def _spans(
    low: Tensor, high: Tensor, lowest: int, sym: bool, scale_dtype: torch.dtype
) -> list[tuple[Tensor, Tensor]]:
    """Return scales and zero points that cover `low` to `high`, [groups, 1] each; the nearest first."""
    exact = (high - low) / (-2 * lowest - 1)
    limits = torch.finfo(scale_dtype)
    # A smaller scale would round to zero or be flushed to it; float16 may use its subnormals. A group of
    # zeros gets this scale too, since any scale stores zeros exactly.
    least = max(limits.smallest_normal * limits.eps, torch.finfo(torch.float32).smallest_normal)
    scale = exact.clamp(min=least).to(scale_dtype).float()
    if not bool(torch.isfinite(scale).all()):
        raise ValueError(
            f"a scale of {float(exact.max()):.3g} does not fit {str(scale_dtype).removeprefix('torch.')} "
            f"(at most {limits.max:.3g}): store the scales in bfloat16"
        )
    if sym:
        return [(scale, torch.zeros_like(scale))]
    steps = low / scale
    nearest = steps.round()
    offsets = [nearest] if lowest < -2 else [nearest, steps.floor() + steps.ceil() - nearest]
    return [(scale, (lowest - offset).clamp_(lowest, -1 - lowest)) for offset in offsets]
