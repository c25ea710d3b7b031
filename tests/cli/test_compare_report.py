"""`compare --report`: the same comparison as a page, as Markdown and as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest


def test_the_three_forms_say_the_same(run: Any, tmp_path: Path) -> None:
    run("convert", "digits-resnet", "--recipe", "3x3-only", "-o", "a.pt", "--quiet")
    line = ("compare", "digits-resnet", "a.pt", "--no-latency", "--data", "digits")
    printed = {form: run(*line, "--report", f"c.{form}", "--json") for form in ("html", "md", "json")}
    told = json.loads(Path("c.json").read_text())
    assert told == json.loads(printed["json"].out)
    page, markdown = Path("c.html").read_text(), Path("c.md").read_text()
    for text in (page, markdown):
        assert "a.pt" in text
        assert all(f"{100 * row['scores'][0]['value']:.2f} %" in text for row in told["models"])
    assert "Content-Security-Policy" in page
    assert "http" not in page.replace("http-equiv", "")


@pytest.mark.parametrize(
    ("name", "expected"), [("c.txt", "must end in .html, .json or .md"), ("no/c.md", "does not exist")]
)
def test_a_report_that_cannot_be_written_is_refused_first(refusal: Any, name: str, expected: str) -> None:
    assert expected in refusal("compare", "digits-resnet", "digits-resnet", "--report", name)
