"""The settings of calibration: one dataclass that checks its values, and from which the command line is made."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from asymswap.errors import AsymswapError, check_choice
from asymswap.models.preprocessing import PreprocessingOptions
from asymswap.utils.distributed import ALONE, Team
from asymswap.utils.options import option

OutputKind = Literal["scores", "values"]
"""The outputs of a network: class scores (N, classes), before or after a softmax, or values of any other kind."""

_PANEL = "Calibration (no labels needed)"


# No `from __future__ import annotations` here: the command line needs the types of the fields.
@dataclass(frozen=True)
class Calibration:
    """How to calibrate; the help text of each option is beside it. Raises AsymswapError for values that make no sense.

    - `sequential`, `outputs`: None means layer by layer if there are images, and judged by the outputs themselves;
    - `team`: several processes, each with its share of the images; all must call alike;
    - `preprocessing`: how images are prepared, if the model's weights, family or file do not say so correctly.
    """

    data: Any = option(
        None,
        "Choose ranks and weights on images: any folder of them, digits, a folder of class folders, cifar10:PATH "
        "(cifar100, mnist, fashion-mnist), or a tensor file.",
        _PANEL,
        text=True,
    )
    images: int = option(512, "Number of images.", _PANEL)
    sequential: bool | None = option(
        None, "Solve layer by layer, each on the input that it really gets.", _PANEL, shown="where there are images"
    )
    cache: Path | None = option(None, "File of calibration statistics: read if it exists, else written.", _PANEL)
    polish_steps: int | None = option(
        None,
        "Then train on the original's outputs, for a number of steps (500) or minutes (5min).",
        _PANEL,
        text=True,
    )
    polish_minutes: float | None = None
    polish_images: int = option(5000, "Number of images to polish on, at most.", _PANEL)
    memory_gib: float = option(4.0, "Memory limit in GiB.", _PANEL)
    outputs: OutputKind | None = option(
        None,
        "Kind of the network's outputs: class scores, or values (of a regressor, an embedder, a denoiser).",
        _PANEL,
        metavar="KIND",
        shown="judged by them",
        text=True,
    )
    seed: int = 0
    team: Team = ALONE
    preprocessing: PreprocessingOptions | None = None
    inputs: Callable[[Any], Any] | None = None

    def __post_init__(self) -> None:
        if self.data is None and self.cache is None:
            raise AsymswapError("calibration needs images, `data=…`, or a file of statistics, `cache=…`")
        if self.images < 1:
            raise AsymswapError(f"`images={self.images}` is no number of images; give 128 to 2048")
        if self.outputs is not None:
            check_choice("the kind of outputs", self.outputs, get_args(OutputKind))
        polish = (self.polish_steps, self.polish_minutes)
        if None not in polish or any(value is not None and value <= 0 for value in polish):
            raise AsymswapError("polish takes either a number of steps or a number of minutes, above zero")
        if self.polishes and self.data is None:
            raise AsymswapError("polish needs images: give `data=…` too")
        if self.memory_gib <= 0:
            raise AsymswapError(f"`memory_gib={self.memory_gib:g}` is no amount of memory; give GiB, such as 4")

    @property
    def polishes(self) -> bool:
        """True if the converted network is to be polished."""
        return self.polish_steps is not None or self.polish_minutes is not None
