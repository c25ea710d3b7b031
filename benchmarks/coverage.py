"""Every builder of torchvision and over a hundred CNNs of timm: what asymswap finds, and whether it converts them.

    python benchmarks/coverage.py [--models resnet18 timm:convnext_tiny] [--out benchmarks/results/coverage.json]
        [--markdown docs/reference/coverage.md]

For each model, with random weights (seed 0): `candidates`, then `convert` by the recipe all-spatial with `energy = 1`
and `allow_growth = true`. That replaces every conv with a kernel of more than one row and column, grouped and
depthwise ones too, by a pair that must compute the same. Each model has its own process, forked from one that has done
the imports, so that peak memory is that model's. Models in the JSON are skipped, unless they failed or are named by
--models; a full run takes hours.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from measured import (
    QUIET,
    apart,
    import_everything,
    machine,
    machine_text,
    markdown_table,
    run_well,
    state,
    states,
    table,
    write_json,
)

RECIPE = "all-spatial"
FULL_RANK = {"energy": 1.0, "allow_growth": True}
TIMM = Path(__file__).with_name("timm_cnns.txt")
SAME = 1e-3  # two random images whose outputs differ by less than this are said to have the same
COLUMNS = ["model", "read by", "convs", "candidates", "MACs held", "swapped", "layer", "output", "seconds", "peak MB"]


def measure(name: str) -> dict[str, Any]:
    """The row of one model."""
    import torch

    import asymswap

    torch.manual_seed(0)
    start = time.perf_counter()
    found = asymswap.candidates(asymswap.open_model(name, weights="none"))
    middle = time.perf_counter()
    conversion = asymswap.convert(asymswap.open_model(name, weights="none"), RECIPE, overrides=FULL_RANK)
    end = time.perf_counter()
    report = conversion.report
    return {
        "traced_by": found.traced_by,
        "input": found.input,
        "macs": found.total.macs,
        "params": found.total.params,
        "convs": len(found.rows),
        "candidates": sum(row.reason is None for row in found.rows),
        "macs_held": found.held.macs / found.total.macs if found.total.macs else 0.0,
        "swapped": len(report.swapped),
        "kept": sorted({row.reason for row in report.sites if row.action == "keep"}),
        "layer_difference": max((row.output_error for row in report.swapped), default=0.0),
        "output_difference": report.output.relative,
        "output": describe_output(conversion),
        "seconds": {"candidates": round(middle - start, 2), "convert": round(end - middle, 2)},
    }


def describe_output(conversion: Any) -> str:
    """Whether the random network's own output is worth comparing: `usable`, or how it is degenerate."""
    import torch

    from asymswap.utils.inputs import probe
    from asymswap.utils.tensors import list_tensors

    preprocessing, model = conversion.header.preprocessing, conversion.model.eval()
    if preprocessing.form == "image-list":
        # What a detector keeps says nothing; the outputs of its parts are compared, and those were not zero.
        return "usable" if conversion.report.output.largest > 0 else "all zeros"
    outputs = []
    with torch.no_grad():
        for seed in (0, 1):
            made = list_tensors(model(*probe(preprocessing, next(model.parameters()).dtype, images=1, seed=seed)))
            outputs.append(torch.cat([tensor.double().flatten() for tensor in made]))
    one, other = outputs
    if not bool(torch.isfinite(one).all()):
        return "not finite"
    if float(one.norm()) == 0:
        return "all zeros"
    # After many layers of random weights, biases may dominate what is left of the input.
    return "usable" if float((one - other).norm() / one.norm()) > SAME else "hardly moved by the input"


def every_model() -> list[str]:
    """torchvision's own list of builders, from another process to keep torch out of this one; and timm's."""
    code = "from torchvision import models; print(*models.list_models())"
    return run_well([sys.executable, "-c", code]).out.split() + [f"timm:{name}" for name in TIMM.read_text().split()]


def cells(name: str, row: dict[str, Any]) -> list[str]:
    if "failed" in row:
        return [name, f"failed: {row['failed']}", *[""] * (len(COLUMNS) - 3), f"{row['peak_mb']}"]
    output = f"{row['output_difference']:.0e}" + ("" if row["output"] == "usable" else " (*)")
    return [
        name,
        row["traced_by"],
        f"{row['convs']}",
        f"{row['candidates']}",
        f"{100 * row['macs_held']:.1f} %",
        f"{row['swapped']}",
        f"{row['layer_difference']:.0e}",
        output,
        f"{sum(row['seconds'].values()):.1f}",
        f"{row['peak_mb']}",
    ]


def by_package(rows: dict[str, Any]) -> dict[str, list[str]]:
    """The models of torchvision and of timm."""
    found: dict[str, list[str]] = {"torchvision": [], "timm": []}
    for name in rows:
        found["timm" if name.startswith("timm:") else "torchvision"].append(name)
    return {package: names for package, names in found.items() if names}


