"""Options that several commands share, and how their text becomes values."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import itertools
import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from asymswap.api.progress import bars
from asymswap.cli import screen
from asymswap.cli.failures import in_flags
from asymswap.cli.fields import Command, opt, options_of, parameters_of, takes
from asymswap.errors import AsymswapError
from asymswap.measure.timing import Timing

if TYPE_CHECKING:
    from asymswap.data.task import Task
    from asymswap.models.opened import OpenedModel
    from asymswap.reporting.tables import Screen
    from asymswap.types import Progress

T = TypeVar("T")

_MODEL = "Model"
IMAGES, RESULT = "Images", "Result"
"""Panels of the help that several commands have."""

DATA_FORMS = "digits, a folder of class folders, cifar10:PATH (cifar100, mnist, fashion-mnist), or a tensor file."
"""Labelled images that every command takes, for the end of a help text."""


def _timing(values: Mapping[str, Any]) -> Timing | None:
    given = {name: value for name, value in values.items() if value is not None}
    return Timing(**given) if given else None


takes_timing = takes("timing", options_of(Timing, given_only=True), _timing)
"""Gives a command the options of time in place of its parameter `timing`: a Timing, or None if none is given."""


def complete_recipe(incomplete: str) -> list[str]:
    """Return the shipped recipes that begin like this, for the shell; where none does, it offers files."""
    from asymswap.planning.recipe import shipped_names

    return [name for name in shipped_names() if name.startswith(incomplete)]


_ABOUT_MODEL = (
    "A name (resnet18, timm:resnet18, cifar:resnet20, digits-resnet), a file, or your own code, which is run: "
    "pkg.mod:factory, net.py:Net."
)
_ABOUT_MODELS = "Names, pkg.mod:factory, or files of any kind; the others are compared with the first."
Model = Annotated[str, typer.Argument(help=_ABOUT_MODEL, show_default=False)]
Models = Annotated[list[str], typer.Argument(metavar="MODEL...", help=_ABOUT_MODELS, show_default=False)]
Checkpoint = Annotated[Path, typer.Argument(help="A file that `asymswap convert` wrote.", show_default=False)]
Markdown = Annotated[bool, opt("Print Markdown, for a pull request.", None, "--markdown")]
Cpu = Annotated[bool, opt("Use no GPU.", None, "--cpu")]
Force = Annotated[bool, opt("Replace files that exist.", RESULT, "--force")]
Data = Annotated[str, opt(DATA_FORMS, IMAGES, shown=False)]
Strict = Annotated[bool, opt("Fail on an image that cannot be read instead of skipping it.", IMAGES, "--strict")]
Download = Annotated[bool, opt("Fetch the data where torchvision can.", IMAGES, "--download")]


def _opening(
    weights: Annotated[
        str | None,
        opt(
            "Name of published weights, none for random ones, or a state_dict file.",
            _MODEL,
            shown="the builder's DEFAULT",
        ),
    ] = None,
    arch: Annotated[
        str | None, opt("The architecture of a state_dict file: resnet18, timm:resnet18, net.py:Net …", _MODEL)
    ] = None,
    key: Annotated[
        str | None,
        opt("Which state_dict of the file, such as state_dict_ema; a dotted path.", _MODEL, shown="the likeliest"),
    ] = None,
    arguments: Annotated[
        list[str] | None, opt("key=value for the builder, in Python: num_classes=10, weights=None.", _MODEL, "--arg")
    ] = None,
    input_size: Annotated[str | None, opt("Size of one input, as 3x224x224.", _MODEL, "--input", shown=False)] = None,
    trust_pickle: Annotated[
        bool,
        opt("Unpickle classes outside the allowlist. This may run any code in the file.", _MODEL, "--trust-pickle"),
    ] = False,
) -> dict[str, Any]:
    """Return the options of `asymswap.open_model` but the preprocessing."""
    return {
        "weights": weights,
        "arch": arch,
        "key": key,
        "arguments": parse_pairs("--arg", arguments, python=True),
        # With four numbers it is the size of a clip.
        "input_size": parse_size("--input", input_size, (3, 4), "channels x height x width, such as 3x224x224"),
        "trust_pickle": trust_pickle,
    }


def _preprocessing(
    normalize: Annotated[
        str | None,
        opt(
            "How pixels are normalised: imagenet, none (0 to 1), half (-1 to 1), bytes (0 to 255), cifar10 and others.",
            IMAGES,
            shown="as weights, family or file say; else inferred from the network's batch norms",
        ),
    ] = None,
    mean: Annotated[
        str | None,
        opt("Mean of each channel, for pixels from 0 to 1, as 0.5,0.5,0.5; with --std.", IMAGES, shown=False),
    ] = None,
    std: Annotated[str | None, opt("Standard deviation of each channel, as --mean.", IMAGES, shown=False)] = None,
    bgr: Annotated[bool, opt("Channels are blue, green, red; with --mean and --std.", IMAGES, "--bgr")] = False,
    size: Annotated[
        str | None,
        opt(
            "Height x width of the network's input, as 224x224 or 224.",
            IMAGES,
            shown="from --input, or the model's own",
        ),
    ] = None,
    resize: Annotated[
        int | None,
        opt(
            "Resize the shorter side to this and crop the centre, as 256.",
            IMAGES,
            shown="the model's own; with --size the whole image is resized",
        ),
    ] = None,
    interpolation: Annotated[
        str | None, opt("bilinear, bicubic, nearest and others.", IMAGES, shown="the model's own, or bilinear")
    ] = None,
) -> Any:
    """Return how images are prepared; None where none of the options is given."""
    from asymswap.models.preprocessing import PreprocessingOptions

    sides = parse_size("--size", size, (1, 2), "height x width, such as 224x224")
    options = PreprocessingOptions(
        normalize=normalize,
        mean=parse_numbers("--mean", mean),
        std=parse_numbers("--std", std),
        bgr=bgr or None,
        size=None if sides is None else (sides[0], sides[-1]),
        resize=resize,
        interpolation=interpolation,
    )
    return None if options == PreprocessingOptions() else options


def _further(
    task: Annotated[
        Path | None,
        opt("Your own data, inputs, metric and loss: a Python file, which is run. `asymswap task` prints one.", "Task"),
    ] = None,
    json: Annotated[bool, opt("Print JSON instead of tables.", None, "--json")] = False,
    quiet: Annotated[bool, opt("Show no progress and print no report.", None, "--quiet", "-q")] = False,
    debug: Annotated[bool, opt("Show the traceback of an error.", None, "--debug")] = False,
) -> dict[str, Any]:
    """Return the file of a task, and what a command prints."""
    return {"task_file": task, "json": json, "quiet": quiet}


@dataclass(frozen=True)
class Common:
    """The options that commands share: how models are opened, and what is printed."""

    opening: Mapping[str, Any]
    json: bool
    quiet: bool
    task_file: Path | None = None

    @functools.cached_property
    def task(self) -> Task | None:
        """The functions of the task file, which is run when they are first asked for."""
        from asymswap.data.task import read_task

        return None if self.task_file is None else read_task(self.task_file)

    def open_model(self, model: str | Path, step: Progress) -> OpenedModel:
        """Open the model of a command, for the verb that gets it."""
        from asymswap.models import opening

        return self._with_example(opening.open_model(str(model), progress=step, **self.opening)).hand_over()

    def open_models(self, models: list[str], step: Progress) -> list[OpenedModel]:
        """Open several models, all of them before the verb begins."""
        from asymswap.models import opening

        every = opening.open_models(models, progress=step, **self.opening)
        return [self._with_example(opened).hand_over() for opened in every]

    def _with_example(self, opened: OpenedModel) -> OpenedModel:
        """Return the model with the first sample of a task's calibration() as its example."""
        if self.task is None or self.task.calibration is None:
            return opened
        from asymswap.data.inputs import settle_on
        from asymswap.types import UserData

        return settle_on(opened, UserData(self.task.calibration, self.task.inputs))[0]

    def check_form(self, markdown: bool) -> None:
        """Raise AsymswapError where both JSON and Markdown are asked for."""
        if self.json and markdown:
            raise AsymswapError("--json and --markdown are two forms of the same; give one of them")

    def progress(self) -> AbstractContextManager[Progress]:
        """Show progress while a block runs."""
        return bars(self.quiet)

    def show(
        self,
        record: T,
        view: Callable[[T, int | None], Screen] | None = None,
        markdown: bool = False,
    ) -> None:
        """Print a result as Markdown or JSON, or as `view` shows it at a number of columns, or not at all."""
        from asymswap.reporting import views
        from asymswap.results.records import to_json

        draw = view or views.view
        if markdown:
            typer.echo(draw(in_flags(record), None).markdown(), nl=False)
        elif self.json:
            screen.print_json(to_json(record))
        elif not self.quiet:
            console = screen.console()
            screen.show(draw(in_flags(record), console.width), console)


