"""Options that several commands share, how their text becomes values, and how results are printed."""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib.util
import json
import os
import re
import tomllib
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from asymswap.calibration.config import Calibration
from asymswap.cli.commands import EVERYWHERE, Group
from asymswap.cli.failures import in_flags
from asymswap.errors import AsymswapError
from asymswap.fileformats.detect import SUFFIXES, exists
from asymswap.measure.timing import Timing
from asymswap.models.preprocessing import PreprocessingOptions
from asymswap.planning.shipped import shipped_names
from asymswap.types import Progress, UserData
from asymswap.utils.distributed import Team
from asymswap.utils.files import check_distinct, check_output
from asymswap.utils.options import option

if TYPE_CHECKING:
    from rich.console import Console

    from asymswap.data.task import Task
    from asymswap.models.opened import OpenedModel
    from asymswap.models.opening import Unopened
    from asymswap.reporting.tables import Screen

_MODEL, IMAGES, RESULT = "Model", "Images", "Result"
"""Panels of the help that several commands have."""

_ABOUT_MODEL = (
    "A name (resnet18, timm:resnet18, cifar:resnet20, digits-resnet), a file, or your own code, which is run: "
    "pkg.mod:factory, net.py:Net."
)
_ABOUT_MODELS = "Names, pkg.mod:factory, or files of any kind; the others are compared with the first."
_ABOUT_PIXELS = (
    "How pixels are normalised: imagenet, none (0 to 1), half (-1 to 1), bytes (0 to 255), cifar10 and others."
)
_ABOUT_TASK = "Your own data, inputs, metric and loss: a Python file, which is run. `asymswap task` prints one."
Model = Annotated[str, typer.Argument(help=_ABOUT_MODEL, show_default=False)]
Models = Annotated[list[str], typer.Argument(metavar="MODEL...", help=_ABOUT_MODELS, show_default=False)]
Checkpoint = Annotated[Path, typer.Argument(help="A file that `asymswap convert` wrote.", show_default=False)]

FORCE = option(False, "Replace files that exist.", RESULT)
OUTPUT = ("-o", "--output")
DOWNLOAD = option(False, "Fetch the data where torchvision can.", IMAGES)


def complete_recipe(incomplete: str) -> list[str]:
    """Return the shipped recipes that begin like this, for the shell; where none does, it offers files."""
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
    normalize: str | None = option(None, _ABOUT_PIXELS, IMAGES, shown=_NORMALIZE)
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
    task_file: Path | None = option(None, _ABOUT_TASK, "Task", flags=("--task",))
    device: str | None = option(
        None, "Where it computes: cpu, cuda, cuda:1 or mps.", _MODEL, shown="images on a GPU if there is one"
    )
    markdown: bool = option(False, "Print Markdown, for a pull request.", EVERYWHERE)
    json: bool = option(False, "Print JSON instead of tables.", EVERYWHERE)
    quiet: bool = option(False, "Show no progress and print no report.", EVERYWHERE, flags=("--quiet", "-q"))
    debug: bool = option(False, "Show the traceback of an error.", EVERYWHERE)

    def __post_init__(self) -> None:
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

            # That is not yet what the verb works on, so no report is to mention it.
            opened = replace(settle_on(opened, UserData(self.task.calibration, self.task.inputs)), fed=None)
        return replace(opened, handed_over=True)

    def bars(self, leads: bool = True) -> AbstractContextManager[Progress]:
        """Show a bar while the block runs; of several processes the one that leads does."""
        from asymswap.api import progress

        return progress.bars(self.quiet or not leads)

    def check_images(self, data: str | None) -> None:
        """Raise AsymswapError for options that say how to prepare images, where there are none."""
        if self.preprocessing is not None and data is None:
            raise AsymswapError("how images are prepared was said, but there are none: give `data=…`, or leave it out")

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


def _common(*opening: str, images: bool = True) -> Any:
    """Return the common options, with these alone of those that say how a model is opened."""
    only = (*opening, *(_IMAGES if images else ()), *(("task_file",) if opening else ()), "json", "quiet", "debug")
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

