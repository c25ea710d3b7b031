"""The records that all parts share, of numbers and text; sizes are (height, width), in pixels or in a kernel's taps."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

Size = tuple[int, int]


class Shown:
    """A result that shows itself: `str` is what the command line prints, `repr` one line; a notebook gets HTML.

    `view` names the function of `asymswap.reporting` that draws it; without one, the result's `report` is shown.
    """

    _view = ""

    def __init_subclass__(cls, view: str = "") -> None:
        # A dataclass leaves a method alone that the class itself has.
        cls._view, cls.__repr__ = view, Shown.__repr__  # type: ignore[method-assign]

    def _as(self, form: str) -> str:
        return str(getattr(importlib.import_module("asymswap.reporting.tables"), form)(self))

    def __str__(self) -> str:
        return self._as("to_text")

    def __repr__(self) -> str:
        return self._as("to_line")

    def _repr_html_(self) -> str:
        return self._as("to_fragment")


MACS = (
    "One MAC is one multiply-add of a convolution, a linear layer or a matrix product, in one forward pass in eval "
    "mode on one input (batch 1); FLOPs are 2 x MACs. Additions of biases, normalisation, activations, pooling and "
    "interpolation of feature maps are not counted. A deformable convolution also samples between pixels: 4 MACs for "
    "each sample (every channel of the input at every tap of every pixel of the output), 5 where a mask scales it."
)


class Strict:
    """A record read from files: pydantic takes no unknown keys, and guesses no numbers from text."""

    __pydantic_config__: ClassVar = {"extra": "forbid", "strict": True}


@dataclass(frozen=True)
class Cost:
    """The cost of a layer or a model: multiply-adds of one forward pass, and parameters."""

    derived: ClassVar = ("flops",)

    macs: int
    params: int

    @property
    def flops(self) -> int:
        return 2 * self.macs

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.macs + other.macs, self.params + other.params)

    def __sub__(self, other: Cost) -> Cost:
        return Cost(self.macs - other.macs, self.params - other.params)


@dataclass(frozen=True)
class ConvSpec:
    """Every field of one `nn.Conv2d`; `padding` is per axis, or the text `"same"` or `"valid"`."""

    in_channels: int
    out_channels: int
    kernel: Size
    stride: Size = (1, 1)
    padding: Size | str = (0, 0)
    dilation: Size = (1, 1)
    groups: int = 1
    bias: bool = True
    padding_mode: str = "zeros"
    dtype: str = "float32"

    @property
    def group_in(self) -> int:
        return self.in_channels // self.groups

    @property
    def group_out(self) -> int:
        return self.out_channels // self.groups

    @property
    def grouping(self) -> str:
        """`dense` (one group), `depthwise` (one input channel a group) or `grouped`."""
        return "dense" if self.groups == 1 else "depthwise" if self.group_in == 1 else "grouped"

    @property
    def pads(self) -> tuple[int, int, int, int]:
        """Pixels padded left, right, above and below; `"same"` may have one more right and below."""
        if self.padding == "same":
            sums = [dilation * (taps - 1) for dilation, taps in zip(self.dilation, self.kernel, strict=True)]
            (top, bottom), (left, right) = ((whole // 2, whole - whole // 2) for whole in sums)
            return left, right, top, bottom
        height, width = (0, 0) if isinstance(self.padding, str) else self.padding
        return width, width, height, height

    @property
    def params(self) -> int:
        return self.macs_per_pixel() + self.out_channels * self.bias

    def macs_per_pixel(self) -> int:
        """Return the multiply-adds for one pixel of the output feature map."""
        return self.out_channels * self.group_in * math.prod(self.kernel)

    def output(self, input: Size) -> Size:
        """Return the size of the output feature map for an input of this size."""
        left, right, top, bottom = self.pads
        padded = input[0] + top + bottom, input[1] + left + right
        axes = zip(padded, self.kernel, self.stride, self.dilation, strict=True)
        height, width = ((size - dilation * (taps - 1) - 1) // step + 1 for size, taps, step, dilation in axes)
        return height, width

    def describe(self) -> str:
        """Return the conv in one short phrase, defaults left out: `64->128 3x3 s2 d2 g4`."""
        parts = [f"{self.in_channels}->{self.out_channels}", "x".join(map(str, self.kernel))]
        for letter, pair in (("s", self.stride), ("d", self.dilation)):
            if pair != (1, 1):
                parts.append(letter + (str(pair[0]) if pair[0] == pair[1] else "x".join(map(str, pair))))
        if self.groups > 1:
            parts.append("dw" if self.grouping == "depthwise" else f"g{self.groups}")
        return " ".join(parts)


@dataclass(frozen=True)
class Call:
    """One run of a conv in a forward pass."""

    input: Size  # of the feature map, as is the output
    output: Size
    batch: int = 1
    batched: bool = True  # False: one image without a batch dimension

    @classmethod
    def of(cls, input: Sequence[int], output: Sequence[int]) -> Call:
        """Return the call with these shapes of input and output."""
        batched = len(input) == 4
        return cls((input[-2], input[-1]), (output[-2], output[-1]), input[0] if batched else 1, batched)


@dataclass(frozen=True)
class Neighbour:
    """A node beside a conv in the fx graph."""

    op: str  # canonical: `batch_norm`, `relu`, `add`, `concat`, `conv`, `input` …
    name: str  # the module's or node's own
    direct: bool = True  # False: a batch norm is between the conv and this node
    alone: bool = False  # True: the module is known to run once in a forward pass, on the output of this conv


def norm_behind(after: Sequence[Neighbour]) -> str | None:
    """Return the batch norm that is the only reader of a conv and reads nothing else, given what follows the conv."""
    direct = [neighbour for neighbour in after if neighbour.direct]
    alone = len(direct) == 1 and direct[0].op == "batch_norm" and direct[0].alone
    return direct[0].name if alone else None


@dataclass(frozen=True)
class Site:
    """One `nn.Conv2d` in its place in a model."""

    name: str
    conv: ConvSpec
    calls: tuple[Call, ...]
    aliases: tuple[str, ...] = ()  # further names of the same module
    before: tuple[Neighbour, ...] | None = None  # None, as `after`, if torch.fx could not trace the model
    after: tuple[Neighbour, ...] | None = None
    refusal: str | None = None  # why no kind may replace it

    @property
    def cost(self) -> Cost:
        """MACs summed over all calls of a forward pass, and parameters counted once."""
        pixels = sum(math.prod(call.output) * call.batch for call in self.calls)
        return Cost(self.conv.macs_per_pixel() * pixels, self.conv.params)

    @property
    def norm_behind(self) -> str | None:
        return norm_behind(self.after or ())

    @property
    def feature_map(self) -> Size | None:
        """The size of the first call's input; None if the conv is never called."""
        return self.calls[0].input if self.calls else None


