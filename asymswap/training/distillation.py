"""Distillation: the teacher, by default the original network, and the loss of labels, its scores and its blocks.

Class probabilities are distilled as by Hinton, Vinyals and Dean (2015): both networks' scores are divided by a
temperature, and the divergence is multiplied by its square. If the teacher is sure of its training images, the scores
before the softmax say more: their squared difference (Ba and Caruana, 2014). Outputs of blocks with the same name can
be compared too (Romero et al., 2015, without a regressor, since the shapes are the same).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from asymswap.checkpoint import Header, read_checkpoint
from asymswap.errors import AsymswapError, SourceError
from asymswap.fileformats.detect import sha256
from asymswap.measure.fidelity import difference
from asymswap.models import builders, timm_models
from asymswap.models.factories import names_python_file
from asymswap.models.opening import open_model
from asymswap.models.references import FILE_SUFFIXES
from asymswap.results.records import read_history
from asymswap.training.config import Training
from asymswap.types import Swap

_AUXILIARY = 0.3  # the weight of auxiliary classifiers' losses (Szegedy et al., 2015)
ORIGINAL = "original"
_GIVE = "give the teacher, `distill=…`"
_LISTS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclass(frozen=True)
class Teacher:
    """A network to learn from; `blocks` maps blocks of the student to the teacher's blocks with the same output."""

    model: nn.Module
    description: str
    blocks: Mapping[str, str]


