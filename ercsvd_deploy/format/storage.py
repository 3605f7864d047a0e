"""The storage of one Linear: layout, rank, quantization of each matrix, names and shapes of its tensors.

Part of `format.schema`, which explains the names. No torch here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property, lru_cache
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator

GUARD = "weight"
GUARD_SHAPE = (0,)
FACTOR_A = "factor_a"
FACTOR_B = "factor_b"
PIVOT_ROWS = "pivot_rows"
OTHER_ROWS = "other_rows"
ROW_ORDER = "row_order"
FACTOR_PARTS = (FACTOR_A, FACTOR_B, PIVOT_ROWS, OTHER_ROWS)

WEIGHT = "weight"
WEIGHT_PACKED = "weight_packed"
WEIGHT_SCALE = "weight_scale"
WEIGHT_ZERO_POINT = "weight_zero_point"
WEIGHT_SHAPE = "weight_shape"

Layout = Literal["dense", "low_rank", "pivoted", "corrected"]
LowRankLayout = Literal["low_rank", "pivoted"]
# The matrices that each layout stores; each has a field of `Storage` for its integers.
_PARTS: Mapping[Layout, tuple[str, ...]] = {
    "dense": (WEIGHT,),
    "low_rank": (FACTOR_A, FACTOR_B),
    "pivoted": (PIVOT_ROWS, OTHER_ROWS),
    "corrected": (WEIGHT, FACTOR_A, FACTOR_B),
}
WORD_BITS = 32  # integers are packed into int32 words
Bits = Literal[2, 3, 4, 5, 6, 8]


class CheckpointFormatError(ValueError):
    """A checkpoint's description cannot be read by this version, or contradicts itself."""


def values_in_whole_words(bits: int) -> int:
    """Return the smallest number of packed integers that fill whole words: 8 of 4 bits, 32 of 3 bits."""
    return WORD_BITS // math.gcd(WORD_BITS, bits)


