from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import asymswap
from asymswap.calibration.sequential import refine_

Run = Callable[..., Any]
CONVERT = ("convert", "digits-resnet", "--recipe", "half-macs", "--macs", "0.3", "-o", "out.pt")
TWO = ("convert", "digits-resnet", "--recipe", "two.toml", "-o", "out.pt")
"""Swaps two convs, where it does not matter which."""


@pytest.fixture(autouse=True)
def _recipe(tmp_path: Path) -> None:
    (tmp_path / "two.toml").write_text(
        "[[rules]]\nmatch = { names = 'layer2.1.*' }\nswap = { kind = 'separable' }\n[budget]\nmacs = 0.85\n"
    )


def test_calibration_keeps_the_accuracy_that_the_weights_alone_lose(run: Run) -> None:
    blind = json.loads(run(*CONVERT, "--evaluate", "digits", "--json", "--dry-run").out)
    seen = json.loads(run(*CONVERT, "--evaluate", "digits", "--json", "--calibrate", "digits").out)
    known, alone = (report["accuracy"]["scores"][0] for report in (seen, blind))
    assert known["before"] == alone["before"] > 0.98
    assert known["after"] > 0.97
    assert known["after"] > alone["after"]
    assert seen["after"]["macs"] <= 0.3 * seen["before"]["macs"]
    row = seen["calibration"]
    assert (row["data"], row["images"], row["seed"], row["sequential"]) == ("digits", 512, 0, True)
    assert len(row["sha256"]) == 64


