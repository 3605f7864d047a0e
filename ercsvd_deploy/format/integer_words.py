"""Integers of 2 to 8 bits in 32-bit words, as a checkpoint and vLLM's Humming kernels hold them, and back.

Values follow one another without gaps, the first in the lowest bits; one that does not fit the rest of its
word goes on in the lowest bits of the next. Of 3-bit integers 32 fill three words. At 2, 4 and 8 bits, where
no value is split, these are compressed-tensors' words too. At other bits that library leaves the rest of a
word empty; vLLM's own loader of its format, like Humming, expects no gaps.

Only torch is needed, since this runs in servers.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the customary name

from ercsvd_deploy.format.schema import WORD_BITS, values_in_whole_words

_ROWS_AT_ONCE = 8192  # are unpacked to 32 bits a value


def pack_columns(values: Tensor, bits: int) -> Tensor:
    """Pack unsigned values [rows, columns] into int32 words [rows, ceil(columns * bits / 32)].

    The inverse of `unpack_columns`; unused bits of the last word are zero.
    """
    rows, columns = values.shape
    per_block = values_in_whole_words(bits)
    blocks = F.pad(values.to(torch.int32), (0, -columns % per_block)).view(rows, -1, per_block)
    words = blocks.new_zeros(rows, blocks.shape[1], per_block * bits // WORD_BITS)
    for place in range(per_block):
        word, shift = divmod(place * bits, WORD_BITS)
        words[..., word] |= blocks[..., place] << shift  # wraps: the highest value has the sign bit
        if shift + bits > WORD_BITS:
            words[..., word + 1] |= blocks[..., place] >> (WORD_BITS - shift)
    return words.flatten(1)[:, : -(-columns * bits // WORD_BITS)].contiguous()


def unpack_columns(words: Tensor, bits: int, columns: int) -> Tensor:
    """Unpack int32 words [rows, n] into the first `columns` unsigned values (int32)."""
    per_block = values_in_whole_words(bits)
    words_per_block = per_block * bits // WORD_BITS
    blocks = F.pad(words, (0, -words.shape[1] % words_per_block)).view(len(words), -1, words_per_block)
    starts = torch.arange(0, per_block * bits, bits, device=words.device, dtype=torch.int32)
    shifts = starts % WORD_BITS
    mask = 2**bits - 1
    if words_per_block == 1:
        values = (blocks >> shifts) & mask
    else:
        word = starts // WORD_BITS
        in_next = (shifts + bits - WORD_BITS).clamp(min=0)  # bits that the next word has
        in_first = bits - in_next
        low = (blocks[..., word] >> shifts) & ((1 << in_first) - 1)
        following = blocks[..., (word + 1).clamp(max=words_per_block - 1)]
        values = low | ((following & ((1 << in_next) - 1)) << in_first)
    unpacked: Tensor = values.flatten(1)[:, :columns]
    return unpacked


def pack_rows(values: Tensor, bits: int) -> Tensor:
    """Pack unsigned values [rows, n] down the columns into int32 words [ceil(rows * bits / 32), n]."""
    return pack_columns(values.t(), bits).t().contiguous()


def unpack_rows(words: Tensor, bits: int, rows: int) -> Tensor:
    """Unpack int32 words [m, n] into the first `rows` rows of unsigned values; the inverse of `pack_rows`."""
    return unpack_columns(words.t(), bits, rows).t()


def dequantize(words: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, columns: int) -> Tensor:
    """Return the dense matrix [rows, columns] of packed integers, in the dtype of `scale`.

    Args:
        words: [rows, ceil(columns * bits / 32)], int32.
        scale: [rows, groups]; every group is equally wide.
        zero_point: [rows, groups], one unsigned value each; None for half the range.
        bits: Bits of a stored value.
        columns: Columns of the matrix.
    """
    values = unpack_columns(words, bits, columns).reshape(*scale.shape, -1)
    offset = 2 ** (bits - 1) if zero_point is None else zero_point[:, :, None]
    centred = (values - offset).to(scale.dtype)  # at most 8 bits and a sign: exact in bfloat16
    return (centred * scale[:, :, None]).view(len(words), columns)


def dequantize_by_blocks(
    words: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, columns: int
) -> Tensor:
    """Like `dequantize`, but a block of rows at a time, so that an embedding needs little extra memory."""
    blocks = [
        dequantize(words[rows], scale[rows], None if zero_point is None else zero_point[rows], bits, columns)
        for rows in (slice(start, start + _ROWS_AT_ONCE) for start in range(0, len(words), _ROWS_AT_ONCE))
    ]
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks)
