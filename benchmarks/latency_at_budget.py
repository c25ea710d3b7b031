"""Latency under budgets of MACs and of latency: original and converted networks timed in turn.

    python benchmarks/latency_at_budget.py [--models resnet18 …] [--budgets 0.7 0.5 0.35] [--threads 2] [--rounds 40]
        [--wait-policy active] [--out build/latency_at_budget.json] [--markdown docs/latency.md]

Random weights (seed 0), which do not matter for the time; batch 1, each network's own input size. For each network one
process, in which the original and its conversions by the recipe half-macs run in turn: at each budget of MACs, with
ranks rounded to what processors like (the default), and at the same budgets of latency, whose plans are made for the
memory format in question from measurements made then and there. Networks that are in the JSON are measured again.

Threads that wait do so asleep, as in the command asymswap; `--wait-policy active` keeps them awake, which is faster on
an idle machine and many times as slow on a busy one.

Targets, in channels_last: at half of the MACs at most 0.60 of the latency (resnet18, vgg16); at each budget at most
1.15 x the share of MACs that is left.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from measured import QUIET, machine, machine_text, markdown_table, read_json, run, table, write_json

RECIPE = "half-macs"
ORIGINAL = "original"
MODELS = ("resnet18", "resnet34", "vgg16", "cifar:resnet20", "deeplabv3_resnet50")
BUDGETS = (0.7, 0.5, 0.35)
FORMATS = ("channels-last", "contiguous")
TARGET, PROMISED = 0.6, ("resnet18", "vgg16")
FOLLOWS = 1.15
"""How many times the share of MACs the share of time may be."""
COLUMNS = [
    "network",
    "memory format",
    "version",
    "MACs",
    "min ms",
    "x",
    "x / MACs",
    "parts x",
    "convs x",
    "convs' share",
]


def measure(name: str, budgets: Sequence[float], threads: int, rounds: int) -> dict[str, Any]:
    """What is told of one network; runs in a process of its own."""
    import torch

    import asymswap
    from asymswap.measure.latency import in_format, inputs_like, time_models
    from asymswap.opening import open_model
    from asymswap.sources.references import Request

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    opened = open_model(name, Request(weights="none"))
    size = tuple(opened.example()[0].shape[1:])

    def convert(measure: str, fraction: float, timing: Any) -> Any:
        overrides = {f"budget.{measure}": fraction}
        try:
            return asymswap.convert(opened.model, RECIPE, overrides=overrides, timing=timing, input_size=size)
        except asymswap.AsymswapError as error:
            return str(error)

    counted = {counted_name(budget): convert("macs", budget, None) for budget in budgets}
    found: dict[str, Any] = {"formats": {}, "input": list(size)}
    for memory_format in FORMATS:
        # A table of an earlier day would be read from the user's cache.
        with tempfile.TemporaryDirectory() as folder:
            timing = asymswap.Timing(memory_format, cache=Path(folder))
            timed_ones = {timed_name(budget): convert("latency", budget, timing) for budget in budgets}
        conversions = {**counted, **timed_ones}
        failed = {key: value for key, value in conversions.items() if isinstance(value, str)}
        reports = {key: value.report for key, value in conversions.items() if key not in failed}
        models = {ORIGINAL: opened.model, **{key: conversions[key].model for key in reports}}
        some = next(iter(reports.values()))
        convs = {row.site for row in some.sites if row.calls}
        leaves = [name for name, module in opened.model.named_modules() if not any(module.children())]
        found["macs"] = some.before.macs
        found["convs_macs"] = 1 - some.rest.macs / some.before.macs
        timed = time_models(
            {key: in_format(model, memory_format) for key, model in models.items()},
            inputs_like(opened.example(), memory_format),
            leaves,
            rounds=rounds,
        )
        found["formats"][memory_format] = {
            key: {
                "macs": reports[key].after.macs / reports[key].before.macs if key in reports else 1.0,
                "min_ms": 1e3 * one.whole,
                "median_ms": 1e3 * one.median,
                "parts_ms": 1e3 * one.sum_of_parts,
                "convs_ms": 1e3 * sum(seconds for name, seconds in one.modules.items() if name in convs),
                "swapped": len(reports[key].swapped) if key in reports else 0,
                "undone": list(reports[key].latency.undone) if key in timed_ones and key in reports else [],
            }
            for key, one in timed.items()
        } | {key: {"failed": reason} for key, reason in failed.items()}
    return found


def counted_name(budget: float) -> str:
    return f"--macs {budget:g}"


def timed_name(budget: float) -> str:
    return f"--latency {budget:g}"


def measure_apart(name: str, wanted: argparse.Namespace) -> dict[str, Any]:
    """The same in a process of its own, and how much the machine was disturbed meanwhile."""
    settings = ["--threads", f"{wanted.threads}", "--rounds", f"{wanted.rounds}"]
    settings += ["--budgets", *map(str, wanted.budgets)]
    command = [sys.executable, __file__, "--worker", name, *settings]
    done = run(command, OMP_WAIT_POLICY=wanted.wait_policy.upper())
    if done.code:
        sys.exit(f"{name} ended with {done.code}:\n{done.err}")
    about = {
        "threads": wanted.threads,
        "rounds": wanted.rounds,
        "budgets": wanted.budgets,
        "wait_policy": wanted.wait_policy,
    }
    return {**json.loads(done.out.splitlines()[-1]), **about, "seconds": done.seconds, "others": round(done.others, 2)}


def rows(data: dict[str, Any]) -> list[list[str]]:
    return [
        [name, memory_format, key, *cells(row, versions[ORIGINAL])]
        for name, network in data["networks"].items()
        for memory_format, versions in network["formats"].items()
        for key, row in versions.items()
    ]


def cells(row: dict[str, Any], original: dict[str, Any]) -> list[str]:
    if "failed" in row:
        return ["failed", *[""] * (len(COLUMNS) - 4)]
    ratio = row["min_ms"] / original["min_ms"]
    parts = [f"{row[key] / original[key]:.2f}" for key in ("parts_ms", "convs_ms")]
    shares = [f"{row['macs']:.3f}", f"{row['min_ms']:.1f}", f"{ratio:.2f}", f"{ratio / row['macs']:.2f}"]
    return [*shares, *parts, f"{100 * share(row):.0f} %"]


def share(row: dict[str, Any]) -> float:
    """How much of the time passes in convs."""
    return row["convs_ms"] / row["parts_ms"]


def findings(data: dict[str, Any]) -> Iterator[str]:
    """What the table comes to, in sentences."""
    for name, network in data["networks"].items():
        for memory_format, versions in network["formats"].items():
            if memory_format == FORMATS[0]:
                yield f"{name}: {verdict(name, versions)}"
            for key, row in versions.items():
                if "failed" in row:
                    yield f"{name}, {memory_format}, {key} failed: {row['failed']}."
                elif row["undone"]:
                    yield f"{name}, {memory_format}, {key}: slower, and so kept: {', '.join(row['undone'])}."
        if network["others"] >= QUIET:
            yield f"{name}: DISTURBED, other processes kept {network['others']:.2f} cores busy: the times are too long."


def verdict(name: str, versions: dict[str, Any]) -> str:
    """The shares of time at the budgets of MACs, and whether they keep the targets."""
    original = versions[ORIGINAL]
    counted = {key: row for key, row in versions.items() if key.startswith("--macs") and "failed" not in row}
    ratios = {key: row["min_ms"] / original["min_ms"] for key, row in counted.items()}
    told = ", ".join(
        f"{ratio:.2f} of the time at {counted[key]['macs']:.2f} of the MACs" for key, ratio in ratios.items()
    )
    kept = sum(ratio <= FOLLOWS * counted[key]["macs"] for key, ratio in ratios.items())
    line = f"{told}; within {FOLLOWS} x at {kept} of {len(ratios)} budgets"
    half = ratios.get(counted_name(0.5))
    if name in PROMISED and half is not None:
        line += f"; at half of the MACs at most {TARGET:.2f}: {'met' if half <= TARGET else 'missed'}"
    return f"{line}. Convs take {100 * share(original):.0f} % of the original's time."


EXPLANATION = """\
Random weights (seed 0; for the time they do not matter), one image of the network's own size. The original and its
conversions run in turn in one process; the minimum over the rounds. `x` is the time over the original's in the same
memory format, `x / MACs` the same over the share of MACs that is left. `--macs B`, and `--latency B --memory-format …`,
go with `--recipe half-macs`. Parts: each layer's own minimum, summed, which a busy machine disturbs least. Convs: those
of them that are convs, or what took their place; the others are batch norms, activations, pooling and linear layers.

