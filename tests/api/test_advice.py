"""Bad news comes first, with what of all that helps was not yet done."""

from __future__ import annotations

import re
from typing import Any

import pytest

import asymswap

CALIBRATION = asymswap.Calibration("digits", images=64)
POLISHED = asymswap.Calibration("digits", images=64, polish_steps=1)
TINY = {"ratio": 0.1}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"evaluate": "digits"}, r"top-1 falls by \d+\.\d+ points: calibrate .*`calibration=DIR`"),
        ({}, r"the output changes by \d+\.\d %: calibrate"),
        ({"calibration": CALIBRATION}, r"of the held-back inputs get another answer .*: polish it, `polish_minutes=5`"),
        ({"calibration": POLISHED}, "fine-tune it with the original as its teacher"),
    ],
)
def test_what_was_lost_comes_with_what_to_do_next(options: dict[str, Any], expected: str) -> None:
    warnings = asymswap.convert("digits-resnet", "3x3-only", overrides=TINY, **options).report.warnings
    assert re.search(expected, warnings[0])


@pytest.mark.parametrize(
    ("recipe", "options"),
    [
        ("acnet", {}),
        ("acnet", {"evaluate": "digits"}),
        ("half-macs", {"macs": 0.8, "calibration": CALIBRATION, "evaluate": "digits"}),
    ],
)
def test_where_little_was_lost_nothing_is_said(recipe: str, options: dict[str, Any]) -> None:
    assert asymswap.convert("digits-resnet", recipe, **options).report.warnings == ()


def test_lower_is_better_counts_the_other_way() -> None:
    error = asymswap.Metric(lambda model: {"error": 1.0}, lower_is_better={"error"})
    assert asymswap.convert("digits-resnet", "3x3-only", overrides=TINY, evaluate=error).report.warnings == ()
