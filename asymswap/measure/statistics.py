"""Intervals of an accuracy (Wilson), of a mean, and of a median by order statistics; McNemar's exact test."""

import math
from collections.abc import Sequence
from itertools import accumulate
from statistics import NormalDist, fmean, stdev

_Z = NormalDist().inv_cdf(0.975)  # deviations of the normal distribution within which 95 % lie


def wilson_interval(right: int, images: int) -> tuple[float, float]:
    """Return the 95 % interval of Wilson (1927, equation 4) for an accuracy with `right` of `images` sampled.

    Unlike the usual one it stays within 0 and 1, and has a width if none or all are right.
    """
    fraction, spread = right / images, _Z * _Z / images
    centre = (fraction + spread / 2) / (1 + spread)
    half = _Z / (1 + spread) * math.sqrt(fraction * (1 - fraction) / images + spread / (4 * images))
    # At the ends the two are equal but for rounding.
    return 0.0 if right == 0 else max(0.0, centre - half), 1.0 if right == images else min(1.0, centre + half)


def mean_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Return the normal 95 % interval of the mean of independent values; None for fewer than two."""
    if len(values) < 2:
        return None
    half = _Z * stdev(values) / math.sqrt(len(values))
    return fmean(values) - half, fmean(values) + half


def mcnemar_exact(only_first: int, only_second: int) -> float:
    """Return the two-sided p-value of McNemar's test (1947) in its exact form, for two models on the same images.

    Of equally good models, each is as likely to be the one that gets an image right alone: the p-value is the
    probability of a split at least as uneven, 1 without any such image.
    """
    images, fewer = only_first + only_second, min(only_first, only_second)
    term = total = 1
    for number in range(fewer):
        term = term * (images - number) // (number + 1)
        total += term
    # Whole numbers until here: the quotient is rounded once.
    return min(1.0, 2 * total / (1 << images))


def median_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float, float]:
    """Return two order statistics with the true median between them, and the confidence of that.

    For any distribution: each value is below the median with probability one half (Thompson, 1936). The interval of few
    values is their range, with less confidence: 94 % for five, 75 % for three.
    """
    ordered, number = sorted(values), len(values)
    ways = accumulate(math.comb(number, count) for count in range(number + 1))
    # The median lies between the values at these places, unless at most `place` values lie on one side of it.
    place = max(0, next(most for most, below in enumerate(ways) if 2 * below / (1 << number) > 1 - confidence) - 1)
    return ordered[place], ordered[number - 1 - place], min(confidence, 1 - 2 / (1 << number))
