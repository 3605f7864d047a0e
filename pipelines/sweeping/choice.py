"""Which of several models are worth having: none other is both smaller and better."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

Item = TypeVar("Item")


def pareto_front(items: Sequence[Item], key: Callable[[Item], tuple[float, float]]) -> list[Item]:
    """Return the items that no other beats, by size.

    Args:
        items: Anything.
        key: Gives (size, loss); less is better in both. One item beats another if it is at most as large and
            loses at most as much, and one of the two is less.
    """
    front: list[Item] = []
    least = float("inf")
    for item in sorted(items, key=key):
        _, loss = key(item)
        if loss < least:
            front.append(item)
            least = loss
    return front
