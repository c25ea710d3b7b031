"""HTML pages that need nothing beside them: a template, the style, and the one script that its own policy allows.

The template escapes whatever it is given.
"""

from __future__ import annotations

import base64
import hashlib
from importlib import resources
from typing import Any

from asymswap.reporting.format import clean


def render(template: str, script: str | None = None, **values: Any) -> str:
    """Return the page of a template in `templates/`, with the style of all pages, and the named script if any."""
    import jinja2
    from markupsafe import Markup

    def shown(value: Any) -> Any:
        return clean(value) if isinstance(value, str) and not isinstance(value, Markup) else value

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("asymswap.reporting", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=shown,
    )
    # The policy of a page allows no style attributes: lengths of bars are classes.
    lengths = "".join(f".w{percent}{{width:{percent}%}}.h{percent}{{height:{percent}%}}" for percent in range(101))
    style = _asset("report.css") + lengths
    code = "" if script is None else _asset(script)
    return environment.get_template(template).render(
        style=Markup(style),
        script=Markup(code),
        style_hash=_hash(style),
        script_hash=_hash(code),
        **values,
    )


def percent_of(value: float, most: float) -> int:
    """Return how long the bar of a value is, in per cent of the longest; what is not zero can be seen."""
    if not value > 0:  # nan is not, either
        return 0
    return 100 if value >= most else max(1, round(100 * value / most))


def _asset(name: str) -> str:
    return resources.files("asymswap.reporting").joinpath("templates", name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
