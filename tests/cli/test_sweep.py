"""`asymswap sweep` as it is typed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

COMMAND = ("sweep", "digits-resnet", "--recipe", "half-macs", "--evaluate", "digits")


def test_a_sweep_writes_its_json_and_its_reports_and_goes_on(run: Callable[..., Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    done = run(*COMMAND, "--macs", "0.5", "--report", "s.md", "--report", "s.svg", "--report", "s.html")
    assert done.code == 0, done.err
    assert "advised: 0.5, the last" in done.out or "every budget loses" in done.out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["digits-resnet.sweep.json", "s.html", "s.md", "s.svg"]
    again = run(*COMMAND, "--macs", "0.6,0.5", "--json")
    assert again.code == 0, again.err
    found = json.loads(again.out)
    assert found == json.loads((tmp_path / "digits-resnet.sweep.json").read_text())
    assert [point["budget"] for point in found["points"]] == [0.6, 0.5]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--macs", "x"), "--macs 'x' is neither from:to:step, such as 0.9:0.3:0.1, nor 0.6,0.5"),
        (("--macs", "0.5", "--params", "0.5"), "budgets are of --macs, of --params or of --latency; give one of them"),
        (("--report", "s.pdf"), "--report s.pdf: the file must end in .html, .md, .svg or .png"),
        (("-o", "other.json"), "other.json is no sweep to resume"),
        (("-o", "."), ". is a folder; give a file name in it"),
        (("--polish", "10"), "--polish 10 is of calibration, which needs images: give --calibrate DATA"),
    ],
)
def test_what_cannot_be_done_is_told_in_one_line(
    refusal: Callable[..., str], options: tuple[str, ...], message: str
) -> None:
    Path("other.json").write_text("{}")
    assert message in refusal(*COMMAND, *options)