LABELLED = "digits, a folder of class folders, cifar10:PATH (cifar100, mnist, fashion-mnist), or a tensor file."
"""Labelled images that every command takes, for the end of a help text."""
EVALUATION_FORMS = f"{LABELLED.replace(', or a', ', a')[:-1]}, pairs:INPUTS,TARGETS or masks:IMAGES,MASKS."
"""Data that models can be evaluated on, likewise."""


@dataclass(frozen=True)
class _Measured:
    metric: list[str] | None = option(
        None,
        "Measure by FILE.py:function or pkg.mod:function, which is run: it gets the model and returns a number, or "
        "numbers by name; can be repeated.",
        "Metric",
    )
    crop_border: int = option(0, "Pixels to leave out at each border of pairs.", "Metric", min=0)
    against_original: bool = option(
        False,
        "Measure how far each model agrees with the first, without labels, on what `convert` holds back of the same "
        "--data, or of a task's calibration().",
        "Metric",
    )


MEASURED: Any = Group(_Measured, only=("metric", "crop_border"))
COMPARED: Any = Group(_Measured)
UNLABELLED: Any = Group(Calibration, given_only=True, only=("patch", "noise", "outputs"))
_FLAGS = {
    "data": "--calibrate",
    "images": "--calibration-images",
    "cache": "--calibration-cache",
    "polish_steps": "--polish",
    "memory_gib": "--calibration-memory",
}
CALIBRATION: Any = Group(Calibration, given_only=True, flags=_FLAGS)
INPUTS: Any = Group(
    Calibration, given_only=True, flags=_FLAGS, only=("data", "images", "patch", "patches", "noise", "outputs")
)


def console() -> Console:
    """Return the console for results; of unknown width, it is wide enough for complete tables."""
    from asymswap.api.progress import plain_console

    screen = plain_console()
    return screen if screen.is_terminal or "COLUMNS" in os.environ else plain_console(width=max(screen.width, 120))


def print_json(value: Any) -> None:
    """Print JSON for programs: always the same layout, no colour, and null for numbers that are not finite."""
    from asymswap.results.records import plain

    print(json.dumps(plain(in_flags(value)), indent=2, allow_nan=False))  # noqa: T201


def measured_by(
    option: str, data: str | None, measured: Mapping[str, Any], task: Task, needed: bool = False
) -> tuple[Any, dict[str, Any]]:
    """Return the one thing by which `option`, `--metric` or a task asks to measure, and more arguments of the verb."""
    metrics, crop_border = measured["metric"] or [], measured["crop_border"]
    by = {option: data is not None, "--metric": metrics, f"evaluate() of {task.path}": task.evaluate}
    said = [name for name, given in by.items() if given]
    if len(said) > 1:
        raise AsymswapError(f"{said[0]} and {said[1]} both say what to measure by; give one of them")
    if needed and not said:
        raise AsymswapError(f"give {option}, --metric with a function of your own, or a --task with evaluate()")
    if crop_border and data is None:
        raise AsymswapError(f"--crop-border goes with {option} pairs:INPUTS,TARGETS; leave it out")
    if not metrics and task.evaluate is None:
        return data, {"crop_border": crop_border}
    from asymswap.data.metrics import Metric, read_metric

    if task.evaluate is not None:
        return Metric(task.evaluate, task.lower_is_better), {}
    return [read_metric(reference) for reference in metrics], {}


def compared_by(
    data: str | None, measured: Mapping[str, Any], unlabelled: Mapping[str, Any], task: Task, needed: bool = False
) -> tuple[Any, dict[str, Any]]:
    """Return what `measured_by` does, or with --against-original the inputs on which models are to agree."""
    if not measured["against_original"]:
        if unlabelled:
            raise AsymswapError(f"`{next(iter(unlabelled))}=…` goes with --against-original; leave it out")
        return measured_by("--data", data, measured, task, needed)
    images = task.calibration if data is None else data
    if images is None:
        raise AsymswapError("--against-original needs inputs: give --data, or a --task with calibration()")
    return Calibration(images, inputs=task.inputs, **unlabelled), {"against_original": True}


