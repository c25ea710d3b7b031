"""How many images of a labelled set a classifier gets right."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from asymswap.errors import SourceError
from asymswap.tensors import eval_mode
from asymswap.training.data import LabelledImages


@dataclass(frozen=True)
class Accuracy:
    """The fraction `top1` of images whose highest score is their class's, the counts behind it, and the wall time.

    `scores` is how many classes the model has, which may be more than the data's.
    """

    top1: float
    correct: int
    images: int
    scores: int
    seconds: float


def evaluate(
    model: nn.Module,
    data: LabelledImages,
    batch_size: int = 256,
    progress: Callable[[int, int], None] | None = None,
) -> Accuracy:
    """Measure the top-1 accuracy of `model` on `data`, in eval mode and where its parameters are; it stays unchanged.

    `progress` is called with the images done and the images in all after each batch.

    Raises:
        SourceError: the data is empty, or the model does not return scores for all of its classes.
    """
    total = _count(data)
    device, dtype = placement(model)
    # A generator of its own: the loader would otherwise draw from the global one and change what is random afterwards.
    loader = DataLoader(data.images, batch_size, generator=torch.Generator())
    correct = done = classes = 0
    start = time.perf_counter()
    with eval_mode(model), torch.inference_mode():
        for images, labels in loader:
            scores = check_scores(model(images.to(device, dtype)), data)
            classes = scores.shape[1]
            correct += int((scores.argmax(1).cpu() == labels).sum())
            done += len(labels)
            if progress is not None:
                progress(done, total)
    return Accuracy(correct / total, correct, total, classes, time.perf_counter() - start)


def check_classifier(model: nn.Module, data: LabelledImages) -> None:
    """Raise what `evaluate` would raise, from the first image alone."""
    _count(data)
    device, dtype = placement(model)
    with eval_mode(model), torch.inference_mode():
        check_scores(model(data.images[0][0][None].to(device, dtype)), data)


def _count(data: LabelledImages) -> int:
    if len(data) == 0:
        raise SourceError(f"there is nothing to evaluate on: {data.description}")
    return len(data)


def placement(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Where a model's parameters are, and in which dtype."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            return parameter.device, parameter.dtype
    return torch.device("cpu"), torch.float32


def check_scores(output: object, data: LabelledImages) -> Tensor:
    """The output itself, if it is class scores for the data's classes at least; raises SourceError otherwise."""
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
