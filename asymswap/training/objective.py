"""What is minimised: a loss of labels or of the user's, the difference from a teacher's outputs, or both.

Class probabilities are distilled as by Hinton, Vinyals and Dean (2015): both networks' scores are divided by a
temperature, and the divergence is multiplied by its square. Or the squared difference of the scores is taken (Ba and
Caruana, 2014), and always without labels. Outputs of blocks with the same name can be compared too (Romero et al.,
2015, without a regressor, since the shapes are the same).
"""

from collections.abc import Callable, Collection
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from asymswap.data.batches import Batch, Source, to_device
from asymswap.data.datasets import LabelledImages
from asymswap.data.metrics import EvaluatedBy, Own, all_scores, predict
from asymswap.errors import SourceError, call
from asymswap.measure.fidelity import caught, difference, feature_error
from asymswap.results.evaluate import Score
from asymswap.results.finetune import Scores
from asymswap.training.config import Training
from asymswap.training.distillation import Teacher
from asymswap.utils.distributed import Team
from asymswap.utils.inputs import arguments_of, copied, sizes
from asymswap.utils.tensors import deep_copy, eval_mode, list_tensors, meta_copy, seed_, to_meta

_COMPARABLE = (
    "; to learn from a teacher both must return the same tensors, such as a detector's heads before boxes are chosen: "
    "wrap them in a module whose forward returns these"
)
_AUXILIARY = 0.3  # the weight of auxiliary classifiers' losses (Szegedy et al., 2015)


