"""Reads and writes integers in 32-bit words, and undoes the permutations of vLLM's kernels.

Nothing is shared with the code under test.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_FOUR_BIT_INTERLEAVE = [0, 2, 4, 6, 1, 3, 5, 7]
_EIGHT_BIT_INTERLEAVE = [0, 2, 1, 3]


def pack_last(values: Tensor, bits: int) -> Tensor:
    """Pack unsigned values [..., n] into int32 words [..., n * bits / 32], low bits first, without gaps."""
    if 32 % bits:  # values go on in the next word: every bit is placed by itself
        values, bits = (values.long()[..., None] >> torch.arange(bits)).flatten(-2) & 1, 1
    per_word = 32 // bits
    shifts = torch.arange(per_word, dtype=torch.int64) * bits
    words: Any = (values.long().reshape(*values.shape[:-1], -1, per_word) << shifts).sum(-1)
    packed: Tensor = words.to(torch.int32)  # wraps, so that the sign bit is the highest value's
    return packed


def unpack_last(words: Tensor, bits: int) -> Tensor:
    """Unpack int32 words [..., m] into unsigned values [..., m * 32 / bits], int32."""
    if 32 % bits:  # values go on in the next word: every bit by itself, in as few bytes as that takes
        octets = words.contiguous().view(torch.uint8)
        single = (octets[..., None] >> torch.arange(8, dtype=torch.uint8)) & 1
        values = single.reshape(*words.shape[:-1], -1, bits) << torch.arange(bits, dtype=torch.uint8)
        together: Tensor = values.sum(-1, dtype=torch.int32)
        return together
    shifts = torch.arange(32 // bits, dtype=torch.int32, device=words.device) * bits
    values = (words[..., None] >> shifts) & (2**bits - 1)
    unpacked: Tensor = values.reshape(*words.shape[:-1], -1)
    return unpacked


def pack_first(values: Tensor, bits: int) -> Tensor:
    """Pack unsigned values [n, m] along the first dimension, filled up with zeros to whole words."""
    num_words = -(-len(values) * bits // 32)
    filled = torch.cat([values, values.new_zeros(-len(values) % 32, values.shape[1])])
    return pack_last(filled.T.contiguous(), bits).T[:num_words].contiguous()


def grouped_order() -> list[int]:
    """Return Marlin's order of 64 scales: place p holds the scale of column `order[p]`."""
    return [row + 8 * column for row in range(8) for column in range(8)]


def channel_order() -> list[int]:
    """Return Marlin's order of 32 scales that are applied to the result."""
    return [2 * pair + place for pair in range(4) for place in (0, 1, 8, 9, 16, 17, 24, 25)]


def unpermute(values: Tensor, order: list[int]) -> Tensor:
    """Undo a permutation of consecutive columns: place p of each run holds column `order[p]`."""
    runs = values.reshape(-1, len(order))
    original = torch.empty_like(runs)
    original[:, torch.tensor(order)] = runs
    return original.reshape(values.shape)


def uninterleave(values: Tensor, bits: int) -> Tensor:
    """Undo Marlin's interleaving of the values in a word."""
    return unpermute(values, _FOUR_BIT_INTERLEAVE if bits == 4 else _EIGHT_BIT_INTERLEAVE)


def scaled(centred: Tensor, scales: Tensor) -> Tensor:
    """Return centred integers [K, N] times their groups' scales [groups, N], float32."""
    columns, width = centred.shape
    weight = centred.float().reshape(len(scales), -1, width) * scales.float()[:, None]
    return weight.reshape(columns, width)


def multiply(x: Tensor, centred: Tensor, scales: Tensor) -> Tensor:
    """Return x [m, K] times (centred integers [K, N] times their groups' scales [groups, N]), as x is."""
    return (x.float() @ scaled(centred, scales)).to(x.dtype)


def centre(values: Tensor, zeros: Tensor) -> Tensor:
    """Subtract from unsigned values [K, N] the zero points [groups, N] of their groups."""
    columns, width = values.shape
    return (values.reshape(len(zeros), -1, width) - zeros[:, None]).reshape(columns, width)


def require(condition: bool, message: str) -> None:
    """Fail as a compiled operator does.

    Raises:
        RuntimeError: the condition does not hold.
    """
    if not condition:
        raise RuntimeError(message)
