"""Shared by the peers' scripts: read the model and the images from a file, write the results to another.

Each script runs in the peers' environment, with a Python that has torch and the peer but not asymswap: of the checkout
it imports only the networks, which need torch, torchvision, pydantic and safetensors.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from asymswap.models import builders

BATCH = 128
Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Task:
    """The model with its weights, the images (N x C x H x W) with their targets, and the fraction of MACs to keep.

    Targets are labels, or images as the network makes them. Test images of several sizes are several pairs.
    """

    model: nn.Module
    calibration: Pair
    test: Sequence[Pair]
    budget: float
    scores: Path | None

    @property
    def image(self) -> Tensor:
        """One image."""
        return self.calibration[0][:1]


@dataclass
class Clock:
    """Wall time and processor time of what runs inside `measure`."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0

    @contextmanager
    def measure(self) -> Iterator[None]:
        """Add what runs inside."""
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        self.seconds += time.perf_counter() - wall
        self.cpu_seconds += time.process_time() - cpu


@dataclass
class Results:
    """The rows of one script: a variant of its method each ("" is the method itself)."""

    task: Task
    packages: Sequence[str]
    out: Path
    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(self, variant: str, model: nn.Module, clock: Clock, note: str = "") -> None:
        """Measure a compressed model and write all rows so far."""
        self.rows.append(
            {
                "variant": variant,
                "macs": count_macs(model, self.task.image),
                "score": quality(model, self.task.test),
                "seconds": round(clock.seconds, 3),
                "cpu_seconds": round(clock.cpu_seconds, 3),
                "threads": torch.get_num_threads(),
                "versions": {name: version(name) for name in ("torch", *self.packages)},
                "note": note,
            }
        )
        self.out.write_text(json.dumps(self.rows), encoding="utf-8")


def start(description: str | None, packages: Sequence[str]) -> tuple[Task, Results]:
    """Read the command line `BUNDLE BUDGET OUT [--scores FILE]`, and the bundle."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("bundle", type=Path, help="model and images, written by accuracy_at_budget.py")
    parser.add_argument("budget", type=float, help="fraction of the MACs to keep")
    parser.add_argument("out", type=Path, help="JSON file of the results")
    parser.add_argument("--scores", type=Path, help="file of what does not depend on the budget: read, else written")
    args = parser.parse_args()
    bundle = torch.load(args.bundle, weights_only=True)
    model = build(bundle["reference"], bundle["arguments"])
    model.load_state_dict(bundle["state_dict"])
    task = Task(model.eval(), bundle["calibration"], bundle["test"], args.budget, args.scores)
    return task, Results(task, packages, args.out)


def build(reference: str, arguments: Mapping[str, Any]) -> nn.Module:
    """Return a network by its name, or by `file.py:Class`."""
    file, _, name = reference.rpartition(":")
    if not file.endswith(".py"):
        return builders.family_of(reference).build(reference, dict(arguments))
    sys.path.insert(0, str(Path(file).resolve().parent))
    made: nn.Module = getattr(importlib.import_module(Path(file).stem), name)()
    return made


def count_macs(model: nn.Module, image: Tensor) -> int:
    """Multiply-adds of convolutions and linear layers for one image, whatever module runs them."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.eval()(image)
    return counter.get_total_flops() // 2


def quality(model: nn.Module, pairs: Sequence[Pair]) -> float:
    """Return the percentage of images whose highest score is their label's, or the mean PSNR in dB of images."""
    found: list[Tensor] = []
    with torch.inference_mode():
        for images, targets in pairs:
            for x, y in zip(images.split(2 * BATCH), targets.split(2 * BATCH), strict=True):
                out = model.eval()(x)
                if y.dim() == 1:
                    found.append(100 * (out.argmax(1) == y).double())
                else:
                    found.append(-10 * (out.clamp(0, 1) - y).square().double().flatten(1).mean(1).log10())
    return float(torch.cat(found).mean())


def agreement(model: nn.Module, original: nn.Module, images: Tensor) -> float:
    """Return the same measure against the original's own answers; it needs no labels."""
    with torch.inference_mode():
        answers = torch.cat([original.eval()(x) for x in images.split(2 * BATCH)])
    return quality(model, [(images, answers.argmax(1) if answers.dim() == 2 else answers.clamp(0, 1))])


def reestimate_batch_norm_(model: nn.Module, images: Tensor) -> None:
    """Give every batch norm the statistics of these images in the compressed network."""
    norms = [module for module in model.eval().modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean over all batches
        norm.train()
    with torch.no_grad():
        for batch in images.split(BATCH):
            model(batch)
    model.eval()


def smallest_that_fits(fits: Any, low: float, high: float, steps: int = 18) -> float:
    """Halve [low, high] until the smallest number that fits is found; `high` where none in between does."""
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high
