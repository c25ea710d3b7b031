"""Check that a model's classes are the data's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from asymswap.data.datasets import LabelledImages
from asymswap.data.predict import check_scores, placement
from asymswap.errors import SourceError
from asymswap.results.records import History
from asymswap.types import Origin
from asymswap.utils.tensors import eval_mode


def check_class_count(model: nn.Module, data: LabelledImages) -> int:
    """Return the model's number of classes; raise SourceError where the data has others, or it is no classifier."""
    assert data.preprocessing is not None
    pre = data.preprocessing
    device, dtype = placement(model)
    with eval_mode(model), torch.inference_mode():
        scores = check_scores(model(torch.zeros(1, pre.channels, *pre.size, device=device, dtype=dtype)), data)
    if scores.shape[1] != len(data.classes):
        raise SourceError(
            f"the model scores {scores.shape[1]} classes, but the data has {len(data.classes)} ({data.description}); "
            "give data of all of the model's classes, or a model for these"
        )
    return scores.shape[1]


def known_classes(history: History, origin: Origin) -> tuple[str, ...]:
    """Return the names of the model's classes in order, if its checkpoint or its published weights have them."""
    if history.training:
        return history.training[-1].classes
    return published_classes(origin.reference, history.report.model.weights)


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
    """Raise SourceError where a class of the data has the name of a class of the model, but another number."""
    numbers = {name: number for number, name in enumerate(known)}
    if len(numbers) != len(known):
        return
    for number, name in enumerate(data.classes):
        if numbers.get(name, number) != number:
            raise SourceError(
                f"class {name!r} is number {number} of the data and number {numbers[name]} of the model "
                f"({data.description}); name the data's classes so that they sort as the model's"
            )
