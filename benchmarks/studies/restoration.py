"""What a network that makes images keeps at a fraction of its MACs, solved alone and polished, over several seeds.

    python benchmarks/studies/restoration.py NAME [--macs 0.5 0.3] [--polish none 5min] [--seeds 0 1 2]
        [--out benchmarks/studies/results/restoration.json] [--markdown docs/results/restoration.md] -- CONVERT…

CONVERT are the arguments of `asymswap convert` that name the network, its calibration and its metric:

    python benchmarks/studies/restoration.py "DnCNN 25/255" -- dncnn25.pth --arch nets.py:DnCNN --normalize none \\
        --calibrate train/ --patch 64 --noise 25/255 --metric psnr.py:denoising

Each conversion is a command in a process of its own; the metric is measured by it, on test images that calibration
never sees. What is in the JSON is not done again.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from statistics import mean, stdev
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # for what it shares with the checks of a release

from measured import ASYMSWAP, machine, machine_text, markdown_table, read_json, run_well, state, states, write_json

HERE = Path(__file__).parent
TEXT = """\
# Denoising and super-resolution

Written by `benchmarks/studies/restoration.py`, which says how. Half and less of the MACs of networks that make images:
their 3x3 convs become pairs (`half-macs`), solved layer by layer on unlabelled images, then polished for some minutes
or not at all. The metric is that of test images: the mean over seeds, which draw the calibration images and patches,
± the standard deviation. Processor seconds are those of the whole command, its two evaluations included. `train_x2`
holds the images of `train`, halved and enlarged again by bicubic interpolation.

{table}

{commands}

State: {states}. Machine: {machine}.
"""


def measure(convert: list[str], macs: float, polish: str, seed: int) -> dict[str, Any]:
    """Convert once, and return the metric before and after, the fraction of the MACs and the processor seconds."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [ASYMSWAP, "convert", *convert, "--recipe", "half-macs", "--macs", str(macs), "--seed", str(seed)]
        command += ["--dry-run", "--report", str(report), *(() if polish == "none" else ("--polish", polish))]
        done = run_well(command)
        found = json.loads(report.read_text())
    score = found["accuracy"]["scores"][0]
    return {
        "before": score["before"],
        "after": score["after"],
        "macs": found["after"]["macs"] / found["before"]["macs"],
        "cpu": round(done.cpu_seconds, 1),
        "cores": machine()["cores"],
        "state": state(),
    }


def page(results: dict[str, Any]) -> str:
    """Return the page: a row for each network, share and time of polish."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for key, one in results["rows"].items():
        groups.setdefault(tuple(json.loads(key)[:3]), []).append(one)
    rows = []
    for (name, macs, polish), found in sorted(groups.items()):
        after = [one["after"] for one in found]
        spread = f" ±{stdev(after):.2f}" if len(after) > 1 else ""
        rows.append(
            [
                name,
                f"{found[0]['macs']:.3f}" if found[0]["macs"] else macs,
                polish
                if polish == "none"
                else f"{polish}, {found[0].get('cores', 2)} cores".replace("1 cores", "1 core"),
                f"{found[0]['before']:.2f}",
                f"{mean(after):.2f}{spread}",
                f"{len(after)}",
                f"{mean(one['cpu'] for one in found):.0f}",
            ]
        )
    columns = ["network", "share of MACs", "polish", "before", "after", "seeds", "processor s"]
    commands = "\n".join(f"- {name}: `{' '.join(['asymswap convert', *c])}`" for name, c in results["commands"].items())
    all_states = states(list(results["rows"].values()))
    table = markdown_table(columns, rows)
    return TEXT.format(table=table, commands=commands, states=all_states, machine=machine_text())


def named(word: str) -> str:
    """A word of a command with the name of a file in place of its path, as of `folder/nets.py:Net`."""
    path, colon, rest = word.partition(":")
    return f"{Path(path).name}{colon}{rest}" if Path(path).exists() else word


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("--macs", type=float, nargs="+", default=[0.5, 0.3])
    parser.add_argument("--polish", nargs="+", default=["none", "5min"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=HERE / "results" / "restoration.json")
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("convert", nargs="+")
    args = parser.parse_args()
    results = read_json(args.out, {"rows": {}, "commands": {}})
    # Only the names of files: where they lie says nothing.
    results["commands"][args.name] = [named(word) for word in args.convert]
    for seed in args.seeds:
        for macs in args.macs:
            for polish in args.polish:
                key = json.dumps([args.name, str(macs), polish, seed])
                if key not in results["rows"]:
                    results["rows"][key] = measure(args.convert, macs, polish, seed)
                    write_json(args.out, results)
                print(key, results["rows"][key])
    if args.markdown is not None:
        args.markdown.write_text(page(results))


if __name__ == "__main__":
    main()
