"""The Pareto front of several models, and the best of them by size, losses and gates."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from ercsvd_deploy.recipe.fields import parse_size

if TYPE_CHECKING:
    from ercsvd_deploy.pipelines.sweeping.file import Pick
    from ercsvd_deploy.pipelines.sweeping.results import PointResult

Item = TypeVar("Item")


def pareto_front(items: Sequence[Item], key: Callable[[Item], tuple[float, float]]) -> list[Item]:
    """Return the items that no other item beats, in order of size.

    Args:
        items: The items.
        key: Returns (size, loss) of an item; less is better in both. One item beats another if it is at most
            as large, loses at most as much, and is better in one of the two. An item whose loss is not finite
            is never on the front.
    """
    front: list[Item] = []
    least = float("inf")
    for item in sorted((item for item in items if math.isfinite(key(item)[1])), key=key):
        _, loss = key(item)
        if loss < least:
            front.append(item)
            least = loss
    return front


def front_of(results: Sequence[PointResult], text: str) -> list[str]:
    """Return the names of the points that no other beats on a text."""
    front = pareto_front(results, lambda point: (point.num_bytes, point.perplexity[text]))
    return [point.name for point in front]


def pick_point(pick: Pick | None, results: Sequence[PointResult]) -> tuple[str | None, str]:
    """Return the best point's name, or None if there is none, and the reason.

    Args:
        pick: The sweep's criterion; None if it picks no point.
        results: All points, the original first.
    """
    original, compressed = results[0], [point for point in results if point.recipe is not None]
    if pick is None:
        return None, "nothing was to be picked"
    passing = [point for point in compressed if point.passed]
    if not passing:
        return None, "no point passes the gates"
    if pick.best_under is None:
        best = min(passing, key=lambda point: (point.num_bytes, worst_increase(point, original)))
        return best.name, f"the smallest of the {len(passing)} points that pass the gates"
    limit = parse_size(pick.best_under)
    fitting = [point for point in passing if point.num_bytes <= limit]
    if not fitting:
        return None, f"no point that passes the gates is at most {pick.best_under}"
    best = min(fitting, key=lambda point: (worst_increase(point, original), point.num_bytes))
    reason = f"the best on its worst text of the {len(fitting)} points of at most {pick.best_under}"
    return best.name, reason


def worst_increase(point: PointResult, original: PointResult) -> float:
    """Return the largest relative increase of a perplexity, or loss of exact match; NaN is infinite."""
    losses = [value / original.perplexity[text] - 1 for text, value in point.perplexity.items()]
    losses += [original.exact_match[name] - value for name, value in point.exact_match.items()]
    return max((loss if math.isfinite(loss) else math.inf for loss in losses), default=0.0)
