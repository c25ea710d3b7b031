"""Predictions of a classifier for every image of a labelled set, or for this process's share of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, default_collate

from asymswap.data.datasets import LabelledImages
from asymswap.errors import SourceError
from asymswap.utils.distributed import ALONE, Team
from asymswap.utils.tensors import eval_mode


@dataclass(frozen=True)
class Predictions:
    """For each readable image: its number, class, likeliest class, rank of its class (0 is best), and loss.

    `scores` is the model's number of classes; `seconds` were spent in forward passes; `unreadable` images are left out.
    """

    numbers: Tensor
    labels: Tensor
    guesses: Tensor
    ranks: Tensor
    losses: Tensor
    scores: int
    seconds: float
    unreadable: int = 0

    def __len__(self) -> int:
        return len(self.labels)


class _Readable(Dataset[Any]):
    """The chosen images with their numbers; the error in the place of one that cannot be read."""

    def __init__(self, data: LabelledImages, chosen: Sequence[int]) -> None:
        self._data, self._chosen = data, chosen

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, place: int) -> tuple[Tensor, int, int] | SourceError:
        try:
            image, label = self._data.images[self._chosen[place]]
        except SourceError as error:
            return error
        return image, label, self._chosen[place]


def _collate(samples: Sequence[Any]) -> tuple[list[Tensor] | None, list[SourceError]]:
    errors = [sample for sample in samples if isinstance(sample, SourceError)]
    readable = [sample for sample in samples if not isinstance(sample, SourceError)]
    return (default_collate(readable) if readable else None), errors


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
    """Run the model in eval mode, where its parameters are; it stays unchanged. `context` surrounds each forward pass.

    Raises SourceError where there is no image or the model is no classifier of these classes, with `strict` also where
    an image cannot be read.
    """
    _check_any(data)
    chosen = range(team.rank, len(data), team.size)
    # A generator of its own: the loader would otherwise draw from the global one.
    loader: Iterable[Any] = DataLoader(
        _Readable(data, chosen), batch_size, num_workers=workers, collate_fn=_collate, generator=torch.Generator()
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
            images, labels, numbers = readable
            images = images.to(device, dtype)
            start = time.perf_counter()
            with context():
                output = check_scores(model(images), data).float().cpu()
            seconds += time.perf_counter() - start
            scores = output.shape[1]
            parts.append([numbers, labels, *_judge(output, labels)])
            done += len(labels)
            if progress is not None:
                progress(done + unreadable, len(chosen))
    if not parts and team.size == 1:
        raise SourceError(f"no image can be read of {data.description}; --strict names the first that cannot")
    columns = [torch.cat(column) for column in zip(*parts, strict=True)] if parts else [torch.zeros(0)] * 5
    numbers, labels, guesses, ranks, losses = columns
    return Predictions(numbers, labels, guesses, ranks, losses, scores, seconds, unreadable)


def _judge(scores_NC: Tensor, labels_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the likeliest classes, how many classes are likelier than the right one, and the losses."""
    own = scores_NC.gather(1, labels_N[:, None])
    guesses = scores_NC.argmax(1)
    ranks = (scores_NC > own).sum(1)
    # Of equal scores argmax takes one; if that is not the right class, it counts as likelier.
    ranks = torch.where((ranks == 0) & (guesses != labels_N), 1, ranks)
    losses = F.cross_entropy(scores_NC, labels_N, reduction="none").double()
    return guesses, ranks, losses


def check_classifier(model: nn.Module, data: LabelledImages) -> None:
    """Raise what `predict` would raise, after the first image alone."""
    _check_any(data)
    device, dtype = placement(model)
    with eval_mode(model), torch.inference_mode():
        check_scores(model(data.images[0][0][None].to(device, dtype)), data)


def _check_any(data: LabelledImages) -> None:
    if len(data) == 0:
        raise SourceError(f"there is nothing to evaluate on: {data.description}")


def placement(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Return the device and the dtype of a model's parameters."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            return parameter.device, parameter.dtype
    return torch.device("cpu"), torch.float32


def check_scores(output: object, data: LabelledImages) -> Tensor:
    """Return the output if it is class scores for at least the data's classes; raise SourceError otherwise."""
    if not isinstance(output, Tensor):
        raise SourceError(
            f"the model returns a {type(output).__name__}, not a tensor of class scores; give a classifier"
        )
    if output.ndim != 2:
        raise SourceError(
            f"the model returns a tensor of shape {tuple(output.shape)}, not images x class scores; give a classifier"
        )
    if output.shape[1] < len(data.classes):
        raise SourceError(
            f"the model scores {output.shape[1]} classes, but the data has {len(data.classes)} ({data.description}); "
            "give data with the model's classes"
        )
    return output
