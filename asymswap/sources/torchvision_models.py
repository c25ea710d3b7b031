"""The models of torchvision by name: built, filled with published weights, described so that they can be rebuilt."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchvision import models

from asymswap.errors import SourceError, near_names
from asymswap.spec import Preprocessing

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def names() -> list[str]:
    """All model names that torchvision registers."""
    return list(models.list_models())


def classifiers() -> list[str]:
    """The names of the image classifiers among them."""
    return list(models.list_models(models))


def build(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    """The model with random weights, downloading nothing; raises SourceError for arguments that it does not take."""
    builder = models.get_model_builder(name)
    takes = inspect.signature(builder).parameters
    # Given weights are ours to load; the slow and warned-of initialisation of googlenet would be thrown away.
    ours: dict[str, Any] = {"weights": None, "weights_backbone": None}
    defaults: dict[str, Any] = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    _check_arguments(name, arguments)
    try:
        model: nn.Module = builder(**{key: None for key in ours if key in takes}, **{**defaults, **arguments})
    except (TypeError, ValueError) as error:
        raise SourceError(f"torchvision's {name} does not take {dict(arguments)}: {error}") from None
    return model


def build_pretrained(
    name: str, weights_name: str, arguments: Mapping[str, Any]
) -> tuple[nn.Module, dict[str, Any], str]:
    """The model with published weights, the arguments that rebuild its structure, and the weights' own name.

    The weights are read from torch.hub's cache, or downloaded into it. Raises SourceError where neither can be done.
    """
    weights = _weights(name, weights_name)
    _check_arguments(name, arguments)
    cached = Path(torch.hub.get_dir()) / "checkpoints" / weights.url.rpartition("/")[2]
    try:
        if not cached.exists():
            cached.parent.mkdir(parents=True, exist_ok=True)
            digits = torch.hub.HASH_REGEX.search(cached.name)
            torch.hub.download_url_to_file(
                weights.url, str(cached), hash_prefix=digits and digits[1], progress=sys.stderr.isatty()
            )
        model = models.get_model(name, weights=weights, progress=False, **arguments)
    except OSError as error:
        raise SourceError(
            f"the weights {weights.name} of {name} are not in {cached.parent} and cannot be downloaded "
            f"({_reason(error)}); use --weights none for random weights or --weights FILE for a state_dict"
        ) from None
    except (RuntimeError, EOFError) as error:
        raise SourceError(
            f"cannot load {cached} into {name}: {_reason(error)}; delete that file if it is damaged"
        ) from None
    except (TypeError, ValueError) as error:
        raise SourceError(f"torchvision's {name} does not take {dict(arguments)}: {_reason(error)}") from None
    return model, {**_set_by_weights(name, weights), **arguments}, weights.name


def preprocessing(name: str, model: nn.Module, weights_name: str | None) -> Preprocessing:
    """How the weights' own transforms prepare an image; for random weights, those of the default weights."""
    weights = _weights(name, weights_name or "DEFAULT")
    transforms = weights.transforms()
    sizes = {key: getattr(transforms, key, None) for key in ("crop_size", "resize_size")}
    crop, resize = (value[0] if isinstance(value, list | tuple) else value for value in sizes.values())
    # Vision transformers fix their input size when they are built.
    fixed = getattr(model, "image_size", None)
    if isinstance(fixed, int) and fixed != crop:
        crop, resize = fixed, None
    return Preprocessing(
        channels=3,
        size=(crop or 224, crop or 224),
        mean=tuple(getattr(transforms, "mean", None) or IMAGENET_MEAN),
        std=tuple(getattr(transforms, "std", None) or IMAGENET_STD),
        resize=resize,
        interpolation=getattr(getattr(transforms, "interpolation", None), "value", "bilinear"),
    )


def _weights(name: str, weights_name: str) -> Any:
    enum = models.get_model_weights(name)
    if weights_name not in enum.__members__:
        known = list(enum.__members__)
        hint = near_names(weights_name, known) or f"; known: {', '.join(known)}"
        raise SourceError(f"torchvision's {name} has no weights {weights_name!r}{hint}; none and a FILE work too")
    return enum[weights_name]


def _set_by_weights(name: str, weights: Any) -> dict[str, Any]:
    """The constructor arguments that torchvision changes on its own when weights are given."""
    if name == "googlenet":
        return {"transform_input": True, "aux_logits": False}
    if name == "inception_v3":
        return {"transform_input": True}
    if name.startswith("vit_") and weights.meta["min_size"][0] != 224:
        return {"image_size": weights.meta["min_size"][0]}
    return {}


def _check_arguments(name: str, arguments: Mapping[str, Any]) -> None:
    """Weights are chosen by their own option: as an argument they could make a stored reference download something."""
    for key in arguments:
        if key in ("weights", "weights_backbone", "progress", "pretrained"):
            raise SourceError(f"{key!r} is not an argument for torchvision's {name}; choose weights with --weights")


def _reason(error: Exception) -> str:
    reason = getattr(error, "reason", None) or error
    return " ".join(str(reason).split()) or type(error).__name__
