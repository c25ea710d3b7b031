"""Time beside MACs, in each runtime: a network and its conversions, timed in turn, in several processes.

    python benchmarks/studies/latency_at_budget.py [--models resnet18 …] [--budgets 0.7 0.5 0.35] [--latency 0.7 0.5]
        [--runtimes torch onnxruntime openvino] [--threads 1 2] [--batches 1 8] [--processes 5] [--seconds 40]
        [--out benchmarks/studies/results/latency_at_budget.json] [--markdown docs/results/latency.md]

Random weights (seed 0), which do not matter for the time. Each process converts the network by `half-macs` to each
budget of MACs and times all of them beside the original, by `asymswap.benchmark`: where a process's memory comes to lie
makes its convs faster or slower as long as it lives. Budgets of time are planned by `asymswap convert` at one thread
and batch 1, in each runtime, in a process of its own, and then measured here like the others. A network of your own is
`FILE.py:Net@1x180x180`. What is in the JSON is not done again.

Targets: in the best runtime at most 1.10 x the share of MACs that is left, in PyTorch at most 1.25 x.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # for what it shares with the checks of a release

from measured import ASYMSWAP, machine_text, markdown_table, read_json, run, run_well, state, table, write_json

HERE = Path(__file__).parent
MODELS = ("resnet18", "resnet34", "vgg16", "resnet50", "cifar:resnet20")
RUNTIMES = ("torch", "onnxruntime", "openvino")
BEST, IN_TORCH = 1.10, 1.25
COLUMNS = ["network", "budget", "MACs", "runtime", "batch", "threads", "before ms", "of the time", "range", "x MACs"]
TEXT = """\
# Time beside MACs

Written by `benchmarks/studies/latency_at_budget.py`, which says how. Networks with random weights, which do not matter
for the time, beside their conversions by `half-macs`, all in turn. *Of the time*: the median over {processes} of the
ratio to the original in the same process, with its range. *x MACs*: that ratio over the share of MACs that is left; the
goal is {best:.2f} at most in the best runtime and {torch:.2f} in PyTorch. PyTorch in channels-last, and float32
everywhere. The budgets of time (`--latency`) were planned in the runtime of their row, at batch 1 on one thread.

{findings}

What is in the way: layers that are not convs stay as they are (batch norms are folded, activations and pooling cost as
much as before; the three linear layers of VGG-16 hold 0.8 % of its MACs and 89 % of its weights, all of which are read
for one image), the two convs of a pair write and read a tensor between them, and each sums over fewer numbers. ONNX
Runtime loses least by that.

{table}

{notes}

State: {state}. Machine: {machine}.
"""


def options_of(model: str) -> tuple[str, list[str]]:
    """Return the reference of a network, and the options that say its input."""
    reference, _, size = model.partition("@")
    return reference, ["--input", size] if size else []


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Convert one network to all budgets of MACs, and time all of them, and the files given, in this process."""
    import asymswap

    reference, size = options_of(args.worker)
    given: dict[str, Any] = {"input_size": tuple(map(int, size[1].split("x")))} if size else {}
    weights = None if ".py:" in reference else "none"
    original = asymswap.open_model(reference, weights=weights, **given)
    found: dict[str, Any] = {"macs": {}, "rows": []}
    models: dict[str, Any] = {"": original}
    for budget in args.budgets:
        try:
            models[f"--macs {budget:g}"] = asymswap.convert(original, "half-macs", macs=budget, progress=False)
        except asymswap.AsymswapError as error:
            found.setdefault("failed", {})[f"--macs {budget:g}"] = str(error)
    planned = dict(pair.split("=", 1) for pair in args.files)  # budget and runtime: file
    for runtime in args.runtimes:
        own = {key.rpartition(" ")[0]: path for key, path in planned.items() if key.endswith(f" {runtime}")}
        arch = {"arch": reference} if ".py:" in reference else {}
        several = models | {key: asymswap.open_model(path, **arch) for key, path in own.items()}
        timed = asymswap.benchmark(
            list(several.values()),
            runtimes=[runtime],
            batches=args.batches,
            threads=args.threads,
            memory_formats=["channels-last"],
            precision="fp32",
            seconds=args.seconds,
            layers=False,
            progress=False,
        )
        found["macs"] |= {key: one.cost.macs for key, one in zip(several, timed.models, strict=True)}
        for result in timed.results:
            setting, key = timed.settings[result.setting], list(several)[result.model]
            row = {"budget": key, "runtime": runtime, "batch": setting.batch, "threads": setting.threads}
            if result.seconds is None:
                row["failed"] = result.failure
            else:
                row |= {
                    "ms": 1e3 * result.seconds.minimum,
                    "ratio": None if result.ratio is None else result.ratio.value,
                }
            found["rows"].append(row)
    return found


def plan(model: str, args: argparse.Namespace, folder: Path) -> tuple[list[str], dict[str, str]]:
    """Plan all budgets of time in all runtimes; return the files, and the reasons where there are none."""
    files, failed = [], {}
    reference, size = options_of(model)
    weights = [] if ".py:" in reference else ["--weights", "none"]
    for runtime in args.runtimes:
        for budget in args.latency:
            path, key = folder / f"{runtime}-{budget:g}.pt", f"--latency {budget:g} {runtime}"
            command = [ASYMSWAP, "convert", reference, *weights, *size, "--recipe", "half-macs"]
            command += ["--latency", f"{budget:g}", "--runtime", runtime, "--threads", "1", "--precision", "fp32"]
            done = run([*command, "-o", str(path), "--quiet"])
            if done.code:
                failed[key] = (done.err.strip().splitlines() or ["no reason given"])[-1].removeprefix("error: ")
            else:
                files.append(f"{key}={path}")
    return files, failed


