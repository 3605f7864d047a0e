"""Integers packed into 32-bit words as compressed-tensors packs them, and back; low bits first.

Only torch is needed, since this runs in servers. `ercsvd_deploy.format.packing` writes these words.
"""

from __future__ import annotations

import torch

WORD_BITS = 32


def pack_rows(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack unsigned values [rows, n] into int32 words [ceil(rows * bits / 32), n].

    The inverse of `unpack_rows`, up to rows of zeros that fill the last word.
    """
    per_word = WORD_BITS // bits
    rows, width = values.shape
    padded = values.new_zeros((-(-rows // per_word) * per_word, width), dtype=torch.int32)
    padded[:rows] = values
    shifts = torch.arange(0, WORD_BITS, bits, device=values.device, dtype=torch.int32)
    # the values share no bits, so that their sum is their union, the sign bit included
    return (padded.view(-1, per_word, width) << shifts[:, None]).sum(dim=1, dtype=torch.int32)


def unpack_rows(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Unpack int32 words [m, n] into unsigned values [m * 32 / bits, n]; the inverse of `pack_rows`."""
    shifts = torch.arange(0, WORD_BITS, bits, device=words.device, dtype=torch.int32)
    values = (words[:, None, :] >> shifts[:, None]) & (2**bits - 1)
    unpacked: torch.Tensor = values.reshape(-1, words.shape[1])
    return unpacked


def unpack_columns(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Unpack int32 words [rows, m] into unsigned values [rows, m * 32 / bits], int32."""
    shifts = torch.arange(0, WORD_BITS, bits, device=words.device, dtype=torch.int32)
    values = (words[:, :, None] >> shifts) & (2**bits - 1)
    unpacked: torch.Tensor = values.reshape(words.shape[0], -1)
    return unpacked


def dequantize(
    words: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None, bits: int
) -> torch.Tensor:
    """Return the matrix [rows, columns] that packed integers stand for, in the dtype of `scale`.

    Args:
        words: [rows, columns * bits / 32], int32.
        scale: [rows, groups]; every group is equally wide.
        zero_point: [rows, groups], one unsigned value each; None stands for half the range.
        bits: Of a stored value.
    """
    values = unpack_columns(words, bits).view(*scale.shape, -1)
    offset = 2 ** (bits - 1) if zero_point is None else zero_point[:, :, None]
    centred = (values - offset).to(scale.dtype)  # at most 8 bits and a sign: exact in bfloat16
    return (centred * scale[:, :, None]).view(words.shape[0], -1)
