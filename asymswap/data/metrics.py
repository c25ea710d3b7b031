"""What models are measured by: labelled images, pairs of images, masks, or functions of the user's."""

import hashlib
import importlib.util
import inspect
import math
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass
from functools import partial, wraps
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, default_collate
from torchvision import models
from torchvision.transforms import v2

from asymswap.data.datasets import PIL_MODES, LabelledImages, open_data, paired_files, read_picture, to_input
from asymswap.data.references import PAIRED
from asymswap.errors import AsymswapError, SourceError, call, listed, near_names, reason_of
from asymswap.models.factories import found_callable
from asymswap.models.opened import OpenedModel
from asymswap.results.evaluate import Score
from asymswap.results.records import read_provenance
from asymswap.types import Preprocessing
from asymswap.utils.distributed import ALONE, Team
from asymswap.utils.inputs import output_of, placed, sizes
from asymswap.utils.tensors import eval_mode, list_tensors


@dataclass(frozen=True)
class Metric:
    """A metric of the user's: `function(model)` gives a number, or numbers by name, the first of which decides.

    It gets the model in eval mode. Higher is better, but for the names in `lower_is_better`; `name` is that of a single
    number, by default the function's.
    """

    function: Callable[[nn.Module], Any]
    lower_is_better: Collection[str] = ()
    name: str = ""

    def __post_init__(self) -> None:
        what, lower = self.function, self.lower_is_better
        if not callable(what):
            raise AsymswapError(f"models are measured by data, a function or a Metric, not by {what!r:.60}")
        if not isinstance(lower, Collection) or not all(isinstance(name, str) for name in lower):
            raise AsymswapError(f"`lower_is_better={lower!r:.60}` is no tuple or set of names")
        own = str(getattr(what, "__name__", type(what).__name__)).replace("<lambda>", "metric")
        object.__setattr__(self, "name", self.name or own)
        object.__setattr__(self, "lower_is_better", (lower,) if isinstance(lower, str) else tuple(lower))


EvaluatedBy: TypeAlias = str | Callable[[nn.Module], Any] | Metric | Sequence[Metric]
"""What `evaluate=` takes: a data reference, a function of the model, a metric, or several."""

Steps: TypeAlias = Callable[[int, int], None]
"""Progress: the number of images done, and of all."""


class Measured(NamedTuple):
    """Scores, the first of which decides, and its values for single samples, of which it is the mean, if it is one."""

    scores: tuple[Score, ...]
    each: tuple[float, ...] = ()


class Evaluator:
    """Measures models: called with one and a function for progress, it returns scores, or raises AsymswapError."""

    description = ""
    inputs = ""  # the images that the model gets, as calibration describes them
    images: int | None = None
    classes: int | None = None
    fingerprint = ""  # another one where the data is another
    note = ""  # for the report

    def measured(self, model: nn.Module, progress: Steps) -> Measured:
        """Return the scores with the values for single samples."""
        raise NotImplementedError

    def __call__(self, model: nn.Module, progress: Steps) -> tuple[Score, ...]:
        return self.measured(model, progress).scores


def evaluator_of(measure: EvaluatedBy, opened: OpenedModel, crop_border: int = 0) -> Evaluator:
    """Return what measures a model, of data on the test part; `crop_border` pixels of pairs are left out at borders."""
    kind = paired_kind(measure)
    if crop_border and kind != "pairs":
        raise AsymswapError("`crop_border=…` goes with pairs:INPUTS,TARGETS; leave it out")
    if not isinstance(measure, str):
        return Own(measure)
    if kind is not None:
        return (Pairs if kind == "pairs" else Masks)(measure, opened.preprocessing, crop_border)
    data = open_data(measure, opened.preprocessing, "test")
    return Labelled(data, check_classifier(opened.model, data))


def paired_kind(measure: EvaluatedBy) -> str | None:
    """Return `pairs` or `masks` for a reference to such data."""
    kind = measure.partition(":")[0] if isinstance(measure, str) else None
    return kind if kind in PAIRED else None


def check_same(first: Sequence[Score], found: Sequence[Score]) -> None:
    """Raise AsymswapError where a metric gives other names for one model than for another."""
    one, other = ([score.name for score in scores] for scores in (first, found))
    if set(one) != set(other):
        names = f"{', '.join(one)} for the first model and {', '.join(other)} for another"
        raise AsymswapError(f"the metric gave {names}; give the same names for every model")


