"""Intervals: against scipy's and statistics' own, and how often they hold in simulations."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from ercsvd_deploy.pipelines.judging.uncertainty import (
    Estimate,
    deciding_count,
    mean_of,
    perplexity_increase,
    perplexity_of,
    share_drop,
    share_of,
    with_standard_error,
)

RNG = np.random.default_rng(0)


def test_a_mean_has_the_t_interval_that_scipy_has() -> None:
    values = RNG.normal(3, 2, 7)
    found = mean_of(values.tolist(), "windows")
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert found.value == pytest.approx(values.mean())
    assert (found.count, found.unit) == (7, "windows")


def test_a_perplexity_increase_is_the_paired_one() -> None:
    before = RNG.normal(3, 0.5, 20)  # windows differ much, the models on one window little
    after = before + RNG.normal(0.05, 0.01, 20)
    found = perplexity_increase(before.tolist(), after.tolist())
    expected = stats.ttest_rel(after, before).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((math.expm1(expected.low), math.expm1(expected.high)))
    old, new = perplexity_of(before.tolist()), perplexity_of(after.tolist())
    assert found.value == pytest.approx(new.value / old.value - 1)
    unpaired = (new.high - new.low) / old.value
    assert found.high - found.low < unpaired / 10


@pytest.mark.parametrize(("right", "count"), [(0, 10), (7, 10), (10, 10), (500, 1000)])
def test_a_share_has_wilsons_interval(right: int, count: int) -> None:
    found = share_of([True] * right + [False] * (count - right), "questions")
    expected = stats.binomtest(right, count).proportion_ci(method="wilson")
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-12)


@pytest.mark.parametrize(
    ("count", "right", "lost", "won", "most"),
    # Cautious where a handful of questions decides.
    [(40, 0.9, 0.05, 0.0, 1.0), (100, 0.7, 0.1, 0.05, 0.98), (500, 0.5, 0.02, 0.02, 0.98)],
)
def test_the_interval_of_a_paired_drop_holds_as_often_as_it_says(
    count: int, right: float, lost: float, won: float, most: float
) -> None:
    """`lost` of all questions only the first model answers, `won` only the second."""
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(1000):
        kinds = rng.choice(4, count, p=[lost, won, right - lost, 1 - right - won])
        before, after = np.isin(kinds, (0, 2)), np.isin(kinds, (1, 2))
        found = share_drop(before.tolist(), after.tolist(), "questions")
        assert found.value == pytest.approx(before.mean() - after.mean())
        held += found.low <= lost - won <= found.high
    assert 0.93 <= held / 1000 <= most


def test_a_drop_that_mcnemar_calls_significant_has_an_interval_above_zero() -> None:
    """As a check of the direction and the scale; near the border the two need not agree."""
    agreeing = 0
    cases = [(lost, won) for lost in range(0, 30, 3) for won in range(0, 30, 3) if lost + won]
    for lost, won in cases:
        both = 200 - lost - won
        before = [True] * lost + [False] * won + [True] * both
        after = [False] * lost + [True] * won + [True] * both
        interval = share_drop(before, after, "questions")
        exact = stats.binomtest(lost, lost + won).pvalue
        agreeing += (exact < 0.05) == (interval.low > 0 or interval.high < 0)
    assert agreeing >= 0.95 * len(cases)


def test_what_has_no_spread_to_see_has_no_interval() -> None:
    for found in (mean_of([1.0], "windows"), mean_of([], "windows"), mean_of([1.0, math.inf], "windows")):
        assert not found.has_interval
    assert not share_of([], "questions").has_interval
    assert not share_drop([], [], "questions").has_interval
    assert not with_standard_error(0.5, None, 10, "documents").has_interval
    assert math.isinf(perplexity_of([1000.0, 1000.0]).value)
    equal = mean_of([2.0, 2.0, 2.0], "windows")
    assert (equal.low, equal.high) == (2.0, 2.0)


def test_standard_errors_give_normal_intervals() -> None:
    found = with_standard_error(0.5, 0.1, 100, "documents")
    assert (found.low, found.high) == pytest.approx(stats.norm.interval(0.95, 0.5, 0.1))


def test_the_count_that_would_decide_does() -> None:
    rng = np.random.default_rng(2)
    values = rng.normal(0.08, 0.1, 20)
    found = mean_of(values.tolist(), "windows")
    limit = found.value + 0.02
    assert found.low < limit < found.high
    needed = deciding_count(found, limit)
    assert needed is not None
    for count, is_decided in ((needed // 2, False), (2 * needed, True)):
        repeated = np.resize(values, count)
        more = mean_of(repeated.tolist(), "windows")
        assert (more.high < more.value + 0.02) == is_decided
    assert deciding_count(found, found.value) is None  # no count decides a tie
    assert deciding_count(found, found.high + 1) is None  # decided
    assert deciding_count(Estimate(1.0, math.nan, math.nan, 1, "windows"), 2.0) is None
