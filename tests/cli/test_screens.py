"""Every screen of the command line, on a pseudo-terminal of 80 columns, and some at 120, beside the recorded one.

`pytest tests/cli/test_screens.py --record-screens` records them again; the difference is to be read before it is kept.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import pkgutil
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.rich_utils
from screens import Screen, masked, on_terminal, read_screen, same

import asymswap
from asymswap.checkpoint import read_checkpoint
from asymswap.cli.commands import SUMMARIES
from asymswap.cli.main import main
from asymswap.measure.latency import Timed
from asymswap.models.converted import save_checkpoint
from asymswap.results.benchmark import Result
from asymswap.types import Ratio, Seconds

GOLDEN = Path(__file__).parents[1] / "golden"
MADE_BY = GOLDEN / "made-by.txt"
WIDE = {
    "benchmark",
    "candidates",
    "candidates-long-names",
    "candidates-recipe",
    "compare",
    "convert",
    "convert-kinds",
    "evaluate",
}
"""Screens that show more at 120 columns: the rest is recorded at 80 alone."""
COMMANDS = sorted(SUMMARIES)

RESULTS = {
    "candidates": "candidates digits-resnet",
    "candidates-recipe": "candidates digits-resnet --recipe mixed",
    "candidates-long-names": "candidates inception_v3 --weights none",
    "candidates-little": "candidates swin_t --weights none",
    "recipes": "recipes",
    "recipes-check": "recipes mine.toml",
    "convert": "convert digits-resnet --recipe 3x3-only --dry-run --evaluate digits",
    "convert-kinds": "convert digits-resnet --recipe mixed --dry-run",
    "convert-calibrated": (
        "convert digits-resnet --recipe half-macs --calibrate digits --calibration-images 64 --no-sequential --dry-run"
    ),
    "show": "show digits.pt",
    "show-twice": "show twice.pt",
    "show-offsets": "show moved.pt --offsets",
    "compare": "compare digits-resnet digits.pt --data digits --images 100",
    "compare-three": "compare digits-resnet digits.pt twice.pt --no-latency",
    "benchmark": "benchmark digits-resnet digits.pt --threads 1 --layers 3",
    "sweep": "sweep digits-resnet --recipe half-macs --recipe last.toml --macs 0.6,0.4,0.1 --evaluate digits",
    "evaluate": "evaluate digits-resnet digits.pt --data digits",
    "finetune": "finetune digits.pt --data digits --steps 8 --workers 0 --device cpu",
    "fuse": "fuse moved.pt",
    "export": "export digits.pt --to pt2",
}
# These end with code 1, in one line however long, or with 2, which is Typer's.
ERRORS = {
    "error-model": ("convert resnet81 --recipe 3x3-only", 1),
    "error-recipe": ("convert digits-resnet --recipe 3x3", 1),
    "error-exists": ("convert digits-resnet --recipe 3x3-only -o digits.pt", 1),
    "error-file": ("show broken.pt", 1),
    "error-data": ("evaluate digits-resnet --data nowhere/", 1),
    "error-budget": ("sweep digits-resnet --recipe half-macs --evaluate digits --macs 1.5", 1),
    "error-nothing": ("convert digits-resnet --recipe inception-7x7 --dry-run", 1),
    "error-usage": ("convert", 2),
    "error-option": ("compare digits-resnet --macs 0.5", 2),
    "error-command": ("covnert digits-resnet", 2),
}
HELPS = {"help": "--help", **{f"help-{name}": f"{name} --help" for name in COMMANDS}}
Recorded = Callable[[str, int, str, str], None]

LAST = """
[[rules]]
match = { names = "layer2.*" }
swap = { kind = "separable" }