@dataclass(frozen=True)
class Predictions:
    """What a model says of each readable image."""

    numbers: Tensor  # of the images
    labels: Tensor
    guesses: Tensor  # the likeliest classes
    ranks: Tensor  # of the right classes, 0 is best
    losses: Tensor
    scores: int  # the model's number of classes
    seconds: float  # in forward passes
    unreadable: int = 0  # images left out

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def correct(self) -> int:
        return int((self.guesses == self.labels).sum())

    @property
    def top1(self) -> float:
        return self.correct / len(self)

    @property
    def named(self) -> tuple[Score, ...]:
        """Top-1, and top-5 of more than five classes."""
        top5 = int((self.ranks < 5).sum()) / len(self)
        return (Score("top-1", self.top1, "%"), *([Score("top-5", top5, "%")] if self.scores > 5 else []))


def _read(data: LabelledImages, numbers: Sequence[int]) -> tuple[list[Tensor], list[SourceError]]:
    """Return a batch of the readable images with their numbers, empty if there is none, and the others' errors."""
    samples, errors = [], []
    for number in numbers:
        try:
            samples.append((number, *data[number]))
        except SourceError as error:
            errors.append(error)
    return (default_collate(samples) if samples else []), errors


def predict(
    model: nn.Module,
    data: LabelledImages,
    *,
    batch_size: int = 256,
    workers: int = 0,
    strict: bool = False,
    team: Team = ALONE,
    progress: Steps = lambda *_: None,
) -> Predictions:
    """Run the model in eval mode on the images or this process's share of them.

    Raises SourceError where no image can be read, or if `strict` one cannot, and for no classifier of these classes.
    """
    chosen: Any = range(team.rank, len(data), team.size)
    # A generator of its own: the loader would otherwise draw from the global one.
    loader: Iterable[Any] = DataLoader(
        chosen, batch_size, num_workers=workers, collate_fn=partial(_read, data), generator=torch.Generator()
    )
    parts: list[list[Tensor]] = []
    scores, seconds, unreadable, done = 0, 0.0, 0, 0
    with eval_mode(model), torch.inference_mode():
        for readable, errors in loader:
            if errors and strict:
                raise errors[0]
            unreadable += len(errors)
            if not readable:
                continue
            numbers, images, labels = readable
            arguments = placed(model, (images,))
            start = time.perf_counter()
            output = check_scores(model(*arguments), data).float().cpu()
            seconds += time.perf_counter() - start
            scores = output.shape[1]
            guesses = output.argmax(1)
            ranks = (output > output.gather(1, labels[:, None])).sum(1)
            # Of equal scores argmax takes one; if that is not the right class, it counts as likelier.
            ranks = torch.where((ranks == 0) & (guesses != labels), 1, ranks)
            losses = F.cross_entropy(output, labels, reduction="none").double()
            parts.append([numbers, labels, guesses, ranks, losses])
            done += len(labels)
            progress(done + unreadable, len(chosen))
    if not parts and team.size == 1:
        raise SourceError(f"no image can be read of {data.description}; `strict=True` names the first that cannot")
    columns = [torch.cat(column) for column in zip(*parts, strict=True)] if parts else [torch.zeros(0)] * 5
    numbers, labels, guesses, ranks, losses = columns
    return Predictions(numbers, labels, guesses, ranks, losses, scores, seconds, unreadable)


def check_classifier(model: nn.Module, data: LabelledImages, exact: bool = False) -> int:
    """Return the model's number of classes; SourceError for fewer than the data's, with `exact` also for more."""
    image = torch.zeros(data.preprocessing.channels, *data.preprocessing.size) if exact else data[0][0]
    return check_scores(output_of(model, (image[None],)), data, exact).shape[1]


def check_scores(output: object, data: LabelledImages, exact: bool = False) -> Tensor:
    """Return the class scores that an output holds, of at least the data's classes; raise SourceError otherwise."""
    (found,) = all_scores(output, several=False)
    scores, classes = found.shape[1], len(data.classes)
    if scores < classes or (exact and scores > classes):
        what = f"the model scores {scores} classes, but the data has {classes} ({data.description})"
        raise SourceError(f"{what}; give data with the model's classes")
    return found


