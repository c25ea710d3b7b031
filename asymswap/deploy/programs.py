"""What makes programs out of models (exporters, compilers): kept quiet, failing in one line, and held to PyTorch."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator

from torch import Tensor

from asymswap.errors import AsymswapError

SAME = 1e-4
"""How far a program's outputs may be from PyTorch's, relative to the largest number among them, or to 1."""


def gap(wanted: Tensor, found: Tensor) -> tuple[float, float]:
    """The largest difference of two outputs of one shape, and the largest number of the first; 0 of empty ones."""
    if not wanted.numel():
        return 0.0, 0.0
    exact = wanted.double()
    return float((exact - found.double()).abs().max()), float(exact.abs().max())


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
