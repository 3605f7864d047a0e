"""95 % intervals of measured figures, and of the paired differences between two models.

Both models see the same windows of a text, the same questions and the same documents of a task. The variation
between items is then common to both, and the difference is far more certain than either figure:

    windows       t interval over the windows' values, or over their paired differences
    questions     Wilson's interval of a share; for the paired difference of two shares, Bonett and Price's
                  adjusted Wald interval (doi 10.3102/1076998611411915) of the questions that only one model
                  answers, as in McNemar's test
    other means   value +- 1.96 standard errors, as lm-eval gives them

Adjacent windows of one text are correlated, so intervals over few windows are a little too narrow.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated

from pydantic import Field

from ercsvd_deploy.format.described import Count, Measured

LEVEL = 0.95
_NORMAL = 1.959963984540054  # 0.975 quantile of the normal distribution
_LARGEST_EXPONENT = 700  # beyond it exp leaves the range of a float


@dataclass(frozen=True)
class Estimate:
    """A measured value with its 95 % interval."""

    value: Annotated[Measured, Field(description="The measured value.")]
    low: Annotated[Measured, Field(description="Lower end of the 95 % interval; null where there is none.")]
    high: Annotated[Measured, Field(description="Upper end.")]
    count: Annotated[Count, Field(description="Number of items it was measured on.")]
    unit: Annotated[str, Field(description="What the items are: `windows`, `questions` or `documents`.")]

    @property
    def has_interval(self) -> bool:
        """Whether both ends of the interval are finite."""
        return math.isfinite(self.low) and math.isfinite(self.high)


def mean_of(values: Sequence[float], unit: str) -> Estimate:
    """Return the mean with its t interval; a single value gets no interval.

    Args:
        values: One value for each item, all of equal weight.
        unit: What the items are.
    """
    count = len(values)
    mean = sum(values) / count if count else math.nan
    if count < 2 or not all(map(math.isfinite, values)):
        return Estimate(mean, math.nan, math.nan, count, unit)
    variance = sum((value - mean) ** 2 for value in values) / (count - 1)
    margin = _t_quantile(count - 1) * math.sqrt(variance / count)
    return Estimate(mean, mean - margin, mean + margin, count, unit)


def perplexity_of(window_losses: Sequence[float]) -> Estimate:
    """Return the perplexity of a text from the mean negative log-likelihood of every window."""
    loss = mean_of(window_losses, "windows")
    return replace(loss, value=_exp(loss.value), low=_exp(loss.low), high=_exp(loss.high))


def perplexity_increase(before: Sequence[float], after: Sequence[float]) -> Estimate:
    """Return the relative increase of a perplexity from both models' losses on the same windows."""
    paired = mean_of([new - old for old, new in zip(before, after, strict=True)], "windows")
    return replace(paired, value=_exp(paired.value) - 1, low=_exp(paired.low) - 1, high=_exp(paired.high) - 1)


def share_of(verdicts: Sequence[bool], unit: str) -> Estimate:
    """Return the share of true verdicts with Wilson's interval."""
    count = len(verdicts)
    if not count:
        return Estimate(math.nan, math.nan, math.nan, 0, unit)
    share, square = sum(verdicts) / count, _NORMAL**2
    centre = (share + square / (2 * count)) / (1 + square / count)
    margin = _NORMAL * math.sqrt(share * (1 - share) / count + square / (4 * count**2)) / (1 + square / count)
    return Estimate(share, max(0.0, centre - margin), min(1.0, centre + margin), count, unit)


def share_drop(verdicts: Sequence[bool], new_verdicts: Sequence[bool], unit: str) -> Estimate:
    """Return the decrease of a share, from both models' verdicts on the same items."""
    count = len(verdicts)
    num_lost = sum(old and not new for old, new in zip(verdicts, new_verdicts, strict=True))
    num_won = sum(new and not old for old, new in zip(verdicts, new_verdicts, strict=True))
    if not count:
        return Estimate(math.nan, math.nan, math.nan, 0, unit)
    # One more item of either kind keeps the interval wider than zero where no verdict changed.
    lost_share, won_share = (num_lost + 1) / (count + 2), (num_won + 1) / (count + 2)
    centre = lost_share - won_share
    margin = _NORMAL * math.sqrt((lost_share + won_share - centre**2) / (count + 2))
    return Estimate(
        (num_lost - num_won) / count, max(-1.0, centre - margin), min(1.0, centre + margin), count, unit
    )


def with_standard_error(value: float, standard_error: float | None, count: int, unit: str) -> Estimate:
    """Return a value with the interval that its standard error gives."""
    margin = math.nan if standard_error is None else _NORMAL * standard_error
    return Estimate(value, value - margin, value + margin, count, unit)


def negated(estimate: Estimate | None) -> Estimate | None:
    """Return the estimate with its sign reversed, to show a loss as a change."""
    if estimate is None:
        return None
    return replace(estimate, value=-estimate.value, low=-estimate.high, high=-estimate.low)


def deciding_count(estimate: Estimate, limit: float) -> int | None:
    """Return about how many items would decide whether the value is within a limit, if it stays the same.

    None if the limit equals the value, or if the gate is decided already. The interval shrinks with the
    square root of the count.
    """
    distance = abs(limit - estimate.value)
    margin = estimate.high - estimate.value if limit >= estimate.value else estimate.value - estimate.low
    if not estimate.has_interval or distance == 0 or margin <= distance:
        return None
    return math.ceil(estimate.count * (margin / distance) ** 2)


def _exp(exponent: float) -> float:
    return math.exp(exponent) if not exponent >= _LARGEST_EXPONENT else math.inf


def _t_quantile(degrees: int) -> float:
    """Return the 0.975 quantile of Student's t distribution."""
    from scipy.special import stdtrit  # takes a quarter of a second to import

    return float(stdtrit(degrees, 0.5 + LEVEL / 2))
