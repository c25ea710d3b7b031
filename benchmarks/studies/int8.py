"""What int8 costs a network and its conversion: the score in float and in int8, and the time in ONNX Runtime.

    python benchmarks/studies/int8.py NAME MODEL CONVERTED… --calibrate D (--evaluate D | --metric FILE.py:fn)
        [--arch REF] [--normalize HOW] [--input 1x64x64] [--patch N] [--noise N] [--time-input 1x256x256]
        [--out benchmarks/studies/results/int8.json] [--markdown docs/results/int8.md]

Each model is exported by `asymswap.export` in float32 and, with `quantize="int8"`, in int8; both files are measured as
they are, and timed in turn on one thread. What int8 costs a conversion is set beside what it costs the original.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # for what it shares with the checks of a release

from measured import machine_text, markdown_table, read_json, state, write_json

import asymswap
from asymswap.data.metrics import evaluator_of, read_metric
from asymswap.data.normalization import settle
from asymswap.measure.int8 import FileModel
from asymswap.measure.latency import Turn, ratio_of, seconds_of, stopwatch, take_turns
from asymswap.measure.runtimes import forward_in, open_session
from asymswap.types import silent

HERE = Path(__file__).parent
COLUMNS = ["network", "model", "float", "int8", "lost by int8", "agreement", "float ms", "int8 ms", "of the time", "kB"]
TEXT = """\
# int8

Written by `benchmarks/studies/int8.py`, which says how. Networks and their conversions in float32 and in int8, both as
ONNX files in ONNX Runtime, on one thread; the score is that of test images. *Of the time*: relative to the float32
file.

{table}

Tried between the two convs of a pair, on the DnCNN at half of its MACs; it has 30.33 dB in float32, and in int8:

| what passes between the two convs | dB |
| --- | ---: |
| as it was solved | 30.19 |
| a random rotation (what `export` does) | 30.21 and 30.24 |
| all channels with one range | 30.16 |
| ranges and weights equalised (Nagel et al., 2019) | 30.18 |
| the scale that is best for noise in all numbers alike, by the channels' deviations | 30.09 |
| the same, then a random rotation | 30.13 |

On ResNet-20 at half of its MACs all of them are within 0.25 points of each other, on 2,000 test images. Signed
activations are as accurate as unsigned ones, and take three times as long on an AMD EPYC with AVX-512 VNNI.

State: {state}. Machine: {machine}.
"""


def measure(args: argparse.Namespace, model: str) -> dict[str, Any]:
    """Export a model twice, and measure and time both files."""
    size = None if args.input is None else tuple(map(int, args.input.split("x")))
    preprocessing = asymswap.PreprocessingOptions(normalize=args.normalize) if args.normalize else None
    opened = asymswap.open_model(model, arch=args.arch, input_size=size, preprocessing=preprocessing)
    opened = settle(opened, args.calibrate, "train")
    calibration = asymswap.Calibration(args.calibrate, images=args.images, patch=args.patch, noise=args.noise)
    evaluator = evaluator_of(read_metric(args.metric) if args.metric else args.evaluate, opened)
    with tempfile.TemporaryDirectory() as folder:
        paths = {form: Path(folder) / f"{form}.onnx" for form in ("float", "int8")}
        how: dict[str, Any] = {"dynamic_size": args.time_input is not None}
        asymswap.export(opened, paths["float"], **how, progress=False)
        report = asymswap.export(opened, paths["int8"], quantize="int8", calibration=calibration, **how, progress=False)
        found: dict[str, Any] = {"bytes": {form: path.stat().st_size for form, path in paths.items()}}
        for form, path in paths.items():
            score = evaluator(FileModel(path), silent_steps)[0]
            found[form], found["unit"], found["score"] = score.value, score.unit, score.name
        shape = tuple(map(int, args.time_input.split("x"))) if args.time_input else opened.probe(1)[0].shape[1:]
        x = (torch.rand(1, *shape),)
        sessions = {form: open_session(path, 1) for form, path in paths.items()}
        turns = {form: Turn(stopwatch(forward_in(one, x)), 1, "onnxruntime") for form, one in sessions.items()}
        passes = take_turns(turns, rounds=20, seconds=30, progress=silent)
        found["ms"] = {form: 1e3 * seconds_of(rounds).minimum for form, rounds in passes.items()}
        found["ratio"] = ratio_of(passes["int8"], passes["float"]).value
        outputs = report.int8.outputs if report.int8 else ()
        found["agreement"] = ", ".join(f"{one.measure} {one.value:.4g}" for one in outputs)
    return {**found, "state": state()}


def silent_steps(done: int, total: int) -> None:
    pass


def cells(name: str, model: str, one: dict[str, Any]) -> list[str]:
    factor, form = (100, "{:.2f} %") if one["unit"] == "%" else (1, "{:.2f} " + (one["unit"] or "dB"))
    lost = factor * (one["float"] - one["int8"])
    texts = [form.format(factor * one[key]) for key in ("float", "int8")]
    times = [f"{one['ms'][key]:.3g}" for key in ("float", "int8")]
    size = f"{one['bytes']['float'] / 1e3:.0f} -> {one['bytes']['int8'] / 1e3:.0f}"
    return [name, model, *texts, f"{lost:+.2f}", one["agreement"], *times, f"{one['ratio']:.2f}", size]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("models", nargs="+")
    parser.add_argument("--calibrate", required=True)
    parser.add_argument("--images", type=int, default=512)
    for option in ("evaluate", "metric", "arch", "normalize", "input", "time-input", "noise"):
        parser.add_argument(f"--{option}")
    parser.add_argument("--patch", type=int)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "int8.json")
    parser.add_argument("--markdown", type=Path)
    args = parser.parse_args()
    results = read_json(args.out, {"rows": {}})
    for model in args.models:
        rows = results["rows"].setdefault(args.name, {})
        if Path(model).name not in rows:
            rows[Path(model).name] = measure(args, model)
            write_json(args.out, results)
    table = [cells(name, model, one) for name, rows in results["rows"].items() for model, one in rows.items()]
    text = markdown_table(COLUMNS, table, left=2)
    print(text)
    if args.markdown is not None:
        args.markdown.write_text(TEXT.format(table=text, state=state(), machine=machine_text()), encoding="utf-8")


if __name__ == "__main__":
    main()
