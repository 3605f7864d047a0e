"""Integers in words: inverses of each other, the words written bit by bit, and Humming's rule."""

from __future__ import annotations

import pytest
import torch

from ercsvd_deploy.format import integer_words
from ercsvd_deploy.format.integer_words import (
    dequantize,
    dequantize_by_blocks,
    pack_columns,
    pack_rows,
    unpack_columns,
    unpack_rows,
)

BITS = pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
SHAPES = pytest.mark.parametrize("shape", [(1, 1), (5, 43), (3, 64), (7, 33), (2, 96), (13, 8)])


def random_values(shape: tuple[int, int], bits: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape) + bits)
    return torch.randint(2**bits, shape, dtype=torch.int32, generator=generator)


def written_bit_by_bit(row: list[int], bits: int) -> list[int]:
    """Return the words of a row as one long number, the first value lowest, cut into 32-bit pieces."""
    number = sum(value << (bits * place) for place, value in enumerate(row))
    count = -(-len(row) * bits // 32)
    words = [(number >> (32 * place)) % 2**32 for place in range(count)]
    return [word - 2**32 if word >= 2**31 else word for word in words]


@BITS
@SHAPES
def test_words_are_the_values_bits_without_gaps(shape: tuple[int, int], bits: int) -> None:
    values = random_values(shape, bits)
    words = pack_columns(values, bits)
    assert words.dtype == torch.int32
    assert words.tolist() == [written_bit_by_bit(row, bits) for row in values.tolist()]
    assert torch.equal(pack_rows(values.t(), bits), words.t())


@BITS
@SHAPES
def test_unpacking_inverts_packing(shape: tuple[int, int], bits: int) -> None:
    values = random_values(shape, bits)
    unpacked = unpack_columns(pack_columns(values, bits), bits, shape[1])
    assert unpacked.dtype == torch.int32
    assert torch.equal(unpacked, values)
    assert torch.equal(unpack_rows(pack_rows(values, bits), bits, shape[0]), values)


@BITS
@pytest.mark.parametrize("has_zero_points", [True, False])
def test_dequantizing_element_by_element(
    bits: int, has_zero_points: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = random_values((5, 64), bits)
    scale = torch.rand(5, 2, generator=torch.Generator().manual_seed(1)) + 0.1
    zeros = random_values((5, 2), bits) if has_zero_points else torch.full((5, 2), 2 ** (bits - 1))
    stored = (pack_columns(values, bits), scale, zeros if has_zero_points else None)
    matrix = dequantize(*stored, bits, 64)
    for row in range(5):
        for column in range(64):
            group = column // 32
            centred = float(values[row, column] - zeros[row, group])
            assert matrix[row, column] == centred * scale[row, group]
    for rows_at_once in (2, 5, 8):
        monkeypatch.setattr(integer_words, "_ROWS_AT_ONCE", rows_at_once)
        assert torch.equal(dequantize_by_blocks(*stored, bits, 64), matrix)
