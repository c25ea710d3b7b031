"""Options that several commands share, how their text becomes values, and how results are printed."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import itertools
import json
import os
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from asymswap.api.progress import bars, plain_console
from asymswap.cli.commands import EVERYWHERE, Group
from asymswap.cli.failures import in_flags
from asymswap.errors import AsymswapError
from asymswap.measure.timing import Timing
from asymswap.utils.options import option

if TYPE_CHECKING:
    from rich.console import Console

    from asymswap.data.task import Task
    from asymswap.models.opened import OpenedModel
    from asymswap.models.opening import Unopened
    from asymswap.models.preprocessing import PreprocessingOptions
    from asymswap.reporting.tables import Screen
    from asymswap.types import Progress

_MODEL = "Model"
IMAGES, RESULT = "Images", "Result"
"""Panels of the help that several commands have."""

_ABOUT_MODEL = (
    "A name (resnet18, timm:resnet18, cifar:resnet20, digits-resnet), a file, or your own code, which is run: "
    "pkg.mod:factory, net.py:Net."
)
_ABOUT_MODELS = "Names, pkg.mod:factory, or files of any kind; the others are compared with the first."
Model = Annotated[str, typer.Argument(help=_ABOUT_MODEL, show_default=False)]
Models = Annotated[list[str], typer.Argument(metavar="MODEL...", help=_ABOUT_MODELS, show_default=False)]
Checkpoint = Annotated[Path, typer.Argument(help="A file that `asymswap convert` wrote.", show_default=False)]

FORCE = option(False, "Replace files that exist.", RESULT)
OUTPUT = ("-o", "--output")
DOWNLOAD = option(False, "Fetch the data where torchvision can.", IMAGES)


def complete_recipe(incomplete: str) -> list[str]:
    """Return the shipped recipes that begin like this, for the shell; where none does, it offers files."""
    from asymswap.planning.shipped import shipped_names

    return [name for name in shipped_names() if name.startswith(incomplete)]


TIMING: Any = Group(Timing, lambda given: Timing(**given) if given else None, given_only=True)
"""The options of time: a Timing, or None if none is given."""


# What is used where an option is not given.
_DEFAULT = "the builder's DEFAULT"
_NORMALIZE = "as weights, family or file say; else inferred from the network's batch norms"
_SIZE, _RESIZE = "from --input, or the model's own", "the model's own; with --size the whole image is resized"


@dataclass(frozen=True)
class Common:
    """The options that commands share: how models are opened and images are prepared, and what is printed."""

    weights: str | None = option(
        None, "Name of published weights, none for random ones, or a state_dict file.", _MODEL, shown=_DEFAULT
    )
    arch: str | None = option(
        None, "The architecture of a state_dict file: resnet18, timm:resnet18, net.py:Net …", _MODEL
    )
    key: str | None = option(
        None, "Which state_dict of the file, such as state_dict_ema; a dotted path.", _MODEL, shown="the likeliest"
    )
    arguments: list[str] | None = option(
        None, "key=value for the builder, in Python: num_classes=10, weights=None.", _MODEL, flags=("--arg",)
    )
    input_size: str | None = option(None, "Size of one input, as 3x224x224.", _MODEL, flags=("--input",), shown=False)
    trust_pickle: bool = option(
        False, "Unpickle classes outside the allowlist. This may run any code in the file.", _MODEL
    )
    normalize: str | None = option(
        None,
        "How pixels are normalised: imagenet, none (0 to 1), half (-1 to 1), bytes (0 to 255), cifar10 and others.",
        IMAGES,
        shown=_NORMALIZE,
    )
    mean: str | None = option(
        None, "Mean of each channel, for pixels from 0 to 1, as 0.5,0.5,0.5; with --std.", IMAGES, shown=False
    )
    std: str | None = option(None, "Standard deviation of each channel, as --mean.", IMAGES, shown=False)
    bgr: bool = option(False, "Channels are blue, green, red; with --mean and --std.", IMAGES)
    size: str | None = option(None, "Height x width of the network's input, as 224x224 or 224.", IMAGES, shown=_SIZE)
    resize: int | None = option(
        None, "Resize the shorter side to this and crop the centre, as 256.", IMAGES, shown=_RESIZE
    )
    interpolation: str | None = option(
        None, "bilinear, bicubic, nearest and others.", IMAGES, shown="the model's own, or bilinear"
    )
    task_file: Path | None = option(
        None,
        "Your own data, inputs, metric and loss: a Python file, which is run. `asymswap task` prints one.",
        "Task",
        flags=("--task",),
    )
    device: str | None = option(
        None, "Where it computes: cpu, cuda, cuda:1 or mps.", _MODEL, shown="images on a GPU if there is one"
    )
    markdown: bool = option(False, "Print Markdown, for a pull request.", EVERYWHERE)
    json: bool = option(False, "Print JSON instead of tables.", EVERYWHERE)
    quiet: bool = option(False, "Show no progress and print no report.", EVERYWHERE, flags=("--quiet", "-q"))
    debug: bool = option(False, "Show the traceback of an error.", EVERYWHERE)

    def __post_init__(self) -> None:
        """Raise AsymswapError where both JSON and Markdown are asked for."""
        if self.json and self.markdown:
            raise AsymswapError("--json and --markdown are two forms of the same; give one of them")

    @functools.cached_property
    def task(self) -> Task:
        """The functions of the task file, which is run when they are first asked for."""
        from asymswap.data.task import Task, read_task

        return Task() if self.task_file is None else read_task(self.task_file)

    @functools.cached_property
    def preprocessing(self) -> PreprocessingOptions | None:
        """How images are prepared; None where none of the options is given."""
        from asymswap.models.preprocessing import PreprocessingOptions

        sides = parse_numbers("--size", self.size, "not height x width, such as 224x224", int, "x", (1, 2))
        options = PreprocessingOptions(
            normalize=self.normalize,
            mean=parse_numbers("--mean", self.mean, _NUMBERS),
            std=parse_numbers("--std", self.std, _NUMBERS),
            bgr=self.bgr or None,
            size=None if sides is None else (sides[0], sides[-1]),
            resize=self.resize,
            interpolation=self.interpolation,
        )
        return None if options == PreprocessingOptions() else options

    def _opening(self) -> dict[str, Any]:
        """The options of `asymswap.open_model`."""
        form = "not channels x height x width, such as 3x224x224"
        names = ("weights", "arch", "key", "trust_pickle", "device")
        return {name: getattr(self, name) for name in names} | {
            "arguments": parse_pairs("--arg", self.arguments, python=True),
            # With four numbers it is the size of a clip.
            "input_size": parse_numbers("--input", self.input_size, form, int, "x", (3, 4)),
            "preprocessing": self.preprocessing,
        }

    def model(self, reference: str | Path, step: Progress) -> Unopened:
        """Return the model of a command, which the verb that gets it opens."""
        from asymswap.models.opening import Unopened, open_model

        return Unopened(lambda: self._handed_over(open_model(str(reference), progress=step, **self._opening())))

    def open_models(self, models: list[str], step: Progress) -> list[OpenedModel]:
        """Open several models, all of them before the verb begins."""
        from asymswap.models.opening import open_models

        return [self._handed_over(one) for one in open_models(models, progress=step, **self._opening())]

    def _handed_over(self, opened: OpenedModel) -> OpenedModel:
        """Return a model for one verb; the first sample of a task's calibration() is its example."""
        if self.task.calibration is not None:
            from asymswap.data.inputs import settle_on
            from asymswap.types import UserData

            # That is not yet what the verb works on, so no report is to mention it.
            opened = replace(settle_on(opened, UserData(self.task.calibration, self.task.inputs)), fed=None)
        return replace(opened, handed_over=True)

    def check_images(self, data: str | None) -> None:
        """Raise AsymswapError for options that say how to prepare images, where there are none."""
        if self.preprocessing is not None and data is None:
            raise AsymswapError("how images are prepared was said, but there are none: give `data=…`, or leave it out")

    def progress(self) -> AbstractContextManager[Progress]:
        """Show progress while a block runs."""
        return bars(self.quiet)

    def show(self, record: Any, view: Callable[[Any, int | None], Screen] | None = None) -> None:
        """Print a result as Markdown or JSON, or as `view` shows it at a number of columns, or not at all."""
        from asymswap.reporting import tables
        from asymswap.results.records import to_json

        draw = view or tables.view
        if self.markdown:
            typer.echo(draw(in_flags(record), None).markdown(), nl=False)
        elif self.json:
            print_json(to_json(record))
        elif not self.quiet:
            screen = console()
            screen.print(draw(in_flags(record), screen.width), highlight=False, markup=False)