_EVERY = tuple(parameters_of(_opening))


def takes_common(opening: Collection[str] = _EVERY, preprocessing: bool = True) -> Callable[[Command], Command]:
    """Give a command the options that commands share, in place of its parameter `common`.

    Of those that say how a model is opened, only the named ones; `preprocessing` are the options of images. Who opens
    no model has no task either.
    """
    groups = (
        {name: one for name, one in parameters_of(_opening).items() if name in opening},
        parameters_of(_preprocessing) if preprocessing else {},
        {name: one for name, one in parameters_of(_further).items() if opening or name != "task"},
    )

    def build(values: dict[str, Any]) -> Common:
        opened, prepared, further = ({name: values[name] for name in group} for group in groups)
        how = {**_opening(**opened), "preprocessing": _preprocessing(**prepared)}
        return Common(how, **_further(**further))

    return takes("common", {name: one for group in groups for name, one in group.items()}, build)


def fill_in(arguments: list[str]) -> list[str]:
    """Return the arguments with the value `original` for a --distill whose value was left out."""
    result = []
    for argument, following in itertools.pairwise([*arguments, "-"]):
        result.append(argument)
        if argument == "--distill" and following.startswith("-"):
            result.append("original")
    return result


def parse_size(option: str, text: str | None, numbers: Collection[int], form: str) -> tuple[int, ...] | None:
    """Read `224x320`, where that is of `numbers` numbers; raises AsymswapError, which names the `form`, otherwise."""
    if text is None:
        return None
    parts = text.lower().split("x")
    if len(parts) not in numbers or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise AsymswapError(f"{option} {text!r} is not {form}")
    return tuple(int(part) for part in parts)


