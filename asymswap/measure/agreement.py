"""Agreement: how far a converted network answers as the original does, without labels."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from asymswap.measure.fidelity import WHOLE, Sums
from asymswap.measure.statistics import wilson_interval
from asymswap.results.evaluate import OutputAgreement
from asymswap.utils.inputs import Inputs, copied, samples_in
from asymswap.utils.tensors import eval_mode, list_tensors

_PEAKS = {1.0: (0.0, 1.0), 255.0: (8.0, 255.0)}
"""Peaks of images, and between which root mean squares their pixels are; what is between the two is no image."""

_LAST_PARTS = 3
_KNOWN = 2**30  # bytes of the original's outputs that are kept


def named_outputs(output: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of a nested output with its name: keys, fields and numbers, joined by dots."""
    if isinstance(output, Tensor):
        yield name, output
        return
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(output, Mapping):
        items = output.items()
    elif isinstance(output, tuple) and hasattr(output, "_fields"):
        items = zip(output._fields, output, strict=True)
    elif isinstance(output, list | tuple):
        items = enumerate(output) if len(output) > 1 else [("", one) for one in output]
    elif hasattr(output, "__dataclass_fields__"):
        items = vars(output).items()
    for key, item in items:
        yield from named_outputs(item, ".".join(part for part in (name, str(key)) if part))


@dataclass
class _Output:
    """Running figures of one output."""

    sums: Sums = field(default_factory=Sums)
    same: int = 0
    votes: int = 0
    cosines: float = 0.0
    rows: int = 0
    numbers: int = 0

    def add(self, one: Tensor, other: Tensor) -> None:
        self.sums.add(one, other)
        self.numbers += one.numel()
        if one.dim() < 2 or one.shape[1] < 2 or not one.is_floating_point():
            return
        self.same += int((one.argmax(1) == other.argmax(1)).sum())
        self.votes += one.numel() // one.shape[1]
        self.cosines += float(F.cosine_similarity(one.double().flatten(1), other.double().flatten(1)).sum())
        self.rows += len(one)

    def result(self, name: str, shape: Sequence[int], scores: bool) -> OutputAgreement:
        """Return the measure that suits the output: scores, embeddings, images, other values."""
        relative = self.sums.difference().relative
        if scores and self.votes:
            interval = wilson_interval(self.same, self.votes)
            return OutputAgreement(name, "top-1", self.same / self.votes, relative, interval)
        if len(shape) == 2 and self.rows:
            return OutputAgreement(name, "cosine", self.cosines / self.rows, relative)
        size = math.sqrt(self.sums.energy / max(1, self.numbers))
        peak = next((peak for peak, (low, high) in _PEAKS.items() if low <= size <= high), None)
        if len(shape) == 4 and shape[1] in (1, 3) and peak is not None:
            error = self.sums.squares / max(1, self.numbers)
            value = math.inf if error == 0 else 10 * math.log10(peak**2 / error)
            return OutputAgreement(name, "PSNR", value, relative, peak=peak)
        return OutputAgreement(name, "relative error", relative, relative)


def measure_agreement(
    original: nn.Module,
    other: nn.Module,
    batches: Iterable[tuple[Inputs, Inputs]],
    scores: bool,
    parts: Sequence[str] = WHOLE,
    step: Callable[[int], None] = lambda _: None,
    known: dict[int, Any] | None = None,
) -> tuple[OutputAgreement, ...]:
    """Compare both networks' outputs on batches of inputs, the own ones of each; each output by its name.

    `scores`: outputs of two dimensions are scores of classes; a map of several channels then is scores for each pixel.
    Where what comes out depends on values (a detector's boxes), the outputs of the last of its `parts` are compared in
    its place, in either network's own run. Outputs whose sizes differ are left out. `known` has the original's outputs
    of batches by their numbers; those that it lacks are put into it while they take little memory.
    """
    known = {} if known is None else known
    room = _KNOWN - sum(tensor.nbytes for one in known.values() for tensor in list_tensors(one))
    found: dict[str, _Output] = {}
    shapes: dict[str, Sequence[int]] = {}

    def add(one: Any, two: Any, prefix: str) -> None:
        others = dict(named_outputs(two, prefix))
        for name, tensor in named_outputs(one, prefix):
            its = others.get(name)
            if its is None or its.shape != tensor.shape or not tensor.numel():
                continue
            shapes[name] = tensor.shape
            found.setdefault(name, _Output()).add(tensor, its)

    whole, done = tuple(parts) == WHOLE, 0
    with eval_mode(original, other), torch.inference_mode():
        for number, (batch, own) in enumerate(batches):
            seen = [known[number]] if number in known else []
            for model, inputs in ((original, batch), (other, own))[len(seen) :]:
                with ExitStack() as hooks:
                    outputs: dict[str, list[Any]] = {}
                    for name in () if whole else parts:

                        def keep(_: nn.Module, __: Any, output: Any, name: str = name, kept: Any = outputs) -> None:
                            kept.setdefault(name, []).append(output)

                        hooks.enter_context(model.get_submodule(name).register_forward_hook(keep))
                    output = model(*copied(inputs))
                    seen.append({"": output} if whole else dict(list(outputs.items())[-_LAST_PARTS:]))
            room -= sum(tensor.nbytes for tensor in list_tensors(seen[0])) if number not in known else 0
            if room > 0:
                known[number] = seen[0]
            for name in seen[0]:
                if name in seen[1]:
                    add(seen[0][name], seen[1][name], name)
            done += samples_in(batch)
            step(done)
    # In the network's own order, for the first decides; in parts, a map of three channels is no image.
    return tuple(one.result(name, shapes[name] if whole else (), scores) for name, one in found.items())