_NUMBERS = "no list of numbers, such as 0.5,0.5,0.5"
_IMAGES = ("normalize", "mean", "std", "bgr", "size", "resize", "interpolation")
_PRINTING = ("json", "quiet", "debug")


def _common(*opening: str, images: bool = True) -> Any:
    """Return the common options, with these alone of those that say how a model is opened."""
    only = (*opening, *(_IMAGES if images else ()), *(("task_file",) if opening else ()), *_PRINTING)
    return Group(Common, lambda values: Common(**values), only=only)


_OPENING = ("weights", "arch", "key", "arguments", "input_size", "trust_pickle", "device")
COMMON = _common(*_OPENING)
BESIDE = _common(*_OPENING, "markdown")
BESIDE_WITHOUT_IMAGES = _common(*_OPENING, "markdown", images=False)
WITHOUT_IMAGES = _common(*_OPENING, images=False)
OF_CHECKPOINT = _common("arch", "arguments")
EXPORTED = _common("arch", "arguments", images=False)
TRAINED = _common("arch", "arguments", "input_size", "device")
PRINTING = _common(images=False)
"""The options of `Common` that different commands have."""


def console() -> Console:
    """Return the console for results; of unknown width, it is wide enough for complete tables."""
    screen = plain_console()
    known = screen.is_terminal or "COLUMNS" in os.environ
    return screen if known else plain_console(width=max(screen.width, 120))


