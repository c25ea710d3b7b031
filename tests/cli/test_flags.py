"""Arguments that the library names, as options of the running command."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from asymswap.cli import failures
from asymswap.cli.commands import command
from asymswap.cli.failures import in_flags


@dataclass(frozen=True)
class Record:
    """Texts at several depths."""

    notes: tuple[str, ...]
    about: dict[str, list[str]]
    number: float = 0.5
    path: Path | None = None


def run(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    options = {one.name: one for one in command(name).params if one.param_type_name == "option"}
    monkeypatch.setattr(failures, "options", options)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("`force=True`", "--force"),
        ("`arch=…`", "--arch"),
        ("`arch=`", "--arch"),
        ('give `weights=FILE` or `weights="none"`', "give --weights FILE or --weights none"),
        ("`arch='net.py:build'`", "--arch net.py:build"),
        ("`input_size=(3, 224, 224)`", "--input 3x224x224"),
        ("`size=(8, 9)`", "--size 8x9"),
        ("`mean=(0.5, 0.25)`", "--mean 0.5,0.25"),
        ("`arguments={'depth': 3, 'width': …}`", "--arg depth=3 --arg width=…"),
        ("`overrides={'rank': 8, 'bias': True}`", "--set rank=8 --set bias=true"),
        ("`arch={[]: 1}` `arch=((((`", "--arch {[]: 1} --arch (((("),
        ("`PreprocessingOptions(normalize=…)` or `PreprocessingOptions(size=(8, 9))`", "--normalize or --size 8x9"),
        ("`sequential=False`", "--no-sequential"),
        ("`calibration=…`", "--calibrate"),
        ("`data='a b'`", "--calibrate 'a b'"),
        ("`images=0`", "--calibration-images 0"),
        ("`polish_minutes=5`", "--polish 5min"),
        ("`polish_steps=500`", "--polish 500"),
        ("`memory_gib=1.5`", "--calibration-memory 1.5"),
        ("`macs=None`", "no --macs"),
        ("`learning_rate=1` and `model.eval()`", "`learning_rate=1` and `model.eval()`"),
        ("`model=…`", "`model=…`"),
    ],
)
def test_an_argument_is_named_as_the_option(monkeypatch: pytest.MonkeyPatch, text: str, shown: str) -> None:
    run(monkeypatch, "convert")
    assert in_flags(text) == shown


def test_it_depends_on_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    run(monkeypatch, "evaluate")
    assert in_flags('`data=…`, `part="validation"`') == "--data, --part validation"
    run(monkeypatch, "export")
    assert in_flags('`form="pt2"`, `fuse=False`, `rank=…`') == "--to pt2, --no-fuse, `rank=…`"
    run(monkeypatch, "benchmark")
    assert in_flags("`runtimes=['torch', 'onnxruntime']`") == "--runtime torch --runtime onnxruntime"


def test_records_are_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    run(monkeypatch, "convert")
    record = Record(("give `arch=…`",), {"`key=…`": ["`seed=1`"]}, path=Path("`seed=1`"))
    assert in_flags(record) == Record(("give --arch",), {"`key=…`": ["--seed 1"]}, path=Path("`seed=1`"))
    assert record.notes == ("give `arch=…`",)


def test_without_a_command_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failures, "options", {})
    assert in_flags("`arch=…`") == "`arch=…`"
