"""Pictures by matplotlib, which is loaded only when one is drawn."""

from __future__ import annotations

import io
from typing import Any


def new_figure(width: float, height: float) -> Any:
    """An empty figure of so many inches, which no window shows."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def picture_of(figure: Any, form: str) -> bytes:
    """The figure as an `svg` or `png` file; equal figures make equal files."""
    from matplotlib import rc_context

    buffer = io.BytesIO()
    # Without the date, and with names that are not random.
    with rc_context({"svg.hashsalt": "asymswap", "svg.fonttype": "none"}):
        figure.savefig(buffer, format=form, dpi=150, metadata={"Date": None} if form == "svg" else None)
    return buffer.getvalue()
