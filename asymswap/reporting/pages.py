"""HTML pages that need nothing beside them: a template, the style and the script that its own policy allows.

The template escapes whatever it is given, and no script runs but the one that the page was written with.
"""

from __future__ import annotations

import base64
import hashlib
from importlib import resources
from typing import Any

from asymswap.reporting.drawing import clean, svg_style, variables


def render(template: str, script: str | None = None, **values: Any) -> str:
    """The page of a template in `templates/`, with the style of all pages, and the named script if there is one."""
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
    style = variables() + svg_style() + _asset("report.css")
    code = "" if script is None else _asset(script)
    return environment.get_template(template).render(
        style=Markup(style), script=Markup(code), style_hash=_hash(style), script_hash=_hash(code), **values
    )


def _asset(name: str) -> str:
    return resources.files("asymswap.reporting").joinpath("templates", name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
