"""What the plots share; matplotlib is loaded only when one is drawn."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from typing import Any

from asymswap.reporting.format import clean


def new_figure(width: float, height: float) -> Any:
    """Return an empty figure of that many inches, which no window shows."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def add_legend(axes: Any, named: Sequence[tuple[Any, str]], **options: Any) -> None:
    """Add a legend with the names as they are: no `$` in one begins a formula, and no `_` before it hides it."""
    legend = axes.legend([line for line, _ in named], ["-"] * len(named), **options)
    for text, (_, name) in zip(legend.get_texts(), named, strict=True):
        text.set_parse_math(False)
        text.set_text(clean(name))


def picture_of(figure: Any, form: str) -> bytes:
    """Return the figure as an `svg` or `png` file; equal figures make equal files."""
    from matplotlib import rc_context

    buffer = io.BytesIO()
    # Without the date, and with names that are not random.
    with rc_context({"svg.hashsalt": "asymswap", "svg.fonttype": "none"}), warnings.catch_warnings():
        # Names may be in any script: in an SVG file the reader's font shows them, in a PNG file boxes stand for them.
        warnings.filterwarnings("ignore", "Glyph", UserWarning)
        figure.savefig(buffer, format=form, dpi=150, metadata={"Date": None} if form == "svg" else None)
    return buffer.getvalue()
