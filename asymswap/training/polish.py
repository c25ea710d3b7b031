"""Label-free polish: the converted network learns from the original's outputs, on unlabelled images.

The student sees what the teacher sees, each batch mirrored or not (Beyer et al., 2022: a consistent teacher). Batch
norms keep their statistics. Some images are held back; the weights that are kept are those with the least divergence
on them, which may be the ones that it began with: it never ends worse than that.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from asymswap.errors import AsymswapError
from asymswap.spec import Progress, silent
from asymswap.tensors import eval_mode, list_tensors

_LEARNING_RATE = 3e-4
_BATCH = 128
_CHECKS = 20
_WARM_UP = 0.05


@dataclass(frozen=True)
class Polish:
    """How long to polish: so many steps, or so many minutes."""

    steps: int | None = None
    minutes: float | None = None


@dataclass(frozen=True)
class Polished:
    """What came of it: steps done, the step that was kept, and the divergence on held-back images before and after."""

    steps: int
    kept_step: int
    before: float
    after: float
    images: int
    seconds: float


def polish_(
    original: nn.Module,
    converted: nn.Module,
    images: Tensor,
    wanted: Polish,
    *,
    seed: int = 0,
    progress: Progress = silent,
) -> Polished:
    """Train `converted`, in place, to give the outputs of `original` on the images (N, C, H, W)."""
    start = time.perf_counter()
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images), generator=generator)
    back = max(1, min(512, len(images) // 8))
    held, seen = images[order[:back]], images[order[back:]]
    if not len(seen):
        seen = held
    trainable = [parameter for parameter in converted.parameters() if parameter.requires_grad]
    if not trainable:
        raise AsymswapError("there is nothing to polish: every parameter of the model is frozen")
    with eval_mode(original, converted):
        before = best = _divergence_on(original, converted, held)
        kept_step, kept = 0, copy.deepcopy(converted.state_dict())
        optimizer = torch.optim.AdamW(trainable, lr=_LEARNING_RATE, weight_decay=0)
        done, next_check = 0, 1 / _CHECKS
        for batch in _augmented(seen, generator):
            elapsed = time.perf_counter() - start
            part = done / wanted.steps if wanted.steps else elapsed / (60 * (wanted.minutes or 1.0))
            if part >= next_check or part >= 1:
                now = _divergence_on(original, converted, held)
                if now < best:
                    best, kept_step, kept = now, done, copy.deepcopy(converted.state_dict())
                next_check += 1 / _CHECKS
            if part >= 1:
                break
            _step(original, converted, batch, optimizer, part)
            done += 1
            progress("polishing", min(1000, int(1000 * part)), 1000)
        converted.load_state_dict(kept)
    return Polished(done, kept_step, before, best, len(images), time.perf_counter() - start)


def divergence(teacher: object, student: object) -> Tensor:
    """Mean divergence per image: Kullback-Leibler for scores of classes, relative squared error for anything else."""
    ones, others = list_tensors(teacher), list_tensors(student)
    if len(ones) == 1 and ones[0].dim() == 2 and ones[0].shape[1] > 1:
        log_p, log_q = F.log_softmax(ones[0].float(), 1), F.log_softmax(others[0].float(), 1)
        return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    parts = [
        (other - one).square().sum() / one.square().sum().clamp_min(1e-12)
        for one, other in zip(ones, others, strict=True)
        if one.is_floating_point()
    ]
    return torch.stack(parts).mean()


def _step(
    original: nn.Module, converted: nn.Module, batch: Tensor, optimizer: torch.optim.Optimizer, part: float
) -> None:
    rate = min(1.0, part / _WARM_UP) if part < _WARM_UP else 0.5 * (1 + math.cos(math.pi * part))
    for group in optimizer.param_groups:
        group["lr"] = _LEARNING_RATE * max(rate, 0.01)
    with torch.no_grad():
        wanted = original(batch)
    optimizer.zero_grad(set_to_none=True)
    divergence(wanted, converted(batch)).backward()
    nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
    optimizer.step()


def _divergence_on(original: nn.Module, converted: nn.Module, images: Tensor) -> float:
    with torch.no_grad():
        parts = [float(divergence(original(b), converted(b))) * len(b) for b in images.split(_BATCH)]
    return sum(parts) / len(images)


def _augmented(images: Tensor, generator: torch.Generator) -> Iterator[Tensor]:
    """Batches without end, in a new order at every round, half of them mirrored."""
    while True:
        for chosen in torch.randperm(len(images), generator=generator).split(_BATCH):
            mirrored = float(torch.rand(1, generator=generator)) < 0.5
            yield images[chosen].flip(3) if mirrored else images[chosen]
