"""Two real processes against one; nightly, and always in tests/training/test_processes.py, torchrun starts them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processes import CLI, forked, team

import asymswap
from asymswap.utils.distributed import ALONE, joined

CONVERT = ("convert", "digits-resnet", "--recipe", "half-macs", "--macs", "0.3")


def torchrun(folder: Path, *command: str, processes: int = 2) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return subprocess.run([*launcher, "-m", "asymswap", *command], cwd=folder, capture_output=True, text=True)


def test_two_processes_give_the_plan_and_the_weights_of_one(tmp_path: Path) -> None:
    options = (*CONVERT, "--calibrate", "digits", "--calibration-images", "300", "--polish", "3", "--json")
    written = ("-o", "two.pt", "--write-plan", "two.json", "--calibration-cache", "e.safetensors")
    two, silent = team(CLI, *options, *written, cwd=tmp_path)
    assert (two.returncode, silent.returncode) == (0, 0), two.stderr
    one = forked(CLI, *options, "-o", "one.pt", "--write-plan", "one.json", cwd=tmp_path)
    assert one.returncode == 0, one.stderr
    plans = [json.loads((tmp_path / name).read_text()) for name in ("one.json", "two.json")]
    settings = [[(swap["site"], swap["settings"]) for swap in plan["swaps"]] for plan in plans]
    assert settings[0] == settings[1]
    for first, second in zip(plans[0]["swaps"], plans[1]["swaps"], strict=True):
        assert first["predicted"] == pytest.approx(second["predicted"], rel=1e-9)
    states = [asymswap.load(tmp_path / name).state_dict() for name in ("one.pt", "two.pt")]
    for key, tensor in states[0].items():
        assert torch.allclose(tensor, states[1][key], rtol=1e-4, atol=1e-5), key
    # One process prints; both runs tell of the same images.
    assert "{" not in silent.stdout
    # Before the report, torch 2.9 prints there which processes have found each other.
    rows = [json.loads(done.stdout[done.stdout.index("{\n") :])["calibration"] for done in (one, two)]
    assert rows[0]["sha256"] == rows[1]["sha256"]
    assert (tmp_path / "e.safetensors").exists()


@pytest.mark.nightly
def test_a_process_without_images_waits_for_the_others(tmp_path: Path) -> None:
    """Eight digits make one batch, which is the first process's."""
    options = (*CONVERT, "--calibrate", "digits", "--calibration-images", "8", "--json", "-o", "two.pt")
    done = torchrun(tmp_path, *options)
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout[done.stdout.index("{\n") :])["calibration"]
    assert (row["images"], row["sequential"]) == (8, True)


def test_what_fails_in_the_first_process_ends_all(tmp_path: Path) -> None:
    options = ("--calibrate", "digits", "--calibration-images", "8")
    processes = team(CLI, *CONVERT[:-1], "0.001", *options, cwd=tmp_path)
    assert [done.returncode for done in processes] == [1, 1]
    for done in processes:
        assert "error: the budget of 0.001 of the model's MACs cannot be reached" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.nightly
def test_several_processes_without_images_have_nothing_to_share(tmp_path: Path) -> None:
    done = torchrun(tmp_path, *CONVERT)
    assert done.returncode != 0
    assert "torchrun has nothing to share out: several processes are for --calibrate DATA" in done.stderr


def test_a_process_by_itself_is_a_team_of_one() -> None:
    with joined() as team:
        assert team is ALONE
        assert team.leads
        assert list(team.share("abc")) == [(0, "a"), (1, "b"), (2, "c")]
        assert team.first(lambda: 3) == 3
        assert team.gather("x") == ["x"]


ENDING = """
import atexit, sys
from asymswap.utils.distributed import end_process

class Remains:
    def __del__(self):
        print("torn down")

remains = Remains()
atexit.register(print, "exit handler")
sys.stdout.write("buffered ")
end_process({code!r})
"""


@pytest.mark.parametrize(("code", "returned"), [(None, 0), (0, 0), (1, 1), (130, 130), ("what failed", 1)])
def test_a_process_of_a_team_ends_without_the_teardown_of_python(code: object, returned: int) -> None:
    """Threads of torch's process groups outlive the training, and abort the process if they run during it."""
    ending = subprocess.run([sys.executable, "-c", ENDING.format(code=code)], capture_output=True, text=True)
    assert (ending.returncode, ending.stdout) == (returned, "buffered exit handler\n")
    assert ending.stderr == ("what failed\n" if code == "what failed" else "")
