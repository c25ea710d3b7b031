"""What the user says about the network's input: its size, how images are resized, and how they are normalised."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from asymswap.errors import AsymswapError, near_names
from asymswap.types import Fed, Preprocessing, Size


@dataclass(frozen=True)
class Normalization:
    """(pixel - mean) / std per channel, for pixels from 0 to 1; `bgr`: the channels are blue, green, red."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    bgr: bool = False


_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)

COLOUR = {
    "imagenet": Normalization(_IMAGENET_MEAN, _IMAGENET_STD),
    "none": Normalization((0.0,) * 3, (1.0,) * 3),
    "half": Normalization((0.5,) * 3, (0.5,) * 3),
    "cifar10": Normalization(_CIFAR10_MEAN, (0.2470, 0.2435, 0.2616)),
    "cifar10-kuangliu": Normalization(_CIFAR10_MEAN, (0.2023, 0.1994, 0.2010)),
    "cifar100": Normalization((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "bytes": Normalization((0.0,) * 3, (1 / 255,) * 3),
    "caffe": Normalization((103.939 / 255, 116.779 / 255, 123.68 / 255), (1 / 255,) * 3, bgr=True),
    "imagenet-std": Normalization((0.0,) * 3, _IMAGENET_STD),
}
"""The usual normalisations of three channels, the most usual first."""

GREY = {
    "none": Normalization((0.0,), (1.0,)),
    "half": Normalization((0.5,), (0.5,)),
    "mnist": Normalization((0.1307,), (0.3081,)),
    "fashion-mnist": Normalization((0.2860,), (0.3530,)),
    "bytes": Normalization((0.0,), (1 / 255,)),
    "imagenet": Normalization((0.449,), (0.226,)),
}
"""The usual normalisations of one channel, the most usual first."""

NAMES = tuple(dict.fromkeys([*COLOUR, *GREY]))


def usual(channels: int) -> dict[str, Normalization]:
    """The usual normalisations of so many channels, the most usual first; only plain ones where not 1 or 3."""
    if channels in (1, 3):
        return GREY if channels == 1 else COLOUR
    plain = {name: (one.mean[0], one.std[0]) for name, one in GREY.items() if name in ("none", "half", "bytes")}
    return {name: Normalization((mean,) * channels, (std,) * channels) for name, (mean, std) in plain.items()}


def normalization_of(preprocessing: Preprocessing) -> Normalization:
    """How a network's preprocessing normalises."""
    return Normalization(preprocessing.mean, preprocessing.std, preprocessing.bgr)


def name_of(preprocessing: Preprocessing) -> str | None:
    """The usual name of how it normalises, if it has one."""
    own = normalization_of(preprocessing)
    for name, one in usual(preprocessing.channels).items():
        pairs = zip((*one.mean, *one.std), (*own.mean, *own.std), strict=True)
        if one.bgr == own.bgr and all(math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-9) for a, b in pairs):
            return name
    return None


def fed(preprocessing: Preprocessing, distances: Mapping[str, float] | None = None) -> Fed:
    """What images become by this preprocessing, for a report; `distances` is what the batch norms said."""
    bounds = [(pixel - m) / s for pixel in (0, 1) for m, s in zip(preprocessing.mean, preprocessing.std, strict=True)]
    return Fed(
        input=preprocessing.describe(),
        size_from=preprocessing.size_from,
        resize=preprocessing.resize,
        interpolation=preprocessing.interpolation,
        mean=preprocessing.mean,
        std=preprocessing.std,
        bgr=preprocessing.bgr,
        low=min(bounds),
        high=max(bounds),
        normalization=name_of(preprocessing),
        normalization_from=preprocessing.normalization_from,
        distances=distances or {},
    )


@dataclass(frozen=True)
class PreprocessingOptions:
    """How images are to be prepared, where that is not what the model's weights, family or file say.

    - `normalize`: a usual normalisation by its name, such as `imagenet`, `none` (pixels from 0 to 1) or `half` (from -1
      to 1);
    - `mean`, `std`: the same in numbers, for pixels from 0 to 1; one for each channel, or one for all;
    - `bgr`: channels in the order blue, green, red, as OpenCV reads them;
    - `size`: (height, width) of the network's input; `resize`: length of the shorter side before the middle is cut out
      to `size`, else the whole image is resized to `size`; `interpolation`: `bilinear`, `bicubic`, `nearest` …

    What is None stays as it is known. Raises AsymswapError where options contradict each other.
    """

    normalize: str | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    bgr: bool | None = None
    size: Size | None = None
    resize: int | None = None
    interpolation: str | None = None

    def __post_init__(self) -> None:
        if self.normalize is not None:
            if self.normalize not in NAMES:
                hint = near_names(self.normalize, NAMES) or f"; known are {', '.join(NAMES)}"
                raise AsymswapError(f"there is no --normalize {self.normalize!r}{hint}")
            for name in ("mean", "std", "bgr"):
                if getattr(self, name) is not None:
                    raise AsymswapError(f"--normalize {self.normalize} says the {name} already: leave out --{name}")
        elif (self.mean is None) != (self.std is None):
            given, missing = ("mean", "std") if self.std is None else ("std", "mean")
            raise AsymswapError(f"--{given} goes with --{missing}: give both, or --normalize with a usual name")
        for name in ("mean", "std"):
            values = getattr(self, name)
            if values is not None and not (len(values) and all(map(math.isfinite, values))):
                raise AsymswapError(f"--{name} {','.join(map(str, values))} is no list of numbers, such as 0.5,0.5,0.5")
        if self.std is not None and min(self.std) <= 0:
            raise AsymswapError(f"--std {min(self.std):g} must be above 0")
        if self.size is not None and (len(self.size) != 2 or min(self.size) < 1):
            raise AsymswapError(f"--size {'x'.join(map(str, self.size))} is not height x width, such as 224x224")
        if self.resize is not None and self.resize < 1:
            raise AsymswapError(f"--resize {self.resize} is no length in pixels, such as 256")
        if self.size is not None and self.resize is not None and self.resize < min(self.size):
            raise AsymswapError(
                f"--resize {self.resize} is shorter than what is cut out ({self.size[0]}x{self.size[1]}); give "
                f"--resize {max(self.size)} or more"
            )

    def apply(self, known: Preprocessing) -> Preprocessing:
        """What is known, with what was given; raises AsymswapError where the numbers do not suit the channels."""
        result = known
        if self.size is not None:
            if known.size_from == "given" and known.size != self.size:
                raise AsymswapError(
                    f"--input {known.describe()} and --size {self.size[0]}x{self.size[1]} contradict each other; give "
                    "one of them"
                )
            result = replace(result, size=self.size, resize=None, size_from="given")
        if self.resize is not None:
            if self.resize < min(result.size):
                raise AsymswapError(
                    f"--resize {self.resize} is shorter than the input ({known.describe()}); give --size too"
                )
            result = replace(result, resize=self.resize)
        if self.interpolation is not None:
            result = replace(result, interpolation=self.interpolation)
        if self.normalize is not None or self.mean is not None:
            result = with_normalization(result, self._normalization(known.channels), "given")
        elif self.bgr is not None:
            raise AsymswapError("--bgr goes with --mean and --std: give those too, in the order blue, green, red")
        return result

    def _normalization(self, channels: int) -> Normalization:
        if self.normalize is not None:
            found = usual(channels).get(self.normalize)
            if found is None:
                suit = ", ".join(usual(channels))
                raise AsymswapError(f"--normalize {self.normalize} is not for {channels} channels; give one of {suit}")
            return found
        assert self.mean is not None
        assert self.std is not None
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, channels):
                raise AsymswapError(
                    f"--{name} has {len(values)} numbers for {channels} channels; give one, or one for each"
                )
        mean, std = (tuple(v) * (channels if len(v) == 1 else 1) for v in (self.mean, self.std))
        return Normalization(mean, std, bool(self.bgr))


