"""A budget of loss: what is allowed, and the search for the smallest network that loses no more when measured.

One number is searched: the fraction of the MACs that a plan may keep. Each trial solves and measures a network, which
takes long; the errors that plans predict take no time, and the logarithm of the measured loss is nearly a straight line
over the logarithm of their sum of squares. So each next fraction is where that line, through the nearest trials on both
sides, meets the allowed loss.
"""

from __future__ import annotations

import math
import re
from bisect import insort_left
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, Literal

import numpy as np

from asymswap.errors import AsymswapError
from asymswap.results.evaluate import Score

_AIM = 0.95  # of the allowed loss: a step that aims at all of it would end above it as often as below
_NEAR = 0.9  # of the allowed loss, above which a network is small enough
_CLOSE = 0.01  # fractions of the MACs that are as good as equal
_FAR = 0.6  # of the way to the end, at most, in one step
_SLOPES = (0.3, 3.0)


@dataclass(frozen=True)
class Drop:
    """How much may be lost: a number, in the unit that was given with it."""

    value: float
    unit: Literal["", "%", "dB"] = ""

    @classmethod
    def parse(cls, given: Any) -> Drop:
        """Read 0.5, "2%" or "0.1dB"; raises AsymswapError for anything else."""
        number = r"(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:e[+-]?[0-9]+)?"
        found = re.fullmatch(rf"\s*({number})\s*(%|dB|)\s*", str(given), re.IGNORECASE)
        if found is None or isinstance(given, bool) or not math.isfinite(float(found[1])):
            raise AsymswapError(f"{given!s:.60} is no loss that may be allowed; give 0.5 (points), 0.1dB or 2%")
        return cls(float(found[1]), {"": "", "%": "%"}.get(found[2], "dB"))  # type: ignore[arg-type]

    def allowed(self, score: Score) -> float:
        """Return how much of a score may be lost, as its values are; raises AsymswapError for another unit than its.

        A number without a unit is in points of a score in per cent, else in the score's own unit; errors are fractions.
        """
        is_error = score.unit == "%" and score.lower_is_better
        if self.unit == "dB" and score.unit == "%":
            more = "give points, such as 0.5"
            if is_error:
                more = (
                    "give a relative error, such as 2%; decibels need the right images: `noise=…` for a denoiser, "
                    "pairs:INPUTS,TARGETS as data, or `evaluate=…`"
                )
            raise AsymswapError(f"{self} is in decibels, but what is measured is {score.name}; {more}")
        if self.unit == "%" and score.unit == "dB":
            raise AsymswapError(f"{self} is in per cent, but {score.name} is in decibels; give 0.1dB")
        if is_error and self.unit == "" and self.value >= 1:
            raise AsymswapError(f"an {score.name} of {self} allows everything; give 0.02 or 2%")
        return self.value / 100 if self.unit == "%" or (score.unit == "%" and not is_error) else self.value

    def __str__(self) -> str:
        return f"{self.value:g}{' ' * (self.unit == 'dB')}{self.unit}"


@dataclass
class Search:
    """Finds the smallest of rising `fractions` with at most the `allowed` loss: call `next`, measure, and `add`."""

    fractions: Sequence[float]
    predicted: Sequence[float]  # the error of each fraction's plan; between fractions it is interpolated
    allowed: float
    _: KW_ONLY
    grain: float = 0.0  # smallest difference that the measure can show
    start: float | None = None  # the first fraction to try, by default the middle
    first_slope: float = 0.7  # of the line through a single trial
    tries: int = 6
    tried: list[tuple[float, float]] = field(default_factory=list)  # fractions with their losses, by the fractions

    def __post_init__(self) -> None:
        # More MACs never predict a larger error, but for what is spent off the hulls.
        falling = np.minimum.accumulate(np.log(np.maximum(self.predicted, 1e-12)))
        # Equal predictions have no inverse: each is a little below the one before.
        self._predicted = falling - 1e-9 * np.arange(len(falling))

    def add(self, fraction: float, loss: float) -> None:
        """Take a measured loss."""
        insort_left(self.tried, (fraction, loss if math.isfinite(loss) else math.inf))

    @property
    def best(self) -> tuple[float, float] | None:
        """The smallest fraction tried with at most the allowed loss, and its loss."""
        return next((trial for trial in self.tried if trial[1] <= self.allowed), None)

    @property
    def slope(self) -> float:
        """The slope of the line through the two trials that are nearest to the allowed loss."""
        if len(self.tried) < 2:
            return self.first_slope
        after = next((n for n, (_, loss) in enumerate(self.tried) if loss <= self.allowed), len(self.tried))
        start = min(max(after - 1, 0), len(self.tried) - 2)
        (more, high), (less, low) = map(self._place, self.tried[start : start + 2])
        return min(max((high - low) / max(more - less, 1e-9), _SLOPES[0]), _SLOPES[1])

    def next(self) -> float | None:
        """Return the fraction to try next; None where the best is good enough, or nothing is left to try."""
        if not self.tried:
            return (self.fractions[0] + self.fractions[-1]) / 2 if self.start is None else self.start
        best, least, most = self.best, self.fractions[0], self.fractions[-1]
        # Where noise puts a loss above the allowed one beyond the best, it does not matter.
        outside = next((one for one in reversed(self.tried) if best is None or one[0] < best[0]), None)
        if best is None and self.tried[-1][0] >= most:
            return None
        if best is None and len(self.tried) >= self.tries - 1:
            return most
        if best is not None:
            near = best[1] >= min(_NEAR * self.allowed, self.allowed - self.grain)
            close = best[0] <= least or (outside is not None and best[0] - outside[0] <= _CLOSE)
            if near or close or len(self.tried) >= self.tries:
                return None
        aim = math.log(_AIM * self.allowed)
        if best and outside:
            (good, low), (bad, high) = map(self._place, (best, outside))
            share = (aim - low) / max(high - low, 1e-9)
            found = self._fraction(good + min(max(share, 0.15), 0.85) * (bad - good))
        else:
            # Where a line through the trials, all on one side of the allowed loss, meets it.
            nearest = best or self.tried[-1]
            x, y = self._place(nearest)
            found, end = self._fraction(x + (aim - y) / self.slope), least if y <= aim else most
            # A loss of nothing says little about how far there is to go.
            far = nearest[0] + _FAR * (end - nearest[0])
            if abs(end - nearest[0]) > 5 * _CLOSE:
                found = max(found, far) if end < nearest[0] else min(found, far)
            elif abs(found - nearest[0]) > _CLOSE:
                found = end
        return min(max(found, least), most)

    def _place(self, trial: tuple[float, float]) -> tuple[float, float]:
        """Return the logarithms of a trial's predicted error and of its loss, which may have been nothing at all."""
        fraction, loss = trial
        loss = min(max(loss, self.allowed / 10), 300 * self.allowed)
        return float(np.interp(fraction, self.fractions, self._predicted)), math.log(loss)

    def _fraction(self, predicted: float) -> float:
        return float(np.interp(predicted, self._predicted[::-1], self.fractions[::-1]))