[budget]
macs = 0.9
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command lines name: recipes, a file that is no model, and three converted ones."""
    made = tmp_path_factory.mktemp("screens")
    (made / "mine.toml").write_text('[[rules]]\nmatch = { kernel = "3x3" }\nswap = { kind = "acb" }\n')
    (made / "last.toml").write_text(LAST)
    (made / "broken.pt").write_bytes(b"no checkpoint" * 9)
    conversion = asymswap.convert("digits-resnet", "3x3-only")
    asymswap.save(conversion, made / "digits.pt")
    with contextlib.chdir(made):  # its path stands in the report
        asymswap.save(asymswap.convert("digits.pt", "all-spatial", overrides={"rank": 2}), "twice.pt")
    asymswap.save(asymswap.convert("digits-resnet", "offset"), made / "moved.pt")
    _move_taps(made / "moved.pt")
    return made


def _move_taps(path: Path) -> None:
    """Some taps of some layers go some way, as training would make them."""
    model, header = asymswap.load(path), read_checkpoint(path).header
    offsets = [tensor for name, tensor in model.named_parameters() if name.endswith("raw_offsets")]
    with torch.no_grad():
        for number, tensor in enumerate(offsets[:5]):
            tensor.copy_(0.3 * number * torch.sin(torch.arange(1.0, tensor.numel() + 1)).reshape(tensor.shape))
    save_checkpoint(path, model, header)


class Show:
    """Runs command lines."""

    def __init__(self, source: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._source, self._folder, self._monkeypatch = source, folder, monkeypatch

    def __call__(self, line: str, width: int) -> tuple[Screen, int]:
        """In a terminal of so many columns: the screen, and the exit code; each command finds the folder as it was."""
        shutil.rmtree(self._folder, ignore_errors=True)
        self._monkeypatch.chdir(shutil.copytree(self._source, self._folder))
        codes: list[int] = []
        sent = on_terminal(width, lambda: codes.append(self.piped(line)))
        return read_screen(sent, width), codes[0]

    def piped(self, line: str) -> int:
        """With whatever stands for the output now; the exit code."""
        self._monkeypatch.setattr(sys, "argv", ["asymswap", *shlex.split(line)])
        with pytest.raises(SystemExit) as stop:
            main()
        return int(stop.value.code or 0)


@pytest.fixture
def show(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> Show:
    """Runs command lines in a folder of their own, which holds what they name."""
    here = tmp_path / "here"
    monkeypatch.chdir(shutil.copytree(folder, here))
    monkeypatch.setenv("TERM", "xterm-256color")
    for name in ("FORCE_COLOR", "NO_COLOR", "COLUMNS", "LINES", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(typer.rich_utils, "FORCE_TERMINAL", None)
    monkeypatch.setattr(typer.rich_utils, "MAX_WIDTH", None)
    # Else a help would call the command by the name of what runs the tests.
    monkeypatch.setattr(sys.modules["__main__"], "__package__", "", raising=False)
    # What the machine tells, where it would change how tables and lines are set.
    monkeypatch.setattr("asymswap.api.compare.machine", lambda: {"processor": "a processor"})
    times = [
        Result(0, 0, Seconds(0.001, 0.00125, 0.01)),
        Result(1, 0, Seconds(0.0005, 0.000625, 0.02), ratio=Ratio(0.5, 0.49, 0.52)),
        Result(2, 0, Seconds(0.0004, 0.0005, 0.03), ratio=Ratio(0.4, 0.36, 0.43)),
    ]
    monkeypatch.setattr("asymswap.api.compare.time_in_turn", lambda opened, timing, progress: times[: len(opened)])
    monkeypatch.setattr("asymswap.api.benchmark.machine", lambda: {"processor": "a processor", "cores": 2})
    monkeypatch.setattr("asymswap.api.benchmark.take_turns", _turns)
    for place in ONCE:
        monkeypatch.setattr(place, _once(pkgutil.resolve_name(place)))
    return Show(folder, here, monkeypatch)


ONCE = (
    "asymswap.api.candidates.candidates",
    "asymswap.api.convert.convert",
    "asymswap.api.evaluate.evaluate",
    "asymswap.api.compare.compare",
    "asymswap.api.sweep.sweep",
)
"""Verbs that only return a result: where a test shows it at several widths, it is computed once."""


def _once(verb: Callable[..., object]) -> Callable[..., object]:
    known: dict[str, object] = {}

    def call(*arguments: object, **options: object) -> object:
        line = " ".join(sys.argv)
        if line not in known:
            known[line] = verb(*arguments, **options)
        return known[line]

    return call


def _turns(turns: Mapping[Any, Any], *, rounds: int, **_: object) -> dict[Any, list[list[Any]]]:
    """The later the model and the setting, the faster; even rounds take a hundredth more."""
    if 0 in turns:
        return _layers(turns)
    return {
        (model, setting): [[1.01 ** (number % 2) * 1e-3 / (1 + model + setting / 4)] for number in range(rounds)]
        for model, setting in turns
    }


def _layers(turns: Mapping[Any, Any]) -> dict[Any, list[list[Any]]]:
    """The later the layer, the longer it takes; the last model's take half of it."""
    *_, names = turns[0].measure.args
    layers = {name: 1e-5 * number for number, name in enumerate(names, start=1)}
    return {
        key: [[Timed(1.0, {name: one / part for name, one in layers.items()}, 1e-4, 1.0)]]
        for part, key in enumerate(turns, start=1)
    }


