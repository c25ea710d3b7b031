"""What models are measured by: labelled images, pairs of images, masks, or a function of the user's.

| argument | scores |
| --- | --- |
| a data reference | top-1, and top-5 of more than five classes |
| `pairs:INPUTS,TARGETS` | two folders of images, or two images: PSNR, and SSIM where torchmetrics is installed |
| `masks:IMAGES,MASKS` | images, and PNGs of class numbers (255 is ignored): mean IoU and pixel accuracy |
| a callable, or a `Metric` | what it gives for a model: a number, or numbers by name |
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import inspect
import math
import sys
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import v2

from asymswap.data.datasets import (
    PAIRED,
    PIL_MODES,
    LabelledImages,
    image_files,
    open_data,
    paired_places,
    read_picture,
    to_input,
)
from asymswap.data.predict import Predictions, check_classifier, placement, predict
from asymswap.errors import AsymswapError, SourceError, listed, near_names, reason_of
from asymswap.models.factories import found_callable
from asymswap.models.opened import OpenedModel
from asymswap.results.evaluate import Score
from asymswap.types import Preprocessing
from asymswap.utils.tensors import eval_mode, list_tensors

Steps: TypeAlias = Callable[[int, int], None]
"""Progress: the number of images done, and of all."""


@dataclass(frozen=True)
class Metric:
    """A metric of the user's: `function(model)` gives a number, or numbers by name; the first decides.

    It gets the model in eval mode. Higher is better, but for the names in `lower_is_better`; `name` is that of a single
    number, by default the function's.
    """

    function: Callable[[nn.Module], Any]
    lower_is_better: Collection[str] = ()
    name: str | None = None

    @property
    def label(self) -> str:
        own = str(getattr(self.function, "__name__", type(self.function).__name__))
        return self.name or own.replace("<lambda>", "metric")


EvaluatedBy: TypeAlias = str | Callable[[nn.Module], Any] | Metric | Sequence[Metric]
"""What `evaluate=` takes: a data reference, a function of the model, a metric, or several."""


class Evaluator:
    """Measures models: called with one, and with a function for progress, it returns its scores.

    `fingerprint` changes where the data does; `note` is for the report. Raises AsymswapError where it cannot measure.
    """

    description = ""
    inputs = ""  # the images that the model gets, as calibration describes them
    images: int | None = None
    classes: int | None = None
    fingerprint = ""
    note = ""

    def __call__(self, model: nn.Module, progress: Steps) -> tuple[Score, ...]:
        raise NotImplementedError


def evaluator_of(measure: EvaluatedBy, opened: OpenedModel, crop_border: int = 0) -> Evaluator:
    """Return what measures a model by a data reference's test part, by a function of the model, or by metrics.

    `crop_border`: pixels to leave out at each border of pairs. Raises SourceError for data that does not suit the
    model.
    """
    kind = paired_kind(measure)
    if crop_border and kind != "pairs":
        raise AsymswapError("`crop_border=…` goes with pairs:INPUTS,TARGETS; leave it out")
    if isinstance(measure, str):
        if kind == "pairs":
            return Pairs(measure, opened.preprocessing, crop_border)
        if kind == "masks":
            return Masks(measure, opened.preprocessing)
        data = open_data(measure, opened.preprocessing, "test")
        return Labelled(data, scored=check_classifier(opened.model, data))
    return Own(measure)


def paired_kind(measure: EvaluatedBy) -> str | None:
    """Return `pairs` or `masks` for a reference to such data."""
    kind = measure.partition(":")[0] if isinstance(measure, str) else None
    return kind if kind in PAIRED else None


def check_same(first: Sequence[Score], found: Sequence[Score]) -> None:
    """Raise AsymswapError where a metric gives other names for one model than for another."""
    one, other = ([score.name for score in scores] for scores in (first, found))
    if set(one) != set(other):
        raise AsymswapError(
            f"the metric gave {', '.join(one)} for the first model and {', '.join(other)} for another; give the same "
            "names for every model"
        )


class Labelled(Evaluator):
    """Top-1 and top-5 of a classifier; `scored` is the number of classes that the model scores, if it is known."""

    def __init__(self, data: LabelledImages, scored: int | None = None, **options: Any) -> None:
        self.data, self._options = data, {"strict": True, **options}
        self.description = self.inputs = data.description
        self.images, self.classes = len(data), len(data.classes)
        labels = (data.classes, [int(label) for label in data.pictures.labels])
        self.fingerprint = hashlib.sha256(repr(labels).encode()).hexdigest()
        if scored not in (None, self.classes):
            self.note = f"the model scores {scored} classes, the data has {self.classes}: do they agree?"

    def predict(self, model: nn.Module, progress: Steps) -> Predictions:
        """Return what the model says of each image."""
        return predict(model, self.data, progress=progress, **self._options)

    def __call__(self, model: nn.Module, progress: Steps) -> tuple[Score, ...]:
        return self.predict(model, progress).named


class _Paired(Evaluator):
    """Images of any size, each with a picture of what is right, which has the same stem."""

    def __init__(self, reference: str, known: Preprocessing) -> None:
        first, second = paired_places(reference)
        # Opened for what it refuses: networks that do not take single images.
        opened = open_data(reference, known, "test", unlabelled=True)
        self.known, self.inputs = opened.preprocessing, opened.description
        self.pairs = _pair(first, second)
        self.images = len(self.pairs)
        self.description = f"{paired_kind(reference)} of {first} and {second}: {self.images} images"
        names = [(path.name, path.stat().st_size) for pair in self.pairs for path in pair]
        self.fingerprint = hashlib.sha256(repr(names).encode()).hexdigest()

    def outputs(self, model: nn.Module, transform: Callable[[Any], Tensor], progress: Steps) -> Any:
        """Yield what the model returns for each image, in batches of one, and the paths of the pair."""
        device, dtype = placement(model)
        with eval_mode(model), torch.inference_mode():
            for done, (path, target) in enumerate(self.pairs, 1):
                image = transform(read_picture(path, PIL_MODES[self.known.channels]))
                try:
                    output = model(image[None].to(device, dtype))
                except Exception as error:
                    # The network's own code may raise anything for an image that it does not take.
                    size = "x".join(map(str, image.shape))
                    raise SourceError(f"the model does not run on '{path}' ({size}): {reason_of(error)}") from error
                if any(bool(tensor.isnan().any()) for tensor in list_tensors(output)):
                    raise SourceError(f"the model makes NaN of '{path}'")
                yield output, path, target
                progress(done, len(self.pairs))


def _pair(first: Path, second: Path) -> list[tuple[Path, Path]]:
    """Return the paths of two folders' images (or two images') in pairs of the same stem."""
    if first.is_file() and second.is_file():
        return [(first, second)]
    stems: list[dict[str, Path]] = []
    for folder in (first, second):
        found: dict[str, Path] = {}
        for path in image_files(folder):
            if path.stem in found:
                raise SourceError(f"'{found[path.stem]}' and '{path}' have one stem, which pairs them with the same")
            found[path.stem] = path
        stems.append(found)
    for one, other, folder in ((stems[0], stems[1], second), (stems[1], stems[0], first)):
        alone = [path for stem, path in one.items() if stem not in other]
        if alone:
            others = f" (and so have {len(alone) - 1} more)" if len(alone) > 1 else ""
            raise SourceError(
                f"'{alone[0]}' has no partner of the same stem in {folder}{others}; images are paired by their stems"
            )
    return [(path, stems[1][stem]) for stem, path in stems[0].items()]


_SSIM_WINDOW = 11
_MOST_DB = 100.0
"""PSNR of an image without any error, which would be infinite."""


class Pairs(_Paired):
    """PSNR and SSIM of a network from images to images, on values from 0 to 1; each image at its own size.

    The output is taken to be normalised as the input is, and is clamped to 0 to 1. SSIM: Wang et al., 2004, by
    torchmetrics.
    """

    def __init__(self, reference: str, known: Preprocessing, crop_border: int = 0) -> None:
        super().__init__(reference, known)
        self._crop = crop_border
        if crop_border < 0:
            raise AsymswapError(f"`crop_border={crop_border}` is no number of pixels; give 0 or more")
        self.description += ", each at its own size"
        if crop_border:
            self.description += f", without {crop_border} pixels at each border"
            self.fingerprint += f" {crop_border}"
        smallest = min(min(_size(target)) for _, target in self.pairs) - 2 * crop_border
        if smallest < 1:
            raise SourceError(f"`crop_border={crop_border}` leaves nothing of the smallest target; give less")
        self._ssim = smallest >= _SSIM_WINDOW
        if not self._ssim:
            self.note = f"no SSIM: it needs targets of {_SSIM_WINDOW} x {_SSIM_WINDOW} pixels"
        elif importlib.util.find_spec("torchmetrics") is None:
            self._ssim, self.note = False, "no SSIM: it needs torchmetrics (pip install 'asymswap[metrics]')"

    def __call__(self, model: nn.Module, progress: Steps) -> tuple[Score, ...]:
        known, crop = self.known, self._crop
        mean, std = (torch.tensor(values)[:, None, None] for values in (known.mean, known.std))
        psnr, ssim = [], []
        as_fractions = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.ToPureTensor()])
        for output, path, place in self.outputs(model, v2.Compose(to_input(known)), progress):
            target = as_fractions(read_picture(place, PIL_MODES[known.channels]))
            if not isinstance(output, Tensor) or output.shape[1:] != target.shape:
                made = "x".join(map(str, output.shape[1:])) if isinstance(output, Tensor) else type(output).__name__
                size = "x".join(map(str, target.shape))
                raise SourceError(f"the model makes {made} of '{path}', but its target '{place}' is {size}")
            picture = output[0].float().cpu() * std + mean
            picture = (picture.flip(0) if known.bgr else picture).clamp(0, 1)
            if crop:
                picture, target = (one[:, crop:-crop, crop:-crop] for one in (picture, target))
            error = float((picture.double() - target.double()).square().mean())
            psnr.append(min(-10 * math.log10(max(error, 1e-300)), _MOST_DB))
            if self._ssim:
                from torchmetrics.functional.image import structural_similarity_index_measure

                found: Any = structural_similarity_index_measure(picture[None], target[None], data_range=1.0)
                ssim.append(float(found))
        scores = (Score("PSNR", sum(psnr) / len(psnr), "dB"),)
        return (*scores, Score("SSIM", sum(ssim) / len(ssim))) if ssim else scores


def _size(path: Path) -> tuple[int, int]:
    try:
        with Image.open(path) as image:
            return image.size
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise SourceError(f"image '{path}' cannot be read ({error}); remove or replace it") from error


class Masks(_Paired):
    """Mean IoU over the classes that occur, and pixel accuracy, of a network that scores every pixel's class.

    Images are resized to the network's input, its scores to the mask (bilinear).
    """

    def __call__(self, model: nn.Module, progress: Steps) -> tuple[Score, ...]:
        resized = v2.Compose([v2.Resize(list(self.known.size)), *to_input(self.known)])
        counts = torch.zeros(0, 0, dtype=torch.int64)  # pixels of each class (rows) by the class that is said
        for output, _, place in self.outputs(model, resized, progress):
            scores = output.get("out") if isinstance(output, Mapping) else output
            if not isinstance(scores, Tensor) or scores.ndim != 4 or scores.shape[1] < 2:
                shape = tuple(scores.shape) if isinstance(scores, Tensor) else type(output).__name__
                raise SourceError(
                    f"the model returns {shape}, not scores of two classes or more for every pixel (N x C x H x W, or "
                    "a dict with them as 'out'); measure it by a function of your own"
                )
            mask = _mask(place)
            classes = scores.shape[1]
            if not len(counts):
                counts = torch.zeros(classes, classes, dtype=torch.int64)
            said = F.interpolate(scores.float().cpu(), mask.shape, mode="bilinear").argmax(1)[0]
            kept = mask != 255
            wrong = mask[kept & ((mask >= classes) | (mask < 0))]
            if len(wrong):
                raise SourceError(
                    f"mask '{place}' has a class {int(wrong[0])}, but the model scores {classes} classes, from 0 to "
                    f"{classes - 1}; 255 is ignored"
                )
            counts += torch.bincount(mask[kept] * classes + said[kept], minlength=classes**2).view(classes, classes)
        if not int(counts.sum()):
            raise SourceError(f"every pixel of {self.description} is 255, which is ignored; give masks with classes")
        right = counts.diagonal()
        union = counts.sum(0) + counts.sum(1) - right
        iou = (right[union > 0].double() / union[union > 0]).mean()
        return Score("mIoU", float(iou), "%"), Score("pixel accuracy", float(right.sum() / counts.sum()), "%")


def _mask(path: Path) -> Tensor:
    """Return the class number of every pixel (H x W)."""
    try:
        with Image.open(path) as image:
            numbers = np.asarray(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise SourceError(f"mask '{path}' cannot be read ({error}); remove or replace it") from error
    if numbers.ndim != 2 or numbers.dtype.kind not in "bui":
        raise SourceError(f"mask '{path}' is a picture in colour; give one of class numbers, grey or with a palette")
    return torch.from_numpy(numbers.astype(np.int64))


class Own(Evaluator):
    """One or several metrics of the user's."""

    def __init__(self, measure: object) -> None:
        given = [*measure] if isinstance(measure, list | tuple) else [measure]
        self._metrics = [one if isinstance(one, Metric) else Metric(one) for one in given]  # type: ignore[arg-type]
        wrong = [type(one.function).__name__ for one in self._metrics if not callable(one.function)]
        if wrong or not given:
            raise AsymswapError(
                "what to measure by is a data reference, a function of the model or asymswap.Metric, not "
                f"{wrong[0] if wrong else 'nothing'}"
            )
        self.description = "the data of the metric " + ", ".join(metric.label for metric in self._metrics)
        self.fingerprint = hashlib.sha256("".join(map(_source, self._metrics)).encode()).hexdigest()

    def __call__(self, model: nn.Module, progress: Steps) -> tuple[Score, ...]:
        scores: dict[str, Score] = {}
        for done, metric in enumerate(self._metrics):
            progress(done, len(self._metrics))
            found = _numbers(metric, _measured(metric, model))
            lower = [metric.lower_is_better] if isinstance(metric.lower_is_better, str) else metric.lower_is_better
            for name in lower:
                if name not in found:
                    hint = near_names(name, found) or f"; it gives {listed(list(found), 6)}"
                    raise AsymswapError(
                        f"lower is better for {name!r}, which the metric {metric.label} does not give{hint}"
                    )
            for name, value in found.items():
                if name in scores:
                    raise AsymswapError(f"two metrics give {name!r}; give one of them another name")
                scores[name] = Score(name, value, lower_is_better=name in lower)
        progress(len(self._metrics), len(self._metrics))
        return tuple(scores.values())


