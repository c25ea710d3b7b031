"""The models of torchvision: build them, fill them with published weights, describe them to be rebuilt."""

import inspect
import re
import sys
from collections.abc import Mapping
from dataclasses import replace
from http.client import HTTPException
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchvision import models

from asymswap.errors import SourceError, reason_of
from asymswap.fileformats.detect import sha256, sniff
from asymswap.fileformats.state_dict import State
from asymswap.fileformats.torch_files import load_object, to_structure
from asymswap.models import family
from asymswap.models.family import Arguments, Family, Fit, input_channels
from asymswap.models.opened import OpenedModel
from asymswap.models.preprocessing import IMAGENET_MEAN, IMAGENET_STD, with_channels
from asymswap.types import InputForm, KnownFrom, Origin, Preprocessing, Size

PREFIX = "torchvision:"

# What the models of torchvision's packages take, where it is not a batch of images.
_FORMS: dict[str, InputForm] = {"detection": "image-list", "optical_flow": "image-pair", "video": "clips"}
_FRAMES = 16  # of a clip: what the published video networks were trained on, and the least that some of them take
_DELETE = "delete that file if it is damaged"
# Keys of files that older versions wrote, torchvision's own published ones among them.
_OLD_KEYS = (
    (re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)"), r"\1\2"),
    (re.compile(r"(encoder_layer_\d+\.mlp\.)linear_1\."), r"\g<1>0."),
    (re.compile(r"(encoder_layer_\d+\.mlp\.)linear_2\."), r"\g<1>3."),
)


def classifiers() -> list[str]:
    """Return the names of torchvision's image classifiers."""
    return list(models.list_models(models))


def with_current_keys(state: State) -> State:
    """Return the state dict under the names that torchvision's densenets and vision transformers have now."""
    for pattern, name in _OLD_KEYS:
        state = {pattern.sub(name, key): tensor for key, tensor in state.items()}
    return state


def assumed_preprocessing(model: nn.Module) -> Preprocessing:
    """Return what a model of which nothing else is known most likely takes, by its class and its attributes."""
    _, known, module = type(model).__module__.partition("torchvision.models.")
    form, side = _FORMS.get(module.partition(".")[0], "images"), getattr(model, "image_size", None)
    size: Size = (side, side) if isinstance(side, int) else (224, 224)
    mean, std = IMAGENET_MEAN, IMAGENET_STD
    if form == "image-list":
        # Detectors normalise and resize by themselves; they leave this size as it is, so the costs are of it.
        transform = getattr(model, "transform", None)
        fixed, shortest = getattr(transform, "fixed_size", None), int(getattr(transform, "min_size", (800,))[-1])
        size = (shortest, shortest) if fixed is None else (int(fixed[1]), int(fixed[0]))
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    elif form == "image-pair":
        size, mean, std = (256, 256), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
    by_size: KnownFrom = "family" if known or isinstance(side, int) else "assumed"
    frames = _FRAMES if form == "clips" else 1
    assumed = Preprocessing(3, size, mean, std, form=form, frames=frames, size_from=by_size)
    return replace(assumed, normalization_from="family" if known else "assumed")


