"""Latency under budgets of MACs and of latency: original and converted networks timed alternately.

    python benchmarks/studies/latency_at_budget.py [--models resnet18 …] [--budgets 0.7 0.5 0.35] [--processes 5]
        [--threads 2] [--rounds 40] [--wait-policy active] [--out benchmarks/studies/results/latency_at_budget.json]
        [--markdown docs/results/latency.md]

Random weights (seed 0), which do not matter for the time; batch 1, each network's own input size. In a process of its
own the original and its conversions by the recipe half-macs run in turn: at each budget of MACs, with ranks rounded to
what processors like (the default), and at the same budgets of latency, whose plans are made for the memory format in
question from measurements made then and there.

Where a process's memory comes to lie makes its convs faster or slower as long as it lives: the share of the original's
time that one and the same converted ResNet-18 took was 0.59 in one process and 0.67 in the next. So there are several
processes for each network, of which the first measures everything and the others the budgets of MACs. What is in the
JSON, which is kept in the repository, is not done again.

Threads that wait do so asleep, as in the command asymswap; `--wait-policy active` keeps them awake, which is faster on
an idle machine and many times as slow on a busy one.

Targets, in channels_last: at half of the MACs at most 0.60 of the latency (resnet18, vgg16); at each budget at most
1.15 x the share of MACs that is left.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # for what it shares with the checks of a release

from measured import QUIET, machine, machine_text, markdown_table, read_json, run, table, write_json

RECIPE = "half-macs"
ORIGINAL = "original"
MODELS = ("resnet18", "resnet34", "vgg16", "cifar:resnet20", "deeplabv3_resnet50")
BUDGETS = (0.7, 0.5, 0.35)
FORMATS = ("channels-last", "contiguous")
TARGET, PROMISED = 0.6, ("resnet18", "vgg16")
FOLLOWS = 1.15
"""How many times the share of MACs the share of time may be."""
LOWEST = re.compile(r"ask for at least ([\d.]+)")
"""The message for a budget that cannot be reached."""
COLUMNS = [
    "network",
    "memory format",
    "version",
    "MACs",
    "min ms",
    "x",
    "range",
    "x / MACs",
    "parts x",
    "convs x",
    "convs' share",
]


def measure(name: str, budgets: Sequence[float], threads: int, rounds: int, everything: bool) -> dict[str, Any]:
    """Measure one network in this process: the budgets of MACs, or with `everything` those of latency too."""
    import torch

    import asymswap
    from asymswap.measure.latency import in_format, inputs_like, time_models
    from asymswap.models.opening import open_model

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    opened = open_model(name, weights="none")
    size = tuple(opened.example()[0].shape[1:])

    def convert(measure: str, fraction: float, timing: Any) -> Any:
        overrides = {f"budget.{measure}": fraction}
        try:
            return asymswap.convert(
                asymswap.open_model(opened.model, input_size=size), RECIPE, overrides=overrides, timing=timing
            )
        except asymswap.AsymswapError as error:
            return str(error)

    counted = {counted_name(budget): convert("macs", budget, None) for budget in budgets}
    found: dict[str, Any] = {"formats": {}, "input": list(size)}
    for memory_format in FORMATS:
        # A table of an earlier day would be read from the user's cache.
        with tempfile.TemporaryDirectory() as folder:
            timing = asymswap.Timing(memory_format=memory_format, cache=Path(folder))
            timed_ones = {timed_name(budget): convert("latency", budget, timing) for budget in budgets if everything}
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
                "parts_ms": 1e3 * (one.rest + sum(one.modules.values())),
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


def measure_apart(name: str, args: argparse.Namespace, everything: bool) -> dict[str, Any]:
    """The same in a process of its own, and how much the machine was disturbed meanwhile."""
    settings = ["--threads", f"{args.threads}", "--rounds", f"{args.rounds}"]
    settings += ["--budgets", *map(str, args.budgets), *["--everything"] * everything]
    command = [sys.executable, __file__, "--worker", name, *settings]
    done = run(command, OMP_WAIT_POLICY=args.wait_policy.upper())
    if done.code:
        sys.exit(f"{name} ended with {done.code}:\n{done.err}")
    return {**json.loads(done.out.splitlines()[-1]), "seconds": done.seconds, "others": round(done.others, 2)}


def survey(args: argparse.Namespace) -> dict[str, Any]:
    """Measure what the JSON lacks, and write it after each process."""
    setting = {key: getattr(args, key) for key in ("budgets", "threads", "rounds", "wait_policy")}
    setting["machine"] = machine()
    data = read_json(args.out, {"networks": {}, **setting})
    other = [key for key, value in setting.items() if data[key] != value]
    if other:
        sys.exit(f"error: {args.out} holds results of another {other[0]}; give another --out, or remove it")
    for name in args.models:
        processes = data["networks"].setdefault(name, [])
        while len(processes) < args.processes:
            processes.append(measure_apart(name, args, everything=not processes))
            write_json(args.out, data)
            print(f"{name}, {len(processes)}/{args.processes}: {processes[-1]['seconds']:.0f} s", file=sys.stderr)
    return data


@dataclass(frozen=True)
class Row:
    """One version of a network in one memory format, over all processes that measured it.

    Times are shares of the original's in the same process: their median, and of the whole pass the range as well.
    """

    macs: float
    min_ms: float
    time: float
    low: float
    high: float
    parts: float
    convs: float
    conv_share: float
    processes: int
    undone: tuple[str, ...] = ()
    failed: str = ""


def row_of(processes: Sequence[dict[str, Any]], memory_format: str, key: str) -> Row:
    """The row of one version, which at least the first process has measured."""
    formats = [process["formats"][memory_format] for process in processes]
    found = [(versions[key], versions[ORIGINAL]) for versions in formats if key in versions]
    first = found[0][0]
    if "failed" in first:
        return Row(0, 0, 0, 0, 0, 0, 0, 0, 1, failed=first["failed"])

    def share(measured: str) -> list[float]:
        return [one[measured] / original[measured] for one, original in found]

    whole = share("min_ms")
    return Row(
        macs=first["macs"],
        min_ms=min(one["min_ms"] for one, _ in found),
        time=median(whole),
        low=min(whole),
        high=max(whole),
        parts=median(share("parts_ms")),
        convs=median(share("convs_ms")),
        conv_share=median(one["convs_ms"] / one["parts_ms"] for one, _ in found),
        processes=len(found),
        undone=tuple(first["undone"]),
    )


def network_rows(processes: Sequence[dict[str, Any]]) -> dict[tuple[str, str], Row]:
    """All of one network, by memory format and version."""
    return {
        (memory_format, key): row_of(processes, memory_format, key)
        for memory_format, versions in processes[0]["formats"].items()
        for key in versions
    }


def rows(data: dict[str, Any]) -> list[list[str]]:
    return [
        [name, memory_format, key, *cells(row)]
        for name, processes in data["networks"].items()
        for (memory_format, key), row in network_rows(processes).items()
    ]


def cells(row: Row) -> list[str]:
    if row.failed:
        return ["unreachable", *[""] * (len(COLUMNS) - 4)]
    spread = f"{row.low:.2f} to {row.high:.2f}" if row.processes > 1 and row.macs < 1 else ""
    shares = [f"{row.macs:.3f}", f"{row.min_ms:.1f}", f"{row.time:.2f}", spread, f"{row.time / row.macs:.2f}"]
    return [*shares, f"{row.parts:.2f}", f"{row.convs:.2f}", f"{100 * row.conv_share:.0f} %"]


def findings(data: dict[str, Any]) -> Iterator[str]:
    """Summarise the table in sentences."""
    for name, processes in data["networks"].items():
        found = network_rows(processes)
        yield f"{name}: {verdict(name, found)}"
        for memory_format in FORMATS:
            mine = {key: row for (one, key), row in found.items() if one == memory_format}
            failed = [key for key, row in mine.items() if row.failed]
            lowest = [float(least[1]) for row in mine.values() if (least := LOWEST.search(row.failed))]
            if failed:
                least_text = f"; the least is {max(lowest):.2f}" if lowest else ""
                yield f"{name}, {memory_format}: unreachable, so refused: {', '.join(failed)}{least_text}."
            for key, row in mine.items():
                if row.undone:
                    yield f"{name}, {memory_format}, {key}: slower, so kept: {', '.join(row.undone)}."
        most = max(process["others"] for process in processes)
        if most >= QUIET:
            yield f"{name}: DISTURBED, other processes kept {most:.2f} cores busy: the times are too long."


def verdict(name: str, found: dict[tuple[str, str], Row]) -> str:
    """The shares of time at the budgets of MACs, and whether they keep the targets."""
    counted = {key: row for (one, key), row in found.items() if one == FORMATS[0] and key.startswith("--macs")}
    done = [row for row in counted.values() if not row.failed]
    shares = ", ".join(f"{row.time:.2f} of the time at {row.macs:.2f} of the MACs" for row in done)
    kept = sum(row.time <= FOLLOWS * row.macs for row in done)
    line = f"{shares}; within {FOLLOWS} x at {kept} of {len(done)} budgets"
    half = counted.get(counted_name(0.5))
    if name in PROMISED and half is not None:
        line += f"; at half of the MACs at most {TARGET:.2f}: {'met' if half.time <= TARGET else 'missed'}"
    return f"{line}. Convs take {100 * found[FORMATS[0], ORIGINAL].conv_share:.0f} % of the original's time."


EXPLANATION = """\
Random weights (seed 0; they do not matter for the time), one image of the network's own size. The original and its
conversions alternate in one process. `x` is the minimum over the rounds, divided by the original's in the same process
and memory format. For budgets of MACs the table has the median and the range of several processes, because a process's
convs are faster or slower depending on where its memory is. `x / MACs` is `x` divided by the share of MACs that is
left. `--macs B` and `--latency B --memory-format …` are used with `--recipe half-macs`. Parts: each layer's own
minimum, summed, which a busy machine disturbs least. Convs: only convs and their replacements; the other parts are
batch norms, activations, pooling and linear layers.

