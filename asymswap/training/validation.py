"""Validation between epochs: on labelled images, by the user's own function, or by the loss of what was held back."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from asymswap.data.batches import Source, to_device
from asymswap.data.datasets import LabelledImages
from asymswap.data.predict import placement, predict
from asymswap.errors import SourceError
from asymswap.results.finetune import Scores
from asymswap.training.config import Training
from asymswap.training.objective import Objective
from asymswap.utils.distributed import Team
from asymswap.utils.tensors import eval_mode, seed_
from asymswap.utils.users import call

Context = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Validator:
    """Scores a model: `measure` gets it and the context of a forward pass.

    The first of `order`, or the first score, decides which epoch is the best, the next where those are equal; less is
    better of those in `lower`, or of all where that is True.
    """

    measure: Callable[[nn.Module, Context], Scores]
    lower: Collection[str] | bool = ("loss",)
    order: tuple[str, ...] = ()

    def rank(self, scores: Scores) -> tuple[float, ...]:
        """Return a key that sorts better scores behind worse ones."""
        lower = scores if self.lower is True else self.lower or ()
        return tuple(-scores[name] if name in lower else scores[name] for name in self.order or scores)


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
        device, total, seen = placement(model)[0], 0.0, 0
        with eval_mode(model), torch.no_grad(), closing(source.groups(0, 0)) as groups:
            for group, count in groups:
                for batch in group:
                    with context():
                        total += float(objective.loss(model, model, to_device(batch, device))[0])
                seen += count
        return {"loss": total / seen}

    return Validator(lambda model, context: team.first(lambda: measure(model, context)))


def by_user(evaluate: Callable[[nn.Module], Any], team: Team, seed: int) -> Validator:
    """Validate by the user's function, which the first process alone calls, with the model in eval mode.

    Its attribute `lower_is_better` says of which names less is better; True: of all.
    """
    name = getattr(evaluate, "__name__", "score").replace("<lambda>", "score")
    lower = getattr(evaluate, "lower_is_better", ())

    def measure(model: nn.Module, context: Context) -> Scores:
        seed_(seed, "validate")
        with eval_mode(model), torch.no_grad(), context():
            found = call("`evaluate=…`", evaluate, model)
        scores: dict[str, float] = {}
        for key, value in (found if isinstance(found, Mapping) else {name: found}).items():
            with contextlib.suppress(TypeError, ValueError, RuntimeError):
                scores[str(key)] = float(value)
            if not math.isfinite(scores.get(str(key), math.nan)):
                raise SourceError(f"`evaluate=…` gave {key} = {value}, not a number that says how good the model is")
        if not scores:
            raise SourceError("`evaluate=…` gave an empty dict; it must return a number, or a dict of numbers")
        return scores

    lower = (lower,) if isinstance(lower, str) else lower
    return Validator(lambda model, context: team.first(lambda: measure(model, context)), lower=lower)
