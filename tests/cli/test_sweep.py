"""`asymswap sweep` as it is typed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

COMMAND = [sys.executable, "-m", "asymswap", "sweep", "digits-resnet", "--recipe", "half-macs", "--evaluate", "digits"]


def run(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *options], cwd=folder, capture_output=True, text=True, timeout=300)


def test_a_sweep_writes_its_json_and_its_reports_and_goes_on(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    done = run(tmp_path, "--macs", "0.5", "--report", "s.md", "--report", "s.svg", "--report", "s.html")
    assert done.returncode == 0, done.stderr
    assert "advised: 0.5, the last" in done.stdout or "every budget loses" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["digits-resnet.sweep.json", "s.html", "s.md", "s.svg"]
    again = run(tmp_path, "--macs", "0.6,0.5", "--json")
    assert again.returncode == 0, again.stderr
    found = json.loads(again.stdout)
    assert found == json.loads((tmp_path / "digits-resnet.sweep.json").read_text())
    assert [point["budget"] for point in found["points"]] == [0.6, 0.5]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--macs", "x"), "--macs 'x' is neither from:to:step, such as 0.9:0.3:0.1, nor 0.6,0.5"),
        (("--macs", "0.5", "--params", "0.5"), "budgets are of --macs or of --params; give one of them"),
        (("--report", "s.pdf"), "--report s.pdf: the file must end in .html, .md, .svg or .png"),
        (("-o", "other.json"), "other.json is no sweep to resume"),
        (("-o", "."), "error: . is a folder; give a file name in it"),
        (("--polish", "10"), "--polish 10 is of calibration, which needs images: give --calibrate DATA"),
    ],
)
def test_what_cannot_be_done_is_told_in_one_line(tmp_path: Path, options: tuple[str, ...], message: str) -> None:
    (tmp_path / "other.json").write_text("{}")
    done = run(tmp_path, *options)
    assert done.returncode == 1
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["other.json"]