MACs say nothing about a linear layer's time at batch 1: each weight is read from memory for a single multiply-add. The
three of VGG-16 hold 0.8 % of its MACs, and 89 % of its parameters.

Why time does not follow MACs: other layers stay as they are, the two convs of a pair write and read a tensor between
them, and each sums over fewer numbers. In channels_last, a 3x3 conv of 64 to 256 channels runs at 85 to 108 billion
MACs per second on two threads of an AMD EPYC (Zen 4), its pair at 70 to 85 (512 channels on 7 x 7: 44 to 51, and the
pair 42 to 46); on a core of an Intel Xeon at 90 to 110, and the pair at 75 to 85. The order of the two convs makes 2 to
5 %. A network as small as `cifar:resnet20`, whose convs take 0.1 ms each, gains nothing at batch 1: a pair pays the
overhead of a conv twice.""".splitlines()


def markdown(data: dict[str, Any]) -> str:
    facts = ", ".join(f"{name} {value}" for name, value in data["machine"].items())
    counts = sorted({len(processes) for processes in data["networks"].values()})
    processes = " to ".join(map(str, dict.fromkeys((counts[0], counts[-1]))))
    lines = [
        "# Latency and MACs",
        "",
        "Written by `python benchmarks/studies/latency_at_budget.py --markdown docs/results/latency.md`.",
        "",
        *(f"- {line}" for line in findings(data)),
        f"- Machine: {facts}; {data['threads']} threads, {processes} processes, at most {data['rounds']} rounds in "
        f"each, OMP_WAIT_POLICY={data['wait_policy'].upper()}.",
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
    parser.add_argument("--processes", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--wait-policy", choices=("passive", "active"), default="active")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/studies/results/latency_at_budget.json"))
    parser.add_argument("--markdown", type=Path, help="write this page as well")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--everything", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        found = measure(args.worker, args.budgets, args.threads, args.rounds, args.everything)
        print(json.dumps(found))
        return
    data = survey(args)
    print(machine_text(), "", table(COLUMNS, rows(data)), "", *findings(data), sep="\n")
    if args.markdown:
        args.markdown.write_text(markdown(data), encoding="utf-8")


if __name__ == "__main__":
    main()