def all_scores(output: object, several: bool = True) -> list[Tensor]:
    """Return a classifier's scores (N x classes), if `several` a tuple's, the main ones first; or raise SourceError."""
    if isinstance(output, Mapping):  # as transformers' classifiers return
        output = output.get("logits", output)
    found = output if several and isinstance(output, tuple) else (output,)
    scores = [item for item in found if isinstance(item, Tensor)]
    if not scores or any(item.ndim != 2 for item in scores):
        what = sizes(tuple(scores)) or f"a {type(output).__name__}"
        raise SourceError(f"the model returns {what}, not images x class scores; give a classifier")
    return scores


def known_classes(opened: OpenedModel) -> tuple[str, ...]:
    """Return the names of the model's classes in order, if its checkpoint or torchvision's weights have them."""
    history, name = read_provenance(opened.provenance, opened.reference), opened.origin.reference
    if history.training:
        return history.training[-1].classes
    try:
        known = models.get_model_weights(name.removeprefix("torchvision:"))
        weights = known[history.report.model.weights or opened.weights]
    except (KeyError, ValueError):  # another network than torchvision's, or other weights
        return ()
    return tuple(weights.meta.get("categories", ()))


def check_class_names(known: Sequence[str], data: LabelledImages) -> None:
    """Raise SourceError if a class of the data has the name of a class of the model, but another number."""
    numbers = {name: number for number, name in enumerate(known)}
    for number, name in enumerate(data.classes if len(numbers) == len(known) else ()):
        if numbers.get(name, number) != number:
            what = f"class {name!r} is number {number} of the data and number {numbers[name]} of the model"
            raise SourceError(f"{what} ({data.description}); name the data's classes so that they sort as the model's")


class Labelled(Evaluator):
    """Top-1 and top-5 of a classifier; `scored` is the number of classes that the model scores, if it is known."""

    def __init__(self, data: LabelledImages, scored: int | None = None, **options: Any) -> None:
        self.data, self._options = data, {"strict": True, **options}
        self.description = self.inputs = data.description
        self.images, self.classes = len(data), len(data.classes)
        self.fingerprint = _hash((data.classes, [int(label) for label in data.labels]))
        if scored not in (None, self.classes):
            self.note = f"the model scores {scored} classes, the data has {self.classes}: do they agree?"

    def predict(self, model: nn.Module, progress: Steps) -> Predictions:
        return predict(model, self.data, progress=progress, **self._options)

    def measured(self, model: nn.Module, progress: Steps) -> Measured:
        found = self.predict(model, progress)
        right = (found.guesses == found.labels)[found.numbers.argsort()]
        return Measured(found.named, tuple(right.double().tolist()))


def _hash(value: object) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()


class _Paired(Evaluator):
    """Images, each with a picture of what is right, of the same stem."""

    def __init__(self, reference: str, known: Preprocessing, crop: int = 0, chosen: list[int] | None = None) -> None:
        # Opened for what it refuses: networks that do not take single images.
        opened = open_data(reference, known, "test", unlabelled=True)
        self.known, self.crop = opened.preprocessing, crop
        self.inputs = opened.description if chosen is None else ""
        self.mode = PIL_MODES[known.channels]
        pairs = paired_files(reference)
        self.pairs = pairs if chosen is None else [pairs[number] for number in chosen]
        self.images = len(self.pairs)
        self.description = f"{reference}, {self.images} images"
        self.description += ", each at its own size" if paired_kind(reference) == "pairs" else ""
        self.description += f", without {crop} pixels at each border" if crop else ""
        files = [(path.name, path.stat().st_size) for pair in self.pairs for path in pair]
        self.fingerprint = _hash((files, crop))

    def outputs(self, model: nn.Module, steps: list[Any], progress: Steps) -> Iterator[tuple[Any, Path, Path]]:
        """Yield what the model returns for each image, in batches of one, and the paths of the pair."""
        transform = v2.Compose([*steps, *to_input(self.known)])
        for done, (path, target) in enumerate(self.pairs, 1):
            image = transform(read_picture(path, self.mode))
            try:
                output = output_of(model, (image[None],))
            except Exception as error:
                # The network's own code may raise anything for an image that it does not take.
                what = f"'{path}' ({_shape(image)}): {reason_of(error)}"
                raise SourceError(f"the model does not run on {what}") from error
            if any(bool(tensor.isnan().any()) for tensor in list_tensors(output)):
                raise SourceError(f"the model makes NaN of '{path}'")
            yield output, path, target
            progress(done, len(self.pairs))


