"""Intervals and tests, against sums done by hand and against SciPy."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from asymswap.measure.statistics import mcnemar_exact, median_interval, wilson_interval


@pytest.mark.parametrize(
    ("first", "second", "p"),
    [
        (0, 0, 1.0),
        (1, 1, 1.0),
        (0, 5, 2 / 32),
        # 10 discordant images, 2 of the fewer: (1 + 10 + 45) / 1024, twice.
        (2, 8, 112 / 1024),
        (8, 2, 112 / 1024),
        (5, 5, 1.0),
    ],
)
def test_mcnemar_by_hand(first: int, second: int, p: float) -> None:
    assert mcnemar_exact(first, second) == pytest.approx(p, rel=1e-15)


@given(st.integers(0, 3000), st.integers(0, 3000))
def test_mcnemar_is_the_binomial_test(first: int, second: int) -> None:
    expected = stats.binomtest(first, first + second, 0.5).pvalue if first + second else 1.0
    assert mcnemar_exact(first, second) == pytest.approx(expected, rel=1e-9, abs=1e-200)  # where SciPy gives 0


def test_mcnemar_of_many_images_neither_overflows_nor_takes_long() -> None:
    assert mcnemar_exact(10_000, 10_000) == 1.0
    assert mcnemar_exact(9_800, 10_200) == pytest.approx(stats.binomtest(9_800, 20_000, 0.5).pvalue, rel=1e-9)
    assert mcnemar_exact(0, 20_000) == 0.0


@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_against_scipy(counts: tuple[int, int]) -> None:
    right, images = counts
    low, high = wilson_interval(right, images)
    expected = stats.binomtest(right, images).proportion_ci(0.95, method="wilson")
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert 0 <= low <= right / images <= high <= 1


def test_wilson_by_hand() -> None:
    # Of 10 images all right: the lower end is n / (n + z^2).
    z2 = 1.959963984540054**2
    assert wilson_interval(10, 10) == pytest.approx((10 / (10 + z2), 1.0))
    assert math.isclose(wilson_interval(0, 10)[1], z2 / (10 + z2))


def covers_all(number: int) -> float:
    """How surely the whole range of so many values holds the median: unless all fell on one side."""
    return float(1 - 2 * stats.binom.pmf(0, number, 0.5))


@given(st.integers(6, 2000), st.sampled_from([0.5, 0.9, 0.95, 0.99]))
def test_the_interval_of_a_median_is_the_shortest_that_is_sure_enough(number: int, confidence: float) -> None:
    """The median lies outside of the k-th values from both ends when at most k - 1 coins fall on one side."""
    low, high, sure = median_interval([float(value) for value in range(number)], confidence)
    assert sure == pytest.approx(min(confidence, covers_all(number)), rel=1e-12)
    assert low + high == number - 1
    covers = [1 - 2 * stats.binom.cdf(place, number, 0.5) for place in (int(low), int(low) + 1)]
    assert covers[0] >= confidence - 1e-9 or low == 0
    assert covers[1] < confidence + 1e-9 or low + 1 > high - 1


def test_the_interval_of_a_median_sorts_and_takes_all_of_few() -> None:
    assert median_interval([5.0, 1.0, 3.0]) == (1.0, 5.0, 0.75)
    assert median_interval([2.0]) == (2.0, 2.0, 0.0)
    assert median_interval([1.0, 2.0, 3.0, 4.0, 5.0]) == (1.0, 5.0, 0.9375)
    # Of 20 values, by the tables of the sign test, those in the places 6 and 15.
    assert median_interval([float(value) for value in range(20, 0, -1)]) == (6.0, 15.0, 0.95)