def check_needed(options: PreprocessingOptions | None, data: str | None) -> None:
    """Raise AsymswapError where it is said how images are prepared, and there are none."""
    if options is not None and data is None:
        raise AsymswapError("how images are prepared was said, but there are none: give --data, or leave it out")


def with_normalization(preprocessing: Preprocessing, how: Normalization, origin: str) -> Preprocessing:
    """The same preprocessing with another normalisation; `origin` says where that is known from."""
    return replace(preprocessing, mean=how.mean, std=how.std, bgr=how.bgr, normalization_from=origin)  # type: ignore[arg-type]


def with_size(preprocessing: Preprocessing, input_size: tuple[int, ...]) -> Preprocessing:
    """The same preprocessing to a given size: (channels, height, width), or (channels, frames, height, width)."""
    if len(input_size) != (4 if preprocessing.form == "clips" else 3) or min(input_size) < 1:
        takes = "channels x frames x height x width" if preprocessing.form == "clips" else "channels x height x width"
        raise AsymswapError(f"--input {'x'.join(map(str, input_size))} does not suit: one input is {takes}")
    channels, *frames, height, width = input_size
    resized = replace(
        preprocessing, size=(height, width), resize=None, frames=frames[0] if frames else 1, size_from="given"
    )
    return resized if channels == preprocessing.channels else with_channels(resized, channels)


def with_channels(preprocessing: Preprocessing, channels: int) -> Preprocessing:
    """The same preprocessing for another number of channels, whose normalisation is then not known any more."""
    if preprocessing.channels == channels:
        return preprocessing
    how = usual(channels)["half"]
    return with_normalization(replace(preprocessing, channels=channels), how, "assumed")


def size_warning(preprocessing: Preprocessing) -> tuple[str, ...]:
    """What to say first where nobody gave the size of the input."""
    if preprocessing.size_from != "assumed":
        return ()
    return (
        f"input {preprocessing.describe()} is assumed, and all figures follow from it: give --input to say the size",
    )