def _shape(value: Any) -> str:
    return sizes((value,)) if isinstance(value, Tensor) else f"a {type(value).__name__}"


_SSIM_WINDOW = 11
_MOST_DB = 100.0  # PSNR of an image without any error, which would be infinite


class Pairs(_Paired):
    """PSNR and SSIM of a network from images to images, on values from 0 to 1; each image at its own size.

    Outputs are taken to be normalised as inputs, and are clamped to 0 to 1. SSIM: Wang et al., 2004, by torchmetrics.
    """

    def measured(self, model: nn.Module, progress: Steps) -> Measured:
        known, crop, ssim = self.known, self.crop, 0.0
        each: list[float] = []
        mean, std = (torch.tensor(values)[:, None, None] for values in (known.mean, known.std))
        if importlib.util.find_spec("torchmetrics") is None:
            self.note = "no SSIM: it needs torchmetrics (pip install 'asymswap[metrics]')"
        for output, path, place in self.outputs(model, [], progress):
            target = v2.functional.to_dtype(v2.functional.pil_to_tensor(read_picture(place, self.mode)), scale=True)
            if not isinstance(output, Tensor) or output.shape[1:] != target.shape:
                made = _shape(output[0] if isinstance(output, Tensor) else output)
                raise SourceError(f"the model makes {made} of '{path}', but its target '{place}' is {_shape(target)}")
            picture = output[0].float().cpu() * std + mean
            picture = (picture.flip(0) if known.bgr else picture).clamp(0, 1)
            if not 0 <= 2 * crop < min(target.shape[1:]):
                raise SourceError(f"`crop_border={crop}` leaves nothing of '{place}' ({_shape(target)}), or is below 0")
            if crop:
                picture, target = (one[:, crop:-crop, crop:-crop] for one in (picture, target))
            each += psnr(picture[None], target[None])
            if min(target.shape[1:]) < _SSIM_WINDOW:
                self.note = f"no SSIM: it needs targets of {_SSIM_WINDOW} x {_SSIM_WINDOW} pixels"
            if not self.note:
                from torchmetrics.functional.image import structural_similarity_index_measure

                found: Any = structural_similarity_index_measure(picture[None], target[None], data_range=1.0)
                ssim += float(found) / len(self.pairs)
        scores = (Score("PSNR", sum(each) / len(each), "dB"), Score("SSIM", ssim))
        return Measured(scores[:1] if self.note else scores, tuple(each))


def psnr(images_NCHW: Tensor, right_NCHW: Tensor) -> list[float]:
    """Return each image's PSNR in dB, of values from 0 to 1."""
    errors = (images_NCHW.double() - right_NCHW.double()).square().flatten(1).mean(1)
    return [min(-10 * math.log10(max(error, 1e-300)), _MOST_DB) for error in errors.tolist()]


class Masks(_Paired):
    """Mean IoU over the classes that occur, and pixel accuracy, of scores of every pixel, resized to the mask."""

    def measured(self, model: nn.Module, progress: Steps) -> Measured:
        counts = torch.zeros(1, 1, dtype=torch.int64)  # pixels of each class (rows) by the class that is said
        for output, _, place in self.outputs(model, [v2.Resize(list(self.known.size))], progress):
            scores = output.get("out") if isinstance(output, Mapping) else output
            if not isinstance(scores, Tensor) or scores.ndim != 4 or scores.shape[1] < 2:
                what = f"the model returns {_shape(scores)}, not scores of two classes or more for every pixel"
                form = "N x C x H x W, or a dict with them as 'out'"
                raise SourceError(f"{what} ({form}); measure it by a function of your own")
            numbers = np.asarray(read_picture(place, None))
            if numbers.ndim != 2 or numbers.dtype.kind not in "bui":
                raise SourceError(f"mask '{place}' holds colours; give one of class numbers, grey or with a palette")
            mask, classes = torch.from_numpy(numbers.astype(np.int64)), scores.shape[1]
            said = F.interpolate(scores.float().cpu(), mask.shape, mode="bilinear").argmax(1)[0]
            mask, said = mask[mask != 255], said[mask != 255]
            wrong = mask[(mask >= classes) | (mask < 0)]
            if len(wrong):
                range_ = f"{classes} classes, from 0 to {classes - 1}; 255 is ignored"
                raise SourceError(f"mask '{place}' has a class {int(wrong[0])}, but the model scores {range_}")
            counts = counts + torch.bincount(mask * classes + said, minlength=classes**2).view(classes, classes)
        if not int(counts.sum()):
            raise SourceError(f"every pixel of {self.description} is 255, which is ignored; give masks with classes")
        right = counts.diagonal()
        union = counts.sum(0) + counts.sum(1) - right
        iou = (right[union > 0].double() / union[union > 0]).mean()
        accuracy = float(right.sum() / counts.sum())
        return Measured((Score("mIoU", float(iou), "%"), Score("pixel accuracy", accuracy, "%")))


