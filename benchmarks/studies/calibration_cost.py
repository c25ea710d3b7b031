"""What calibration costs: seconds of each stage and peak memory, by the number of images, and whether that is linear.

    python benchmarks/studies/calibration_cost.py [--models resnet18 resnet50 vgg16] [--images 128 256 512 1024 2048]
        [--ways "one pass" "layer by layer"] [--out benchmarks/studies/results/calibration_cost.json]
        [--markdown docs/results/calibration-cost.md]

Each is `asymswap convert MODEL --weights none --recipe half-macs --calibrate FOLDER --calibration-images N --dry-run`
in a process of its own, with the default memory limit of 4 GiB; one pass is with `--no-sequential`. What is in the
JSON, kept in the repository, is not done again, but for runs that failed.

The images are random, of three sizes of detail, 256 x 256, in PPM files, which need no decoding; made for each start of
this script in a temporary folder, always the same ones.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))  # for what it shares with the checks of a release

from measured import ASYMSWAP, QUIET, machine_text, markdown_table, read_json, run, state, states, table, write_json
from PIL import Image

WAYS = {"one pass": "--no-sequential", "layer by layer": "--sequential"}
STAGES = ("load", "trace", "calibrate", "plan", "convert", "measure")
FITTED = ("calibrate", "convert", "whole process", "processor")
SIDE = 256
HELD_BACK = 256
"""More images than are asked for: the command compares the outputs on images that calibration has not seen."""

COLUMNS = [
    "network",
    "way",
    "images",
    *(f"{stage} s" for stage in STAGES),
    "whole process s",
    "processor s",
    "peak MB",
    "others",
]
FIT_COLUMNS = ["network", "way", "stage", "ms per image", "seconds without any", "R²", "worst miss"]


@dataclass(frozen=True)
class Line:
    """Seconds over images, by least squares; `worst` is the largest residual over the seconds measured there."""

    slope: float
    intercept: float
    r_squared: float
    worst: float


def fit(images: Sequence[float], seconds: Sequence[float]) -> Line:
    """The straight line through at least two points."""
    x_mean, y_mean = mean(images), mean(seconds)
    spread = sum((x - x_mean) ** 2 for x in images)
    slope = sum((x - x_mean) * (y - y_mean) for x, y in zip(images, seconds, strict=True)) / spread
    intercept = y_mean - slope * x_mean
    residuals = [y - intercept - slope * x for x, y in zip(images, seconds, strict=True)]
    total = sum((y - y_mean) ** 2 for y in seconds)
    explained = 1 - sum(residual**2 for residual in residuals) / total if total else 1.0
    return Line(slope, intercept, explained, max(abs(r) / y for r, y in zip(residuals, seconds, strict=True)))


def make_images(folder: Path, count: int) -> float:
    """Write so many images into one class folder; returns the seconds that reading one of them takes."""
    place = folder / "images"
    place.mkdir()
    for number in range(count):
        draw = np.random.default_rng(number)
        # White noise alone would leave a network nothing but its mean: real images have detail of every size.
        layers = [Image.fromarray(draw.integers(0, 256, (side, side, 3), np.uint8)) for side in (4, 32, SIDE)]
        coarse, middle, fine = (layer.resize((SIDE, SIDE), Image.Resampling.BILINEAR) for layer in layers)
        Image.blend(Image.blend(coarse, middle, 0.4), fine, 0.2).save(place / f"{number:05}.ppm")
    start = time.perf_counter()
    for number in range(100):
        with Image.open(place / f"{number % count:05}.ppm") as image:
            image.convert("RGB")
    return (time.perf_counter() - start) / 100


def measure(model: str, way: str, images: int, folder: Path, timeout: float) -> dict[str, Any]:
    """One run of the command."""
    command = [ASYMSWAP, "convert", model, "--weights", "none", "--recipe", "half-macs", "--dry-run", "--json"]
    command += ["--calibrate", str(folder), "--calibration-images", f"{images}", WAYS[way]]
    done = run(command, timeout=timeout)
    about = {
        "whole process": round(done.seconds, 2),
        "processor": round(done.cpu_seconds, 2),
        "peak_mb": round(done.peak_mb),
        "others": round(done.others, 2),
        "state": state(),
    }
    if done.code:
        last = (done.err.strip().splitlines() or ["no message"])[-1]
        return {"failed": f"killed after {done.seconds:.0f} s" if done.code == -9 else last, **about}
    report = json.loads(done.out)
    assert report["calibration"]["images"] == images
    assert report["calibration"]["sequential"] == (way == "layer by layer")
    return {
        "stages": report["seconds"],
        "macs": report["after"]["macs"] / report["before"]["macs"],
        "swapped": sum(row["action"] == "swap" for row in report["sites"]),
        "notes": report["calibration"]["notes"],
        **about,
    }


def key_of(model: str, way: str, images: int) -> str:
    return f"{model}|{way}|{images}"


def survey(args: argparse.Namespace) -> dict[str, Any]:
    """Measure what the JSON lacks, the cheapest first, and write it after each run."""
    data = {**read_json(args.out, {"runs": {}}), "threads": threads()}
    lacking = [
        (model, way, images)
        for images in sorted(args.images)
        for model in args.models
        for way in args.ways
        if "stages" not in data["runs"].get(key_of(model, way, images), {})
    ]
    if not lacking:
        return data
    with tempfile.TemporaryDirectory() as folder:
        data["reading_ms"] = round(1e3 * make_images(Path(folder), max(args.images) + HELD_BACK), 3)
        for number, (model, way, images) in enumerate(lacking, start=1):
            row = measure(model, way, images, Path(folder), args.timeout)
            data["runs"][key_of(model, way, images)] = row
            write_json(args.out, data)
            print(f"{number}/{len(lacking)} {'  '.join([model, way, str(images), *cells(row)])}", file=sys.stderr)
    return data


def threads() -> int:
    """The number of threads of torch."""
    return int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)))


def known(data: dict[str, Any]) -> list[tuple[str, str, int, dict[str, Any]]]:
    """All runs: network, way, images and what was measured."""
    split = [(*key.split("|"), row) for key, row in data["runs"].items()]
    found = [(model, way, int(images), row) for model, way, images, row in split]
    return sorted(found, key=lambda item: (item[0], list(WAYS).index(item[1]), item[2]))


def cells(row: dict[str, Any]) -> list[str]:
    stages = row.get("stages", {})
    seconds = [f"{stages[stage]:.1f}" if stage in stages else "failed" for stage in STAGES]
    process = [f"{row['whole process']:.1f}", f"{row['processor']:.1f}"]
    return [*seconds, *process, f"{row['peak_mb']}", f"{row['others']:.2f}"]


def lines(data: dict[str, Any]) -> Iterator[tuple[str, str, str, Line]]:
    """A line for each network, way and stage of which three or more numbers of images were measured."""
    done = [item for item in known(data) if "failed" not in item[3]]
    for model, way in dict.fromkeys(item[:2] for item in done):
        some = [(images, row) for one, other, images, row in done if (one, other) == (model, way)]
        if len(some) < 3:
            continue
        for stage in FITTED:
            seconds = [row["stages"].get(stage, row.get(stage)) for _, row in some]
            yield model, way, stage, fit([images for images, _ in some], seconds)


def fit_rows(data: dict[str, Any]) -> list[list[str]]:
    return [[model, way, stage, *line_cells(line)] for model, way, stage, line in lines(data)]


def line_cells(line: Line) -> list[str]:
    return [
        f"{1e3 * line.slope:.1f}",
        f"{line.intercept:.1f}",
        f"{line.r_squared:.4f}",
        f"{100 * line.worst:.0f} %",
    ]


def findings(data: dict[str, Any]) -> list[str]:
    """Summarise the tables in sentences."""
    done = [item for item in known(data) if "failed" not in item[3]]
    found = []
    for stage, what in (("whole process", "Seconds"), ("processor", "Processor seconds")):
        squares = [line.r_squared for _, _, one, line in lines(data) if one == stage]
        if squares:
            found.append(f"{what} of the whole process over images: R² is {min(squares):.4f} at least.")
    for model, way, images, row in known(data):
        if "failed" in row:
            found.append(f"{model}, {way}, {images} images failed: {row['failed']}.")
    for model in dict.fromkeys(item[0] for item in done):
        most = max((item for item in done if item[0] == model), key=lambda item: item[3]["peak_mb"])
        found.append(f"{model}: most memory {most[3]['peak_mb']:,} MB ({most[1]}, {most[2]} images).")
    disturbed = [item for item in done if item[3]["others"] >= QUIET]
    if disturbed:
        found.append(f"DISTURBED: other programs were busy during {len(disturbed)} of {len(done)} runs.")
    if "reading_ms" in data:
        found.append(f"Reading an image takes {data['reading_ms']:.2f} ms, without cropping and normalising.")
    return found


EXPLANATION = f"""\
Each row is one process of `asymswap convert MODEL --weights none --recipe half-macs --calibrate FOLDER
--calibration-images N --dry-run` with the default `--calibration-memory` of 4 GiB, and with `--no-sequential` for one
pass. Weights and images are random: {SIDE} x {SIDE} pixels with detail at three scales, in PPM files, which cost almost
nothing to read; the networks get 224 x 224.