class Torchvision(Family):
    """`torchvision:NAME`, or NAME alone."""

    prefix = PREFIX

    def names(self) -> list[str]:
        return [f"{PREFIX}{name}" for name in models.list_models()]

    def construct(self, reference: str, arguments: Arguments) -> nn.Module:
        """Build the model with random weights, downloading nothing; `in_channels` replaces its first conv."""
        name = reference.removeprefix(PREFIX)
        family.check_arguments(f"torchvision's {name}", arguments)
        builder = models.get_model_builder(name)
        # Given weights are ours to load.
        none = {key: None for key in ("weights", "weights_backbone") if key in inspect.signature(builder).parameters}
        model = _make(name, {key: value for key, value in arguments.items() if key != "in_channels"} | none)
        if "in_channels" not in arguments:
            return model
        channels = arguments["in_channels"]
        first, conv = next((item for item in model.named_modules() if isinstance(item[1], nn.Conv2d)), ("", None))
        # What a network is for, as torchvision's packages say: classification, segmentation, detection, video …
        package: list[str] = builder.__module__.split(".")
        if conv is None or (len(package) > 3 and package[2] != "segmentation"):
            raise SourceError(f"{reference} does not take 'in_channels'; its input has the channels of an image")
        if type(channels) is not int or channels < 1 or channels % conv.groups:
            raise SourceError(f"{reference} cannot have in_channels={channels!r}; give a whole number from 1 on")
        if channels != conv.in_channels:
            same = ("out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
            kept = {field: getattr(conv, field) for field in same}
            model.set_submodule(first, nn.Conv2d(channels, bias=conv.bias is not None, **kept))
        return model

    def weights(self, reference: str, name: str | None, arguments: Arguments) -> OpenedModel:
        """Return the model with published weights, from torch.hub's cache, or downloaded into it; raise SourceError."""
        model_name = reference.removeprefix(PREFIX)
        weights = _weights(model_name, name or "DEFAULT")
        family.check_arguments(f"torchvision's {model_name}", arguments)
        cached, state = _read_published(model_name, weights)
        # While this is set, torchvision's builder takes our state dict for the weights' own; it still sets what the
        # weights ask for.
        weights.get_state_dict = lambda **_: state
        try:
            model = _make(model_name, {**arguments, "weights": weights, "progress": False})
        except Exception as error:
            # Weights that do not fit can raise about anything; so can a builder at an argument of another network.
            if arguments and isinstance(error, TypeError | ValueError):
                what = f"torchvision's {model_name} does not take {dict(arguments)}: {reason_of(error, 500)}"
            else:
                what = f"cannot load {cached} into {model_name}: {reason_of(error, 500)}; {_DELETE}"
            raise SourceError(what) from None
        finally:
            del weights.get_state_dict
        origin = Origin(reference, {**_set_by_weights(model_name, weights), **arguments})
        # With weights, torchvision builds detectors and the like otherwise than without: store what it built.
        skeleton = None if model_name in classifiers() else to_structure(model)
        preprocessing = self.preprocessing(reference, model, arguments, weights.name)
        return OpenedModel(model, origin, preprocessing, weights.name, skeleton=skeleton, private=True)

    def describe(self, model: nn.Module, reference: str, arguments: Arguments, weights: str) -> OpenedModel:
        """Describe a filled model, with a note on the switch that published weights turn on and files do not have."""
        opened = super().describe(model, reference, arguments, weights)
        switches = weights != "random" and reference.removeprefix(PREFIX) in ("googlenet", "inception_v3")
        if switches and "transform_input" not in arguments:
            note = "set the argument transform_input=True for weights that descend from torchvision's; it is off here"
            opened = replace(opened, notes=(note,))
        return opened

    def fit(self, reference: str, arguments: Arguments, state: State) -> Fit:
        """Fit as any family does, under the names that densenets and vision transformers have now."""
        return super().fit(reference, arguments, with_current_keys(state))

    def preprocessing(self, reference: str, model: nn.Module, arguments: Arguments, weights: str = "") -> Preprocessing:
        """Return how the transforms of these weights, or of the default ones, prepare an image."""
        assumed = assumed_preprocessing(model)
        if assumed.form in ("image-list", "image-pair"):
            return with_channels(assumed, input_channels(model))
        transforms = _weights(reference.removeprefix(PREFIX), weights or "DEFAULT").transforms()
        sizes = (getattr(transforms, key, None) for key in ("crop_size", "resize_size"))
        crop, resize = (value[0] if isinstance(value, list | tuple) else value for value in sizes)
        # Vision transformers fix their input size when they are built.
        fixed = getattr(model, "image_size", None)
        other_size = isinstance(fixed, int) and fixed != crop
        side = (fixed if other_size else crop) or 224
        known = replace(
            assumed,
            size=(side, side),
            mean=tuple(getattr(transforms, "mean", None) or IMAGENET_MEAN),
            std=tuple(getattr(transforms, "std", None) or IMAGENET_STD),
            resize=None if other_size else resize,
            interpolation=getattr(getattr(transforms, "interpolation", None), "value", "bilinear"),
            normalization_from="weights" if weights else "family",
            size_from="weights" if weights and not other_size else "family",
        )
        return with_channels(known, input_channels(model))


def as_published(opened: OpenedModel, origin: Origin, weights: str) -> OpenedModel:
    """Describe a filled model whose weights have been found to be published ones."""
    settings = ", ".join(f"{key}={value}" for key, value in origin.arguments.items())
    sets = f", which sets {settings}" if settings else ""
    note = f"known by its SHA-256 as torchvision's {weights} of {origin.reference.removeprefix(PREFIX)}{sets}"
    known = Torchvision().preprocessing(origin.reference, opened.model, {}, weights)
    return replace(opened, preprocessing=known, notes=(note,))


def published(digest: str) -> tuple[Origin | None, str]:
    """Return the model and the name of the published weights that a file is, by its SHA-256; (None, "") for others."""
    for name in models.list_models():
        for weights in models.get_model_weights(name):
            digits = torch.hub.HASH_REGEX.search(weights.url.rpartition("/")[2])  # the first of the SHA-256
            if digits and digits[1][:8] == digest[:8] and not name.startswith("quantized_"):
                # The heads that torchvision drops from its pretrained models are in their files.
                arguments = {k: v for k, v in _set_by_weights(name, weights).items() if k != "aux_logits"}
                return Origin(f"{PREFIX}{name}", arguments), weights.name
    return None, ""


def _make(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    if name.removeprefix("quantized_") in ("googlenet", "inception_v3"):
        # Their slow and warned-of initialisation would be thrown away.
        arguments = {"init_weights": False, **arguments}
    return models.get_model(name, **arguments)  # type: ignore[no-any-return]


def _read_published(name: str, weights: Any) -> tuple[Path, Any]:
    """Return the file of these weights in torch.hub's cache, downloaded where it is missing, and its state dict."""
    cached = Path(torch.hub.get_dir()) / "checkpoints" / weights.url.rpartition("/")[2]
    found = torch.hub.HASH_REGEX.search(cached.name)
    digits = found[1] if found else ""
    try:
        if not cached.exists():
            cached.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(weights.url, str(cached), digits or None, sys.stderr.isatty())
    except (OSError, HTTPException, RuntimeError) as error:
        # The RuntimeError is torch's word for a download with another hash than its name says.
        why = reason_of(getattr(error, "reason", None) or error, 500)
        where = f"are not in {cached.parent} and cannot be downloaded ({why}); {family.OTHER_WEIGHTS}"
        raise SourceError(f"the weights {weights.name} of {name} {where}") from None
    try:
        kind = sniff(cached)  # read as any file: torchvision would unpickle it without restriction
        if not sha256(cached).startswith(digits):
            raise SourceError("its SHA-256 is not the one in its name")
        return cached, load_object(cached, kind, False, "it", 'take weights of your own with `weights="FILE"`')
    except SourceError as error:
        raise SourceError(f"cannot load {cached} into {name}: {error}; {_DELETE}") from None


def _weights(name: str, weights_name: str) -> Any:
    members = models.get_model_weights(name).__members__
    # The quantisable models stay unquantised here, and take the weights that theirs were made from.
    known = {key: weights.meta.get("unquantized", weights) for key, weights in members.items()}
    known |= {weights.name: weights for weights in known.values()}
    family.check_weights(f"torchvision's {name}", weights_name, known)
    return known[weights_name]


def _set_by_weights(name: str, weights: Any) -> dict[str, Any]:
    """Return the constructor arguments that torchvision changes on its own when weights are given."""
    if name in ("googlenet", "quantized_googlenet", "quantized_inception_v3"):
        return {"transform_input": True, "aux_logits": False}
    if name == "inception_v3":
        return {"transform_input": True}
    if name.startswith("vit_") and weights.meta["min_size"][0] != 224:
        return {"image_size": weights.meta["min_size"][0]}
    return {}
