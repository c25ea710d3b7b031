"""`asymswap finetune` and `asymswap evaluate` as a user types them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import asymswap
from asymswap.cli.options import Common
from asymswap.data.task import Task

Run = Callable[..., Any]
SHORT = ("--data", "digits", "--epochs", "2", "--batch-size", "256", "--lr", "0.002")


@pytest.fixture
def start(run: Run) -> Path:
    run("convert", "digits-resnet", "--recipe", "half-macs", "--macs", "0.25", "-q")
    return Path("digits-resnet.asym.pt")


def test_a_round_from_conversion_to_a_fused_file(run: Run) -> None:
    run("convert", "digits-resnet", "--recipe", "acnet", "-q", "-o", "a.asym.pt")
    tuned = run("finetune", "a.asym.pt", "--data", "digits", "--steps", "4", "--distill", "--json")
    assert tuned.code == 0, tuned.err
    report = json.loads(tuned.out)
    assert (report["schema"], report["teacher"]) == (1, "digits-resnet")
    assert [Path(row["path"]).name for row in report["files"]] == ["a.tuned.pt", "last.pt"]
    assert run("fuse", "a.tuned.pt", "--as-original", "-o", "plain.pt", "-q").code == 0
    evaluated = run("evaluate", "digits-resnet", "a.tuned.pt", "plain.pt", "--data", "digits", "--json")
    assert evaluated.code == 0, evaluated.err
    scores = json.loads(evaluated.out)
    assert scores["schema"] == 1
    first, tuned_scores, plain = scores["models"]
    assert min(one["scores"][0]["value"] for one in (first, tuned_scores)) > 0.97
    about = plain["classifier"]
    assert about["right"] == tuned_scores["classifier"]["right"]
    assert sum(row["right"] for row in about["classes"]) == about["right"]
    shown = run("show", "a.tuned.pt").out
    assert "Training 1: 1 epoch (4 steps) on 1295 of digits" in shown
    assert "taught by digits-resnet" in " ".join(shown.split())


def test_what_a_pipe_gets(run: Run, start: Path) -> None:
    """A line for each epoch on stderr, the report on stdout."""
    done = run("finetune", start, *SHORT, "-o", "t.pt")
    assert done.code == 0
    told = done.err.splitlines()
    assert re.fullmatch(r"before: validation \d+\.\d\d %, loss \d+\.\d{4}", told[0])
    line = r"epoch {}/2: loss \d+\.\d{{4}}, top-1 \d+\.\d %; validation \d+\.\d\d %( \(best\))?; \d+ images/s"
    assert [bool(re.fullmatch(line.format(number), told[number])) for number in (1, 2)] == [True, True]
    assert len(told) == 3
    for text in ("before", "kept", "last epoch", "top-1", "adamw, learning rate 0.002, batch 256", "t.pt: "):
        assert text in done.out
    rows = [json.loads(text) for text in Path("t.run/metrics.jsonl").read_text().splitlines()]
    assert [row["event"] for row in rows].count("step") == 12
    assert rows[-1]["event"] == "epoch"
    assert run("finetune", start, "--data", "digits", "--steps", "2", "-o", "quiet.pt", "-q")[1:] == ("", "")


@pytest.mark.nightly
@pytest.mark.parametrize("options", [(), ("--distill", "--distill-features", "0.1")])
def test_killed_from_outside_and_resumed(run: Run, start: Path, options: tuple[str, ...]) -> None:
    """The very command, killed as the system kills, at whatever moment that is."""
    command = [*SHORT, "--epochs", "6", "--augment", "randaugment", "--ema", "0.9", "--save-every", "4", *options]
    started = [sys.executable, "-m", "asymswap", "finetune", str(start), *command, "-o", "broken.pt"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(started, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=env) as process:
        told = Path("broken.run/metrics.jsonl")
        while process.poll() is None and not (told.exists() and told.read_text().count("\n") > 9):
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    resumed = run("finetune", start, *command, "-o", "broken.pt", "--resume")
    assert resumed.code == 0, resumed.err
    assert re.search(r"resumed after \d+ of 36 steps", resumed.err)
    assert run("finetune", start, *command, "-o", "whole.pt").code == 0
    states = [asymswap.load(name).state_dict() for name in ("broken.pt", "whole.pt")]
    assert all(torch.equal(tensor, states[1][key]) for key, tensor in states[0].items())


def test_bad_input(run: Run, refusal: Run, start: Path) -> None:
    torch.save(asymswap.load(start).state_dict(), "plain.pt")
    Path("photos/cat").mkdir(parents=True)
    Path("photos/dog").mkdir()
    Image.new("L", (8, 8)).save("photos/cat/0.png")
    for command, said in (
        (("plain.pt", *SHORT), "plain.pt holds a state_dict of an unknown architecture; name it with --arch"),
        (("gone.pt", *SHORT), "gone.pt"),
        ((start, "--data", "digit"), "data 'digit' is neither .*; did you mean digits"),
        ((start, "--data", "photos"), "no image of class 'dog' to train on"),
        ((start, *SHORT, "--steps", "3"), "give either --epochs or --steps"),
        ((start, *SHORT, "--optimizer", "adamv"), "--optimizer 'adamv' is unknown; did you mean adamw"),
        ((start, *SHORT, "--augment", "flap"), "--augment 'flap' is unknown; did you mean"),
        (
            (start, *SHORT, "--distill", "digits-resnt"),
            "the teacher digits-resnt cannot be used: .*did you mean digits-res",
        ),
        ((start, *SHORT, "--distill-loss", "mae"), "--distill-loss 'mae' is unknown; did you mean mse"),
        ((start, *SHORT, "--train", "old"), "--train 'old' is unknown; choose all, new, bn"),
        ((start, *SHORT, "-o", "x.txt"), "x.txt must end in .pt, .pth, .safetensors"),
        ((start, *SHORT, "-o", start), "exists already; give another name"),
        ((start, *SHORT, "-o", start, "--force"), "the checkpoint and -o both name .*; give them two files"),
        ((start, *SHORT, "-o", "no/such/x.pt"), "the folder no/such does not exist"),
        ((start, *SHORT, "--run", start, "-o", "y.pt"), "is a file; the run needs a folder of that name"),
        ((start, *SHORT, "--batch-size", "0"), "--batch-size 0 must be above 0"),
    ):
        assert re.search(said, refusal("finetune", *command)), command


def test_unreadable_images(run: Run, refusal: Run) -> None:
    run("convert", "digits-resnet", "--recipe", "3x3-only", "-q", "-o", "d.asym.pt")
    for label in range(10):
        folder = Path(f"photos/{label}")
        folder.mkdir(parents=True)
        for number in range(4):
            Image.new("L", (8, 8), 20 * label).save(folder / f"{number}.png")
    Path("photos/3/1.png").write_bytes(b"no picture")
    Path("photos/7/2.png").write_bytes(Path("photos/7/1.png").read_bytes()[:40])
    options = ("--data", "photos", "--epochs", "1", "--validation", "none", "--workers", "0")
    done = run("finetune", "d.asym.pt", *options)
    assert done.code == 0, done.err
    assert "2 unreadable skipped" in done.err
    assert "2 times an image could not be read" in " ".join(done.out.split())
    evaluated = run("evaluate", "d.asym.pt", "--data", "photos")
    assert evaluated.code == 0, evaluated.err
    assert "40 images of 10 classes; 38 can be read, 2 cannot" in evaluated.out
    for command in (("finetune", "d.asym.pt", *options, "--force"), ("evaluate", "d.asym.pt", "--data", "photos")):
        assert re.search(
            r"image '.*(3/1|7/2)\.png' cannot be read .*; remove or replace it", run(*command, "--strict").err
        )


def test_a_teacher_needs_no_labels(run: Run, refusal: Run) -> None:
    run("convert", "digits-resnet", "--recipe", "half-macs", "--macs", "0.4", "-q", "-o", "d.asym.pt")
    Path("photos").mkdir()
    for number, image in enumerate(torch.rand(20, 8, 8, generator=torch.Generator().manual_seed(0)).mul(255).byte()):
        Image.fromarray(image.numpy()).save(f"photos/{number}.png")
    options = ("--data", "photos", "--epochs", "2", "--workers", "0", "--augment", "none")
    done = run("finetune", "d.asym.pt", *options, "--distill")
    assert done.code == 0, done.err
    assert re.search(r"^before: validation loss 0\.\d+$", done.err, re.MULTILINE)
    assert re.search(
        r"^epoch 1/2: loss \d\.\d+; validation loss 0\.\d+ \(best\); \d+ images/s$", done.err, re.MULTILINE
    )
    assert "Taught by digits-resnet." in done.out
    shown = " ".join(run("show", "d.tuned.pt").out.split())
    assert re.search(r"taught by digits-resnet; validation loss 0\.\d+ -> 0\.\d+ \(epoch \d\)", shown)
    said = refusal("finetune", "d.asym.pt", *options, "-o", "x.pt")
    assert "folder 'photos' holds no class folders" in said


def test_the_functions_of_a_task(run: Run, refusal: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run("convert", "digits-resnet", "--recipe", "3x3-only", "-q", "-o", "d.asym.pt")
    images = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))

    def spread(model: torch.nn.Module) -> float:
        return float(model(images).std())

    task = Task(
        "my_task.py",
        training=lambda: [{"pixels": images, "other": 0}],
        inputs=lambda batch: batch["pixels"],
        loss=lambda outputs, batch: outputs.std(),
        evaluate=spread,
        lower_is_better=("spread",),
    )
    monkeypatch.setattr(Common, "task", task, raising=False)
    done = run("finetune", "d.asym.pt", "--epochs", "3")
    assert done.code == 0, done.err
    assert "3 epochs, 3 steps; those of epoch 3 kept" in done.out
    assert "Trained on 1 batch of a list." in done.out
    assert "Validated by" in done.out
    assert re.search("give --data, or a --task with training", refusal("finetune", "d.asym.pt", *SHORT, "-o", "x.pt"))


def test_evaluation_on_screen(run: Run, start: Path) -> None:
    done = run("evaluate", "digits-resnet", start, "--data", "digits")
    assert done.code == 0, done.err
    for text in (
        "digits (scikit-learn): 360 test images",
        "top-1",
        "95 %",
        "McNemar p",
        "only 1st right",
        "Class",
        "9 as 1 (1)",
    ):
        assert text in done.out, text
    # 359 of 360: Wilson's interval, worked out by hand.
    assert re.search(r"1 digits-resnet +99\.72 % +98\.44-99\.95 +100\.00 %", done.out), done.out


def test_an_evaluation_of_images_that_were_trained_on_says_so(run: Run) -> None:
    for label in range(10):
        folder = Path(f"photos/{label}")
        folder.mkdir(parents=True)
        for number in range(10):
            Image.new("L", (8, 8), 20 * label + number).save(folder / f"{number}.png")
    run("convert", "digits-resnet", "--recipe", "3x3-only", "-q", "-o", "d.asym.pt")
    run("finetune", "d.asym.pt", "--data", "photos", "--epochs", "1", "-q")
    said = " ".join(run("evaluate", "d.tuned.pt", "--data", "photos").out.split())
    assert "tuned.pt was trained on images of the same place: its accuracy here is too good to be trusted" in said
    held = run("evaluate", "d.tuned.pt", "--data", "photos", "--part", "validation").out
    assert "10 of folder photos: 100 images" in held
    assert "too good" not in held


def test_evaluations_that_cannot_be_done(refusal: Run) -> None:
    for command, said in (
        (("digits-resnet", "--data", "digits", "--part", "tests"), "--part 'tests' is unknown; did you mean test"),
        (("digits-resnt", "--data", "digits"), "no model 'digits-resnt'.*did you mean digits-resnet"),
        (("digits-resnet", "--data", "digits", "--batch-size", "0"), "--batch-size must be above 0"),
        (("digits-resnet", "--data", "mnist:x"), "data mnist:x has no folder MNIST"),
        (
            ("digits-resnet", "--data", "digits", "--part", "validation", "--validation", "none"),
            "needs held-back images",
        ),
    ):
        assert re.search(said, refusal("evaluate", *command)), command
