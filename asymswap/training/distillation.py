"""What a network is taught by: labels, another network's class probabilities or scores, and its layers' outputs.

Distillation of class probabilities follows Hinton, Vinyals and Dean (2015): both networks' scores are divided by a
temperature, and the divergence is multiplied by its square. Of a network that is sure of what it was trained on the
scores before the softmax tell more: their squared difference (Ba and Caruana, 2014). A converted network has what
others lack: blocks that stand for blocks of its teacher. Their outputs are compared too where that is wanted (Romero et
al., 2015, without a regressor, since the shapes are the same).
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

_AUXILIARY = 0.3
"""The weight of auxiliary classifiers' losses (Szegedy et al., 2015)."""


@dataclass(frozen=True)
class Teacher:
    """A network to learn from, what it is, and which block of the student stands for which of its own."""

    model: nn.Module
    description: str
    blocks: Mapping[str, str]


@dataclass(frozen=True)
class Objective:
    """What is made small: see `Training` for the fields."""

    label_smoothing: float = 0.0
    teacher: Teacher | None = None
    weight: float = 0.9
    compare: str = "kl"
    temperature: float = 4.0
    features: float = 0.0

    def loss(self, student: nn.Module, runner: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The loss summed over the images, and the class scores; `runner` is the student as it has to be called.

        `labels` are class numbers (N) or shares of classes (N x classes).
        """
        if self.teacher is None:
            output = runner(images)
            return self._by_labels(output, labels), main_scores(output)
        blocks = self.teacher.blocks if self.features else {}
        # A copy: a model may change its input in place.
        with torch.no_grad(), caught(self.teacher.model, blocks.values()) as taught:
            target = main_scores(self.teacher.model(images.clone()))
        with caught(student, blocks) as learned:
            output = runner(images)
        scores = main_scores(output)
        if target.shape != scores.shape:
            raise SourceError(
                f"the teacher {self.teacher.description} scores {target.shape[1]} classes, the model "
                f"{scores.shape[1]}; give --distill a teacher of the same classes"
            )
        loss = self.weight * self._by_teacher(target, scores)
        if self.weight < 1:
            loss = loss + (1 - self.weight) * self._by_labels(output, labels)
        if self.features:
            error = feature_error(taught, learned, blocks)
            if error is None:
                raise SourceError("--distill-features finds no block of the same output in the teacher; leave it out")
            loss = loss + self.features * len(images) * error
        return loss, scores

    def _by_teacher(self, target: Tensor, scores: Tensor) -> Tensor:
        if self.compare == "mse":
            return len(scores) * difference(target, scores)
        return divergence(target, scores, self.temperature)

    def _by_labels(self, output: object, labels: Tensor) -> Tensor:
        total = torch.zeros(())
        for number, scores in enumerate(all_scores(output)):
            loss = F.cross_entropy(scores.float(), labels, label_smoothing=self.label_smoothing, reduction="sum")
            total = loss if number == 0 else total + _AUXILIARY * loss
        return total


def divergence(target_NC: Tensor, scores_NC: Tensor, temperature: float) -> Tensor:
    """The Kullback-Leibler divergence of class probabilities at a temperature, times its square, summed over images."""
    wanted, given = (F.log_softmax(scores.float() / temperature, 1) for scores in (target_NC, scores_NC))
    return F.kl_div(given, wanted, reduction="sum", log_target=True) * temperature**2


def feature_error(
    taught: Mapping[str, Tensor], learned: Mapping[str, Tensor], blocks: Mapping[str, str]
) -> Tensor | None:
    """The squared error of the blocks' outputs relative to the teacher's own variance, the mean over all blocks.

    `blocks` says which of the teacher's stands for each of the student's. None where no two have given outputs of the
    same shape.
    """
    errors = []
    for mine, theirs in blocks.items():
        target, output = taught.get(theirs), learned.get(mine)
        if target is not None and output is not None and target.shape == output.shape:
            errors.append((output.float() - target.float()).square().mean() / target.float().var().clamp_min(1e-12))
    return torch.stack(errors).mean() if errors else None


def all_scores(output: object) -> list[Tensor]:
    """The class scores (N x classes) that a classifier returns in train mode, those of auxiliary classifiers last.

    Raises SourceError where there are none.
    """
    found = [output] if isinstance(output, Tensor) else list(output) if isinstance(output, tuple) else []
    scores = [item for item in found if isinstance(item, Tensor)]
    if not scores or any(item.ndim != 2 for item in scores):
        shape = f"tensors of shape {', '.join(str(tuple(item.shape)) for item in scores)}" if scores else type(output)
        raise SourceError(f"the model returns {shape}, not images x class scores; give a classifier")
    return scores


def main_scores(output: object) -> Tensor:
    """The class scores that count."""
    return all_scores(output)[0]


@contextmanager
def caught(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """What the named modules return, where that is a tensor, while this lasts, the last time that each is called."""
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
