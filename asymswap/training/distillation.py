"""The training loss: labels, a teacher's class probabilities or scores, and the outputs of its blocks.

Distillation of class probabilities follows Hinton, Vinyals and Dean (2015): both networks' scores are divided by a
temperature, and the divergence is multiplied by its square. Where the teacher is sure of its training images, the
scores before the softmax say more: their squared difference (Ba and Caruana, 2014). Blocks of a converted network
correspond to blocks of its teacher; their outputs can be compared too (Romero et al., 2015, without a regressor, since
the shapes are the same).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from asymswap.errors import SourceError
from asymswap.measure.fidelity import difference
from asymswap.training.config import Training

_AUXILIARY = 0.3
"""The weight of auxiliary classifiers' losses (Szegedy et al., 2015)."""


@dataclass(frozen=True)
class Teacher:
    """A network to learn from; `blocks` maps blocks of the student to the teacher's blocks with the same output."""

    model: nn.Module
    description: str
    blocks: Mapping[str, str]


@dataclass(frozen=True)
class Objective:
    """The loss to minimise: with a teacher, see `Training` for the parts of the loss."""

    settings: Training
    teacher: Teacher | None = None

    def loss(self, student: nn.Module, runner: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss summed over the images, and the class scores; `runner` is the student as it must be called.

        `labels` are class numbers (N) or fractions of classes (N x classes).
        """
        settings = self.settings
        if self.teacher is None:
            output = runner(images)
            return self._by_labels(output, labels), all_scores(output)[0]
        blocks = self.teacher.blocks if settings.distill_features else {}
        # A copy: a model may change its input in place.
        with torch.no_grad(), caught(self.teacher.model, blocks.values()) as taught:
            target = all_scores(self.teacher.model(images.clone()))[0]
        with caught(student, blocks) as learned:
            output = runner(images)
        scores = all_scores(output)[0]
        if target.shape != scores.shape:
            raise SourceError(
                f"the teacher {self.teacher.description} scores {target.shape[1]} classes, the model "
                f"{scores.shape[1]}; give --distill a teacher of the same classes"
            )
        if settings.distill_loss == "mse":
            loss = settings.distill_weight * (len(scores) * difference(target, scores))
        else:
            loss = settings.distill_weight * divergence(target, scores, settings.temperature)
        if settings.distill_weight < 1:
            loss = loss + (1 - settings.distill_weight) * self._by_labels(output, labels)
        if settings.distill_features:
            error = feature_error(taught, learned, blocks)
            if error is None:
                raise SourceError("--distill-features finds no block of the same output in the teacher; leave it out")
            loss = loss + settings.distill_features * len(images) * error
        return loss, scores

    def _by_labels(self, output: object, labels: Tensor) -> Tensor:
        main, *auxiliary = (
            F.cross_entropy(scores.float(), labels, label_smoothing=self.settings.label_smoothing, reduction="sum")
            for scores in all_scores(output)
        )
        for loss in auxiliary:
            main = main + _AUXILIARY * loss
        return main


def divergence(target_NC: Tensor, scores_NC: Tensor, temperature: float) -> Tensor:
    """Return the KL divergence of class probabilities at a temperature, times its square, summed over the images."""
    target, given = (F.log_softmax(scores.float() / temperature, 1) for scores in (target_NC, scores_NC))
    return F.kl_div(given, target, reduction="sum", log_target=True) * temperature**2


def feature_error(
    taught: Mapping[str, Tensor], learned: Mapping[str, Tensor], blocks: Mapping[str, str]
) -> Tensor | None:
    """Return the squared error of the blocks' outputs relative to the teacher's variance, averaged over the blocks.

    `blocks` maps the student's blocks to the teacher's. None where no pair has outputs of the same shape.
    """
    errors = []
    for own, theirs in blocks.items():
        target, output = taught.get(theirs), learned.get(own)
        if target is not None and output is not None and target.shape == output.shape:
            errors.append((output.float() - target.float()).square().mean() / target.float().var().clamp_min(1e-12))
    return torch.stack(errors).mean() if errors else None


def all_scores(output: object) -> list[Tensor]:
    """Return the class scores (N x classes) of a classifier in train mode, the main ones first.

    Raises SourceError where there are none.
    """
    found = [output] if isinstance(output, Tensor) else list(output) if isinstance(output, tuple) else []
    scores = [item for item in found if isinstance(item, Tensor)]
    if not scores or any(item.ndim != 2 for item in scores):
        shape = f"tensors of shape {', '.join(str(tuple(item.shape)) for item in scores)}" if scores else type(output)
        raise SourceError(f"the model returns {shape}, not images x class scores; give a classifier")
    return scores


@contextmanager
def caught(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """Collect the output of the last call of each named module, if it is a tensor, while the block lasts."""
    outputs: dict[str, Tensor] = {}

    def catch(name: str) -> torch.utils.hooks.RemovableHandle:
        def hook(module: nn.Module, inputs: object, output: object) -> None:  # noqa: ARG001
            if isinstance(output, Tensor):
                outputs[name] = output

        return model.get_submodule(name).register_forward_hook(hook)

    handles = [catch(name) for name in names]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()
