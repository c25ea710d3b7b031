"""How sure one can be of an accuracy, and of a difference of two: Wilson's interval and McNemar's exact test."""

from __future__ import annotations

import math
from statistics import NormalDist


def wilson_interval(right: int, images: int, confidence: float = 0.95) -> tuple[float, float]:
    """The interval of Wilson (1927, equation 4) for the fraction of images that a model gets right, of which `right`
    of `images` are known; unlike the usual one it stays within 0 and 1, and has a width where none or all are right.
    """
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    fraction, spread = right / images, z * z / images
    centre = (fraction + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(fraction * (1 - fraction) / images + spread / (4 * images))
    # At the ends the two are equal but for rounding.
    low = 0.0 if right == 0 else max(0.0, centre - half)
    return low, 1.0 if right == images else min(1.0, centre + half)


def mcnemar_exact(only_first: int, only_second: int) -> float:
    """The two-sided p-value of McNemar's test (1947) in its exact form, for two models on the same images.

    Of the images that one model alone gets right, each would be either's with probability one half if the models were
    equally good: how likely a split is that is at least as uneven as this one. 1 where there are none.
    """
    images, fewer = only_first + only_second, min(only_first, only_second)
    term = total = 1
    for number in range(fewer):
        term = term * (images - number) // (number + 1)
        total += term
    # Whole numbers until here: the quotient is rounded once.
    return min(1.0, 2 * total / (1 << images))
