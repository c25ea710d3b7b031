"""The models of torchvision by name: built, filled with published weights, described so that they can be rebuilt."""

from __future__ import annotations

import functools
import inspect
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from http.client import HTTPException
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchvision import models

from asymswap.errors import SourceError, near_names
from asymswap.fileformats.detect import sha256, sniff
from asymswap.fileformats.state_dict import State
from asymswap.fileformats.torch_files import load_object
from asymswap.types import InputForm, Preprocessing, Size

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

_DELETE = "delete that file if it is damaged"

# Keys of files that older versions wrote, torchvision's own published ones among them.
_OLD_KEYS = (
    (re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)"), r"\1\2"),
    (re.compile(r"(encoder_layer_\d+\.mlp\.)linear_1\."), r"\g<1>0."),
    (re.compile(r"(encoder_layer_\d+\.mlp\.)linear_2\."), r"\g<1>3."),
)


def names() -> list[str]:
    """All model names that torchvision registers."""
    return list(models.list_models())


def classifiers() -> list[str]:
    """The names of the image classifiers among them."""
    return list(models.list_models(models))


def task(name: str) -> str:
    """What a network is for, as torchvision's packages say: classification, segmentation, detection, video …"""
    parts: list[str] = models.get_model_builder(name).__module__.split(".")
    return parts[2] if len(parts) > 3 else "classification"


@dataclass(frozen=True)
class Published:
    """Weights that torchvision publishes: of which model, by which name, and what they ask of the model."""

    model: str
    weights: str
    arguments: Mapping[str, Any]


def published(digest: str) -> Published | None:
    """Which published weights a file is, by its SHA-256, of which torchvision's file names hold the first digits."""
    return _published().get(digest[:8])


@functools.cache
def _published() -> dict[str, Published]:
    found: dict[str, Published] = {}
    for name in names():
        for weights in models.get_model_weights(name):
            digits = torch.hub.HASH_REGEX.search(weights.url.rpartition("/")[2])
            if digits and not name.startswith("quantized_"):
                # The heads that torchvision drops from its pretrained models are in their files.
                arguments = {k: v for k, v in _set_by_weights(name, weights).items() if k != "aux_logits"}
                found.setdefault(digits[1][:8], Published(name, weights.name, arguments))
    return found


def transforms_input(name: str) -> bool:
    """Whether the model has the switch that torchvision turns on with its published weights alone."""
    return name in ("googlenet", "inception_v3")


def with_current_keys(state: State) -> State:
    """The state dict under the names that torchvision's densenets and vision transformers have now."""

    def current(key: str) -> str:
        for pattern, name in _OLD_KEYS:
            key = pattern.sub(name, key)
        return key

    return {current(key): tensor for key, tensor in state.items()}