class Own(Evaluator):
    """One or several metrics of the user's."""

    def __init__(self, measure: Any) -> None:
        given = measure if isinstance(measure, list | tuple) and measure else [measure]
        self._metrics = [one if isinstance(one, Metric) else Metric(one) for one in given]
        self.description = "the data of the metric " + ", ".join(metric.name for metric in self._metrics)
        self.fingerprint = _hash([(metric.name, _source(metric.function)) for metric in self._metrics])

    def measured(self, model: nn.Module, progress: Steps) -> Measured:
        scores: dict[str, Score] = {}
        for done, metric in enumerate(self._metrics):
            progress(done, len(self._metrics))
            state = {name: one for name, one in model.state_dict().items() if isinstance(one, Tensor)}
            before = {name: one._version for name, one in state.items() if not one.is_inference()}
            who = f"the metric {metric.name}"
            with eval_mode(model):
                gave = call(who, metric.function, model)
            changed = [name for name, version in before.items() if state[name]._version != version]
            if changed:
                raise AsymswapError(f"{who} changed {changed[0]!r} of the model; let it work on a copy")
            named = isinstance(gave, Mapping) and bool(gave)
            found = gave if named else {metric.name: gave}
            for name, value in found.items():
                one = value.item() if isinstance(value, Tensor | np.ndarray) and math.prod(value.shape) == 1 else value
                if not isinstance(name, str) or not isinstance(one, Real) or not math.isfinite(one):
                    what = f"{one!s:.60}" + (f" for {name!r}" if named else "")
                    raise AsymswapError(f"{who} gave {what}; return a finite number, or some by name")
                if name in scores:
                    raise AsymswapError(f"two metrics give {name!r}; give one of them another name")
                scores[name] = Score(name, float(one), lower_is_better=name in metric.lower_is_better)
            for name in metric.lower_is_better:
                if name not in found:
                    hint = near_names(name, found) or f"; it gives {listed(list(found), 6)}"
                    raise AsymswapError(f"lower is better for {name!r}, which metric {metric.name} does not give{hint}")
        progress(len(self._metrics), len(self._metrics))
        return Measured(tuple(scores.values()))


def _source(function: Callable[..., Any]) -> str:
    """Return the text of the function's file, as far as there is one."""
    function = inspect.unwrap(function)
    with suppress(TypeError, OSError, UnicodeDecodeError):
        path = inspect.getsourcefile(function if inspect.isroutine(function) else type(function))
        return Path(path or "").read_text(encoding="utf-8")
    return ""


def read_metric(reference: str) -> Metric:
    """Return the metric that `FILE.py:function` or `package.module:function` names; the file is run.

    `LOWER_IS_BETTER`, a tuple or set of names beside it, is honoured. What it prints goes to stderr.
    """
    name = reference.rpartition(":")[2]
    if name == reference or "/" in name or name.endswith(".py"):
        raise SourceError(f"metric {reference!r}: give FILE.py:FUNCTION, or package.module:FUNCTION")
    with found_callable(reference) as function:
        beside = vars(sys.modules[function.__module__])

    @wraps(function, updated=())  # which says where its source is
    def quiet(model: nn.Module) -> Any:
        with redirect_stdout(sys.stderr):
            return function(model)

    metric = Metric(quiet, beside.get("LOWER_IS_BETTER", ()), name)
    # Names of other functions there are of other metrics.
    return Metric(quiet, [one for one in metric.lower_is_better if one == name or one not in beside], name)
