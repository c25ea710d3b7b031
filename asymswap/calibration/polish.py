"""Label-free polish: train the converted network on the original's outputs, on unlabelled inputs.

The student gets the same inputs as the teacher, augmented, for many steps (Beyer et al., 2022). The loss is the squared
difference of the outputs, of class scores before the softmax (Ba and Caruana, 2014): a network is so sure of its
training images that the probabilities say next to nothing. The outputs of the replaced layers are compared too (Romero
et al., 2015): the same steps gain a tenth more. Batch norms keep their statistics. Muon (Jordan et al., 2024) gains
more than Adam within the few hundred steps that a budget of minutes allows (docs/results/polish.md).

Everything else is found from the network and the budget: the batch, as large as leaves enough steps; the patch, where
outputs are images; the rate, by short runs from the same start; and when to go back, at a lower rate. The weights with
the smallest difference on held-back inputs are kept, be it the initial ones.
"""

from __future__ import annotations

import copy
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from asymswap.calibration.config import Calibration
from asymswap.errors import AsymswapError
from asymswap.measure.fidelity import caught, difference, feature_error
from asymswap.measure.latency import now
from asymswap.types import Plan, Progress, silent
from asymswap.utils.inputs import Inputs, copied, samples_in, samples_of
from asymswap.utils.tensors import deep_copy, device_of, eval_mode, seeded

_RATES = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
_USUAL_RATE = 3e-4
_STEPS = 300  # wanted in a budget of minutes, so that the batch is made smaller
_LEAST_STEPS = 40  # below which no rate is looked for
_PROBE = 1 / 16  # of the budget, for each rate that is tried
_LEAST_SAMPLES, _MOST_SAMPLES = 8, 128  # in a batch
_NUMBERS = 2**17  # of a channel in a batch, at most
_SEEN_PER_HELD_BACK = 50  # samples to train on for each one held back, so that judging takes little of the time
_HELD_BACK = 32, 512
_CHECKS = 20
_WARM_UP = 0.05
_INNER = 3.0  # weight of the replaced layers' outputs, relative to that of the network's
_WORSE = 1.2  # times the best difference: then go back
_SETTLED = 0.25  # of the budget, before which a high rate may still raise the difference
_SHIFT = 8  # images are shifted by up to an eighth of their sides
_PATCH = 64  # side of the patches that are cut from larger images, where the outputs are images too
_NO_SWAPS = Plan(())


@dataclass(frozen=True)
class Polished:
    """What polishing did, with the difference on held-back inputs before and after."""

    steps: int
    kept_step: int  # the step whose weights were kept
    before: float
    after: float
    images: int  # all inputs
    batch: int  # samples a step
    rate: float

    def __str__(self) -> str:
        steps = f"{self.steps} steps of {self.batch} samples at a rate of {self.rate:g}"
        if not self.kept_step:
            few = "too few; give it more time" if self.steps < _STEPS else "no rate does; more inputs may"
            return f"polishing brought nothing: {steps} do not lower the difference on held-back inputs ({few})"
        gained = f"{self.before:.3g} -> {self.after:.3g} (the weights of step {self.kept_step})"
        return f"polished for {steps}, on {self.images} inputs: difference of the outputs on held-back ones {gained}"