def test_the_same_seed_writes_the_same_weights_and_they_load_again(run: Run, tmp_path: Path) -> None:
    for name in ("a.pt", "b.safetensors"):
        run(*TWO[:-1], name, "--calibrate", "digits", "--calibration-images", "32")
    one, other = (asymswap.load(tmp_path / name).state_dict() for name in ("a.pt", "b.safetensors"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_statistics_from_a_file_gives_the_plan_that_it_gave_at_first(run: Run, tmp_path: Path) -> None:
    statistics = ("--calibrate", "digits", "--calibration-images", "64", "--calibration-cache", "e.safetensors")
    first = json.loads(run(*TWO, *statistics, "--json").out)
    assert (tmp_path / "e.safetensors").exists()
    again = json.loads(run(*TWO, *statistics, "--json", "--force").out)
    assert [row["settings"] for row in again["sites"]] == [row["settings"] for row in first["sites"]]
    assert again["after"] == first["after"]
    alone = json.loads(run(*TWO, "--calibration-cache", "e.safetensors", "--json", "--force").out)
    assert alone["calibration"]["sequential"] is False
    assert "not refined layer by layer: the images are not given" in " ".join(alone["calibration"]["notes"])


def test_statistics_of_fewer_images_than_there_are(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is solved layer by layer is told of the images that are there, not of those that the statistics was of."""
    told: list[int] = []

    def refine(*arguments: Any, **options: Any) -> Any:
        images = arguments[5]
        told.append(images.count)
        assert sum(len(batch) for _, (batch,) in images.batches()) == images.count
        return refine_(*arguments, **options)

    monkeypatch.setattr("asymswap.calibration.calibrate.refine_", refine)
    statistics = (
        "--calibrate",
        "digits",
        "--calibration-cache",
        "e.safetensors",
        "--json",
        "--dry-run",
        "--calibration-images",
    )
    first = json.loads(run(*TWO, *statistics, "16").out)
    again = json.loads(run(*TWO, *statistics, "200").out)
    assert told == [16, 200]
    assert "layer by layer on" not in " ".join(first["calibration"]["notes"])
    assert "solved layer by layer on 200 images" in again["calibration"]["notes"]


def test_an_statistics_file_that_cannot_be_written_is_told_before_the_pass(
    refusal: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gather(*_: Any, **__: Any) -> Any:
        raise AssertionError("gathered for nothing")

    monkeypatch.setattr("asymswap.calibration.gather.gather", gather)
    assert "the folder nowhere does not exist" in refusal(
        *TWO, "--calibrate", "digits", "--calibration-cache", "nowhere/e.safetensors"
    )


def test_predicted_errors_are_near_the_measured_ones(run: Run) -> None:
    report = json.loads(run(*CONVERT, "--calibrate", "digits", "--no-sequential", "--json", "--dry-run").out)
    swapped = [row for row in report["sites"] if row["action"] == "swap"]
    assert len(swapped) >= 6
    for row in swapped:
        # The prediction is of the centred output, in its own norm; the weighted solution gives some of it away.
        assert 0.2 < row["output_error"] / row["predicted_error"] < 3


def test_polish_is_told_in_the_report(run: Run) -> None:
    out = run(*TWO, "--calibrate", "digits", "--polish", "5", "--polish-images", "256", "--dry-run").out
    out = " ".join(out.split())
    assert "5 steps of 128 samples at a rate of" in out
    assert "difference of the outputs on held-back ones" in out or "olishing brought nothing" in out


def test_few_images_are_said_to_be_few(run: Run) -> None:
    out = run(*TWO, "--calibrate", "digits", "--calibration-images", "3", "--dry-run").out
    assert "saw fewer than two patches per dimension" in " ".join(out.split())


def pictures(folder: Path, size: int = 8, mode: str = "L") -> Path:
    for name in "ab":
        (folder / name).mkdir(parents=True)
        for number in range(3):
            Image.new(mode, (size, size), 40 * number).save(folder / name / f"{number}.png")
    return folder


def test_calibrating_and_evaluating_on_one_folder_is_warned_of(run: Run, tmp_path: Path) -> None:
    pictures(tmp_path / "photos")
    out = run(*TWO, "--calibrate", "photos", "--evaluate", "photos", "--dry-run").out
    assert "Calibrated and evaluated on the same images" in out


def test_images_of_another_size_and_colour_are_prepared(run: Run, tmp_path: Path) -> None:
    pictures(tmp_path / "photos", size=40, mode="RGB")
    assert run(*TWO, "--calibrate", "photos", "--dry-run").code == 0


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--calibrate", "nowhere"), "data 'nowhere' is neither a known name nor an existing folder"),
        (("--calibrate", "empty"), "holds no images, and no folders of images"),
        (("--calibrate", "broken"), r"image '.*png' cannot be read"),
        (("--calibrate", "digits", "--calibration-images", "0"), "--calibration-images 0 is no number of images"),
        (("--calibrate", "digits", "--calibration-memory", "0"), "--calibration-memory 0 is no amount of memory"),
        (
            ("--calibration-cache", "none.safetensors"),
            "no calibration cache none.safetensors; --calibrate gathers",
        ),
        (("--calibration-cache", "text"), "cannot read the calibration cache text"),
        (("--polish", "5"), "--polish 5 is of calibration, which needs images: give --calibrate"),
        (("--no-sequential",), "--no-sequential is of calibration"),
        (("--calibration-images", "64"), "--calibration-images 64 is of calibration"),
        (("--calibrate", "digits", "--polish-images", "5"), "--polish-images needs polishing: give --polish"),
        (("--memory-format", "contiguous"), "options of time, such as --runtime, go with --latency or --time"),
        (("--calibrate", "digits", "--polish", "fast"), "--polish 'fast' is neither steps"),
        (("--calibrate", "digits", "--polish", "0"), "polish takes either a number of steps"),
        (("--calibrate", "digits", "--macs", "0.01"), "cannot be reached: .* ask for at least 0."),
    ],
)
def test_what_cannot_be_calibrated(refusal: Run, tmp_path: Path, options: tuple[str, ...], reason: str) -> None:

    (tmp_path / "empty").mkdir()
    (tmp_path / "text").write_text("no statistics")
    broken = pictures(tmp_path / "broken")
    for path in broken.rglob("*.png"):
        path.write_bytes(b"no picture")
    assert re.search(reason, refusal(*TWO, *options))


def test_statistics_of_another_model_is_refused(run: Run, refusal: Run) -> None:
    run(*TWO, "--calibrate", "digits", "--calibration-images", "16", "--calibration-cache", "e.safetensors")
    other = ("convert", "out.pt", "--recipe", "all-spatial", "-o", "again.pt", "--calibration-cache", "e.safetensors")
    assert "was gathered from another model" in refusal(*other)
