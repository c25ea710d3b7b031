"""The search for the smallest fraction of the MACs with no more than an allowed loss, on losses known beforehand."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asymswap.errors import AsymswapError
from asymswap.planning.drop_budget import Drop, Search
from asymswap.results.evaluate import Score

FRACTIONS = [0.2 + 0.02 * step for step in range(40)]
PREDICTED = [2.0 * math.exp(-6 * fraction) * (1 - fraction) for fraction in FRACTIONS]


def searched(loss: Callable[[float], float], allowed: float, tries: int = 6) -> Search:
    search = Search(FRACTIONS, PREDICTED, allowed, tries=tries)
    while (fraction := search.next()) is not None:
        assert FRACTIONS[0] <= fraction <= FRACTIONS[-1]
        search.add(fraction, loss(fraction))
    return search


def predicted(fraction: float) -> float:
    return 2.0 * math.exp(-6 * fraction) * (1 - fraction)


@given(scale=st.floats(0.01, 10), power=st.floats(0.4, 1.6), part=st.floats(0.05, 0.95))
def test_the_smallest_fraction_is_found_by_few_trials(scale: float, power: float, part: float) -> None:
    def loss(fraction: float) -> float:
        return scale * predicted(fraction) ** power

    right = FRACTIONS[0] + part * (FRACTIONS[-1] - FRACTIONS[0])
    search = searched(loss, loss(right))
    assert search.best is not None
    fraction, lost = search.best
    assert lost == loss(fraction) <= loss(right)
    assert right <= fraction <= right + 0.03
    assert len(search.tried) <= 6


@given(
    losses=st.lists(st.sampled_from([0.0, 0.001, 0.004, 0.02, 0.3, math.nan, math.inf]), min_size=9, max_size=9),
    allowed=st.sampled_from([0.001, 0.005, 0.1]),
)
def test_what_is_found_was_measured_to_lose_no_more_whatever_the_losses_are(
    losses: list[float], allowed: float
) -> None:
    given_out = iter(losses)
    search = searched(lambda _: next(given_out), allowed)
    measured = losses[: len(search.tried)]
    within = [fraction for fraction, loss in search.tried if loss <= allowed]
    assert (search.best is None) == (not within) == (not any(loss <= allowed for loss in measured))
    assert search.best is None or search.best[0] == min(within)
    # Without any, the largest was tried.
    assert search.best is not None or search.tried[-1][0] == FRACTIONS[-1]


def test_the_ends_are_taken_where_the_answer_lies_there() -> None:
    nothing, everything = searched(lambda _: 0.0, 0.01), searched(lambda _: 0.5, 0.01)
    assert nothing.best is not None
    assert nothing.best[0] == FRACTIONS[0]
    assert everything.best is None
    assert len(everything.tried) <= 6


@pytest.mark.parametrize(
    ("text", "score", "allowed"),
    [
        (0.5, Score("top-1", 0.9, "%"), 0.005),
        ("0.5", Score("agreement", 1.0, "%"), 0.005),
        (" 0.5 % ", Score("mIoU", 0.7, "%"), 0.005),
        ("0.1dB", Score("PSNR", 30.0, "dB"), 0.1),
        ("0.1 db", Score("PSNR", 30.0, "dB"), 0.1),
        (0.1, Score("PSNR", 30.0, "dB"), 0.1),
        (0.02, Score("output error", 0.0, "%", lower_is_better=True), 0.02),
        ("2%", Score("output error", 0.0, "%", lower_is_better=True), 0.02),
        ("3e-1", Score("mine", 12.0), 0.3),
        ("0.3dB", Score("mine", 12.0), 0.3),
        ("3%", Score("mine", 0.9), 0.03),
    ],
)
def test_a_loss_is_in_the_unit_of_what_is_measured(text: float | str, score: Score, allowed: float) -> None:
    assert Drop.parse(text).allowed(score) == pytest.approx(allowed)


@pytest.mark.parametrize("text", ["", "much", "-1", "1 point", "nan", "inf", "1e999", "1..2", "0.1dBm", True, None])
def test_what_is_no_loss_is_refused(text: object) -> None:
    with pytest.raises(AsymswapError, match=r"is no loss that may be allowed; give 0\.5 \(points\), 0\.1dB or 2%"):
        Drop.parse(text)


@pytest.mark.parametrize(
    ("text", "score", "expected"),
    [
        ("0.1dB", Score("agreement", 1.0, "%"), r"0\.1 dB is in decibels, but what is measured is agreement; give po"),
        ("0.1dB", Score("output error", 0.0, "%", lower_is_better=True), "decibels need the right images: `noise=…`"),
        ("1%", Score("PSNR", 30.0, "dB"), r"1% is in per cent, but PSNR is in decibels; give 0\.1dB"),
        (
            2,
            Score("output error", 0.0, "%", lower_is_better=True),
            "an output error of 2 allows everything; give",
        ),
    ],
)
def test_another_unit_is_refused_with_what_to_give(text: float | str, score: Score, expected: str) -> None:
    with pytest.raises(AsymswapError, match=expected):
        Drop.parse(text).allowed(score)