def print_json(value: Any) -> None:
    """Print JSON for programs: always the same layout, no colour, and null for numbers that are not finite."""
    from asymswap.results.records import plain

    print(json.dumps(plain(in_flags(value)), indent=2, allow_nan=False))  # noqa: T201


def fill_in(arguments: list[str]) -> list[str]:
    """Return the arguments with the value `original` for a --distill whose value was left out."""
    result = []
    for argument, following in itertools.pairwise([*arguments, "-"]):
        result.append(argument)
        if argument == "--distill" and following.startswith("-"):
            result.append("original")
    return result


def parse_numbers(
    option: str, text: str | None, form: str, kind: type = float, by: str = ",", lengths: Collection[int] = ()
) -> Any:
    """Read numbers, such as `0.5,0.5`, or `224x320`; whole ones must be above zero.

    Raises AsymswapError, which says that the text is `form`, for anything else.
    """
    if text is None:
        return None
    found: tuple[Any, ...] = ()
    with contextlib.suppress(ValueError):
        found = tuple(kind(part) for part in text.lower().split(by))
    if not found or (lengths and len(found) not in lengths) or (kind is int and min(found) < 1):
        raise AsymswapError(f"{option} {text!r} is {form}")
    return found


def parse_pairs(option: str, texts: list[str] | None, python: bool = False) -> dict[str, Any]:
    """Read `key=value` texts, the values as TOML, or else as plain text; raises AsymswapError for other forms.

    With `python`, values are Python's literals first: `None`, `(2, 2)`.
    """
    import ast
    import tomllib

    def parse(text: str) -> Any:
        if python:
            with contextlib.suppress(ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
                return ast.literal_eval(text)
        with contextlib.suppress(tomllib.TOMLDecodeError, RecursionError):
            return tomllib.loads(f"value = {text}")["value"]
        return text

    pairs: dict[str, Any] = {}
    for text in texts or []:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise AsymswapError(f"{option} {text!r} is not key=value")
        pairs[key.strip()] = parse(value.strip())
    return pairs


def check_picture(option: str, path: Path, force: bool, suffixes: Sequence[str] = (".svg", ".png")) -> None:
    """Raise AsymswapError where a picture, or a report with one, cannot be written, before any work is done for it."""
    from asymswap.utils.files import check_output

    if path.suffix not in suffixes:
        raise AsymswapError(f"{option} {path}: the file must end in {', '.join(suffixes[:-1])} or {suffixes[-1]}")
    if path.suffix != ".md" and importlib.util.find_spec("matplotlib") is None:
        raise AsymswapError(f"{option} {path}: pictures need matplotlib; pip install 'asymswap[plot]'")
    check_output(path, force)


def model_file(reference: str | Path) -> Path | None:
    """Return the file that the model is read from, which must not be overwritten; None if it is not a file."""
    return Path(reference) if os.path.isfile(reference) else None  # noqa: PTH113 (never raises)


def default_output(reference: str, mark: str = "asym") -> Path:
    """Return `<stem>.asym.pt`, or `<stem>.asym2.pt` for a model that was converted before; `mark` replaces `asym`."""
    # A path may have an @ in it, where a reference has it before its weights.
    path = os.path.exists(reference) or ".py:" in reference.lower()  # noqa: PTH110 (never raises)
    name = reference if path else reference.partition("@")[0]
    stem = Path(name.rpartition(":")[2]).name or "model"
    for suffix in (
        ".json", ".index", ".gz", ".tar", ".pt", ".pt2", ".pth", ".th", ".ckpt", ".bin", ".safetensors", ".pkl",
        ".pickle", ".torch",
    ):  # fmt: skip
        stem = stem.removesuffix(suffix)
    base, dot, old = stem.rpartition(".")
    if dot and old.startswith("asym") and (old[4:].isdecimal() or old == "asym"):
        return Path(f"{base}.asym{int(old[4:] or 1) + 1}.pt" if mark == "asym" else f"{base}.{mark}.pt")
    return Path(f"{stem}.{mark}.pt")


def target_of(checkpoint: Path, output: Path | None, target: Path, force: bool) -> Path:
    """Return the file that a command writes: `output`, or else `target`; raise OutputError where it cannot be."""
    from asymswap.utils.files import check_distinct, check_output

    target = output or target
    check_output(target, force)
    check_distinct({"the checkpoint": model_file(checkpoint), "-o": target})
    return target
