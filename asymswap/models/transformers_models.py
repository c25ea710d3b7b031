"""Vision models of transformers, from a folder that `save_pretrained` has written: `transformers:CLASS` by its config.

`config.json` names the class, which transformers itself must have: code in a folder or on a hub is never run, and
nothing is downloaded. The config is kept as the network's arguments, so that a checkpoint needs the folder no more.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from asymswap.errors import SourceError, near_names
from asymswap.models.family import Arguments, Family, input_channels, package
from asymswap.models.opened import OpenedModel
from asymswap.models.preprocessing import IMAGENET_MEAN, IMAGENET_STD
from asymswap.types import Preprocessing
from asymswap.utils.files import write_file

PREFIX = "transformers:"
# By these a config could name other code (kernels of a hub as well), or another package to build the weights with.
_LEFT_OUT = re.compile(
    r"auto_map|custom_pipelines|quantization_config|_name_or_path|\w*(implementation\w*|kernel_config)"
)
# By these a network that is elsewhere, which transformers would fetch; an architecture may be a plain name of timm's.
_ELSEWHERE = ("backbone", "use_timm_backbone", "use_pretrained_backbone", "checkpoint_path", "architecture")
_PILLOW = {0: "nearest", 2: "bilinear", 3: "bicubic"}  # its numbers of interpolations


class Transformers(Family):
    """Models of transformers; of the arguments `config` is the model's, `preprocessor` that of its images."""

    private = False

    def canonical(self, reference: str) -> str | None:
        return reference if re.fullmatch(rf"{PREFIX}\w+", reference) else None

    def construct(self, reference: str, arguments: Arguments) -> nn.Module:
        transformers, name = package("transformers"), reference.removeprefix(PREFIX)
        config = arguments.get("config")
        if not isinstance(config, Mapping) or not isinstance(config.get("model_type"), str):
            raise SourceError(f"{reference} needs its config: give the folder that save_pretrained has written")
        made = getattr(transformers, name, None)
        if not isinstance(made, type) or not issubclass(made, transformers.PreTrainedModel):
            hint = near_names(name, [one for one in dir(transformers) if "For" in one])
            raise SourceError(f"transformers {transformers.__version__} has no model {name!r}{hint}")
        plain = _checked(config, reference)
        return made(transformers.AutoConfig.for_model(plain.pop("model_type"), **plain))  # type: ignore[no-any-return]

    def preprocessing(self, reference: str, model: nn.Module, arguments: Arguments) -> Preprocessing:
        """Return what `preprocessor_config.json` says; what it leaves open is assumed to be as for ImageNet."""
        said, config = arguments.get("preprocessor") or {}, arguments.get("config") or {}
        channels = int(config.get("num_channels") or input_channels(model))
        mean, std = said.get("image_mean") or IMAGENET_MEAN, said.get("image_std") or IMAGENET_STD
        if not said.get("do_normalize", True):
            mean, std = (0.0,) * channels, (1.0,) * channels
        size, crop = said.get("size") or config.get("image_size") or 224, said.get("crop_size")
        edge = size.get("shortest_edge") if isinstance(size, Mapping) else None
        if edge is not None and crop is None and said.get("crop_pct"):
            size, edge = edge, int(edge / said["crop_pct"])
        elif edge is not None:
            size = crop or edge
        sides = (size["height"], size["width"]) if isinstance(size, Mapping) else size
        height, width = sides if isinstance(sides, list | tuple) else (sides, sides)
        mean, std = (tuple(map(float, values))[:channels] for values in (mean, std))
        interpolation = _PILLOW.get(said.get("resample", 2), "bilinear")
        made = Preprocessing(channels, (int(height), int(width)), mean, std, edge, interpolation)
        return made if said else replace(made, normalization_from="assumed", size_from="assumed")


def _checked(value: Any, reference: str) -> Any:
    """Return a part of a config without what names code; raise SourceError for one that names a network elsewhere."""
    if isinstance(value, list):
        return [_checked(item, reference) for item in value]
    if not isinstance(value, Mapping):
        return value
    named = [key for key in _ELSEWHERE if value.get(key) and (key != "architecture" or {*"/:\\"} & {*str(value[key])})]
    if named:
        raise SourceError(f"the config of {reference} takes its {named[0]} from elsewhere, which is not fetched")
    return {key: _checked(item, reference) for key, item in value.items() if not _LEFT_OUT.fullmatch(key)}


def named_in(folder: Path) -> tuple[str, dict[str, Any]] | None:
    """Return the reference and arguments of the model that a folder's config names; None for any other folder."""
    config = _json(folder / "config.json")
    classes = config.get("architectures")
    if not isinstance(classes, list) or len(classes) != 1 or not isinstance(config.get("model_type"), str):
        return None
    arguments = {"config": config}
    if preprocessor := _json(folder / "preprocessor_config.json"):
        arguments["preprocessor"] = preprocessor
    return f"{PREFIX}{classes[0]}", arguments


def save(opened: OpenedModel, folder: Path, write: Callable[[Path], None]) -> Path:
    """Write a folder whose config says, where `from_pretrained` is tried on it, how the network is loaded.

    `write` writes the checkpoint, whose path is returned: a name that transformers does not look for, so that it cannot
    take the original's class with random weights in the swapped convs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "asymswap.safetensors"
    write(file)
    how = f'asymswap: convs were swapped, load it with asymswap.load("{folder.name}/{file.name}")'
    arguments = opened.origin.arguments
    config = {"model_type": how, "asymswap": {"reference": opened.origin.reference, "config": arguments["config"]}}
    write_file(folder / "config.json", json.dumps(config, indent=1))
    if arguments.get("preprocessor"):
        write_file(folder / "preprocessor_config.json", json.dumps(arguments["preprocessor"], indent=1))
    return file


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
