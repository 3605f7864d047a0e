"""Which storages of a Linear are tried, and what follows from them for the others.

The damage that quantizing factors adds varies slowly with their rank. The share of the damage that a low-rank
correction leaves varies slowly with the bits of the integers that it corrects, and hardly with their group
size.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ercsvd_deploy.format.schema import Storage, WeightQuantization

_PROBED_BITS = 3  # at which a correction is fitted


def by_correction(storages: Iterable[Storage]) -> list[dict[WeightQuantization, Storage]]:
    """Return, for every correction on offer, the integers that it can correct -> storage."""
    corrections: dict[tuple[Any, ...], dict[WeightQuantization, Storage]] = {}
    for storage in storages:
        if storage.layout == "corrected":
            integers, *factors = (part for _, part in storage.parts.values())
            assert integers is not None
            correction = (storage.rank, *(part and part.bits for part in factors))
            corrections.setdefault(correction, {})[integers] = storage
    return list(corrections.values())


def fitted_corrections(storages: Collection[Storage]) -> list[Storage]:
    """Return the integers with corrections that are fitted; all of a correction, if some lack plain ones."""
    plain = {storage.weight for storage in storages if storage.layout == "dense"}
    return [
        by_integers[each]
        for by_integers in by_correction(storages)
        for each in (spread_integers(by_integers) if by_integers.keys() <= plain else by_integers)
    ]


def spread_integers(offered: Iterable[WeightQuantization]) -> list[WeightQuantization]:
    """Return a few integers of those on offer: at the middle group size, with bits that lie far apart."""
    by_group_size: dict[int, list[WeightQuantization]] = {}
    for integers in offered:
        by_group_size.setdefault(integers.group_size, []).append(integers)
    ascending = sorted(by_group_size, key=lambda size: math.inf if size == -1 else size)
    middle = by_group_size[ascending[len(ascending) // 2]]
    bits = spread([integers.bits for integers in middle], _PROBED_BITS)
    return [integers for integers in middle if integers.bits in bits]


def spread(numbers: Sequence[int], count: int) -> list[int]:
    """Return about `count` numbers at even distances of the logarithm, including both ends."""
    ordered = sorted(numbers)
    low, high = math.log(ordered[0]), math.log(ordered[-1])
    targets = [low + (high - low) * step / max(1, count - 1) for step in range(count)]
    return sorted({min(ordered, key=lambda number: abs(math.log(number) - target)) for target in targets})


def interpolate(values: Mapping[int, float], number: int) -> float:
    """Return the value at a number, interpolated linearly in the logarithm; outside, that of the nearest."""
    numbers = sorted(values)
    below = max((measured for measured in numbers if measured <= number), default=numbers[0])
    above = min((measured for measured in numbers if measured >= number), default=numbers[-1])
    if below == above:
        return values[below]
    share = math.log(number / below) / math.log(above / below)
    return (1 - share) * values[below] + share * values[above]