def survey(args: argparse.Namespace) -> dict[str, Any]:
    """Do all that the JSON lacks."""
    data = read_json(args.out, {"networks": {}})
    for model in args.models:
        name = options_of(model)[0].rpartition("/")[2]
        known = data["networks"].setdefault(name, {"processes": [], "failed": {}})
        with tempfile.TemporaryDirectory() as folder:
            files: list[str] = []
            if len(known["processes"]) < args.processes and args.latency:
                files, known["failed"] = plan(model, args, Path(folder))
            while len(known["processes"]) < args.processes:
                command = [sys.executable, __file__, "--worker", model, "--seconds", f"{args.seconds:g}"]
                lists = {"budgets": args.budgets, "runtimes": args.runtimes, "threads": args.threads}
                for option, values in {**lists, "batches": args.batches, "files": files}.items():
                    command += [f"--{option}", *map(str, values)]
                found = json.loads(run_well(command).out.splitlines()[-1])
                known["processes"].append({**found, "state": state()})
                write_json(args.out, data)
                print(f"{name}: {len(known['processes'])} of {args.processes}", file=sys.stderr, flush=True)
    return data


def rows(data: dict[str, Any]) -> list[dict[str, Any]]:
    """Return one row for each network, budget and setting, over all processes."""
    found = []
    for name, network in data["networks"].items():
        groups: dict[tuple[Any, ...], list[float]] = defaultdict(list)
        before: dict[tuple[Any, ...], list[float]] = defaultdict(list)
        macs: dict[str, float] = {}
        for process in network["processes"]:
            for key, value in process["macs"].items():
                macs[key] = value / process["macs"][""]
            for row in process["rows"]:
                setting = row["runtime"], row["batch"], row["threads"]
                if row.get("ratio") is not None:
                    groups[(row["budget"], *setting)].append(row["ratio"])
                elif "ms" in row:
                    before[setting].append(row["ms"])
        for (budget, *setting), ratios in groups.items():
            ratio, runtime = median(ratios), setting[0]
            one = {"network": name, "budget": budget, "macs": macs[budget], "runtime": runtime, "batch": setting[1]}
            one |= {"threads": setting[2], "ms": median(before[tuple(setting)]), "ratio": ratio}
            found.append({**one, "low": min(ratios), "high": max(ratios), "x": ratio / macs[budget]})
    return found


def findings(every: list[dict[str, Any]]) -> list[str]:
    """Return for each network and budget of MACs whether the targets are met, at batch 1."""
    groups: dict[tuple[str, str, int], list[dict[str, Any]]] = defaultdict(list)
    for row in every:
        if row["batch"] == 1 and row["budget"].startswith("--macs"):
            groups[row["network"], row["budget"], row["threads"]].append(row)
    lines = []
    for (network, budget, threads), some in groups.items():
        best = min(some, key=lambda row: row["x"])
        missed = "" if best["x"] <= BEST else ", missed"
        line = f"{network}, {budget}, threads {threads}: {best['x']:.2f} x the MACs in {best['runtime']}{missed}"
        torch = next((row["x"] for row in some if row["runtime"] == "torch"), None)
        if torch is not None:
            line += f"; {torch:.2f} x in PyTorch{'' if torch <= IN_TORCH else ', missed'}"
        lines.append(line)
    return lines


def cells(row: dict[str, Any]) -> list[str]:
    spread = f"{row['low']:.2f} to {row['high']:.2f}"
    numbers = [f"{row['ms']:.3g}", f"{row['ratio']:.2f}", spread, f"{row['x']:.2f}"]
    setting = [row["runtime"], str(row["batch"]), str(row["threads"])]
    return [row["network"], row["budget"], f"{row['macs']:.3f}", *setting, *numbers]


def notes(data: dict[str, Any]) -> list[str]:
    """Return what could not be planned or run, and why."""
    lines: dict[str, None] = {}
    for name, network in data["networks"].items():
        lines |= {f"{name}, {key}: {why}": None for key, why in network["failed"].items()}
        for process in network["processes"]:
            lines |= {f"{name}, {key}: {why}": None for key, why in process.get("failed", {}).items()}
            failed = (row for row in process["rows"] if "failed" in row)
            lines |= {f"{name}, {row['budget']} in {row['runtime']}: {row['failed']}": None for row in failed}
    return list(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--budgets", type=float, nargs="*", default=[0.7, 0.5, 0.35])
    parser.add_argument("--latency", type=float, nargs="*", default=[0.7, 0.5])
    parser.add_argument("--runtimes", nargs="+", default=list(RUNTIMES))
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--processes", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=40, help="for one runtime in one process")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "latency_at_budget.json")
    parser.add_argument("--markdown", type=Path, help="write this page as well")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--files", nargs="*", default=[], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(measure(args)))
        return
    data = survey(args)
    every = rows(data)
    print(table(COLUMNS, [cells(row) for row in every]), "", *findings(every), *notes(data), sep="\n")
    if args.markdown:
        counts = sorted({len(network["processes"]) for network in data["networks"].values()})
        listed = lambda lines: "\n".join(f"- {line}" for line in lines)  # noqa: E731
        args.markdown.write_text(
            TEXT.format(
                processes=f"{' to '.join(map(str, dict.fromkeys((counts[0], counts[-1]))))} processes",
                best=BEST,
                torch=IN_TORCH,
                findings=listed(findings(every)),
                table=markdown_table(COLUMNS, [cells(row) for row in every], left=2),
                notes=listed(notes(data)),
                state=state(),
                machine=machine_text(),
            ),
            encoding="utf-8",
        )


if __name__ == "__main__":
    main()
