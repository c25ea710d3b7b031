"""HTML pages and plots: whole files, for which jinja2 and matplotlib are loaded only when one is made."""

import base64
import hashlib
import io
import warnings
from collections.abc import Sequence
from importlib import resources
from typing import Any

from asymswap.reporting import format as fmt


def render(template: str, script: str | None = None, sheet: str = "report.css", **values: Any) -> str:
    """Return the page of a template, all values escaped; its policy allows only its own style and script, no files."""
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("asymswap.reporting", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: fmt.clean(value) if type(value) is str else value,  # not what is Markup already
    )
    folder = resources.files("asymswap.reporting").joinpath("templates")
    # The policy of a page allows no style attributes: lengths of bars are classes.
    lengths = "".join(f".w{percent}{{width:{percent}%}}.h{percent}{{height:{percent}%}}" for percent in range(101))
    for name, file in (("style", sheet), ("script", script)):
        if file is not None:
            text = folder.joinpath(file).read_text(encoding="utf-8") + lengths * (file == "report.css")
            digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
            values |= {name: Markup(text), f"{name}_hash": f"sha256-{digest}"}
    return environment.get_template(template).render(fmt=fmt, percent_of=percent_of, **values)


def percent_of(value: float, most: float) -> int:
    """Return the length of a value's bar in per cent of the longest; a value above zero is always visible."""
    if not value > 0:  # nan is not, either
        return 0
    return 100 if value >= most else max(1, round(100 * value / most))


def new_figure(width: float, height: float) -> Any:
    """Return an empty figure of this size in inches, without a window."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def add_legend(axes: Any, named: Sequence[tuple[Any, str]], **options: Any) -> None:
    """Add a legend with the names as they are: no `$` in one begins a formula, and no `_` before it hides it."""
    legend = axes.legend([line for line, _ in named], ["-"] * len(named), **options)
    for text, (_, name) in zip(legend.get_texts(), named, strict=True):
        text.set_parse_math(False)
        text.set_text(fmt.clean(name))


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