@dataclass(frozen=True)
class Objective:
    """The loss to minimise; see `Training` for its parts with a teacher.

    With `labels` the batches are images with their classes, and the outputs class scores. Else `inputs` says what of a
    batch is the network's input, and `by_user(outputs, batch)` is the loss beside the teacher's.
    """

    settings: Training
    teacher: Teacher | None = None
    labels: bool = True
    mix: nn.Module | None = None
    inputs: Callable[[Any], Any] | None = None
    by_user: Callable[[Any, Any], Any] | None = None

    def loss(self, student: nn.Module, runner: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the loss times the batch's count, and how many guesses are right; `runner` is the wrapped student."""
        settings, teacher, content = self.settings, self.teacher, batch.content
        if self.labels:
            images, labels = content
            # Of mixed images the labels are fractions of classes (N x classes).
            images, targets = self.mix(images, labels) if self.mix and len(images) > 1 else (images, labels)
            arguments: tuple[Any, ...] = (images,)
        else:
            arguments = arguments_of(student, content, self.inputs)
        blocks = teacher.blocks if teacher is not None and settings.distill_features else {}
        if teacher is not None:
            with torch.no_grad(), caught(teacher.model, blocks.values()) as taught:
                target = _run(teacher.model, copied(arguments))
        with caught(student, blocks) as learned:
            output = _run(runner, arguments)
        alone = not self.labels and self.by_user is None
        weight = 0.0 if teacher is None else 1.0 if alone else settings.distill_weight
        loss: Any = 0.0
        if weight > 0:
            error = self._by_scores(target, output) if self.labels else batch.count * output_error(target, output)
            loss = weight * error
        if weight < 1:
            own = self._by_labels(output, targets) if self.labels else batch.count * self._by_user(output, content)
            loss = loss + (1 - weight) * own
        if settings.distill_features:
            apart = feature_error(taught, learned, blocks)
            if apart is None:
                raise SourceError("no block of the teacher has the same output; leave out `distill_features=…`")
            loss = loss + settings.distill_features * batch.count * apart
        return loss, (all_scores(output)[0].detach().argmax(1) == labels).sum() if self.labels else torch.zeros(())

    def _by_labels(self, output: object, labels: Tensor) -> Tensor:
        given: dict[str, Any] = {"label_smoothing": self.settings.label_smoothing, "reduction": "sum"}
        main, *auxiliary = (F.cross_entropy(scores.float(), labels, **given) for scores in all_scores(output))
        return main + _AUXILIARY * sum(auxiliary)

    def _by_scores(self, taught: object, output: object) -> Tensor:
        target, scores = all_scores(taught)[0], all_scores(output)[0]
        if target.shape != scores.shape:
            assert self.teacher is not None
            counts = f"{target.shape[1]} classes, the model {scores.shape[1]}"
            raise SourceError(f"the teacher {self.teacher.description} scores {counts}; give one of the same classes")
        if self.settings.distill_loss == "mse":
            return len(scores) * difference(target, scores)
        return divergence(target, scores, self.settings.temperature)

    def _by_user(self, output: object, content: object) -> Tensor:
        assert self.by_user is not None
        hint = "; here a batch is one tensor, without labels" if isinstance(content, Tensor) else ""
        found = call("`loss=…`", self.by_user, output, content, hint=hint)
        if not isinstance(found, Tensor) or found.numel() != 1:
            what = type(found).__name__ + (f" of shape {tuple(found.shape)}" if isinstance(found, Tensor) else "")
            raise SourceError(f"`loss=…` gave a {what}; it must return one number as a tensor, such as a mean")
        return check_gradient(found.reshape(()), "`loss=…` gave a number that")

    def trains_in_eval_mode(self, student: nn.Module, source: Source) -> bool:
        """Return True for a student, such as a detector, whose outputs are those of the teacher in eval mode only."""
        if self.teacher is None or self.labels or self.by_user is not None:
            return False
        with closing(source.groups(0, 0)) as groups:
            (batch, *_), _ = next(groups)
        batch = to_device(batch, next(student.parameters()).device)
        arguments = arguments_of(student, batch.content, self.inputs)
        probed, reason = deep_copy(student), ""
        with torch.no_grad():
            target = _run(self.teacher.model, copied(arguments))
            for training in (True, False):
                try:
                    output_error(target, _run(probed.train(training), copied(arguments)))
                    if not training:
                        # Boxes that are chosen by their scores are no pairs, even of one number; this fails for them.
                        _run(meta_copy(probed), to_meta(arguments))
                except SourceError as error:
                    reason = reason or str(error).removesuffix(_COMPARABLE)
                else:
                    return not training
        raise SourceError(reason + _COMPARABLE)


def _run(model: nn.Module, arguments: tuple[Any, ...]) -> Any:
    return call(f"the network, given {sizes(arguments) or 'no tensor'},", model, *arguments)


def check_gradient(loss: Tensor, what: str) -> Tensor:
    """Return the loss; raise SourceError where it has no gradient."""
    if torch.is_grad_enabled() and not loss.requires_grad:
        advice = "compute it from the network's outputs, without .item(), .detach() or NumPy"
        raise SourceError(f"{what} does not depend on the trained weights (it has no gradient): {advice}")
    return loss


def output_error(target: object, output: object) -> Tensor:
    """Return the mean over all floating-point outputs of the squared difference relative to the teacher's squares."""
    pair = [[tensor for tensor in list_tensors(value) if tensor.is_floating_point()] for value in (target, output)]
    if [tensor.shape for tensor in pair[0]] != [tensor.shape for tensor in pair[1]] or not pair[0]:
        what = "the teacher returns {} and the trained network {}, which cannot be compared"
        raise SourceError(what.format(*(sizes(tuple(tensors)) or "no tensor" for tensors in pair)) + _COMPARABLE)
    errors = [difference(one, other) for one, other in zip(*pair, strict=True)]
    return check_gradient(torch.stack(errors).mean(), "the difference from the teacher")


def divergence(target_NC: Tensor, scores_NC: Tensor, temperature: float) -> Tensor:
    """Return the KL divergence of class probabilities at a temperature, times its square, summed over the images."""
    target, given = (F.log_softmax(scores.float() / temperature, 1) for scores in (target_NC, scores_NC))
    return F.kl_div(given, target, reduction="sum", log_target=True) * temperature**2


@dataclass(frozen=True)
class Validator:
    """Scores a model by `measure`, in the precision that it is called in."""

    measure: Callable[[nn.Module], Scores]
    lower: Collection[str] = ("loss",)  # of these less is better
    order: tuple[str, ...] = ()  # the first decides which epoch is the best, then the next; else all

    def rank(self, scores: Scores) -> tuple[float, ...]:
        """Return a key that sorts better scores behind worse ones."""
        return tuple(-scores[name] if name in self.lower else scores[name] for name in self.order or scores)


def by_labels(images: LabelledImages, settings: Training, team: Team) -> Validator:
    """Validate a classifier by its loss and top-1."""
    options: dict[str, Any] = {"batch_size": 2 * settings.batch, "workers": settings.workers or 0, "team": team}

    def measure(model: nn.Module) -> Scores:
        found = predict(model, images, strict=settings.strict, **options)
        sums = torch.tensor([float(found.losses.sum()), found.correct, len(found)], dtype=torch.float64)
        loss, correct, seen = team.sum(sums).tolist()
        return {"loss": loss / max(1.0, seen), "top1": correct / max(1.0, seen)}

    return Validator(measure, order=("top1", "loss"))


def by_loss(objective: Objective, source: Source, team: Team) -> Validator:
    """Validate by the loss of a source, of which the first process alone reads everything."""

    def measure(model: nn.Module) -> Scores:
        device, total, seen = next(model.parameters()).device, 0.0, 0
        with eval_mode(model), torch.no_grad(), closing(source.groups(0, 0)) as groups:
            for group, count in groups:
                for batch in group:
                    total += float(objective.loss(model, model, to_device(batch, device))[0])
                seen += count
        return {"loss": total / seen}

    return Validator(lambda model: team.first(lambda: measure(model)))


def by_user(evaluate: EvaluatedBy, team: Team, seed: int) -> Validator:
    """Validate by the user's function or `Metric`, which the first process alone calls."""
    metric, lower = Own(evaluate), set[str]()

    def measure(model: nn.Module) -> Scores:
        def scores() -> tuple[Score, ...]:
            seed_(seed, "validate")
            with torch.no_grad():
                return metric(model, lambda *_: None)

        found = team.first(scores)
        lower.update(score.name for score in found if score.lower_is_better)
        return {score.name: score.value for score in found}

    return Validator(measure, lower=lower)
