"""A few of the killed processes of benchmarks/kill.py."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.nightly
def test_a_killed_conversion_leaves_its_output_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    kill = importlib.import_module("kill")
    wanted = argparse.Namespace(kills=3, seed=0, workers=1)
    found = kill.killed_convert(tmp_path, wanted, lambda line: None)
    assert found["faults"] == []
    assert sum(found["ends"].values()) == 3
