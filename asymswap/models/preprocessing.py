"""How the user wants images prepared: the size of the input, how images are resized, and how they are normalised."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from asymswap.errors import AsymswapError, check_choice
from asymswap.types import Fed, Preprocessing, Size


@dataclass(frozen=True)
class Normalization:
    """(pixel - mean) / std per channel, for pixels from 0 to 1; `bgr`: the channels are blue, green, red."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    bgr: bool = False


IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)

# The usual normalisations of three channels and of one, the most usual first.
COLOUR = {
    "imagenet": Normalization(IMAGENET_MEAN, IMAGENET_STD),
    "none": Normalization((0.0,) * 3, (1.0,) * 3),
    "half": Normalization((0.5,) * 3, (0.5,) * 3),
    "cifar10": Normalization(_CIFAR10_MEAN, (0.2470, 0.2435, 0.2616)),
    "cifar10-kuangliu": Normalization(_CIFAR10_MEAN, (0.2023, 0.1994, 0.2010)),
    "cifar100": Normalization((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "bytes": Normalization((0.0,) * 3, (1 / 255,) * 3),
    "caffe": Normalization((103.939 / 255, 116.779 / 255, 123.68 / 255), (1 / 255,) * 3, bgr=True),
    "imagenet-std": Normalization((0.0,) * 3, IMAGENET_STD),
}
GREY = {
    "none": Normalization((0.0,), (1.0,)),
    "half": Normalization((0.5,), (0.5,)),
    "mnist": Normalization((0.1307,), (0.3081,)),
    "fashion-mnist": Normalization((0.2860,), (0.3530,)),
    "bytes": Normalization((0.0,), (1 / 255,)),
    "imagenet": Normalization((0.449,), (0.226,)),
}


def usual(channels: int) -> dict[str, Normalization]:
    """Return the usual normalisations for a number of channels, the most usual first; few for other than 1 or 3."""
    if channels in (1, 3):
        return GREY if channels == 1 else COLOUR
    plain = {name: GREY[name] for name in ("none", "half", "bytes")}
    return {name: Normalization(one.mean * channels, one.std * channels) for name, one in plain.items()}


def name_of(preprocessing: Preprocessing) -> str | None:
    """Return the usual name of a network's normalisation, if it has one."""
    own = (*preprocessing.mean, *preprocessing.std)
    for name, one in usual(preprocessing.channels).items():
        pairs = zip((*one.mean, *one.std), own, strict=True)
        if one.bgr == preprocessing.bgr and all(math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-9) for a, b in pairs):
            return name
    return None


def fed(preprocessing: Preprocessing) -> Fed:
    """Describe for a report what the network gets, but for what the batch norms say of it."""
    bounds = [(pixel - m) / s for pixel in (0, 1) for m, s in zip(preprocessing.mean, preprocessing.std, strict=True)]
    same = ("size_from", "resize", "interpolation", "mean", "std", "bgr", "normalization_from")
    return Fed(
        input=preprocessing.describe(),
        low=min(bounds),
        high=max(bounds),
        normalization=name_of(preprocessing),
        **{name: getattr(preprocessing, name) for name in same},
    )


@dataclass(frozen=True)
class PreprocessingOptions:
    """How to prepare images, where that differs from what the model's weights, family or file say.

    - `normalize`: a usual normalisation by its name, such as `imagenet`, `none` (pixels from 0 to 1) or `half` (from -1
      to 1);
    - `mean`, `std`: the same in numbers, for pixels from 0 to 1; one for each channel, or one for all;
    - `bgr`: channels in the order blue, green, red, as OpenCV reads them;
    - `size`: (height, width) of the network's input; `resize`: length of the shorter side before the middle is cut out
      to `size`, else the whole image is resized to `size`; `interpolation`: `bilinear`, `bicubic`, `nearest` …

    None leaves a setting as it is known. Raises AsymswapError where options contradict each other.
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
            check_choice("`normalize=…`", self.normalize, COLOUR | GREY)
            for name in ("mean", "std", "bgr"):
                if getattr(self, name) is not None:
                    raise AsymswapError(f'`normalize="{self.normalize}"` says the {name} already: leave out `{name}=…`')
        elif (self.mean is None) != (self.std is None) or (self.mean is None and self.bgr is not None):
            raise AsymswapError("`mean=…` and `std=…` go together, `bgr=…` with both; `normalize=…` names all three")
        for name in ("mean", "std"):
            values = getattr(self, name)
            if values is not None and not (len(values) and all(map(math.isfinite, values))):
                raise AsymswapError(f"`{name}={','.join(map(str, values))}` is no list of numbers, such as 0.5,0.5,0.5")
        if self.std is not None and min(self.std) <= 0:
            raise AsymswapError(f"`std={min(self.std):g}` must be above 0")
        if self.size is not None and (len(self.size) != 2 or min(self.size) < 1):
            raise AsymswapError(f"`size={_by(self.size)}` is not height x width, such as 224x224")

    def apply(self, known: Preprocessing) -> Preprocessing:
        """Return the known preprocessing with these settings; raise AsymswapError where they do not suit it."""
        result = known
        if self.size is not None:
            if known.size_from == "given" and known.size != self.size:
                both = f"`input_size={known.describe()}` and `size={_by(self.size)}`"
                raise AsymswapError(f"{both} contradict each other; give one of them")
            result = replace(result, size=self.size, resize=None, size_from="given")
        if self.resize is not None:
            if self.resize < min(result.size):
                what = f"`resize={self.resize}` is shorter than what is cut out ({_by(result.size)})"
                raise AsymswapError(f"{what}; give `resize={max(result.size)}` or more, or a smaller `size=…`")
            result = replace(result, resize=self.resize)
        if self.interpolation is not None:
            result = replace(result, interpolation=self.interpolation)
        channels, suitable = known.channels, usual(known.channels)
        if self.normalize is not None:
            if self.normalize not in suitable:
                what = f'`normalize="{self.normalize}"` is not for {channels} channels'
                raise AsymswapError(f"{what}; give one of {', '.join(suitable)}")
            return with_normalization(result, suitable[self.normalize], "given")
        if self.mean is None or self.std is None:
            return result
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, channels):
                what = f"`{name}=…` has {len(values)} numbers for {channels} channels"
                raise AsymswapError(f"{what}; give one, or one for each")
        mean, std = (tuple(values) * (channels // len(values)) for values in (self.mean, self.std))
        return with_normalization(result, Normalization(mean, std, bool(self.bgr)), "given")


def _by(sizes: Sequence[int]) -> str:
    return "x".join(map(str, sizes))


def with_normalization(preprocessing: Preprocessing, how: Normalization, origin: str) -> Preprocessing:
    """Return the preprocessing with another normalisation; `origin` says how that is known."""
    return replace(preprocessing, mean=how.mean, std=how.std, bgr=how.bgr, normalization_from=origin)  # type: ignore[arg-type]


def with_size(preprocessing: Preprocessing, input_size: tuple[int, ...]) -> Preprocessing:
    """Return the preprocessing for a given size: (channels, height, width), or (channels, frames, height, width)."""
    clips = preprocessing.form == "clips"
    if len(input_size) != 3 + clips or min(input_size) < 1:
        takes = f"channels x {'frames x ' if clips else ''}height x width"
        raise AsymswapError(f"`input_size={_by(input_size)}` does not suit: one input is {takes}")
    channels, *frames, height, width = input_size
    resized = replace(preprocessing, size=(height, width), resize=None, size_from="given")
    return with_channels(replace(resized, frames=frames[0] if frames else 1), channels)


def with_channels(preprocessing: Preprocessing, channels: int) -> Preprocessing:
    """Return the preprocessing for another number of channels, whose normalisation is then only assumed."""
    if preprocessing.channels == channels:
        return preprocessing
    return with_normalization(replace(preprocessing, channels=channels), usual(channels)["half"], "assumed")


def size_warning(preprocessing: Preprocessing) -> tuple[str, ...]:
    """Warn where nobody gave the size of the input."""
    what = f"input {preprocessing.describe()} is assumed, and all figures follow from it"
    return (f"{what}: give `input_size=…` to say the size",) if preprocessing.size_from == "assumed" else ()
