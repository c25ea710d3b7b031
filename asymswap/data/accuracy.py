"""Top-1 accuracy on a labelled set."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from asymswap.data.datasets import LabelledImages
from asymswap.data.predict import predict


@dataclass(frozen=True)
class Accuracy:
    """The fraction `top1` of correct images, the counts behind it, the model's number of classes, and the wall time."""

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

    `progress` is called with the images done and the images in all after each batch. Raises SourceError where the data
    is empty, or the model does not return scores for all of its classes.
    """
    start = time.perf_counter()
    found = predict(model, data, batch_size=batch_size, strict=True, progress=progress)
    correct = int((found.guesses == found.labels).sum())
    return Accuracy(correct / len(found), correct, len(found), found.scores, time.perf_counter() - start)
