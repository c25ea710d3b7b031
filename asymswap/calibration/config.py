"""The settings of calibration: one dataclass that checks its values, and from which the command line is made."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from asymswap.errors import AsymswapError, check_choice
from asymswap.models.preprocessing import PreprocessingOptions
from asymswap.utils.distributed import ALONE, Team
from asymswap.utils.options import option

OutputKind = Literal["scores", "values"]
"""What a network gives: scores of classes (N, classes), before or after a softmax, or values of any other kind."""

_PANEL = "Calibration (no labels needed)"


# No `from __future__ import annotations` here: the command line needs the types of the fields.
@dataclass(frozen=True)
class Calibration:
    """How to calibrate.

    - `data`: a data reference; `images` of it are looked at;
    - `sequential`: solve layer by layer; None for where there are images;
    - `cache`: a file of statistics to read or, with data, to write;
    - `polish_steps` or `polish_minutes`: let the converted network learn from the original's outputs afterwards, on up
      to `polish_images` images of the same data;
    - `memory_gib`: limit for the covariances and activations that a process keeps;
    - `outputs`: `scores` of classes, or `values` (of a regressor, an embedder, a denoiser); None lets us judge;
    - `team`: several processes, each of which looks at its share of the images; all must call alike;
    - `preprocessing`: how images are prepared, where the model's weights, family or file do not say it, or say it
      wrongly.

    Raises AsymswapError for values that make no sense.
    """

    data: str | None = option(
        None,
        "Choose ranks and weights on images: any folder of them, digits, a folder of class folders, cifar10:PATH "
        "(cifar100, mnist, fashion-mnist), or a tensor file.",
        _PANEL,
    )
    images: int = option(512, "How many of them.", _PANEL)
    sequential: bool | None = option(
        None, "Solve layer by layer on what each really gets.", _PANEL, shown="where there are images"
    )
    cache: Path | None = option(
        None,
        "File of what calibration learned: read if it exists, else written.",
        _PANEL,
    )
    polish_steps: int | None = option(
        None,
        "Then learn from the original's outputs for so many steps (500) or minutes (5min).",
        _PANEL,
        text=True,
    )
    polish_minutes: float | None = None
    polish_images: int = option(5000, "On how many images, at most.", _PANEL)
    memory_gib: float = option(4.0, "Memory limit in GiB.", _PANEL)
    outputs: OutputKind | None = option(
        None,
        "What the network gives: scores (of classes) or values (of a regressor, an embedder, a denoiser).",
        _PANEL,
        metavar="KIND",
        shown="judged by them",
        text=True,
    )
    seed: int = 0
    team: Team = ALONE
    preprocessing: PreprocessingOptions | None = None

    def __post_init__(self) -> None:
        if self.data is None and self.cache is None:
            raise AsymswapError("calibration needs --calibrate DATA or an --calibration-cache file that exists")
        if self.images < 1:
            raise AsymswapError(f"--calibration-images {self.images} is no number of images; give 128 to 2048")
        if self.outputs is not None:
            check_choice("the kind of outputs", self.outputs, get_args(OutputKind))
        polish = (self.polish_steps, self.polish_minutes)
        if None not in polish or any(value is not None and value <= 0 for value in polish):
            raise AsymswapError("polish takes either a number of steps or a number of minutes, above zero")
        if self.polishes and self.data is None:
            raise AsymswapError("--polish needs images: give --calibrate DATA too")
        if self.memory_gib <= 0:
            raise AsymswapError(f"--calibration-memory {self.memory_gib:g} is no amount of memory; give GiB, such as 4")

    @property
    def polishes(self) -> bool:
        """Whether the converted network is to be polished."""
        return self.polish_steps is not None or self.polish_minutes is not None