def build(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    """The model with random weights, downloading nothing; raises whatever the builder does for a wrong argument."""
    builder = models.get_model_builder(name)
    takes = inspect.signature(builder).parameters
    # Given weights are ours to load.
    none = {key: None for key in ("weights", "weights_backbone") if key in takes}
    _check_arguments(name, arguments)
    model: nn.Module = builder(**none, **{**_defaults(name), **arguments})
    return model


def build_pretrained(
    name: str, weights_name: str, arguments: Mapping[str, Any]
) -> tuple[nn.Module, dict[str, Any], str]:
    """The model with published weights, the arguments that rebuild its structure, and the weights' own name.

    The weights are read from torch.hub's cache, or downloaded into it. Raises SourceError where neither can be done.
    """
    weights = _weights(name, weights_name)
    _check_arguments(name, arguments)
    cached = _fetch(name, weights)
    state = _read(name, cached)
    try:
        with _given(weights, state):
            model = models.get_model(name, weights=weights, progress=False, **{**_defaults(name), **arguments})
    except Exception as error:
        # Weights that do not fit can raise about anything; so can a builder at an argument that it was not made for.
        if arguments and isinstance(error, TypeError | ValueError):
            raise SourceError(f"torchvision's {name} does not take {dict(arguments)}: {_reason(error)}") from None
        raise SourceError(f"cannot load {cached} into {name}: {_reason(error)}; {_DELETE}") from None
    return model, {**_set_by_weights(name, weights), **arguments}, weights.name


def _fetch(name: str, weights: Any) -> Path:
    """Where torch.hub keeps the file of these weights; it is downloaded where it is missing."""
    cached: Path = Path(torch.hub.get_dir()) / "checkpoints" / weights.url.rpartition("/")[2]
    try:
        if not cached.exists():
            cached.parent.mkdir(parents=True, exist_ok=True)
            digits = torch.hub.HASH_REGEX.search(cached.name)
            torch.hub.download_url_to_file(
                weights.url, str(cached), hash_prefix=digits and digits[1], progress=sys.stderr.isatty()
            )
    except (OSError, HTTPException, RuntimeError) as error:
        # The RuntimeError is torch's word for a download with another hash than its name says.
        raise SourceError(
            f"the weights {weights.name} of {name} are not in {cached.parent} and cannot be downloaded "
            f"({_reason(error)}); use --weights none for random weights or --weights FILE for a state_dict"
        ) from None
    return cached


def _read(name: str, cached: Path) -> Any:
    """What a file of torch.hub's cache holds, read as any file is; raises SourceError.

    Anybody can write to that folder, and torchvision would unpickle what lies there without restriction.
    """
    digits = torch.hub.HASH_REGEX.search(cached.name)
    try:
        kind = sniff(cached)
        if digits and not sha256(cached).startswith(digits[1]):
            raise SourceError("its SHA-256 is not the one in its name")
        return load_object(cached, kind, False, "it", "take weights of your own with --weights FILE")
    except SourceError as error:
        raise SourceError(f"cannot load {cached} into {name}: {error}; {_DELETE}") from None


@contextmanager
def _given(weights: Any, state: Any) -> Iterator[None]:
    """While open, torchvision's builder takes this state dict for the weights' own; what they set is left to it."""
    weights.get_state_dict = lambda **_: state
    try:
        yield
    finally:
        del weights.get_state_dict


_FRAMES = 16
"""Of a clip: as many as the published video networks were trained on, and the least that some of them take."""

_FORMS: dict[str, InputForm] = {"detection": "image-list", "optical_flow": "image-pair", "video": "clips"}
"""What the models of torchvision's packages take, where it is not a batch of images."""


def input_form(model: nn.Module) -> InputForm:
    """What the forward of one of torchvision's models takes; a batch of images for any other."""
    package = type(model).__module__.removeprefix("torchvision.models.").partition(".")[0]
    return _FORMS.get(package, "images")


def assumed_preprocessing(model: nn.Module) -> Preprocessing:
    """What a model of which nothing else is known most likely takes, by its class and its attributes."""
    form = input_form(model)
    if form == "image-list":
        # They normalise and resize by themselves; this size is left as it is, so that the costs are those of it.
        return _of_family(Preprocessing(3, _detection_size(model), (0.0,) * 3, (1.0,) * 3, form=form))
    if form == "image-pair":
        return _of_family(Preprocessing(3, (256, 256), (0.5,) * 3, (0.5,) * 3, form=form))
    side = getattr(model, "image_size", None)
    ours = type(model).__module__.startswith("torchvision.models.")
    frames = _FRAMES if form == "clips" else 1
    return Preprocessing(
        3,
        (side, side) if isinstance(side, int) else (224, 224),
        IMAGENET_MEAN,
        IMAGENET_STD,
        form=form,
        frames=frames,
        normalization_from="family" if ours else "assumed",
        size_from="family" if ours or isinstance(side, int) else "assumed",
    )


def _of_family(preprocessing: Preprocessing) -> Preprocessing:
    return replace(preprocessing, normalization_from="family", size_from="family")


def _detection_size(model: nn.Module) -> Size:
    transform = getattr(model, "transform", None)
    fixed = getattr(transform, "fixed_size", None)
    if fixed is not None:
        return int(fixed[1]), int(fixed[0])
    side = int(getattr(transform, "min_size", (800,))[-1])
    return side, side


def preprocessing(name: str, model: nn.Module, weights_name: str | None) -> Preprocessing:
    """How the weights' own transforms prepare an image; for random weights, those of the default weights."""
    assumed = assumed_preprocessing(model)
    if assumed.form in ("image-list", "image-pair"):
        return assumed
    weights = _weights(name, weights_name or "DEFAULT")
    transforms = weights.transforms()
    sizes = {key: getattr(transforms, key, None) for key in ("crop_size", "resize_size")}
    crop, resize = (value[0] if isinstance(value, list | tuple) else value for value in sizes.values())
    weights_crop = crop
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
        form=assumed.form,
        frames=assumed.frames,
        normalization_from="weights" if weights_name else "family",
        size_from="weights" if weights_name and crop == weights_crop else "family",
    )


def _weights(name: str, weights_name: str) -> Any:
    members = models.get_model_weights(name).__members__
    # The quantisable models stay unquantised here, and take the weights that theirs were made from.
    known = {key: weights.meta.get("unquantized", weights) for key, weights in members.items()}
    known |= {weights.name: weights for weights in known.values()}
    if weights_name not in known:
        hint = near_names(weights_name, known) or f"; known: {', '.join(known)}"
        raise SourceError(f"torchvision's {name} has no weights {weights_name!r}, no FILE of that name either{hint}")
    return known[weights_name]


def _defaults(name: str) -> dict[str, Any]:
    """Arguments of ours: the slow and warned-of initialisation of two networks would be thrown away."""
    slow = name.removeprefix("quantized_") in ("googlenet", "inception_v3")
    return {"init_weights": False} if slow else {}


def _set_by_weights(name: str, weights: Any) -> dict[str, Any]:
    """The constructor arguments that torchvision changes on its own when weights are given."""
    if name in ("googlenet", "quantized_googlenet", "quantized_inception_v3"):
        return {"transform_input": True, "aux_logits": False}
    if name == "inception_v3":
        return {"transform_input": True}
    if name.startswith("vit_") and weights.meta["min_size"][0] != 224:
        return {"image_size": weights.meta["min_size"][0]}
    return {}


def _check_arguments(name: str, arguments: Mapping[str, Any]) -> None:
    """Weights are chosen by their own option: as an argument they could make a stored reference download something."""
    for key in arguments:
        if key in ("weights", "weights_backbone", "progress", "pretrained", "pretrained_backbone"):
            raise SourceError(f"{key!r} is not an argument for torchvision's {name}; choose weights with --weights")


def _reason(error: Exception) -> str:
    reason = getattr(error, "reason", None) or error
    return " ".join(str(reason).split()) or type(error).__name__