def calibration_of(given: Mapping[str, Any], seed: int, team: Team, task: Task) -> Calibration | None:
    """Return the calibration that options or a task ask for, None where no data is given, which some options need."""
    if task.calibration is not None and "data" in given:
        raise AsymswapError(f"--calibrate and calibration() of {task.path} both say what to calibrate on; give one")
    known = {"data": task.calibration, "inputs": task.inputs}
    given = dict(given) | {name: value for name, value in known.items() if value is not None}
    if not given.keys() & {"data", "cache"}:
        # What a task says of inputs is for other data, too.
        given.pop("inputs", None)
        if given:
            name, value = next(iter(given.items()))
            about = f"`{name}={value}` is of calibration"
            raise AsymswapError(f"{about}, which needs images: give --calibrate DATA, or a --task with calibration()")
        if team.size > 1:
            raise AsymswapError("torchrun has nothing to share out: several processes are for --calibrate DATA")
        return None
    if "polish_images" in given and "polish_steps" not in given:
        raise AsymswapError("--polish-images needs polishing: give --polish STEPS or MINUTES")
    if "polish_steps" in given:
        text = given.pop("polish_steps")
        polish = re.fullmatch(r"(?P<steps>\d+)|(?P<minutes>\d+(\.\d+)?) ?m(in(utes)?)?", text)
        if polish is None:
            raise AsymswapError(f"--polish {text!r} is neither steps, such as 500, nor minutes, such as 5min")
        given |= {"polish_steps": int(text)} if polish["steps"] else {"polish_minutes": float(polish["minutes"])}
    return Calibration(**given, seed=seed, team=team)


def parse_numbers(
    option: str, text: str | None, form: str, kind: type = float, by: str = ",", lengths: Collection[int] = ()
) -> Any:
    """Read numbers, such as `0.5,0.5` or, whole and above zero, `224x320`; `form` says what any other text is."""
    if text is None:
        return None
    found: tuple[Any, ...] = ()
    with contextlib.suppress(ValueError):
        found = tuple(kind(part) for part in text.lower().split(by))
    if not found or (lengths and len(found) not in lengths) or (kind is int and min(found) < 1):
        raise AsymswapError(f"{option} {text!r} is {form}")
    return found


def parse_pairs(option: str, texts: list[str] | None, python: bool = False) -> dict[str, Any]:
    """Read `key=value` texts, the values as TOML or else as text; with `python` first as its literals, as `(2, 2)`."""

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


def check_picture(option: str, path: Path | None, force: bool, suffixes: Sequence[str] = (".svg", ".png")) -> None:
    """Raise AsymswapError where a picture, or a report with one, cannot be written, before any work is done for it."""
    if path is None:
        return
    if path.suffix not in suffixes:
        raise AsymswapError(f"{option} {path}: the file must end in {', '.join(suffixes[:-1])} or {suffixes[-1]}")
    if path.suffix != ".md" and importlib.util.find_spec("matplotlib") is None:
        raise AsymswapError(f"{option} {path}: pictures need matplotlib; pip install 'asymswap[plot]'")
    check_output(path, force)


def check_report(path: Path | None, force: bool) -> None:
    """Raise OutputError where a report cannot be written, before any work is done for it."""
    if path is not None:
        from asymswap.reporting.convert import check_suffix

        check_output(path, force)
        check_suffix(path)


def model_file(reference: str | Path) -> Path | None:
    """Return the file that the model is read from, which must not be overwritten; None if it is not a file."""
    return Path(reference) if os.path.isfile(reference) else None  # noqa: PTH113 (never raises)


def default_output(reference: str, mark: str = "asym") -> Path:
    """Return `<stem>.asym.pt`, or `<stem>.asym2.pt` for a model that was converted before; `mark` replaces `asym`."""
    # A path may have an @ in it, where a reference has it before its weights.
    path = exists(Path(reference)) or ".py:" in reference.lower()
    name = reference if path else reference.partition("@")[0]
    stem = Path(name.rpartition(":")[2]).name or "model"
    while Path(stem).suffix in (*SUFFIXES, ".index", ".gz"):
        stem = Path(stem).stem
    before = re.fullmatch(r"(.*)\.asym(\d*)", stem)
    if before and mark == "asym":
        return Path(f"{before[1]}.asym{int(before[2] or 1) + 1}.pt")
    return Path(f"{before[1] if before else stem}.{mark}.pt")


def target_of(checkpoint: Path, target: Path, force: bool) -> Path:
    """Return the file that a command writes; raise OutputError where it cannot be."""
    check_output(target, force)
    check_distinct({"the checkpoint": model_file(checkpoint), "-o": target})
    return target
