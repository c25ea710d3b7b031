"""What several test files share: the command line in this process, in a folder of its own."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import hypothesis
import pytest

# Few examples in CI, the same ones every time; many, and other ones, for HYPOTHESIS_PROFILE=nightly.
hypothesis.settings.register_profile("ci", deadline=None, max_examples=25, derandomize=True)
hypothesis.settings.register_profile("nightly", deadline=None, max_examples=200)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

# OpenVINO's telemetry forks the process that imports it; without it OpenVINO does nothing of the kind.
_modules: dict[str, Any] = sys.modules
_modules["openvino_telemetry"] = None
if os.environ.get("HYPOTHESIS_PROFILE") != "nightly":
    # Workers that have loaded OpenVINO have died, without a word, when they started a process.
    _modules["openvino"] = None

# Several workers share the cores: torch, which looks here when it is imported, must not take all of them in each.
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if WORKERS > 1:
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // WORKERS)))
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def pytest_addoption(parser: pytest.Parser) -> None:
    """The option that test_screens.py is about."""
    parser.addoption("--record-screens", action="store_true", help="record the screens in tests/golden again")


class Outcome(NamedTuple):
    """How a command ended and what it printed."""

    code: int | str | None
    out: str
    err: str


Run = Callable[..., Outcome]
Refusal = Callable[..., str]


@pytest.fixture
def one_thread() -> Iterator[None]:
    """With models as small as those of the tests, threads only wait for each other."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], one_thread: None) -> Run:
    """Run the command line in `tmp_path` with these arguments."""
    from asymswap.cli.main import main

    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["asymswap", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        return Outcome(stop.value.code or 0, *capsys.readouterr())

    return call


@pytest.fixture
def refusal(run: Run, tmp_path: Path) -> Refusal:
    """Run what cannot be done, see that it ends as such things must, and return the reason that is given."""

    def call(*arguments: object, code: int = 1) -> str:
        before = listing(tmp_path)
        outcome = run(*arguments)
        assert (outcome.code, outcome.out) == (code, ""), outcome
        assert outcome.err.startswith("error: "), outcome
        assert outcome.err.count("\n") == 1, outcome
        assert "this is a bug" not in outcome.err
        assert listing(tmp_path) == before
        return outcome.err.removeprefix("error: ").strip()

    return call


def listing(folder: Path) -> dict[str, bytes | None]:
    """Every file and folder below a folder, with the content of files; compiled Python does not count."""
    found = (path for path in folder.rglob("*") if "__pycache__" not in path.parts)
    return {str(path): path.read_bytes() if path.is_file() else None for path in found}
