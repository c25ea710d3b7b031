"""The settings of calibration: one dataclass that checks its values, and from which the command line is made."""

import copy
import itertools
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from asymswap.errors import AsymswapError, check_choice
from asymswap.models.preprocessing import PreprocessingOptions
from asymswap.types import Patches, UserData
from asymswap.utils.distributed import ALONE, Team
from asymswap.utils.options import option

OutputKind = Literal["scores", "values"]
"""The outputs of a network: class scores (N, classes), before or after a softmax, or values of any other kind."""

_PANEL = "Calibration (no labels needed)"


# No `from __future__ import annotations` here: the command line needs the types of the fields.
@dataclass(frozen=True)
class Calibration:
    """How to calibrate; the help text of each option is beside it. Raises AsymswapError for values that make no sense.

    - `data`: a data reference, a tensor (its rows are samples), a Dataset, a DataLoader, any iterable of batches, or a
      function that returns one. It is read several times; of a generator, what was read is kept;
    - `inputs`: turns a batch into the forward's argument, a tuple of them, or a dict by name; without it a tensor is
      the argument, of a sequence such as (inputs, labels) the first, and of a dict what the forward has a name for;
    - `sequential`, `outputs`: None means layer by layer if there are images, and judged by the outputs themselves;
    - `team`: several processes, each with its share of the images; all must call alike;
    - `preprocessing`: how images are prepared, if the model's weights, family or file do not say so correctly.
    """

    data: Any = option(
        None,
        "Images: any folder of them, digits, a folder of class folders, cifar10:PATH (cifar100, mnist, fashion-mnist), "
        "or a tensor file.",
        _PANEL,
        text=True,
    )
    images: int = option(512, "Number of images.", _PANEL)
    sequential: bool | None = option(
        None, "Solve layer by layer, each on the input that it really gets.", _PANEL, shown="where there are images"
    )
    cache: Path | None = option(None, "File of calibration statistics: read if it exists, else written.", _PANEL)
    polish_steps: int | None = option(
        None, "Then train on the original's outputs, for a number of steps (500) or minutes (5min).", _PANEL, text=True
    )
    polish_minutes: float | None = None
    polish_images: int = option(5000, "Number of images to polish on, at most.", _PANEL)
    memory_gib: float = option(4.0, "Memory limit in GiB.", _PANEL)
    patch: int | None = option(None, "Side of square patches, cut at random, instead of whole images.", _PANEL)
    patches: int | None = option(
        None, "Number of patches, in place of that of images.", _PANEL, shown="as many as images"
    )
    noise: str | float | None = option(
        None, "Noise to add for a denoiser: its deviation for pixels from 0 to 1, as 25/255.", _PANEL, text=True
    )
    held_back: int | None = option(
        None, "Number of images to measure the loss on, at most half.", _PANEL, shown="256; 4,096 for a max drop"
    )
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
        below_one = {name for name, value in vars(self).items() if isinstance(value, int | float) and value < 1}
        nothing, polish = self.data is None and self.cache is None, (self.polish_steps, self.polish_minutes)
        no_polish = None not in polish or any(value is not None and value <= 0 for value in polish)
        no_patches = "patches" in below_one or (self.patches is not None and self.patch is None)
        wrong = {
            "calibration needs images, `data=…`, or a file of statistics, `cache=…`": nothing,
            f"`patch={self.patch}` is no side in pixels, such as 64": "patch" in below_one,
            f"`patches={self.patches}` is a number of patches, and goes with `patch=SIDE`": no_patches,
            f"`images={self.images}` is no number of images; give 128 to 2048": "images" in below_one,
            f"`held_back={self.held_back}` is no number of images; give 256 to 4096": "held_back" in below_one,
            "polish takes either a number of steps or a number of minutes, above zero": no_polish,
            "polish needs images: give `data=…` too": self.polishes and self.data is None,
            f"`memory_gib={self.memory_gib:g}` is no amount of memory; give GiB, such as 4": self.memory_gib <= 0,
        }
        for message, is_so in wrong.items():
            if is_so:
                raise AsymswapError(message)
        self.given()
        if self.outputs is not None:
            check_choice("the kind of outputs", self.outputs, get_args(OutputKind))
        if isinstance(self.data, Iterator):
            # What was read is kept, for copies that read it again.
            (start,) = itertools.tee(self.data, 1)
            object.__setattr__(self, "data", lambda: (batch for batch in copy.copy(start)))

    def given(self) -> UserData:
        """Return the data with all that says how it becomes inputs; raise AsymswapError for noise that is none."""
        deviation = 0.0
        if self.noise is not None:
            above, _, below = str(self.noise).partition("/")
            with suppress(ValueError, ZeroDivisionError):
                deviation = float(above) / float(below or 1)
            if not 0 < deviation < 1:
                raise AsymswapError(f"`noise={self.noise}` is no deviation between 0 and 1, such as 25/255")
        return UserData(self.data, self.inputs, Patches(self.patch, self.patches, deviation), self.held_back or 0)

    @property
    def polishes(self) -> bool:
        """True if the converted network is to be polished."""
        return self.polish_steps is not None or self.polish_minutes is not None