@dataclass(frozen=True)
class Objective:
    """The loss to minimise; see `Training` for its parts with a teacher."""

    settings: Training
    teacher: Teacher | None = None

    def loss(self, student: nn.Module, runner: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss summed over the images, and the class scores; `runner` is the student as accelerate wraps it.

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
                f"{scores.shape[1]}; give as `distill=…` a teacher of the same classes"
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
                raise SourceError("no block of the teacher has the same output; leave out `distill_features=…`")
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
    """Return the squared error of the blocks' outputs relative to the teacher's variance; None without equal shapes."""
    errors = []
    for own, theirs in blocks.items():
        target, output = taught.get(theirs), learned.get(own)
        if target is not None and output is not None and target.shape == output.shape:
            errors.append((output.float() - target.float()).square().mean() / target.float().var().clamp_min(1e-12))
    return torch.stack(errors).mean() if errors else None


def all_scores(output: object) -> list[Tensor]:
    """Return a classifier's scores (N x classes) in train mode, the main ones first, or raise SourceError."""
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
    with ExitStack() as hooks:
        for name in names:

            def catch(_: nn.Module, __: object, output: object, name: str = name) -> None:
                if isinstance(output, Tensor):
                    outputs[name] = output

            hooks.enter_context(model.get_submodule(name).register_forward_hook(catch))
        yield outputs


def find_teacher(header: Header, reference: str, student: nn.Module, folder: Path | None = None) -> Teacher:
    """Return the teacher that a model reference or `original` names, in eval mode.

    For `original` nothing is downloaded, and no path in a checkpoint is followed: the file is looked for in `folder`,
    beside the checkpoint, by its name and SHA-256. Raises SourceError if it is not available or has changed since the
    conversion.
    """
    original = reference == ORIGINAL
    named, options = _recorded(header, folder) if original else (reference, {})
    try:
        with _offline() if original else nullcontext():
            opened = open_model(named, **options)
    except AsymswapError as error:
        if original:
            raise SourceError(f"the original {named} cannot be fetched ({error}); {_GIVE}") from None
        raise SourceError(f"the teacher {named} cannot be used: {error}") from None
    swaps = [swap for plan in header.plans for swap in plan.swaps]
    teacher = opened.model.eval().requires_grad_(False)
    return Teacher(teacher, opened.reference, blocks_around(swaps, student, teacher))


def blocks_around(swaps: Iterable[Swap], student: nn.Module, teacher: nn.Module) -> dict[str, str]:
    """Return the innermost blocks that hold swapped layers, each with the teacher's block of the same output.

    A residual block's sum is the next one's input, while the outputs of single convs are scaled and shifted first. A
    layer that only lists of layers hold is its own block; if it has folded the batch norm behind it, its output is
    compared with the teacher's batch norm.
    """

    def is_block(model: nn.Module, name: str) -> bool:
        try:
            return not isinstance(model.get_submodule(name), _LISTS)
        except AttributeError:
            return False

    found: dict[str, str] = {}
    for swap in swaps:
        parents = (swap.site.rsplit(".", depth)[0] for depth in range(1, swap.site.count(".") + 1))
        pairs = [*((parent, parent) for parent in parents), (swap.site, swap.absorbs or swap.site)]
        for own, theirs in pairs:
            if is_block(student, own) and is_block(teacher, theirs):
                found[own] = theirs
                break
    return found


def _recorded(header: Header, folder: Path | None) -> tuple[str, dict[str, Any]]:
    """Return the reference and options with which the original was opened for the conversion."""
    report = read_history(header.provenance, "the checkpoint").report
    reference, weights = report.model.reference, report.model.weights
    if not reference or weights in ("", "as given"):
        raise SourceError(f"the checkpoint does not say which model it was made from; {_GIVE}")
    origin, arguments = header.origin.reference, dict(header.origin.arguments)
    whole = origin.startswith(("skeleton:", "class:"))
    if not whole and builders.canonical(origin) is None:
        # Code that a file names is not run; what the user names is.
        raise SourceError(f"the original was built by {origin}, which is code of yours; {_GIVE}")
    recorded = None
    if report.model.sha256:
        recorded = (report.files[0].path if report.files else None) or reference
    if whole and (recorded is None or reference != recorded):
        # The class of a module that was saved as a whole: by itself it names nothing to open.
        raise SourceError(f"the checkpoint does not say which file it was made from; {_GIVE}")
    if recorded is not None:
        path = _same_file(recorded, str(report.model.sha256), folder)
        if reference != recorded:
            return origin, {"weights": str(path), "arguments": arguments}
        if not whole:
            try:
                read_checkpoint(path)
            except AsymswapError:
                return str(path), {"arch": origin, "arguments": arguments}
        return str(path), {}  # an asymswap checkpoint, or a whole module, names its architecture itself
    if any(mark in weights for mark in "/\\") or Path(weights).suffix in FILE_SUFFIXES:
        raise SourceError(f"the checkpoint names the weights {weights!r}, a path, which is not followed; {_GIVE}")
    if weights == "random":
        raise SourceError(f"the original {reference} had random weights, which are not kept; {_GIVE}")
    return origin, {"weights": weights, "arguments": arguments} if origin.startswith("torchvision:") else {}


def _same_file(recorded: str, expected: str, folder: Path | None) -> Path:
    """Return the file of that name beside the checkpoint; raise SourceError if it is missing or has changed."""
    name = re.split(r"[/\\]", recorded)[-1]
    # As a reference, the name of a Python file would run it.
    path = None if folder is None or name in ("", ".", "..") or names_python_file(name) else folder / name
    if path is None or not path.is_file():
        where = "" if folder is None else f" in {folder}"
        raise SourceError(f"the original {name} is not beside the checkpoint{where}; put it there, or {_GIVE}")
    if sha256(path) != expected:
        raise SourceError(f"{path} is no longer the file that was converted (its SHA-256 differs); {_GIVE}")
    return path


@contextmanager
def _offline() -> Iterator[None]:
    """Use only weights in the cache of torch.hub or of the Hugging Face hub while the block lasts."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError("nothing is downloaded on a checkpoint's word")

    before = torch.hub.download_url_to_file, timm_models.find_hub
    torch.hub.download_url_to_file, timm_models.find_hub = refuse, refuse
    try:
        yield
    finally:
        torch.hub.download_url_to_file, timm_models.find_hub = before
