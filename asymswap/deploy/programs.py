"""What makes programs out of models (exporters, compilers): kept quiet, failing in one line, and held to PyTorch."""

from __future__ import annotations

import contextlib
import io
import logging
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from asymswap.errors import AsymswapError
from asymswap.utils.tensors import list_tensors

SAME = 1e-4
"""How far a program's outputs may be from PyTorch's, relative to the largest number among them, or to 1.

Where eight times the precision of the output's dtype is more, so far.
"""


@dataclass(frozen=True)
class Gap:
    """The largest difference between an output of a program and PyTorch's, and the largest that is allowed."""

    largest: float
    allowed: float

    @property
    def share(self) -> float:
        """The difference as a share of what is allowed; infinite where there is a NaN or an infinity."""
        return self.largest / self.allowed if math.isfinite(self.largest) else math.inf


def widest_gap(wanted: Any, found: Any) -> Gap:
    """The gap of that output which is farthest from PyTorch's, as a share of what is allowed there."""
    ours, theirs = list_tensors(wanted), list_tensors(found)
    if [one.shape for one in ours] != [other.shape for other in theirs]:
        return Gap(math.inf, SAME)
    return max(map(_gap, ours, theirs), key=lambda gap: gap.share, default=Gap(0.0, SAME))


def _gap(wanted: Tensor, found: Tensor) -> Gap:
    if not wanted.numel():
        return Gap(0.0, SAME)
    precision = torch.finfo(wanted.dtype).eps if wanted.is_floating_point() else 0.0
    exact = wanted.double()
    largest, scale = float((exact - found.double()).abs().max()), float(exact.abs().max())
    return Gap(largest, max(SAME, 8 * precision) * max(1.0, scale))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Exporters talk about their own insides; what matters is told by the checks afterwards."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


@contextlib.contextmanager
def failing_clearly(what: str) -> Iterator[None]:
    """Raise AsymswapError where `what` fails, with its reason on one line."""
    try:
        yield
    except (AsymswapError, OSError):
        raise
    except Exception as error:
        # An exporter may fail in any of its many passes, with any error.
        reason = " ".join((str(error) or type(error).__name__).split())[:200]
        raise AsymswapError(f"{what} cannot express this model: {reason} (--debug shows where)") from error
