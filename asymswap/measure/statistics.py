"""How sure one can be of an accuracy, of a difference of two, and of a median.

Wilson's interval, McNemar's exact test, and the interval between order statistics.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
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


def median_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float, float]:
    """The interval between two order statistics that holds the true median with that confidence, which comes third.

    It assumes nothing of the distribution: each value lies below the median as a coin falls (Thompson 1936). Of few
    values it is all of their range, and the confidence less: five hold the median with 94 %, three with 75 %.
    """
    ordered, number = sorted(values), len(values)
    place, term, below = 0, 1, 1
    # Between the values at these places from both ends it lies, unless at most `place` of them lie on one side of it.
    while True:
        term = term * (number - place) // (place + 1)
        below += term
        if 2 * below / (1 << number) > 1 - confidence:
            return ordered[place], ordered[number - 1 - place], min(confidence, 1 - 2 / (1 << number))
        place += 1