def totals(rows: dict[str, Any]) -> list[str]:
    """Summarise all rows."""
    good = {name: row for name, row in rows.items() if "failed" not in row}
    lines = []
    for package, names in by_package(rows).items():
        failed = [name for name in names if name not in good]
        line = f"{package}: {len(names) - len(failed)} of {len(names)} read and converted at full rank"
        lines.append(line + (f"; failed: {', '.join(failed)}." if failed else "."))
    if not good:
        return lines
    swapped, convs = (sum(row[key] for row in good.values()) for key in ("swapped", "convs"))
    lines.append(f"Of their {convs:,} Conv2d, {swapped:,} were swapped.")
    prefix = "rule 1, but "
    for reason in sorted({reason for row in good.values() for reason in row["kept"] if reason.startswith(prefix)}):
        names = [name for name, row in good.items() if reason in row["kept"]]
        lines.append(
            f"Kept because it {reason.removeprefix(prefix)}: in {', '.join(names[:8])}{' and more' * (len(names) > 8)}."
        )
    none = [name for name, row in good.items() if not row["convs"]]
    lines.append(f"Without a Conv2d, so nothing can be swapped: {', '.join(none) or 'none'}.")
    for key, what in (("layer_difference", "a layer's"), ("output_difference", "a whole model's")):
        worst = max(good, key=lambda name: good[name][key] if math.isfinite(good[name][key]) else -1.0)
        lines.append(f"Greatest relative difference of {what} output: {good[worst][key]:.1e} ({worst}).")
    for kind in sorted({row["output"] for row in good.values()} - {"usable"}):
        names = [name for name, row in good.items() if row["output"] == kind]
        lines.append(f"(*) With random weights the output is {kind} and says little: {', '.join(names)}.")
    seconds = [sum(row["seconds"][step] for row in good.values()) for step in ("candidates", "convert")]
    lines.append(f"Time: {seconds[0]:.0f} s for candidates, {seconds[1]:.0f} s for convert; both build the models.")
    disturbed = sum(row["others"] >= QUIET for row in good.values())
    if disturbed:
        lines[-1] += f" Other programs were busy while {disturbed} of the models were measured, which slows it down."
    largest = max(good, key=lambda name: good[name]["peak_mb"])
    lines.append(f"Most memory: {good[largest]['peak_mb']:,} MB ({largest}).")
    lines.append(f"Measured with {states([*rows.values()])}.")
    return lines


EXPLANATION = """\
Every builder of torchvision and a hundred CNNs of timm, converted at full rank, with random weights (seed 0).
`candidates` lists the convs: how many are candidates, and their share of the model's MACs. `convert` by the recipe
`all-spatial` with `energy = 1` and `allow_growth = true` then replaces every conv with a kernel of more than one row
and column by a pair of full rank, which must compute the same. Layer, output: the greatest relative difference of a
swapped layer's output, and of the whole model's. Seconds: both commands, without the imports. Peak memory: of a process
forked from one that has done the imports; their data count, libraries only as far as the model uses
them.""".splitlines()


def markdown(data: dict[str, Any]) -> str:
    """The page: the totals, then a row for each model."""
    rows = [cells(name, row) for name, row in data["models"].items()]
    facts = ", ".join(f"{name} {value}" for name, value in data["machine"].items())
    lines = [
        "# Supported models",
        "",
        "Written by `python benchmarks/coverage.py --markdown docs/reference/coverage.md`.",
        "",
        *(f"- {line}" for line in totals(data["models"])),
        f"- Machine: {facts}.",
        "",
        *EXPLANATION,
        "",
        markdown_table(COLUMNS, rows, left=2),
        "",
    ]
    return "\n".join(lines)


def survey(names: Sequence[str], again: bool, out: Path, timeout: float) -> dict[str, Any]:
    """Measure what is missing in the JSON, and write it after each model."""
    data = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {"models": {}}
    data["machine"] = machine()
    measured_with = state()
    import_everything()
    for number, name in enumerate(names, start=1):
        if name in data["models"] and not again and "failed" not in data["models"][name]:
            continue
        data["models"][name] = {**apart(functools.partial(measure, name), timeout), "state": measured_with}
        write_json(out, {**data, "models": dict(sorted(data["models"].items()))})
        print(f"{number}/{len(names)} {'  '.join(cells(name, data['models'][name]))}", file=sys.stderr, flush=True)
    return {**data, "models": dict(sorted(data["models"].items()))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", help="only these, also if they are in the JSON already")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/coverage.json"))
    parser.add_argument("--markdown", type=Path, help="write the table to this file as well")
    parser.add_argument("--timeout", type=float, default=900, help="seconds that one model may take")
    args = parser.parse_args()
    data = survey(args.models or every_model(), bool(args.models), args.out, args.timeout)
    shown = table(COLUMNS, [cells(name, row) for name, row in data["models"].items()])
    print(machine_text(), "", *totals(data["models"]), "", shown, sep="\n")
    if args.markdown:
        args.markdown.write_text(markdown(data), encoding="utf-8")


if __name__ == "__main__":
    main()