def _source(metric: Metric) -> str:
    """Return the metric's name and the text of its file, as far as there is one."""
    function = inspect.unwrap(metric.function)
    with contextlib.suppress(TypeError, OSError, UnicodeDecodeError):
        path = inspect.getsourcefile(function if inspect.isroutine(function) else type(function))
        return metric.label + Path(path or "").read_text(encoding="utf-8")
    return metric.label


def _measured(metric: Metric, model: nn.Module) -> Any:
    """Call a metric with a model in eval mode; raise AsymswapError where it fails, or changes the model's weights."""
    state = {name: tensor for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}
    before = {name: tensor._version for name, tensor in state.items() if not tensor.is_inference()}
    try:
        with eval_mode(model):
            found = metric.function(model)
    except (Exception, SystemExit) as error:
        ours = str(Path(__file__).parents[1])
        frames = [one for one in traceback.extract_tb(error.__traceback__) if not one.filename.startswith(ours)]
        # The last line of the metric's own file, not one deep in torch.
        own = [one for one in frames if one.filename == frames[0].filename]
        place = f" at {own[-1].filename}:{own[-1].lineno}" if own else ""
        raise AsymswapError(
            f"the metric {metric.label} failed{place}: {type(error).__name__}: {reason_of(error, 300)}"
        ) from error
    changed = [name for name, version in before.items() if state[name]._version != version]
    if changed:
        raise AsymswapError(
            f"the metric {metric.label} changed {changed[0]!r} of the model; let it work on a copy, in eval mode"
        )
    return found


