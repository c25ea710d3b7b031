"""Label-free polish: the converted network learns from the original's outputs, on unlabelled images.

The student sees what the teacher sees, each image mirrored or not and shifted a little (Beyer et al., 2022: a
consistent teacher and augmented images, for as long as it takes). What is made small is the squared difference of the
outputs, of class scores before the softmax (Ba and Caruana, 2014): a network is so sure of the images that it was
trained on that the probabilities themselves tell next to nothing. Batch norms keep their statistics. Some images are
held back; the weights that are kept are those that differ least on them, which may be the ones that it began with: it
never ends worse than that.
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
from asymswap.measure.fidelity import difference
from asymswap.types import Progress, silent
from asymswap.utils.tensors import deep_copy, eval_mode, seeded

_LEARNING_RATE = 2e-3
_BATCH = 128
_CHECKS = 20
_WARM_UP = 0.05
_SHIFT = 8
"""Images are shifted by up to this part of their sides: one eighth."""


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
    generator = seeded(seed)
    order = torch.randperm(len(images), generator=generator)
    back = max(1, min(512, len(images) // 8))
    held, seen = images[order[:back]], images[order[back:]]
    if not len(seen):
        seen = held
    # A step backwards through asymmetric convs takes half as long in this format. Copies: the models keep their own.
    teacher, student = (deep_copy(one).to(memory_format=torch.channels_last) for one in (original, converted))
    trainable = [parameter for parameter in student.parameters() if parameter.requires_grad]
    if not trainable:
        raise AsymswapError("there is nothing to polish: every parameter of the model is frozen")
    with eval_mode(teacher, student):
        held_out = _HeldOut(teacher, held)
        before = best = held_out.difference(student)
        kept_step, kept = 0, copy.deepcopy(student.state_dict())
        optimizer = torch.optim.AdamW(trainable, lr=_LEARNING_RATE, weight_decay=0)
        done, next_check = 0, 1 / _CHECKS
        for batch in _augmented(seen, generator):
            elapsed = time.perf_counter() - start
            part = done / wanted.steps if wanted.steps else elapsed / (60 * (wanted.minutes or 1.0))
            if part >= next_check or part >= 1:
                now = held_out.difference(student)
                if now < best:
                    best, kept_step, kept = now, done, copy.deepcopy(student.state_dict())
                next_check += 1 / _CHECKS
            if part >= 1:
                break
            _step(teacher, student, batch, optimizer, part)
            done += 1
            progress("polishing", min(1000, int(1000 * part)), 1000)
    converted.load_state_dict(kept)
    return Polished(done, kept_step, before, best, len(images), time.perf_counter() - start)


def _step(teacher: nn.Module, student: nn.Module, batch: Tensor, optimizer: torch.optim.Optimizer, part: float) -> None:
    rate = min(1.0, part / _WARM_UP) if part < _WARM_UP else 0.5 * (1 + math.cos(math.pi * part))
    for group in optimizer.param_groups:
        group["lr"] = _LEARNING_RATE * max(rate, 0.01)
    with torch.no_grad():
        # A copy: a model may change its input in place.
        wanted = teacher(batch.clone())
    optimizer.zero_grad(set_to_none=True)
    difference(wanted, student(batch)).backward()
    nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
    optimizer.step()


class _HeldOut:
    """Images that are not learned from, with what the teacher says of them."""

    def __init__(self, teacher: nn.Module, images: Tensor) -> None:
        self._batches = images.contiguous(memory_format=torch.channels_last).split(_BATCH)
        with torch.no_grad():
            self._wanted = [teacher(batch.clone()) for batch in self._batches]

    def difference(self, student: nn.Module) -> float:
        """The mean difference of the student's outputs."""
        pairs = zip(self._wanted, self._batches, strict=True)
        with torch.no_grad():
            parts = [float(difference(wanted, student(batch.clone()))) * len(batch) for wanted, batch in pairs]
        return sum(parts) / sum(map(len, self._batches))


def _augmented(images: Tensor, generator: torch.Generator) -> Iterator[Tensor]:
    """Batches without end, in a new order at every round."""
    while True:
        for chosen in torch.randperm(len(images), generator=generator).split(_BATCH):
            batch = _shifted(_mirrored(images[chosen], generator), generator)
            yield batch.contiguous(memory_format=torch.channels_last)


def _mirrored(x_NCHW: Tensor, generator: torch.Generator) -> Tensor:
    """Half of the images mirrored."""
    drawn = torch.rand(len(x_NCHW), generator=generator) < 0.5
    return torch.where(drawn[:, None, None, None], x_NCHW.flip(3), x_NCHW)


def _shifted(x_NCHW: Tensor, generator: torch.Generator) -> Tensor:
    """Each image shifted by up to an eighth of its sides, what is missing at the border reflected."""
    (height, width), images = x_NCHW.shape[2:], len(x_NCHW)
    most = (height // _SHIFT, width // _SHIFT)
    padded = F.pad(x_NCHW, (most[1], most[1], most[0], most[0]), mode="reflect").permute(0, 2, 3, 1)
    rows, columns = (
        torch.randint(0, 2 * far + 1, (images, 1), generator=generator) + torch.arange(side)
        for far, side in zip(most, (height, width), strict=True)
    )
    return padded[torch.arange(images)[:, None, None], rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
