"""Options that several commands share, and how their text becomes values."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import os
import re
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from asymswap.errors import AsymswapError

if TYPE_CHECKING:
    from asymswap.models.opened import OpenedModel
    from asymswap.models.preprocessing import PreprocessingOptions
    from asymswap.types import Progress

_MODEL = "Model"
IMAGES, RESULT = "Images", "Result"
"""Groups of a help text that several commands have."""

DATA_FORMS = "digits, a folder of class folders, cifar10:PATH (cifar100, mnist, fashion-mnist), or a tensor file."
"""The labelled images that every command takes, for the end of a help text."""


class MemoryFormat(StrEnum):
    """Orders of an image batch's numbers in memory."""

    channels_last = "channels-last"
    contiguous = "contiguous"


Model = Annotated[
    str,
    typer.Argument(
        help="A name (resnet18, timm:resnet18, cifar:resnet20, digits-resnet), pkg.mod:factory, net.py:Net, or a file.",
        show_default=False,
    ),
]


def complete_recipe(incomplete: str) -> list[str]:
    """The shipped recipes that begin so, for the shell; where none does, it offers files."""
    from asymswap.planning.recipe import shipped_names

    return [name for name in shipped_names() if name.startswith(incomplete)]


Arch = Annotated[
    str | None,
    typer.Option(
        help="The architecture of a state_dict file: resnet18, timm:resnet18, net.py:Net …", rich_help_panel=_MODEL
    ),
]
Key = Annotated[
    str | None,
    typer.Option(
        help="Which state_dict of the file, such as state_dict_ema; a dotted path.",
        rich_help_panel=_MODEL,
        show_default="the likeliest",
    ),
]
Weights = Annotated[
    str | None,
    typer.Option(
        help="Name of published weights, none for random ones, or a state_dict file.",
        rich_help_panel=_MODEL,
        show_default="the builder's DEFAULT",
    ),
]
Arguments = Annotated[
    list[str] | None,
    typer.Option(
        "--arg", help="key=value for the architecture's builder, such as num_classes=10.", rich_help_panel=_MODEL
    ),
]
InputSize = Annotated[
    str | None,
    typer.Option("--input", help="Size of one input, as 3x224x224.", rich_help_panel=_MODEL, show_default=False),
]
TrustPickle = Annotated[
    bool,
    typer.Option(
        "--trust-pickle",
        help="Unpickle classes outside of the allowlist. This may run any code that the file holds.",
        rich_help_panel=_MODEL,
    ),
]
TrustCode = Annotated[
    bool,
    typer.Option(
        "--trust-code",
        help="Run the Python file of a net.py:Net. It may do whatever you may do on this machine.",
        rich_help_panel=_MODEL,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress and print no report.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Force = Annotated[bool, typer.Option("--force", help="Replace files that exist.", rich_help_panel=RESULT)]
Data = Annotated[
    str,
    typer.Option(
        help=DATA_FORMS,
        show_default=False,
        rich_help_panel=IMAGES,
    ),
]
Validation = Annotated[
    str | None,
    typer.Option(
        help="What is validated on: a part of the images (0.1), test, none, or other data.",
        show_default="the folder val, else 0.1",
        rich_help_panel=IMAGES,
    ),
]
Strict = Annotated[
    bool,
    typer.Option("--strict", help="An image that cannot be read is an error, and not skipped.", rich_help_panel=IMAGES),
]
Download = Annotated[
    bool, typer.Option("--download", help="Fetch the data where torchvision can.", rich_help_panel=IMAGES)
]
Cpu = Annotated[bool, typer.Option("--cpu", help="Use no GPU.")]

_PREPROCESSING = {
    "normalize": Annotated[
        str | None,
        typer.Option(
            help="How pixels are normalised: imagenet, none (0 to 1), half (-1 to 1), bytes (0 to 255), cifar10 "
            "and others.",
            show_default="as weights, family or file say; else the network's batch norms are asked",
            rich_help_panel=IMAGES,
        ),
    ],
    "mean": Annotated[
        str | None,
        typer.Option(
            help="Mean of each channel, for pixels from 0 to 1, as 0.5,0.5,0.5; with --std.",
            show_default=False,
            rich_help_panel=IMAGES,
        ),
    ],
    "std": Annotated[
        str | None,
        typer.Option(help="Standard deviation of each channel, as --mean.", show_default=False, rich_help_panel=IMAGES),
    ],
    "bgr": Annotated[
        bool,
        typer.Option("--bgr", help="Channels are blue, green, red; with --mean and --std.", rich_help_panel=IMAGES),
    ],
    "size": Annotated[
        str | None,
        typer.Option(
            help="Height x width of what the network gets, as 224x224 or 224.",
            show_default="that of --input, or the model's own",
            rich_help_panel=IMAGES,
        ),
    ],
    "resize": Annotated[
        int | None,
        typer.Option(
            help="Resize the shorter side to this and cut out the middle, as 256.",
            show_default="the model's own; with --size the whole image is resized",
            rich_help_panel=IMAGES,
        ),
    ],
    "interpolation": Annotated[
        str | None,
        typer.Option(
            help="bilinear, bicubic, nearest and others.",
            show_default="the model's own, or bilinear",
            rich_help_panel=IMAGES,
        ),
    ],
}
"""How images are prepared, in every command that looks at some."""


def takes_preprocessing(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of preprocessing, in place of its parameter `preprocessing`, which gets their values.

    That is a `PreprocessingOptions`, or None where none of them was given.
    """
    signature = inspect.signature(command, eval_str=True)
    parameters = []
    for parameter in signature.parameters.values():
        if parameter.name != "preprocessing":
            parameters.append(parameter)
            continue
        for name, kind in _PREPROCESSING.items():
            default = False if name == "bgr" else None
            parameters.append(inspect.Parameter(name, parameter.kind, default=default, annotation=kind))

    @functools.wraps(command)
    def with_options(**values: Any) -> None:
        given = {name: values.pop(name) for name in _PREPROCESSING}
        command(**values, preprocessing=_preprocessing(**given))

    with_options.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    with_options.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return with_options


def _preprocessing(
    normalize: str | None,
    mean: str | None,
    std: str | None,
    bgr: bool,
    size: str | None,
    resize: int | None,
    interpolation: str | None,
) -> PreprocessingOptions | None:
    from asymswap.models.preprocessing import PreprocessingOptions

    options = PreprocessingOptions(
        normalize=normalize,
        mean=parse_numbers("--mean", mean),
        std=parse_numbers("--std", std),
        bgr=bgr or None,
        size=parse_size(size),
        resize=resize,
        interpolation=interpolation,
    )
    return None if options == PreprocessingOptions() else options


_MAY_STAND_ALONE = {"--distill": "original"}


def fill_in(arguments: list[str]) -> list[str]:
    """The arguments with the value of each option that may stand without one."""
    result = []
    for place, argument in enumerate(arguments):
        result.append(argument)
        alone = place + 1 == len(arguments) or arguments[place + 1].startswith("-")
        if alone and argument in _MAY_STAND_ALONE:
            result.append(_MAY_STAND_ALONE[argument])
    return result


def parse_input_size(text: str | None) -> tuple[int, ...] | None:
    """Read `3x224x224`, or `3x16x112x112` for clips; raises AsymswapError for anything else."""
    if text is None:
        return None
    parts = text.lower().split("x")
    if len(parts) not in (3, 4) or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise AsymswapError(f"--input {text!r} is not channels x height x width, such as 3x224x224")
    return tuple(int(part) for part in parts)


def parse_size(text: str | None) -> tuple[int, int] | None:
    """Read `224x320` (height x width), or `224` for both; raises AsymswapError for anything else."""
    if text is None:
        return None
    parts = text.lower().split("x")
    if len(parts) not in (1, 2) or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise AsymswapError(f"--size {text!r} is not height x width, such as 224x224")
    return int(parts[0]), int(parts[-1])


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


def parse_pairs(option: str, texts: list[str] | None) -> dict[str, Any]:
    """Read `key=value` texts, the values as TOML has them, or as plain text; raises AsymswapError for other forms."""
    pairs: dict[str, Any] = {}
    for text in texts or []:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise AsymswapError(f"{option} {text!r} is not key=value")
        pairs[key.strip()] = _value(value.strip())
    return pairs


def check_recipe(recipe: str | None, overrides: dict[str, Any] | None = None) -> None:
    """Raise RecipeError for a mistake in a recipe; the verb would tell it only when the model has been opened."""
    from asymswap.planning.recipe import parse_recipe, read_recipe_text

    if recipe is not None:
        parse_recipe(*read_recipe_text(recipe), overrides)


def open_model(model: str | Path, step: Progress, **options: Any) -> OpenedModel:
    """Open the model of a command by the shared options, under their names here, for the verb that gets it."""
    from asymswap.models import opening

    return opening.open_model(str(model), progress=step, **_parsed(options)).hand_over()


def open_models(models: list[str], step: Progress, **options: Any) -> list[OpenedModel]:
    """The same for several models, all of them before the verb begins."""
    from asymswap.models import opening

    return [opened.hand_over() for opened in opening.open_models(models, progress=step, **_parsed(options))]


def _parsed(options: dict[str, Any]) -> dict[str, Any]:
    size, arguments = options.pop("input_size", None), options.pop("arguments", None)
    return {**options, "input_size": parse_input_size(size), "arguments": parse_pairs("--arg", arguments)}


PICTURES = (".svg", ".png")


def check_picture(option: str, path: Path, force: bool) -> None:
    """Raise AsymswapError where a picture cannot be drawn into that file, before any work is done for it."""
    from asymswap.utils.files import check_output

    if path.suffix not in PICTURES:
        raise AsymswapError(f"{option} {path}: the file must end in {' or '.join(PICTURES)}")
    check_matplotlib(option, path)
    check_output(path, force, option)


def check_matplotlib(option: str, path: Path) -> None:
    """Raise AsymswapError where the library that draws curves is missing."""
    if importlib.util.find_spec("matplotlib") is None:
        raise AsymswapError(f"{option} {path}: pictures need matplotlib; pip install 'asymswap[plot]'")


def model_file(reference: str | Path) -> Path | None:
    """The file that the model is read from, which nothing may be written over; None where it is no file's."""
    return Path(reference) if os.path.isfile(reference) else None  # noqa: PTH113 (never raises)


def default_output(reference: str, mark: str = "asym") -> Path:
    """`<stem>.asym.pt` in the working directory; `<stem>.asym2.pt` for a model that was converted before.

    With another mark, that one takes the place of `asym`.
    """
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


def _value(text: str) -> Any:
    import tomllib

    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (tomllib.TOMLDecodeError, RecursionError):
        return text