def _numbers(metric: Metric, found: Any) -> dict[str, float]:
    """Return what a metric gave as finite numbers by name; raise AsymswapError for anything else."""
    named = found if isinstance(found, Mapping) else {metric.label: found}
    numbers = {}
    for name, value in named.items():
        one = value.item() if isinstance(value, Tensor | np.ndarray) and math.prod(value.shape) == 1 else value
        if not isinstance(name, str) or not isinstance(one, Real) or not math.isfinite(one):
            of = f" for {name!r}" if isinstance(found, Mapping) else ""
            raise AsymswapError(
                f"the metric {metric.label} gave {str(one)[:60]}{of}; return a finite number, or such numbers by name"
            )
        numbers[name] = float(one)
    if not numbers:
        raise AsymswapError(f"the metric {metric.label} gave an empty dict; return a number, or numbers by name")
    return numbers


def read_metric(reference: str) -> Metric:
    """Return the metric that `FILE.py:function` or `package.module:function` names; the file is run.

    `LOWER_IS_BETTER`, a tuple or set of names beside it, is honoured. What it prints goes to stderr, since stdout is
    the report's. Raises SourceError where there is no such function.
    """
    home, _, name = reference.rpartition(":")
    if not home or not name or "/" in name:
        raise SourceError(f"metric {reference!r}: give FILE.py:FUNCTION, or package.module:FUNCTION")
    with found_callable(reference) as function:
        module = sys.modules.get(getattr(function, "__module__", ""))
    beside = vars(module) if module is not None else {}
    lower = beside.get("LOWER_IS_BETTER", ())
    if not isinstance(lower, str | tuple | list | set | frozenset) or not all(isinstance(one, str) for one in lower):
        raise SourceError(f"LOWER_IS_BETTER of {home} is no tuple or set of names")

    def quiet(model: nn.Module) -> Any:
        with contextlib.redirect_stdout(sys.stderr):
            return function(model)

    # Names of other functions there are of other metrics.
    names = [one for one in ([lower] if isinstance(lower, str) else lower) if one == name or one not in beside]
    quiet.__wrapped__ = function  # type: ignore[attr-defined]  # where its source is
    return Metric(quiet, tuple(names), name)