@pytest.fixture
def recorded(request: pytest.FixtureRequest) -> Recorded:
    """Compares a screen with the recorded one, or records it where that is asked for."""

    def check(name: str, width: int, line: str, text: str) -> None:
        path = GOLDEN / f"{name}.{width}.txt"
        text = f"$ asymswap {line}\n{masked(text)}"
        if request.config.getoption("--record-screens"):
            path.write_text(text, encoding="utf-8")
        assert path.exists(), f"{path.name} has not been recorded yet: pytest {__file__} --record-screens"
        known = path.read_text(encoding="utf-8")
        if not same(known, text):
            assert text == known

    return check


def widths(name: str) -> tuple[int, ...]:
    """The widths at which a screen is recorded."""
    return (80, 120) if name in WIDE else (80,)


def check_layout(screen: Screen) -> None:
    """What holds for each screen: it fits, nothing is cut, nothing is left of progress, and colour is rare."""
    assert screen.runs_over == []
    assert "…" not in screen.text.replace("net.py:Net …", "")
    assert "━" not in screen.text
    assert "loading" not in screen.text
    assert "pytest" not in screen.text


@pytest.mark.parametrize("name", RESULTS)
def test_results(name: str, show: Show, recorded: Recorded) -> None:
    for width in widths(name):
        screen, code = show(RESULTS[name], width)
        assert code == 0, screen.text
        check_layout(screen)
        assert screen.styles <= {"bold", "dim", "yellow"}
        recorded(name, width, RESULTS[name], screen.text)


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str, show: Show, recorded: Recorded, request: pytest.FixtureRequest) -> None:
    line, code = ERRORS[name]
    screen, ended = show(line, 80)
    assert ended == code, screen.text
    if code == 1:
        # One line for programs to find; the terminal breaks it where it must.
        assert screen.text.startswith("error: ")
        assert not screen.styles
    else:
        _skip_other_layouts(request)
    recorded(name, 80, line, screen.text)


@pytest.mark.parametrize("name", HELPS)
def test_helps(name: str, show: Show, recorded: Recorded, request: pytest.FixtureRequest) -> None:
    screen, code = show(HELPS[name], 80)
    assert code == 0
    check_layout(screen)
    assert ("Try: asymswap " if name == "help" else "Example: asymswap ") in screen.text
    _skip_other_layouts(request)
    recorded(name, 80, HELPS[name], screen.text)


def _skip_other_layouts(request: pytest.FixtureRequest) -> None:
    """What typer and rich print themselves, helps and errors of usage, looks another way in another version of them."""
    versions = {name: importlib.metadata.version(name).split(".")[:2] for name in ("typer", "rich")}
    layout = ", ".join(f"{name} {'.'.join(version)}" for name, version in versions.items()) + "\n"
    if request.config.getoption("--record-screens"):
        MADE_BY.write_text(layout, encoding="utf-8")
    if MADE_BY.read_text(encoding="utf-8") != layout:
        pytest.skip(f"this was recorded with {MADE_BY.read_text().strip()}, and here is {layout.strip()}")