def polish_(
    original: nn.Module,
    converted: nn.Module,
    batches: Sequence[Inputs],
    settings: Calibration,
    progress: Progress = silent,
    plan: Plan = _NO_SWAPS,
) -> Polished:
    """Train `converted`, in place, on the outputs of `original` and of its layers that `plan` swaps."""
    begun, steps = time.perf_counter(), settings.polish_steps
    seconds = 60 * (settings.polish_minutes or 0.0)
    # A backward pass through asymmetric convs takes half as long in this format. Copies: the models keep their own.
    teacher, student = (deep_copy(one).to(memory_format=torch.channels_last) for one in (original, converted))
    with eval_mode(teacher, student):
        trainer = _Trainer(teacher, student, plan, _Inputs(teacher, batches, seeded(settings.seed)), settings.seed)
        expected = steps or int(seconds / trainer.fit(seconds))
        trainer.hold_back(trainer.size * expected // _SEEN_PER_HELD_BACK)

        def run(rate: float, share: float, checks: int = 1, stage: str = "") -> tuple[Polished, float]:
            """Train from the start on a share of the steps or seconds, or until the whole time is over."""
            now = time.perf_counter()
            end = begun + seconds if share == 1 else now + share * seconds

            def part(done: int) -> float:
                # A slow network may have used up its time before.
                passed = (time.perf_counter() - now) / max(end - now, 1e-9)
                found = done / max(1, round(share * steps)) if steps else passed
                if stage:
                    progress(stage, min(1000, int(1000 * found)), 1000)
                return found

            return trainer.train(rate, part, checks)

        place = _RATES.index(_USUAL_RATE)
        if expected >= _LEAST_STEPS:
            tried: dict[int, float] = {}

            def probe(at: int) -> float:
                if at not in tried and 0 <= at < len(_RATES):
                    tried[at] = run(_RATES[at], _PROBE)[1]
                    progress("finding a learning rate", len(tried), len(_RATES))
                return tried.get(at, math.inf)

            way = 1 if probe(place + 1) < probe(place) else -1
            while probe(place + way) < probe(place):
                place += way
        polished, _ = run(_RATES[place], 1, _CHECKS, "polishing")
    converted.load_state_dict(trainer.weights)
    return polished


class _Trainer:
    """Trains the student, always from the same start, on the outputs of the teacher; `weights` are the best ones."""

    def __init__(self, teacher: nn.Module, student: nn.Module, plan: Plan, data: _Inputs, seed: int) -> None:
        self.teacher, self.student, self.data, self.size, self.seed = teacher, student, data, data.largest, seed
        # A replacement that takes over a batch norm gives what that gave.
        self.inner = {swap.site: swap.absorbs or swap.site for swap in plan.swaps}
        self.trainable = [parameter for parameter in student.parameters() if parameter.requires_grad]
        if not self.trainable:
            raise AsymswapError("there is nothing to polish: every parameter of the model is frozen")
        self.start = self.weights = copy.deepcopy(student.state_dict())

    def fit(self, seconds: float) -> float:
        """Take the largest batch of which enough steps fit into the time; return the seconds of one of its steps."""
        self.size, trying = 0, min(_LEAST_SAMPLES, self.data.largest)
        fitting, device = 0.0, str(device_of(self.student))
        while trying > self.size:
            for batch in itertools.islice(self.data.draw(trying, seeded(0)), 2):  # the first one takes longer
                start = now(device)
                self.gradient_(batch)
                took = now(device) - start
            if self.size and _STEPS * took > seconds:
                break
            self.size, fitting, trying = trying, took, min(2 * trying, self.data.largest)
        return fitting

    @torch.no_grad()
    def hold_back(self, count: int) -> None:
        """Judge by about so many held-back samples from now on."""
        self.judged = [(batch, self.teacher(*copied(batch))) for batch in self.data.held_back(count)]
        self.before = self.difference()

    @torch.no_grad()
    def difference(self) -> float:
        """Return the student's difference from the teacher on held-back inputs."""
        gaps = [float(difference(target, self.student(*copied(batch)))) for batch, target in self.judged]
        counts = [samples_in(batch) for batch, _ in self.judged]
        return sum(gap * count for gap, count in zip(gaps, counts, strict=True)) / sum(counts)

    def gradient_(self, batch: Inputs) -> None:
        with torch.no_grad(), caught(self.teacher, self.inner.values()) as taught:
            target = self.teacher(*copied(batch))
        self.student.zero_grad()
        with caught(self.student, self.inner) as learned:
            loss = difference(target, self.student(*copied(batch)))
        inner = feature_error(taught, learned, self.inner)
        if inner is not None:
            # In fixed proportion: a denoiser's outputs differ by a thousandth of what its layers do.
            loss = loss + _INNER * (loss.detach() / inner.detach().clamp_min(1e-12)) * inner
        loss.backward()

    def train(self, rate: float, part: Callable[[int], float], checks: int) -> tuple[Polished, float]:
        """Train from the start until the `part` done, by the number of steps, reaches 1; go back where it gets worse.

        The rate rises for a short time, and falls to zero with a cosine. Returns the last difference, too.
        """
        self.student.load_state_dict(self.start)
        optimizer, batches = _Optimizer(self.trainable), self.data.draw(self.size, seeded(self.seed))
        best, step, self.weights = self.before, 0, self.start
        done, last, next_check = 0, self.before, 1 / checks
        while True:
            now = part(done)
            if done and now >= min(1.0, next_check):
                last, next_check = self.difference(), now + 1 / checks
                if last < best:
                    best, step, self.weights = last, done, copy.deepcopy(self.student.state_dict())
                elif _SETTLED < now < 1 and not last <= _WORSE * best:
                    self.student.load_state_dict(self.weights)
                    optimizer, rate = _Optimizer(self.trainable), rate / 2
            if now >= 1 and done:
                polished = Polished(done, step, self.before, best, self.data.count, self.size, rate)
                return polished, last if math.isfinite(last) else math.inf
            self.gradient_(next(batches))
            share = now / _WARM_UP if now < _WARM_UP else 0.5 * (1 + math.cos(math.pi * min(now, 1)))
            optimizer.step_(rate * max(0.01, share))
            done += 1


class _Optimizer:
    """Muon for kernels and matrices, a kernel as the matrix of its filters, and Adam for all else."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.kernels = [(one, nn.Parameter(one.detach().flatten(1).clone())) for one in parameters if one.dim() > 1]
        self.parts: list[torch.optim.Optimizer] = []
        if matrices := [matrix for _, matrix in self.kernels]:
            self.parts.append(torch.optim.Muon(matrices, weight_decay=0, adjust_lr_fn="match_rms_adamw"))
        if others := [parameter for parameter in parameters if parameter.dim() < 2]:
            self.parts.append(torch.optim.Adam(others))

    @torch.no_grad()
    def step_(self, rate: float) -> None:
        for kernel, matrix in self.kernels:
            matrix.grad = None if kernel.grad is None else kernel.grad.flatten(1)
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = rate
            part.step()
        for kernel, matrix in self.kernels:
            kernel.copy_(matrix.view_as(kernel))


class _Inputs:
    """The inputs: some are held back, the others come in batches of any size, augmented where they are images."""

    def __init__(self, teacher: nn.Module, batches: Sequence[Inputs], generator: torch.Generator) -> None:
        self.count = sum(map(samples_in, batches))
        arguments = [batch[0] for batch in batches if len(batch) == 1 and isinstance(batch[0], Tensor)]
        same = len(arguments) == len(batches) and len({one.shape[1:] for one in arguments}) == 1
        # Batches that are the user's own are only cut, never put together.
        self.rows = torch.cat(arguments) if same else None
        self.batches = batches
        order = torch.randperm(len(batches) if self.rows is None else self.count, generator=generator)
        back = max(1, min(_HELD_BACK[1], len(order) // 8))
        self.held, self.seen = order[:back], order[back:] if len(order) > back else order
        self.patch, area = None, 1
        if self.rows is not None and self.rows.dim() == 4:
            self.patch = _patch(teacher, self.rows[:1])
            area = self.patch**2 if self.patch else self.rows.shape[2:].numel()
        most = len(self.seen) if self.rows is not None else max(map(samples_in, batches))
        self.largest = min(most, max(_LEAST_SAMPLES, min(_MOST_SAMPLES, _NUMBERS // area)))

    def held_back(self, count: int) -> list[Inputs]:
        """Return about so many held-back samples, in batches."""
        count = max(count, _HELD_BACK[0])
        if self.rows is not None:
            return [(rows,) for rows in self.rows[self.held[:count]].split(self.largest)]
        chosen = [self.batches[number] for number in self.held]
        before = itertools.accumulate(map(samples_in, chosen), initial=0)
        return [batch for batch, samples in zip(chosen, before, strict=False) if samples < count]

    def draw(self, size: int, generator: torch.Generator) -> Iterator[Inputs]:
        """Yield batches of at most so many samples without end, in a new order every epoch."""
        while True:
            order = self.seen[torch.randperm(len(self.seen), generator=generator)]
            if self.rows is None:
                for batch in (self.batches[number] for number in order):
                    yield from (samples_of(batch, at, at + size) for at in range(0, samples_in(batch), size))
                continue
            for chosen in order.split(size):
                rows = self.rows[chosen]
                if rows.dim() == 4 and rows.is_floating_point():
                    rows = _augmented(rows, self.patch, generator)
                yield (rows,)


def _patch(teacher: nn.Module, image_1CHW: Tensor) -> int | None:
    """Return the side of patches to train on, where images are large and the network makes images of any size."""
    if min(image_1CHW.shape[2:]) < 1.5 * _PATCH:
        return None
    try:
        with torch.no_grad():
            output = teacher(image_1CHW[:, :, :_PATCH, :_PATCH].clone())
    except Exception:  # the network's own code may insist on a size
        return None
    return _PATCH if isinstance(output, Tensor) and output.dim() == 4 and output.shape[-1] >= _PATCH else None


def _augmented(images: Tensor, patch: int | None, generator: torch.Generator) -> Tensor:
    """Return half of the images mirrored; of each a patch at its own place, or all of it, shifted a little."""
    height, width = images.shape[2:]
    sides, far = ((patch, patch), (0, 0)) if patch else ((height, width), (height // _SHIFT, width // _SHIFT))
    mirrored = (torch.rand(len(images), generator=generator) < 0.5).to(images.device)
    images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
    padded = F.pad(images, (far[1], far[1], far[0], far[0]), mode="reflect").permute(0, 2, 3, 1)
    rows, columns = (
        torch.randint(0, padded.shape[1 + axis] - side + 1, (len(images), 1), generator=generator) + torch.arange(side)
        for axis, side in enumerate(sides)
    )
    shifted = padded[torch.arange(len(images))[:, None, None], rows[:, :, None], columns[:, None, :]]
    return shifted.permute(0, 3, 1, 2)
