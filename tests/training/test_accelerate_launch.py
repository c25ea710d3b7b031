"""`accelerate launch` starts the processes of a training as `torchrun` does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import asymswap

# `--multi_gpu` is what starts several processes, on CPUs too; with `--device cpu` accelerate starts a single one.
LAUNCH = (
    "-m", "accelerate.commands.accelerate_cli", "launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
    "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", "-m", "asymswap",
)  # fmt: skip


@pytest.mark.nightly
def test_two_processes_share_the_images_and_one_of_them_writes(tmp_path: Path) -> None:
    conversion = asymswap.convert("digits-resnet", "half-macs", overrides={"budget.macs": 0.3})
    asymswap.save(conversion, tmp_path / "x.pt")
    options = ("--data", "digits", "--epochs", "1", "--validation", "none", "--batch-size", "120", "--json")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, *LAUNCH, "finetune", "x.pt", *options, "-o", "two.pt"],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["settings"]["processes"] == 2
    # 1,437 images: 12 steps of 120 for one process, half as many for two.
    assert report["steps"] == 6
    before, after = (asymswap.load(tmp_path / name).linear.weight for name in ("x.pt", "two.pt"))
    assert not before.equal(after)
