"""Modules that exist already: what they are, from where they can be built again, and what they take."""

from __future__ import annotations

from torch import nn

from asymswap.fileformats.torch_files import to_structure
from asymswap.models import timm_models
from asymswap.models.family import input_channels
from asymswap.models.opened import OpenedModel
from asymswap.models.preprocessing import with_channels
from asymswap.models.torchvision_models import assumed_preprocessing
from asymswap.types import Origin


def describe_module(model: nn.Module, weights: str) -> OpenedModel:
    """An OpenedModel of a module: its structure is stored where the allowlist can read it back."""
    name = f"{type(model).__module__}.{type(model).__qualname__}"
    # Mostly 224 x 224 and ImageNet's statistics, as most networks take; it says what of it is a guess.
    preprocessing = with_channels(assumed_preprocessing(model), input_channels(model))
    skeleton = to_structure(model)
    if skeleton is not None:
        return OpenedModel(model, Origin(f"skeleton:{name}"), preprocessing, weights, skeleton=skeleton)
    origin = timm_models.origin_of(model)
    if origin is not None:
        preprocessing = timm_models.preprocessing_of(model, origin.arguments)
        return OpenedModel(model, origin, preprocessing, weights)
    if timm_models.made_by_timm(model) is not None:
        preprocessing = timm_models.preprocessing_of(model, {})
    note = f"load the result with asymswap.load(path, model=…), for {name} is not made of allowlisted classes alone"
    return OpenedModel(model, Origin(f"class:{name}"), preprocessing, weights, (note,))
