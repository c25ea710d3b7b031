"""Latency at half of the MACs, and under a budget of latency: original and converted networks timed in turn.

    python benchmarks/latency_at_budget.py [--models resnet18 vgg16] [--threads 2] [--rounds 40]
        [--wait-policy active] [--out build/latency_at_budget.json] [--markdown docs/latency.md]

Random weights (seed 0), which do not matter for the time; 224x224, batch 1. For each network one process, in which the
original and its conversions by the recipe half-macs run in turn: with ranks rounded to what processors like, which is
the default, with any rank (`multiple = 1`), and under a budget of latency instead of MACs, whose plan is made for the
memory format in question, from measurements made then and there. Networks that are in the JSON are measured again.

Threads that wait do so asleep, as in the command asymswap; `--wait-policy active` keeps them awake, which is faster on
an idle machine and many times as slow on a busy one.

Target: at half of the MACs, in channels_last, at most 0.60 of the latency.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from measured import QUIET, machine, machine_text, markdown_table, read_json, run, table, write_json

RECIPE = "half-macs"
ORIGINAL, HALF, LATENCY = "original", "half of the MACs", "latency 0.6"
OVERRIDES = {HALF: {}, "half of the MACs, any rank": {"multiple": 1}, LATENCY: {"budget.latency": 0.6}}
FORMATS = ("channels-last", "contiguous")
INPUT = (3, 224, 224)
TARGET = 0.6
COLUMNS = [
    "network",
    "memory format",
    "version",
    "MACs",
    "min ms",
    "x",
    "median ms",
    "x",
    "parts ms",
    "x",
    "convs ms",
    "x",
    "convs' share",
]


def measure(name: str, threads: int, rounds: int) -> dict[str, Any]:
    """What is told of one network; runs in a process of its own."""
    import torch

    import asymswap
    from asymswap.measure.latency import in_format, inputs_like, time_models
    from asymswap.opening import open_model
    from asymswap.sources.references import Request

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    opened = open_model(name, Request(weights="none"), INPUT)

    def convert(key: str, memory_format: Any, folder: str) -> Any:
        timing = asymswap.Timing(memory_format, cache=Path(folder))
        try:
            return asymswap.convert(opened.model, RECIPE, overrides=OVERRIDES[key], timing=timing, input_size=INPUT)
        except asymswap.AsymswapError as error:
            return str(error)

    counted = {key: convert(key, FORMATS[0], "") for key in OVERRIDES if key != LATENCY}
    found: dict[str, Any] = {"formats": {}}
    for memory_format in FORMATS:
        # A table of an earlier day would be read from the user's cache.
        with tempfile.TemporaryDirectory() as folder:
            conversions = {**counted, LATENCY: convert(LATENCY, memory_format, folder)}
        failed = {key: value for key, value in conversions.items() if isinstance(value, str)}
        reports = {key: value.report for key, value in conversions.items() if key not in failed}
        models = {ORIGINAL: opened.model, **{key: conversions[key].model for key in reports}}
        convs = {row.site for row in reports[HALF].sites if row.calls}
        leaves = [name for name, module in opened.model.named_modules() if not any(module.children())]
        found["macs"] = reports[HALF].before.macs
        found["convs_macs"] = 1 - reports[HALF].rest.macs / reports[HALF].before.macs
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
                "undone": list(reports[key].latency.undone) if key == LATENCY else [],
            }
            for key, one in timed.items()
        } | {key: {"failed": reason} for key, reason in failed.items()}
    return found


def measure_apart(name: str, wanted: argparse.Namespace) -> dict[str, Any]:
    """The same in a process of its own, and how much the machine was disturbed meanwhile."""
    settings = ["--threads", f"{wanted.threads}", "--rounds", f"{wanted.rounds}"]
    command = [sys.executable, __file__, "--worker", name, *settings]
    done = run(command, OMP_WAIT_POLICY=wanted.wait_policy.upper())
    if done.code:
        sys.exit(f"{name} ended with {done.code}:\n{done.err}")
    about = {"threads": wanted.threads, "rounds": wanted.rounds, "wait_policy": wanted.wait_policy}
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
    keys = ("min_ms", "median_ms", "parts_ms", "convs_ms")
    times = [(f"{row[key]:.1f}", f"{row[key] / original[key]:.2f}") for key in keys]
    return [f"{row['macs']:.3f}", *(cell for pair in times for cell in pair), f"{100 * share(row):.0f} %"]


def share(row: dict[str, Any]) -> float:
    """How much of the time passes in convs."""
    return row["convs_ms"] / row["parts_ms"]


def findings(data: dict[str, Any]) -> Iterator[str]:
    """What the table comes to, in sentences."""
    for name, network in data["networks"].items():
        for memory_format, versions in network["formats"].items():
            yield f"{name}, {memory_format}: {verdict(versions, memory_format)}"
            original, half = versions[ORIGINAL], versions[HALF]
            yield (
                f"{name}, {memory_format}: convs hold {100 * network['convs_macs']:.1f} % of the original's MACs and "
                f"take {100 * share(original):.0f} % of its time; they alone need "
                f"{half['convs_ms'] / original['convs_ms']:.2f} of it."
            )
            for key, row in versions.items():
                if "failed" in row:
                    yield f"{name}, {memory_format}, {key} failed: {row['failed']}."
                elif row["undone"]:
                    yield f"{name}, {memory_format}, {key}: slower, and so kept: {', '.join(row['undone'])}."
        others = network["others"]
        if others >= QUIET:
            yield f"{name}: DISTURBED, other processes kept {others:.2f} cores busy: the times are too long."


def verdict(versions: dict[str, Any], memory_format: str) -> str:
    """The ratio that is promised."""
    original, half = versions[ORIGINAL], versions[HALF]
    ratio = half["min_ms"] / original["min_ms"]
    line = f"{half['macs']:.2f} of the MACs in {ratio:.2f} of the time"
    if memory_format == "channels-last":
        line += f" (target {TARGET:.2f}: {'met' if ratio <= TARGET else 'missed'})"
    return f"{line}; by the sum of the parts {half['parts_ms'] / original['parts_ms']:.2f}."


EXPLANATION = f"""\
Random weights (seed 0; for the time they do not matter), one image of {INPUT[1]} x {INPUT[2]}. The original and its
conversions run in turn in one process; minimum and median over the rounds. `x` is the time over the original's in the
same memory format. Half of the MACs: `--recipe half-macs`, ranks rounded to multiples of up to 16 (the default); any
rank: `--set multiple=1`; latency 0.6: `--latency 0.6 --memory-format …`. Parts: each layer's own minimum, summed, which
a busy machine disturbs least. Convs: those of the parts that are convs, or what took their place; the others are batch
norms, activations, pooling and linear layers.

MACs say nothing of a linear layer's time at batch 1: each weight is read from memory for a single multiply-add. The
three of VGG-16 hold 0.8 % of its MACs, and 89 % of its parameters.""".splitlines()


def markdown(data: dict[str, Any]) -> str:
    facts = ", ".join(f"{name} {value}" for name, value in data["machine"].items())
    one = next(iter(data["networks"].values()))
    lines = [
        "# Latency at half of the MACs",
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
    parser.add_argument("--models", nargs="+", default=["resnet18", "vgg16"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--wait-policy", choices=("passive", "active"), default="active")
    parser.add_argument("--out", type=Path, default=Path("build/latency_at_budget.json"))
    parser.add_argument("--markdown", type=Path, help="write this page as well")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    wanted = parser.parse_args()
    if wanted.worker:
        print(json.dumps(measure(wanted.worker, wanted.threads, wanted.rounds)))
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