@dataclass(frozen=True)
class Swap(Strict):
    """A site to be replaced: by which kind, with which resolved settings, and why."""

    site: str
    kind: str
    settings: Mapping[str, Any]
    reason: str = ""
    predicted: float | None = None  # expected relative error: of the kernel, or with calibration of the output
    absorbs: str | None = None  # the batch norm that the replacement takes over, and that becomes an identity


@dataclass(frozen=True)
class Keep(Strict):
    """A site that stays as it is, and why."""

    site: str
    reason: str = ""


@dataclass(frozen=True)
class Plan(Strict, Shown, view="screens.plan_view"):
    """The decision for every site of a model: data that can be written, edited and replayed."""

    swaps: tuple[Swap, ...]
    keeps: tuple[Keep, ...] = ()
    multiplier: float | None = None


InputForm = Literal["images", "image-list", "image-pair", "clips"]
"""What a forward takes: N x C x H x W, a list of C x H x W, two times N x C x H x W, or N x C x frames x H x W."""

KnownFrom = Literal["given", "weights", "family", "file", "images", "asked", "assumed"]
"""Who says how images are prepared: `given` by the user, `asked` of the batch norms, `assumed` where nobody says it."""


@dataclass(frozen=True)
class Preprocessing(Strict):
    """How an image becomes the network's input: resized, cropped to `size`, scaled to [0, 1], normalised."""

    channels: int
    size: Size
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: int | None = None  # length of the shorter side before the crop; None: resized to `size` at once
    interpolation: str = "bilinear"
    form: InputForm = "images"
    frames: int = 1  # images in a clip
    bgr: bool = False  # channels, also of `mean` and `std`, are blue, green, red
    normalization_from: KnownFrom = "file"
    size_from: KnownFrom = "file"

    def describe(self) -> str:
        """Return the size of one input: `3x224x224`, `3x16x112x112` for a clip."""
        frames = (self.frames,) if self.form == "clips" else ()
        return "x".join(map(str, (self.channels, *frames, *self.size)))


