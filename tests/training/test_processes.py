"""Two real processes against one with the double batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import CLI, forked, team
from sklearn.datasets import load_digits

import asymswap

ENV = {**os.environ, "OMP_NUM_THREADS": "1"}
OPTIONS = (
    "--data", "few.pt", "--epochs", "2", "--optimizer", "sgd", "--lr", "0.01", "--validation", "0.2",
    "--clip", "5", "--ema", "0.8", "--augment", "crop",
)  # fmt: skip


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped network, cut until there is something to learn, and a few images beside it."""
    folder = tmp_path_factory.mktemp("together")
    conversion = asymswap.convert("digits-resnet", "half-macs", overrides={"budget.macs": 0.3})
    asymswap.save(conversion, folder / "x.asym.pt")
    found = load_digits()
    chosen = [index for digit in range(10) for index in (found.target == digit).nonzero()[0][:20]]
    images = torch.from_numpy(found.images[chosen]).float() / 16
    torch.save({"images": images, "labels": torch.from_numpy(found.target[chosen])}, folder / "few.pt")
    return folder / "x.asym.pt"


def torchrun(folder: Path, *command: str, restarts: int = 0, script: str = "") -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    launcher += ["--max-restarts", str(restarts), "--monitor-interval", "0.1"]
    program = [script] if script else ["-m", "asymswap"]
    return subprocess.run([*launcher, *program, *command], cwd=folder, capture_output=True, text=True, env=ENV)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_two_processes_come_to_what_one_comes_to_with_the_double_batch(start: Path) -> None:
    """With the statistics of batch norms frozen: without GPUs each process has its own."""
    folder, options = start.parent, (*OPTIONS, "--freeze-bn")
    two, silent = team(CLI, "finetune", start, *options, "--batch-size", "10", "-o", "two.pt", "--json", cwd=folder)
    assert (two.returncode, silent.returncode) == (0, 0), two.stderr
    one = forked(CLI, "finetune", start, *options, "--batch-size", "20", "-o", "one.pt", cwd=folder)
    assert one.returncode == 0, one.stderr
    # One process prints and writes.
    assert "{" not in silent.stdout
    report = json.loads(two.stdout[two.stdout.index("{\n") :])
    assert report["steps"] == 2 * 8
    assert not any("batch statistics" in note for note in report["notes"])
    states = [asymswap.load(folder / name).state_dict() for name in ("one.pt", "two.pt")]
    origin = asymswap.load(start).state_dict()
    for key, tensor in states[0].items():
        moved = (tensor.double() - origin[key].double()).norm()
        apart = (tensor.double() - states[1][key].double()).norm()
        assert apart <= 0.02 * moved + 1e-5, key
    rows = [lines(folder / name / "metrics.jsonl") for name in ("one.run", "two.run")]
    for first, second in zip(*rows, strict=True):
        assert first["event"] == second["event"]
        if first["event"] != "start":
            assert first["train"]["loss"] == pytest.approx(second["train"]["loss"], rel=1e-3, abs=1e-4)


SCRIPT = """
import os, signal, sys
from asymswap.training import trainer as loop

learn = loop.Trainer._learn

def _learn(self, *arguments):
    learn(self, *arguments)
    if self.progress.step == 11 and self.team.rank == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)

loop.Trainer._learn = _learn
from asymswap.cli.main import main
main()
"""


@pytest.mark.nightly
def test_a_killed_worker_is_started_again_from_the_last_saving(start: Path) -> None:
    folder = start.parent
    (folder / "killed.py").write_text(SCRIPT)
    command = ("finetune", str(start), *OPTIONS, "--batch-size", "10", "--save-every", "2")
    broken = torchrun(folder, *command, "-o", "broken.pt", restarts=1, script="killed.py")
    assert broken.returncode == 0, broken.stderr
    assert "resumed after 10 of 16 steps" in broken.stderr
    assert "each process keeps its own batch statistics" in broken.stderr
    assert "keeps its own batch statistics" in " ".join(broken.stdout.split())
    whole = torchrun(folder, *command, "-o", "unbroken.pt")
    assert whole.returncode == 0, whole.stderr
    states = [asymswap.load(folder / name).state_dict() for name in ("broken.pt", "unbroken.pt")]
    assert all(torch.equal(tensor, states[1][key]) for key, tensor in states[0].items())


def test_one_process_has_no_batch_statistics_to_share(start: Path) -> None:
    folder = start.parent
    options = ("--data", "few.pt", "--steps", "2", "--validation", "none", "--device", "cpu", "-o", "alone.pt")
    done = forked(CLI, "finetune", start, *options, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "batch statistics" not in done.stderr + done.stdout


OWN = """
import sys
import torch
from torch import nn
import asymswap
from asymswap.utils.distributed import joined

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Conv2d(1, 2, 3), nn.Linear(2, 2)

    def forward(self, x):
        return self.used(x)

torch.manual_seed(0)
net = Net()
batches = list(torch.rand(5, 3, 1, 8, 8))
with joined() as team:
    settings = asymswap.Training(epochs=2, lr=0.01, optimizer="sgd", accumulate=int(sys.argv[2]))
    data = [batch for batch in batches[:4]]
    tuned = asymswap.finetune(
        net, data, settings, loss=lambda outputs, batch: (outputs - batch.mean()).square().mean(),
        evaluate=lambda model: float(model(batches[4]).mean()), team=team,
    )
    if team.leads:
        torch.save(tuned.model.state_dict(), sys.argv[1])
"""


def test_batches_of_the_users_are_shared(start: Path) -> None:
    """Two processes with a batch each are one with two, though a layer has no part in the loss."""
    folder = start.parent
    for done in (*team(OWN, "two.pt", "1", cwd=folder), forked(OWN, "one.pt", "2", cwd=folder)):
        assert done.returncode == 0, done.stderr
    states = [torch.load(folder / name, weights_only=True) for name in ("one.pt", "two.pt")]
    for key, tensor in states[0].items():
        torch.testing.assert_close(states[1][key], tensor, rtol=1e-4, atol=1e-6)