class WeightQuantization(BaseModel):
    """Integers of one stored matrix: bits, groups of columns, symmetry; the keys are GPTQ's."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bits: Bits = Field(description="Bits of one stored value.")
    group_size: int = Field(description="Input columns sharing a scale; -1 for one scale per row.")
    sym: bool = Field(default=True, description="Symmetric: no zero point is stored.")

    @model_validator(mode="after")
    def _group_size_is_possible(self) -> WeightQuantization:
        if self.group_size != -1 and self.group_size < 1:
            raise ValueError(f"group_size is {self.group_size}; it must be -1 or at least 1")
        return self

    def num_groups(self, in_features: int) -> int:
        """Return the number of scale groups in a row of `in_features` columns.

        Raises:
            CheckpointFormatError: the group size does not divide `in_features`.
        """
        if self.group_size == -1:
            return 1
        if in_features % self.group_size:
            raise CheckpointFormatError(
                f"group_size {self.group_size} does not divide the in-dimension {in_features}"
            )
        return in_features // self.group_size

    def leaf_shapes(self, out_features: int, in_features: int) -> dict[str, tuple[int, ...]]:
        """Return leaf name -> shape of the tensors that store an [out, in] matrix."""
        groups = self.num_groups(in_features)
        leaves: dict[str, tuple[int, ...]] = {
            WEIGHT_PACKED: (out_features, -(-in_features * self.bits // WORD_BITS)),
            WEIGHT_SCALE: (out_features, groups),
            WEIGHT_SHAPE: (2,),
        }
        if not self.sym:
            leaves[WEIGHT_ZERO_POINT] = (-(-out_features * self.bits // WORD_BITS), groups)
        return leaves


class Storage(BaseModel):
    """How the weight of one Linear is stored: its layout, its rank, and the integers of each matrix."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    layout: Layout = Field(
        description="One matrix, two factors, pivot rows and what makes the others, or integers and two "
        "factors whose product is added to them."
    )
    shape: tuple[PositiveInt, PositiveInt] = Field(description="[out, in] of the original weight.")
    rank: PositiveInt | None = Field(default=None, description="Rank (low_rank, pivoted, corrected).")
    pivot_blocks: PositiveInt | None = Field(
        default=None,
        description="Equal consecutive blocks of outputs that hold equally many pivots each (pivoted): the "
        "outputs can be cut into any divisor of this many parts.",
    )
    weight: WeightQuantization | None = Field(default=None, description="Quantization (dense, corrected).")
    factor_a: WeightQuantization | None = Field(default=None, description="Quantization of [rank, in].")
    factor_b: WeightQuantization | None = Field(default=None, description="Quantization of [out, rank].")
    pivot_rows: WeightQuantization | None = Field(default=None, description="Quantization of [rank, in].")
    other_rows: WeightQuantization | None = Field(default=None, description="Quantization of the others.")

    @model_validator(mode="after")
    def _parts_fit_the_layout(self) -> Storage:
        allowed = _PARTS[self.layout]
        for part in (WEIGHT, *FACTOR_PARTS):
            if part not in allowed and getattr(self, part) is not None:
                raise ValueError(
                    f"layout {self.layout} has no {part} to quantize, but {' and '.join(allowed)}"
                )
        if (self.pivot_blocks is None) == (self.layout == "pivoted"):
            raise ValueError(
                f"layout {self.layout} {'needs' if self.layout == 'pivoted' else 'has no'} pivot_blocks"
            )
        if (self.rank is None) != (self.layout == "dense"):
            raise ValueError(f"layout {self.layout} {'has no' if self.layout == 'dense' else 'needs a'} rank")
        if self.layout == "corrected" and self.weight is None:
            raise ValueError("layout corrected needs the integers of weight: a plain matrix has no residual")
        if self.rank is None:
            return self
        if self.rank > min(self.shape):
            raise ValueError(f"rank {self.rank} exceeds the smaller side of shape {list(self.shape)}")
        if self.pivot_blocks is not None:
            if self.rank == self.shape[0]:
                raise ValueError(f"rank {self.rank} leaves no other rows of shape {list(self.shape)}")
            if self.rank % self.pivot_blocks or self.shape[0] % self.pivot_blocks:
                raise ValueError(
                    f"pivot_blocks {self.pivot_blocks} does not divide rank {self.rank} and "
                    f"{self.shape[0]} outputs"
                )
        return self

    @classmethod
    @lru_cache(maxsize=4096)  # a plan repeats the same few for every layer of every candidate
    def dense(cls, shape: tuple[int, int], weight: WeightQuantization | None = None) -> Storage:
        """Return the storage of a weight as one matrix [out, in], of integers if `weight` is given."""
        return cls(layout="dense", shape=shape, weight=weight)

    @classmethod
    @lru_cache(maxsize=4096)
    def of_rank(
        cls,
        shape: tuple[int, int],
        rank: int,
        pivot_blocks: int | None = None,
        first: WeightQuantization | None = None,
        second: WeightQuantization | None = None,
    ) -> Storage:
        """Return the storage of a weight as two matrices.

        Args:
            shape: [out, in] of the original weight.
            rank: Its rank.
            pivot_blocks: Number of blocks of the pivoted layout; None: the layout is low_rank.
            first: Quantization of the factor A, or of the pivot rows; None: floating point.
            second: Quantization of the factor B, or of the other rows; None: floating point.
        """
        layout: LowRankLayout = "low_rank" if pivot_blocks is None else "pivoted"
        integers = dict(zip(_PARTS[layout], (first, second), strict=True))
        return cls(layout=layout, shape=shape, rank=rank, pivot_blocks=pivot_blocks, **integers)

    @classmethod
    @lru_cache(maxsize=4096)
    def corrected(
        cls,
        shape: tuple[int, int],
        weight: WeightQuantization,
        rank: int,
        first: WeightQuantization | None = None,
        second: WeightQuantization | None = None,
    ) -> Storage:
        """Return the storage of a weight as integers and a low-rank correction of them.

        Args:
            shape: [out, in] of the weight.
            weight: Its quantization.
            rank: Rank of the correction.
            first: Quantization of the factor A [rank, in]; None: floating point.
            second: Quantization of the factor B [out, rank]; None: floating point.
        """
        return cls(layout="corrected", shape=shape, rank=rank, weight=weight, factor_a=first, factor_b=second)

    @cached_property
    def parts(self) -> Mapping[str, tuple[tuple[int, int], WeightQuantization | None]]:
        """Part name ('' for a matrix [out, in]) -> ((rows, columns), quantization)."""
        (out_features, in_features), rank = self.shape, self.rank or 0
        shapes = {
            WEIGHT: (out_features, in_features),
            FACTOR_A: (rank, in_features),
            FACTOR_B: (out_features, rank),
            PIVOT_ROWS: (rank, in_features),
            OTHER_ROWS: (out_features - rank, rank),
        }
        return {
            "" if part == WEIGHT else part: (shapes[part], getattr(self, part))
            for part in _PARTS[self.layout]
        }

    @property
    def quantization(self) -> WeightQuantization | None:
        """Quantization of the matrix [out, in], or of the first of two matrices; None for floating point."""
        return next(quantization for _, quantization in self.parts.values())

    @property
    def truncated_rank(self) -> int | None:
        """Rank of a low-rank or pivoted weight; None for full rank, with or without a correction."""
        return self.rank if self.layout in ("low_rank", "pivoted") else None

    @property
    def is_quantized(self) -> bool:
        """Whether any of its matrices holds integers."""
        return any(quantization for _, quantization in self.parts.values())

    @property
    def kind(self) -> tuple[object, ...]:
        """All fields but the shape; equal for matrices of different sizes with the same storage."""
        parts = tuple(quantization for _, quantization in self.parts.values())
        return (self.layout, self.rank, self.pivot_blocks, *parts)

    @property
    def label(self) -> str:
        """The storage in a few words, such as `rank 96, int4 g64` or `dense, int3 g64 + rank 32, int8`."""
        label = "dense" if self.truncated_rank is None else f"rank {self.rank}"
        if self.quantization is not None:
            label += f", int{self.quantization.bits} g{self.quantization.group_size}"
        if self.layout == "corrected":
            label += f" + rank {self.rank}" + (f", int{self.factor_a.bits}" if self.factor_a else "")
        return label

    @property
    def is_altered(self) -> bool:
        """Whether the names of the stored tensors differ from the original Linear's."""
        return self.layout != "dense" or self.weight is not None

    @cached_property
    def tensor_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Tensor name relative to the module -> shape, without the bias, which never changes."""
        shapes: dict[str, tuple[int, ...]] = {GUARD: GUARD_SHAPE} if self.is_altered else {}
        for part, ((rows, columns), quantization) in self.parts.items():
            leaves = quantization.leaf_shapes(rows, columns) if quantization else {WEIGHT: (rows, columns)}
            shapes |= {f"{part}.{leaf}" if part else leaf: shape for leaf, shape in leaves.items()}
        if self.layout == "pivoted":
            shapes[ROW_ORDER] = (self.shape[0],)
        return shapes

    @property
    def num_parameters(self) -> int:
        """Matrix elements stored, whatever their width; scales are not parameters."""
        return sum(rows * columns for (rows, columns), _ in self.parts.values())