def parse_numbers(option: str, text: str | None) -> tuple[float, ...] | None:
    """Read `0.5,0.5,0.5`; raises AsymswapError for anything else."""
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise AsymswapError(f"{option} {text!r} is no list of numbers, such as 0.5,0.5,0.5") from None


def parse_counts(option: str, text: str) -> tuple[int, ...]:
    """Read `1,8`, numbers of at least 1; raises AsymswapError for anything else."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise AsymswapError(f"{option} {text!r} is no list of whole numbers from 1, such as 1,8")
    return tuple(dict.fromkeys(int(part) for part in parts))


def parse_polish(text: str | None) -> tuple[int | None, float | None]:
    """Read `500` as steps and `5min` as minutes; raises AsymswapError for anything else."""
    if text is None:
        return None, None
    if text.isdecimal():
        return int(text), None
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?m(?:in(?:utes)?)?", text)
    if match is None:
        raise AsymswapError(f"--polish {text!r} is neither steps, such as 500, nor minutes, such as 5min")
    return None, float(match[1])


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


def check_recipe(recipe: str | None, overrides: dict[str, Any] | None = None) -> None:
    """Raise RecipeError for a mistake in a recipe, before the verb that finds it has opened the model."""
    from asymswap.planning.recipe import parse_recipe, read_recipe_text

    if recipe is not None:
        parse_recipe(*read_recipe_text(recipe), overrides)


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