- load, trace: building the network, and reading its graph.
- calibrate: forward and backward passes of the images, covariances summed.
- plan: ranks from the curves of all convs.
- convert: solving the pairs; layer by layer both networks run along, for each layer on as many images as have their
  activations within the memory limit.
- measure: the report's figures, on 32 images.
- whole process: including importing torch; processor: the seconds of all cores, which a busy machine disturbs least.
- others: cores that other programs kept busy.

Images are decoded once if they fit into 1 GiB (1,783 of this size), otherwise for every pass.""".splitlines()

OF_THE_FIT = """\
Least squares; the worst miss is the largest distance from the line, relative to the seconds measured there. One thing
is not linear: with few images more positions of each are used, so that there are enough patches for the
covariances.""".splitlines()


def markdown(data: dict[str, Any]) -> str:
    rows = [[model, way, f"{images}", *cells(row)] for model, way, images, row in known(data)]
    text = [
        "# Calibration cost",
        "",
        "Written by `python benchmarks/studies/calibration_cost.py --markdown docs/results/calibration-cost.md`.",
        "",
        *(f"- {line}" for line in findings(data)),
        f"- Measured with {states(list(data['runs'].values()))}; threads: {data['threads']}.",
        "",
        *EXPLANATION,
        "",
        markdown_table(COLUMNS, rows, left=2),
        "",
        "## Seconds over images",
        "",
        *OF_THE_FIT,
        "",
        markdown_table(FIT_COLUMNS, fit_rows(data), left=3),
        "",
    ]
    return "\n".join(text)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["resnet18", "resnet50", "vgg16"])
    parser.add_argument("--images", type=int, nargs="+", default=[128, 256, 512, 1024, 2048])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--timeout", type=float, default=7200, help="seconds that one run may take")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/studies/results/calibration_cost.json"))
    parser.add_argument("--markdown", type=Path, help="write this page as well")
    return parser.parse_args()


def main() -> None:
    args = parse()
    data = survey(args)
    rows = [[model, way, f"{images}", *cells(row)] for model, way, images, row in known(data)]
    print(machine_text(), "", table(COLUMNS, rows), "", table(FIT_COLUMNS, fit_rows(data)), "", sep="\n")
    print(*findings(data), sep="\n")
    if args.markdown:
        args.markdown.write_text(markdown(data), encoding="utf-8")


if __name__ == "__main__":
    main()
