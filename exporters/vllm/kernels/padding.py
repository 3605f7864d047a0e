"""What a device holds of an integer matrix once a kernel has padded it; no vLLM needed."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ercsvd_deploy.format.schema import WeightQuantization

_HALF = 2  # bytes of a scale, and of a plain value


def integer_bytes(shape: tuple[int, int], quantization: WeightQuantization) -> int:
    """Return the bytes of a matrix's words, scales and zero points; `shape` is [rows, columns]."""
    rows, columns = shape
    groups = 1 if quantization.group_size == -1 else -(-columns // quantization.group_size)
    bits_of_group = 8 * _HALF + (0 if quantization.sym else quantization.bits)
    return rows * (columns * quantization.bits + groups * bits_of_group) // 8


def plain_bytes(shape: tuple[int, int]) -> int:
    """Return the bytes of a matrix in 16 bits a value."""
    rows, columns = shape
    return _HALF * rows * columns


def is_smaller_plain(
    shape: tuple[int, int], padded: tuple[int, int], quantization: WeightQuantization
) -> bool:
    """Return whether 16-bit values take no more memory than the integers that a kernel pads to `padded`.

    Factors of small rank do: Humming pads a second factor [out, 16] to [out, 128], and four-bit integers then
    take twice what 16-bit values do.
    """
    return padded != shape and plain_bytes(shape) <= integer_bytes(padded, quantization)
