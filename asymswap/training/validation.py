"""Validation between epochs: on labelled images, by the user's own function, or by the loss of what was held back."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from asymswap.data.batches import Source, to_device
from asymswap.data.datasets import LabelledImages
from asymswap.data.metrics import EvaluatedBy, Own
from asymswap.data.predict import predict
from asymswap.results.evaluate import Score
from asymswap.results.finetune import Scores
from asymswap.training.config import Training
from asymswap.training.objective import Objective
from asymswap.utils.distributed import Team
from asymswap.utils.tensors import eval_mode, seed_

Context = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Validator:
    """Scores a model: `measure` gets it and the context of a forward pass.

    The first of `order`, or the first score, decides which epoch is the best, the next where those are equal; less is
    better of those in `lower`.
    """

    measure: Callable[[nn.Module, Context], Scores]
    lower: Collection[str] = ("loss",)
    order: tuple[str, ...] = ()

    def rank(self, scores: Scores) -> tuple[float, ...]:
        """Return a key that sorts better scores behind worse ones."""
        return tuple(-scores[name] if name in self.lower else scores[name] for name in self.order or scores)


def by_labels(images: LabelledImages, settings: Training, team: Team) -> Validator:
    """Validate a classifier by its loss and top-1."""

    def measure(model: nn.Module, context: Context) -> Scores:
        found = predict(
            model,
            images,
            batch_size=2 * settings.batch,
            workers=settings.workers or 0,
            strict=settings.strict,
            team=team,
            context=context,
        )
        sums = torch.tensor([float(found.losses.sum()), found.correct, len(found)], dtype=torch.float64)
        loss, correct, seen = team.sum(sums).tolist()
        return {"loss": loss / max(1.0, seen), "top1": correct / max(1.0, seen)}

    return Validator(measure, order=("top1", "loss"))


def by_loss(objective: Objective, source: Source, team: Team) -> Validator:
    """Validate by the loss of a source, of which the first process alone reads everything."""

    def measure(model: nn.Module, context: Context) -> Scores:
        device, total, seen = next(model.parameters()).device, 0.0, 0
        with eval_mode(model), torch.no_grad(), closing(source.groups(0, 0)) as groups:
            for group, count in groups:
                for batch in group:
                    with context():
                        total += float(objective.loss(model, model, to_device(batch, device))[0])
                seen += count
        return {"loss": total / seen}

    return Validator(lambda model, context: team.first(lambda: measure(model, context)))


def by_user(evaluate: EvaluatedBy, team: Team, seed: int) -> Validator:
    """Validate by the user's function or `Metric`, which the first process alone calls."""
    metric, lower = Own(evaluate), set[str]()

    def scores(model: nn.Module, context: Context) -> tuple[Score, ...]:
        seed_(seed, "validate")
        with torch.no_grad(), context():
            return metric(model, lambda *_: None)

    def measure(model: nn.Module, context: Context) -> Scores:
        found = team.first(lambda: scores(model, context))
        lower.update(score.name for score in found if score.lower_is_better)
        return {score.name: score.value for score in found}

    return Validator(measure, lower=lower)
