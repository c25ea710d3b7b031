"""Costs of asymswap beside their targets: start-up, the first commands, converting above its floor.

    python benchmarks/performance.py [--runs 5] [--out build/performance.json] [--markdown docs/results/performance.md]

Each command is a process of its own, in turn with the others, with the files in the disk's cache; runs that other
processes disturbed are done again. The floor of a command without torch is the help of a typer program that does
nothing; the floor of a conversion is what any such program has to do: import torch and torchvision, build the same
network with random weights (vgg16: 138 M parameters, 553 MB in float32), save its state dict.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measured import (
    ASYMSWAP,
    disturbance,
    interleaved,
    machine,
    machine_text,
    markdown_table,
    run_well,
    summary,
    table,
    write_json,
)

PASS, IMPORT, TORCH = "python -c pass", "import asymswap", "import torch, torchvision"
TYPER = "an empty typer program, --help"
HELP, RECIPES = "asymswap --help", "asymswap recipes"
CANDIDATES = "asymswap candidates resnet18 --weights none"
DEMO = "asymswap convert digits-resnet --recipe 3x3-only --evaluate digits --force"
STATE_DICT = "asymswap convert resnet18.pt --recipe 3x3-only --force"
CONVERT = "asymswap convert vgg16 --weights none --recipe 3x3-only --force"
FLOOR = "build vgg16, save its state dict"
MODEL_MB = 138_357_544 * 4 / 1e6
"""VGG-16 in float32."""

SAVE = "import torch, torchvision; torch.save(torchvision.models.{name}(weights=None).state_dict(), '{file}')"
EMPTY = """
import sys, typer
app = typer.Typer()
app.command()(lambda: None)
sys.argv = ["empty", "--help"]
app()
"""
SCRIPTS = {
    PASS: "pass",
    IMPORT: IMPORT,
    TYPER: EMPTY,
    TORCH: TORCH,
    FLOOR: SAVE.format(name="vgg16", file="floor.pt"),
}
COMMANDS = [PASS, IMPORT, TYPER, HELP, RECIPES, TORCH, CANDIDATES, DEMO, STATE_DICT, FLOOR, CONVERT]
MISTAKES = [
    f"asymswap {wrong}"
    for wrong in (
        "convert resnet18 --recipe 3x3-onyl",
        "convert resnet81 --recipe 3x3-only",
        "convert no-such.pt --recipe 3x3-only",
        "convert resnet18.pt --recipie 3x3-only",
        "convert resnet18.pt --recipe half-macs --macs 50",
        "convert resnet18 --recipe 3x3-only --input 1x32x32",
        "convert resnet18.pt --recipe 3x3-only -o no/such/folder.pt",
        "convert resnet18.pt --recipe half-macs --calibrate no-such-folder",
        "finetune resnet18.pt --data digits --epochs -3",
        "evaluate resnet18.pt --data digit",
    )
]
"""Each ends with a message that says what to do."""
COLUMNS = ["command", "min s", "median s", "peak MB"]


@dataclass(frozen=True)
class Target:
    """A figure, its limit, and its unit."""

    name: str
    value: float
    most: float
    unit: str

    @property
    def verdict(self) -> str:
        return "met" if self.value <= self.most else "missed"

    def cells(self) -> list[str]:
        return [self.name, f"{self.value:.2f} {self.unit}", f"{self.most:g} {self.unit}", self.verdict]


Found = dict[str, dict[str, float]]
"""By command: seconds and peak memory."""


def split(command: str) -> list[str]:
    """The arguments of the process."""
    if command in SCRIPTS:
        return [sys.executable, "-c", SCRIPTS[command]]
    return [ASYMSWAP, *command.split()[1:]]


def targets(found: Found, wrong: Found) -> Iterator[Target]:
    median = {command: each["median_s"] for command, each in found.items()}
    peak = {command: each["peak_mb"] for command, each in found.items()}
    yield Target("`asymswap --help`", median[HELP], 0.2, "s")
    yield Target(
        "`candidates resnet18` over importing torch and torchvision", median[CANDIDATES] / median[TORCH], 1.3, "x"
    )
    yield Target("the README's first command", median[DEMO], 60, "s")
    yield Target("a bare state dict of a ResNet-18, converted", median[STATE_DICT], 60, "s")
    yield Target("`convert vgg16`, seconds over the floor", median[CONVERT] - median[FLOOR], 8, "s")
    slowest = max((each["median_s"], command) for command, each in wrong.items())
    yield Target(f"the slowest of {len(wrong)} mistakes, `{slowest[1]}`", slowest[0], 0.5, "s")
    models = (peak[CONVERT] - peak[FLOOR]) / MODEL_MB
    yield Target("`convert vgg16`, peak memory over the floor's, in models", models, 2, "x")


TARGETS = ["what", "measured", "at most", ""]
ELSEWHERE = [
    ["accuracy at a budget, and the time it takes, beside AIMET and others", "[accuracy](accuracy.md)"],
    ["latency beside MACs", "[latency](latency.md)"],
    ["memory: at most what importing takes, and 2.2 x the weights", "[large models](large-models.md)"],
    ["every builder of torchvision, a hundred CNNs of timm", "[coverage](../reference/coverage.md)"],
    ["a file of each of torchvision's classifiers, with no flag but the recipe's", "[files](../reference/files.md)"],
    ["damaged and hostile files, killed processes", "[robustness](robustness.md)"],
    ["fine-tuning within a point of the original", "[fine-tuning](finetuning-accuracy.md)"],
    ["what each kind of replacement costs", "[kinds](kind-costs.md)"],
]


def markdown(found: Found, wrong: Found, runs: int) -> str:
    lines = [
        "# Performance",
        "",
        "Written by `python benchmarks/performance.py --markdown docs/results/performance.md`.",
        "",
        "Measured costs of asymswap, beside their targets. Seconds are medians.",
        "",
        markdown_table(TARGETS, [target.cells() for target in targets(found, wrong)]),
        "",
        f"From {runs} alternating runs of each command below, every run in its own process. The floor of",
        "`convert vgg16` is what any such program does in Python: import torch and torchvision, build the network,",
        "save its state dict. `resnet18.pt` is a state dict, given only by its name. The targets in seconds were set",
        "on a machine that imports torch and torchvision in 3.4 s, and typer in 0.1 s.",
        "",
        markdown_table(COLUMNS, rows(found, "`")),
        "",
        "Mistakes, by the time until the message:",
        "",
        markdown_table(COLUMNS, rows(wrong, "`")),
        "",
        f"- {disturbance(found | wrong).capitalize()}.",
        f"- Machine: {machine_text()}.",
        "",
        "Other measurements, with their own targets:",
        "",
        markdown_table(["what", "where"], ELSEWHERE, left=2),
        "",
    ]
    return "\n".join(lines)


def rows(found: Found, quote: str = "") -> list[list[str]]:
    return [
        [f"{quote}{command}{quote}", f"{each['min_s']:.3f}", f"{each['median_s']:.3f}", f"{each['peak_mb']:.0f}"]
        for command, each in found.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("build/performance.json"))
    parser.add_argument("--markdown", type=Path, help="write this page as well")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run_well([sys.executable, "-c", SAVE.format(name="resnet18", file="resnet18.pt")], Path(folder))
        runs = interleaved({command: split(command) for command in COMMANDS}, args.runs, Path(folder))
        mistakes = interleaved({command: split(command) for command in MISTAKES}, args.runs, Path(folder), codes=(1, 2))
    found, wrong = ({command: summary(each) for command, each in some.items()} for some in (runs, mistakes))
    judged: dict[str, Any] = {
        target.name: {"measured": target.value, "at most": target.most} for target in targets(found, wrong)
    }
    print(machine_text(), "", table(COLUMNS, rows(found | wrong)), "", disturbance(found | wrong), "", sep="\n")
    print(table(TARGETS, [target.cells() for target in targets(found, wrong)]))
    write_json(args.out, {"machine": machine(), "runs": args.runs, "commands": found | wrong, "targets": judged})
    if args.markdown:
        args.markdown.write_text(markdown(found, wrong, args.runs), encoding="utf-8")


if __name__ == "__main__":
    main()
