"""How far a network answers as another one does, on inputs without labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Measure = Literal["top-1", "cosine", "PSNR", "relative error"]


@dataclass(frozen=True)
class OutputAgreement:
    """One output, by its name (empty if it is the only one).

    `top-1` is the fraction of samples, or of pixels, with the same class, with Wilson's 95 % interval; `cosine` the
    mean cosine of the angle between embeddings; `PSNR` decibels between images of this `peak`; `relative error`,
    which `relative` holds in any case, the norm of the difference over the norm of the first network's output.
    """

    output: str
    measure: Measure
    value: float
    relative: float
    interval: tuple[float, float] | None = None
    peak: float | None = None


@dataclass(frozen=True)
class Agreement:
    """How far two networks agree on `samples` held-back inputs, output by output."""

    inputs: str
    samples: int
    outputs: tuple[OutputAgreement, ...]
