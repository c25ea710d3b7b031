"""Whether `--max-drop` keeps its word on other inputs than those that it measured on.

    python benchmarks/studies/max_drop.py NAME --drops 0.5 1 2 (--other FOLDER | --metric FILE.py:fn)
        [--out benchmarks/studies/results/max_drop.json] [--markdown docs/results/max-drop.md] -- CONVERT…

CONVERT are the arguments of `asymswap convert` that name the network and its calibration. Each request is a command in
a process of its own. The network that it writes is then compared with the original on other inputs: on all images of
the folder by the class, or else by the metric, on data that neither solving nor measuring has seen. What is in the JSON
is not done again.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # for what it shares with the checks of a release

from measured import ASYMSWAP, machine_text, markdown_table, read_json, run, state, write_json

HERE = Path(__file__).parent
WITHIN = {"%": 0.3, "dB": 0.1}
COLUMNS = ["network", "asked", "MACs", "lost when measured", "lost on other inputs", "off by", "solves", "processor s"]
TEXT = """\
# Asking for the loss

Written by `benchmarks/studies/max_drop.py`, which says how. `asymswap convert … --recipe half-macs --max-drop X`, one
pass of calibration images, no polish, no labels: the smallest network found whose loss on held-back inputs is at most
what was asked. *Lost when measured* is that loss with its interval of 95 %, *on other inputs* the loss on data used
neither for solving nor for measuring: points of agreement with the original over all test images, or decibels of the
metric. The goal is at most 0.3 points or 0.1 dB off, on nine of ten.

{table}

{kept} of {all} are within it. Where it is missed, the images that it was measured on are those that the network was
trained on, which it knows by heart: they lose less than others. Measure on images that it has not seen.

{commands}

State: {state}. Machine: {machine}.
"""


def measure(args: argparse.Namespace, drop: str) -> dict[str, Any]:
    """Convert by one request, and measure what was written on other inputs, in this process."""
    import asymswap
    from asymswap.data.datasets import open_data
    from asymswap.data.metrics import evaluator_of, predict, read_metric

    with tempfile.TemporaryDirectory() as folder:
        report, path = Path(folder) / "report.json", Path(folder) / "model.pt"
        command = [ASYMSWAP, "convert", *args.convert, "--recipe", "half-macs", "--max-drop", drop]
        done = run([*command, "-o", str(path), "--report", str(report), "--quiet"])
        if done.code:
            return {"failed": (done.err.strip().splitlines() or ["no reason given"])[-1], "state": state()}
        told = json.loads(report.read_text())
        arch = args.convert[args.convert.index("--arch") + 1] if "--arch" in args.convert else None
        converted = asymswap.open_model(path, arch=arch)
        original = asymswap.open_model(args.convert[0], arch=arch)
        if args.other:
            data = open_data(args.other, converted.preprocessing, "test", unlabelled=True)
            guesses = [predict(one.model, data).guesses for one in (original, converted)]
            lost = 1 - float((guesses[0] == guesses[1]).double().mean())
        else:
            metric = evaluator_of(read_metric(args.metric), converted)
            before, after = (metric(one.model, lambda *_: None)[0].value for one in (original, converted))
            lost = before - after
    row = told["drop"]
    found = {key: row[key] for key in ("unit", "allowed", "lost", "interval", "share", "solves", "samples", "score")}
    return {**found, "other": lost, "cpu": round(done.cpu_seconds, 1), "state": state()}


def cells(name: str, drop: str, one: dict[str, Any]) -> list[str]:
    if "failed" in one:
        return [name, drop, one["failed"], *["-"] * 5]
    factor, unit = (100, " points") if one["unit"] == "%" else (1, f" {one['unit']}")
    low, high = (f"{factor * end:.2f}" for end in one["interval"]) if one["interval"] else ("", "")
    measured = f"{factor * one['lost']:.2f}" + (f" ({low} to {high})" if low else "")
    off = f"{factor * (one['other'] - one['allowed']):+.2f}"
    asked = f"{factor * one['allowed']:g}{unit}"
    return [name, asked, f"{one['share']:.3f}", measured, f"{factor * one['other']:.2f}", off, str(one["solves"]),
            f"{one['cpu']:.0f}"]  # fmt: skip


def kept(one: dict[str, Any]) -> bool:
    factor = 100 if one.get("unit") == "%" else 1
    return "failed" not in one and factor * abs(one["other"] - one["allowed"]) <= WITHIN.get(one["unit"], 0.3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("--drops", nargs="+", required=True)
    parser.add_argument("--other", help="a folder of class folders, test images")
    parser.add_argument("--metric", help="FILE.py:function of the model, on other inputs")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "max_drop.json")
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("convert", nargs="+")
    args = parser.parse_args()
    results = read_json(args.out, {"rows": {}, "commands": {}})
    # Only the names of files: where they lie says nothing.
    results["commands"][args.name] = [Path(word).name if Path(word).exists() else word for word in args.convert]
    rows = results["rows"].setdefault(args.name, {})
    for drop in args.drops:
        if drop not in rows:
            rows[drop] = measure(args, drop)
            write_json(args.out, results)
        print(args.name, drop, rows[drop], flush=True)
    if args.markdown is not None:
        every = [(name, drop, one) for name, some in results["rows"].items() for drop, one in some.items()]
        commands = (f"- {name}: `asymswap convert {' '.join(words)}`" for name, words in results["commands"].items())
        text = TEXT.format(
            table=markdown_table(COLUMNS, [cells(*one) for one in every], left=2),
            kept=sum(kept(one) for _, _, one in every),
            all=len(every),
            commands="\n".join(commands),
            state=state(),
            machine=machine_text(),
        )
        args.markdown.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