MACs say nothing of a linear layer's time at batch 1: each weight is read from memory for a single multiply-add. The
three of VGG-16 hold 0.8 % of its MACs, and 89 % of its parameters.

Why time does not follow MACs: what is no conv stays as it was; and the two convs of a pair write and read a tensor
between them, and sum over fewer numbers each. A 3x3 conv of 64 to 512 channels runs at 90 to 110 billion MACs a second
on a core of an Intel Xeon in channels_last, its pair at 75 to 85 (512 channels on 7 x 7: 39, and the pair faster).
Which of the two comes first makes 2 to 5 %. A network as small as `cifar:resnet20`, whose convs take 0.1 ms each, gains
nothing at batch 1: what a conv costs beside its arithmetic is paid twice by a pair.""".splitlines()


def markdown(data: dict[str, Any]) -> str:
    facts = ", ".join(f"{name} {value}" for name, value in data["machine"].items())
    one = next(iter(data["networks"].values()))
    lines = [
        "# Latency and MACs",
        "",
        "Written by `python benchmarks/latency_at_budget.py --markdown docs/latency.md`.",
        "",
        *(f"- {line}" for line in findings(data)),
        f"- Machine: {facts}; {one['threads']} threads, at most {one['rounds']} rounds, "
        f"OMP_WAIT_POLICY={one['wait_policy'].upper()}.",
        "",
        *EXPLANATION,
        "",
        markdown_table(COLUMNS, rows(data), left=3),
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--budgets", type=float, nargs="+", default=list(BUDGETS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--wait-policy", choices=("passive", "active"), default="active")
    parser.add_argument("--out", type=Path, default=Path("build/latency_at_budget.json"))
    parser.add_argument("--markdown", type=Path, help="write this page as well")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    wanted = parser.parse_args()
    if wanted.worker:
        print(json.dumps(measure(wanted.worker, wanted.budgets, wanted.threads, wanted.rounds)))
        return
    data = {**read_json(wanted.out, {"networks": {}}), "machine": machine()}
    for name in wanted.models:
        data["networks"][name] = measure_apart(name, wanted)
        write_json(wanted.out, data)
    print(machine_text(), "", table(COLUMNS, rows(data)), "", *findings(data), sep="\n")
    if wanted.markdown:
        wanted.markdown.write_text(markdown(data), encoding="utf-8")


if __name__ == "__main__":
    main()
