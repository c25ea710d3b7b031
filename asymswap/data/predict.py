"""A classifier on labelled images: its predictions, and whether its classes are the classes of the data."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, default_collate

from asymswap.data.datasets import LabelledImages
from asymswap.errors import SourceError
from asymswap.results.evaluate import Score
from asymswap.results.records import Provenance
from asymswap.types import Origin
from asymswap.utils.distributed import ALONE, Team
from asymswap.utils.tensors import eval_mode


@dataclass(frozen=True)
class Predictions:
    """What a model says of each readable image."""

    numbers: Tensor  # of the images
    labels: Tensor
    guesses: Tensor  # the likeliest classes
    ranks: Tensor  # of the right classes, 0 is best
    losses: Tensor
    scores: int  # the model's number of classes
    seconds: float  # in forward passes
    unreadable: int = 0  # images left out

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def correct(self) -> int:
        return int((self.guesses == self.labels).sum())

    @property
    def top1(self) -> float:
        return self.correct / len(self)

    @property
    def named(self) -> tuple[Score, ...]:
        """Top-1, and top-5 of more than five classes."""
        top5 = int((self.ranks < 5).sum()) / len(self)
        return (Score("top-1", self.top1, "%"), *([Score("top-5", top5, "%")] if self.scores > 5 else []))


def _read(data: LabelledImages, numbers: Sequence[int]) -> tuple[list[Tensor] | None, list[SourceError]]:
    """Return a batch of the readable images with their numbers, None if there is none, and the errors of the others."""
    samples, errors = [], []
    for number in numbers:
        try:
            samples.append((number, *data.images[number]))
        except SourceError as error:
            errors.append(error)
    return (default_collate(samples) if samples else None), errors


def predict(
    model: nn.Module,
    data: LabelledImages,
    *,
    batch_size: int = 256,
    workers: int = 0,
    strict: bool = False,
    team: Team = ALONE,
    context: Callable[[], AbstractContextManager[Any]] = nullcontext,
    progress: Callable[[int, int], None] | None = None,
) -> Predictions:
    """Run the model in eval mode, where its parameters are, on the images or this process's share of them.

    `context` surrounds each forward pass; `progress` gets the number of images done and of all. Raises SourceError if
    there is no image or the model is no classifier of these classes, with `strict` also if an image cannot be read.
    """
    _check_any(data)
    chosen: Any = range(team.rank, len(data), team.size)
    # A generator of its own: the loader would otherwise draw from the global one.
    loader: Iterable[Any] = DataLoader(
        chosen, batch_size, num_workers=workers, collate_fn=partial(_read, data), generator=torch.Generator()
    )
    device, dtype = placement(model)
    parts: list[list[Tensor]] = []
    scores, seconds, unreadable, done = 0, 0.0, 0, 0
    with eval_mode(model), torch.inference_mode():
        for readable, errors in loader:
            if errors and strict:
                raise errors[0]
            unreadable += len(errors)
            if readable is None:
                continue
            numbers, images, labels = readable
            images = images.to(device, dtype)
            start = time.perf_counter()
            with context():
                output = check_scores(model(images), data).float().cpu()
            seconds += time.perf_counter() - start
            scores = output.shape[1]
            guesses = output.argmax(1)
            ranks = (output > output.gather(1, labels[:, None])).sum(1)
            # Of equal scores argmax takes one; if that is not the right class, it counts as likelier.
            ranks = torch.where((ranks == 0) & (guesses != labels), 1, ranks)
            losses = F.cross_entropy(output, labels, reduction="none").double()
            parts.append([numbers, labels, guesses, ranks, losses])
            done += len(labels)
            if progress is not None:
                progress(done + unreadable, len(chosen))
    if not parts and team.size == 1:
        raise SourceError(f"no image can be read of {data.description}; `strict=True` names the first that cannot")
    columns = [torch.cat(column) for column in zip(*parts, strict=True)] if parts else [torch.zeros(0)] * 5
    numbers, labels, guesses, ranks, losses = columns
    return Predictions(numbers, labels, guesses, ranks, losses, scores, seconds, unreadable)


def placement(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Return the device and the dtype of a model's parameters."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            return parameter.device, parameter.dtype
    return torch.device("cpu"), torch.float32


def check_classifier(model: nn.Module, data: LabelledImages, exact: bool = False) -> int:
    """Return the model's number of classes, found with the first image; raise what `predict` would raise.

    With `exact`, found without an image, and a model with more classes than the data is an error too.
    """
    _check_any(data)
    device, dtype = placement(model)
    known = data.preprocessing
    image = torch.zeros(known.channels, *known.size) if exact else data.images[0][0]
    with eval_mode(model), torch.inference_mode():
        return check_scores(model(image[None].to(device, dtype)), data, exact).shape[1]


def check_scores(output: object, data: LabelledImages, exact: bool = False) -> Tensor:
    """Return the output if it is class scores for at least the data's classes; raise SourceError otherwise."""
    if not isinstance(output, Tensor):
        raise SourceError(
            f"the model returns a {type(output).__name__}, not a tensor of class scores; give a classifier"
        )
    if output.ndim != 2:
        shape = tuple(output.shape)
        raise SourceError(f"the model returns a tensor of shape {shape}, not images x class scores; give a classifier")
    scores, classes = output.shape[1], len(data.classes)
    if scores < classes or (exact and scores > classes):
        advice = (
            "with the model's classes" if scores < classes else "of all of the model's classes, or a model for these"
        )
        raise SourceError(
            f"the model scores {scores} classes, but the data has {classes} ({data.description}); give data {advice}"
        )
    return output


def known_classes(provenance: Provenance, origin: Origin) -> tuple[str, ...]:
    """Return the names of the model's classes in order, if its checkpoint or its published weights have them."""
    if provenance.training:
        return provenance.training[-1].classes
    return published_classes(origin.reference, provenance.report.model.weights)


def published_classes(reference: str, weights: str) -> tuple[str, ...]:
    """Return the names that torchvision gives the classes of published weights; none for other weights."""
    if not reference.startswith("torchvision:"):
        return ()
    from torchvision import models

    try:
        found = models.get_model_weights(reference.removeprefix("torchvision:"))[weights]
    except (KeyError, ValueError):
        return ()
    return tuple(found.meta.get("categories", ()))


def check_class_names(known: Sequence[str], data: LabelledImages) -> None:
    """Raise SourceError if a class of the data has the name of a class of the model, but another number."""
    numbers = {name: number for number, name in enumerate(known)}
    if len(numbers) != len(known):
        return
    for number, name in enumerate(data.classes):
        if numbers.get(name, number) != number:
            raise SourceError(
                f"class {name!r} is number {number} of the data and number {numbers[name]} of the model "
                f"({data.description}); name the data's classes so that they sort as the model's"
            )


def _check_any(data: LabelledImages) -> None:
    if len(data) == 0:
        raise SourceError(f"there is nothing to evaluate on: {data.description}")