@dataclass(frozen=True)
class Fed:
    """How images were prepared for a network, and who said so."""

    input: str
    size_from: KnownFrom
    resize: int | None
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    bgr: bool
    low: float  # what a black pixel becomes
    high: float  # what a white pixel becomes
    normalization: str | None  # the usual name of mean and std
    normalization_from: KnownFrom
    # How far the images' statistics under each normalisation are from those in the network's first batch norms, 0 to 1.
    distances: Mapping[str, float] = field(default_factory=dict)
    own_size: bool = False  # images are not resized


@dataclass(frozen=True)
class Option:
    """One way to swap a site that a budget may choose."""

    kind: str
    settings: Mapping[str, Any]  # resolved
    cost: Cost
    error: float  # squared, relative to the layer's energy, 0 to 1: of the kernel, or with statistics of the output
    loss: float  # what a budget minimises, comparable between sites


@dataclass(frozen=True)
class Origin(Strict):
    """How to build the unconverted model again."""

    reference: str  # a model reference; `skeleton:CLASS`: the structure is stored, `class:CLASS`: the user's own code
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Seconds:
    """The time of one forward pass, over all passes."""

    minimum: float
    median: float
    spread: float  # distance between the quartiles of the rounds' fastest passes over their median


@dataclass(frozen=True)
class Ratio:
    """The time of one model over another's: the median over the rounds of the ratio within a round."""

    value: float
    low: float  # with `high`, the interval of the true median
    high: float
    confidence: float = 0.95  # less if the rounds were too few

    @property
    def is_significant(self) -> bool:
        """True if the interval excludes 1 and the difference is at least 2 %."""
        # Two copies of one model may differ by that much in one process, depending on their addresses in memory.
        return not self.low <= 1 <= self.high and abs(self.value - 1) >= 0.02

    @property
    def is_noisy(self) -> bool:
        """True if the interval is wider than 5 % to each side."""
        return self.high - self.low > 2 * 0.05 * self.value


Progress = Callable[[str, int, int], None]
"""Called with the name of a stage, the steps done and the total number of steps."""


def silent(stage: str, done: int, total: int) -> None:
    """The `Progress` that shows nothing."""


@dataclass(frozen=True)
class RankCost:
    """The cost of a pair of some rank at a site; of a separable one also its order."""

    rank: int
    order: str | None
    cost: Cost


@dataclass(frozen=True)
class Candidate:
    """A site with what a pair could save there, or the reason why it is no candidate."""

    site: Site
    reason: str | None = None
    break_even: RankCost | None = None  # the largest rank that still saves something
    half: RankCost | None = None  # half of that rank
    kind: str = "separable"  # for 1x1 convs `low-rank`, or what the recipe asks for
    becomes: Cost | None = None  # the cost of another kind, if it is known without the weights


@dataclass(frozen=True)
class Patches:
    """Square patches of this side in place of whole images, `count` in all, with noise for a denoiser."""

    size: int | None = None
    count: int | None = None
    noise: float = 0.0  # standard deviation of what is added to pixels from 0 to 1

    def __str__(self) -> str:
        cut = "" if self.size is None else f", patches of {self.size}x{self.size}"
        return cut + (f", noise of {self.noise:.3g} added" if self.noise else "")


@dataclass(frozen=True)
class UserData:
    """What a user gives as data: anything that `open_inputs` takes, and how a batch becomes arguments."""

    data: Any
    inputs: Callable[[Any], Any] | None = None
    patches: Patches = Patches()
    held_back: int = 0  # samples, or patches, to hold back; 0 leaves it to `open_inputs`

    @property
    def reference(self) -> str | None:
        """The text of a data reference; None for other data."""
        return str(self.data) if isinstance(self.data, str | Path) else None
