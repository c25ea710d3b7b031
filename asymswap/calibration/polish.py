"""Label-free polish: train the converted network on the original's outputs, on unlabelled images.

The student gets the same inputs as the teacher. Images of one size come half of them mirrored, each shifted a little
(Beyer et al., 2022: a consistent teacher, augmented images and many steps); other inputs come in the user's batches.
The loss is the squared difference of the outputs, of class scores before the softmax (Ba and Caruana, 2014): a network
is so sure of its training images that the probabilities say next to nothing. Batch norms keep their statistics. Of all
weights, the initial ones among them, those with the smallest difference on held-back inputs are kept, so the result is
never worse than the start.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from asymswap.calibration.config import Calibration
from asymswap.errors import AsymswapError
from asymswap.measure.fidelity import difference
from asymswap.types import Progress, silent
from asymswap.utils.inputs import Inputs, copied, samples_in
from asymswap.utils.tensors import deep_copy, eval_mode, seeded

_LEARNING_RATE = 2e-3
_BATCH = 128
_CHECKS = 20
_WARM_UP = 0.05
_SHIFT = 8  # images are shifted by up to an eighth of their sides


@dataclass(frozen=True)
class Polished:
    """Steps done, the step that was kept, the difference on held-back images before and after, images and seconds."""

    steps: int
    kept_step: int
    before: float
    after: float
    images: int
    seconds: float


def polish_(
    original: nn.Module,
    converted: nn.Module,
    batches: Sequence[Inputs],
    settings: Calibration,
    progress: Progress = silent,
) -> Polished:
    """Train `converted`, in place, on the outputs of `original` for the batches of inputs."""
    start, steps = time.perf_counter(), settings.polish_steps
    generator = seeded(settings.seed)
    images = sum(map(samples_in, batches))
    held_back, seen = _split(batches, generator)
    # A backward pass through asymmetric convs takes half as long in this format. Copies: the models keep their own.
    teacher, student = (deep_copy(one).to(memory_format=torch.channels_last) for one in (original, converted))
    trainable = [parameter for parameter in student.parameters() if parameter.requires_grad]
    if not trainable:
        raise AsymswapError("there is nothing to polish: every parameter of the model is frozen")
    optimizer = torch.optim.AdamW(trainable, lr=_LEARNING_RATE, weight_decay=0)

    with eval_mode(teacher, student):
        with torch.no_grad():
            targets = [teacher(*copied(batch)) for batch in held_back]

        @torch.no_grad()
        def held_back_difference() -> float:
            pairs = zip(targets, held_back, strict=True)
            gaps = [(float(difference(target, student(*copied(one)))), samples_in(one)) for target, one in pairs]
            return sum(gap * count for gap, count in gaps) / sum(count for _, count in gaps)

        before = best = held_back_difference()
        kept_step, kept = 0, copy.deepcopy(student.state_dict())
        done, next_check = 0, 1 / _CHECKS
        for batch in seen:
            elapsed = time.perf_counter() - start
            part = done / steps if steps else elapsed / (60 * (settings.polish_minutes or 1.0))
            if part >= next_check or part >= 1:
                now = held_back_difference()
                if now < best:
                    best, kept_step, kept = now, done, copy.deepcopy(student.state_dict())
                next_check += 1 / _CHECKS
            if part >= 1:
                break
            rate = part / _WARM_UP if part < _WARM_UP else 0.5 * (1 + math.cos(math.pi * part))
            for group in optimizer.param_groups:
                group["lr"] = _LEARNING_RATE * max(rate, 0.01)
            with torch.no_grad():
                target = teacher(*copied(batch))
            optimizer.zero_grad()
            difference(target, student(*copied(batch))).backward()
            nn.utils.clip_grad_norm_(trainable, 1.0)
            optimizer.step()
            done += 1
            progress("polishing", min(1000, int(1000 * part)), 1000)
    converted.load_state_dict(kept)
    return Polished(done, kept_step, before, best, images, time.perf_counter() - start)


def _split(batches: Sequence[Inputs], generator: torch.Generator) -> tuple[Sequence[Inputs], Iterator[Inputs]]:
    """Return batches to hold back, an eighth of all inputs, and the others without end."""
    arguments = [batch[0] for batch in batches if len(batch) == 1 and isinstance(batch[0], Tensor)]
    if len(arguments) == len(batches) and {one.shape[1:] for one in arguments} == {arguments[0].shape[1:]}:
        rows = torch.cat(arguments)
        order = torch.randperm(len(rows), generator=generator)
        back = max(1, min(512, len(rows) // 8))
        held, seen = rows[order[:back]], rows[order[back:]] if len(rows) > back else rows[order]
        if rows.dim() == 4 and rows.is_floating_point():
            held = held.contiguous(memory_format=torch.channels_last)
            return [(one,) for one in held.split(_BATCH)], ((one,) for one in _augmented(seen, generator))
        return [(one,) for one in held.split(_BATCH)], _repeated([(one,) for one in seen.split(_BATCH)], generator)
    order = torch.randperm(len(batches), generator=generator)
    back = max(1, len(batches) // 8)
    rest = order[back:] if len(batches) > back else order
    return [batches[number] for number in order[:back]], _repeated([batches[number] for number in rest], generator)


def _repeated(batches: Sequence[Inputs], generator: torch.Generator) -> Iterator[Inputs]:
    while True:
        for number in torch.randperm(len(batches), generator=generator):
            yield batches[number]


def _augmented(images: Tensor, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield batches without end, in a new order every epoch: half of the images mirrored, each shifted on its own."""
    height, width = images.shape[2:]
    far = height // _SHIFT, width // _SHIFT
    while True:
        for chosen in torch.randperm(len(images), generator=generator).split(_BATCH):
            batch, count = images[chosen], len(chosen)
            mirrored = torch.rand(count, generator=generator) < 0.5
            batch = torch.where(mirrored[:, None, None, None], batch.flip(3), batch)
            padded = F.pad(batch, (far[1], far[1], far[0], far[0]), mode="reflect").permute(0, 2, 3, 1)
            rows, columns = (
                torch.randint(0, 2 * most + 1, (count, 1), generator=generator) + torch.arange(side)
                for most, side in zip(far, (height, width), strict=True)
            )
            shifted = padded[torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]
            yield shifted.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