def test_nothing_is_recorded_that_no_test_reads() -> None:
    names = {f"{name}.{width}.txt" for name in (*RESULTS, *ERRORS, *HELPS) for width in widths(name)}
    assert {path.name for path in GOLDEN.iterdir()} == {*names, MADE_BY.name}


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in ("task", "doctor")])
def test_a_help_has_its_options_in_groups(name: str, show: Show) -> None:
    """No more than nine stand in one box without a name of its own: what they are for must be seen at a glance."""
    text = show(f"{name} --help-all", 120)[0].text
    boxes = re.findall(r"─ ([A-Z][^─]*) ─+╮\n(.*?)╰", text, re.DOTALL)
    options = {title: len(re.findall(r"^│ +\*? *--", box, re.MULTILINE)) for title, box in boxes}
    assert options.get("Options", 0) <= 9, options
    assert sum(options.values()) > 4
    assert boxes[-1][0].strip() == "In all commands"


def test_the_help_of_convert_is_a_screen_of_what_most_need(show: Show) -> None:
    short, whole = (show(f"convert {flag}", 80)[0].text for flag in ("--help", "--help-all"))
    assert len(short.splitlines()) <= 60
    assert "--help-all" in short
    named = [set(re.findall(r"^│ +\*? *(--[a-z-]+)", text, re.MULTILINE)) for text in (short, whole)]
    assert named[0] < named[1]
    assert {"--recipe", "--macs", "--calibrate", "--polish", "--evaluate", "--arch", "--task"} <= named[0]
    assert "<bool>" not in whole


CONTROLS = re.compile(r"\x1b\[(\?25[hl]|2K|1A)")
"""Those by which progress makes room for itself and goes away."""


class TestWithoutColour:
    """What programs and people get who want none."""

    @pytest.mark.parametrize("name", ["candidates", "recipes", "show", "evaluate", "finetune", "error-model"])
    def test_no_color_leaves_not_a_single_style(self, name: str, show: Show, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("NO_COLOR", "1")
        monkeypatch.setenv("_TYPER_FORCE_DISABLE_TERMINAL", "1")  # main() sets it; here it is taken back
        line = RESULTS[name] if name in RESULTS else ERRORS[name][0]
        assert "\x1b[" not in CONTROLS.sub("", show(line, 80)[0].sent)

    @pytest.mark.parametrize("name", ["help-convert", "error-usage"])
    def test_nor_in_what_typer_prints(self, name: str, folder: Path) -> None:
        line = HELPS[name] if name in HELPS else ERRORS[name][0]
        environment = {**os.environ, "NO_COLOR": "1", "TERM": "xterm-256color"}
        for variable in ("FORCE_COLOR", "COLUMNS", "GITHUB_ACTIONS", "PY_COLORS", "_TYPER_FORCE_DISABLE_TERMINAL"):
            environment.pop(variable, None)

        def run() -> None:
            # The terminal stands in the place of this process's own output, which the child gets.
            command = [sys.executable, "-m", "asymswap", *shlex.split(line)]
            subprocess.run(command, cwd=folder, env=environment, check=False, timeout=120)

        sent = on_terminal(80, run)
        assert "convert" in sent
        assert "\x1b[" not in sent

    @pytest.mark.parametrize("name", ["show-offsets", "compare-three", "evaluate", "fuse", *ERRORS])
    def test_a_pipe_gets_plain_lines(self, name: str, show: Show, capfd: pytest.CaptureFixture[str]) -> None:
        line = RESULTS[name] if name in RESULTS else ERRORS[name][0]
        show.piped(line)
        out, err = capfd.readouterr()
        assert "\x1b" not in out + err
        assert all(len(line.rstrip()) <= 120 for line in out.splitlines())
        assert (out == "") == (name in ERRORS)
        assert (err == "") == (name in RESULTS)
