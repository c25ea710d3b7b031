"""The small networks that torchvision lacks: those of CIFAR size, and the demo's."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from asymswap.models.networks import densenet, resnet
from asymswap.models.networks.digits import DIGITS_PREPROCESSING, DIGITS_WEIGHTS, digits_resnet
from asymswap.types import Preprocessing

__all__ = ["BUILDERS", "CIFAR_PREPROCESSING", "DIGITS_PREPROCESSING", "DIGITS_WEIGHTS", "digits_resnet"]

# Each takes `num_classes` and `in_channels` and returns the network with fresh weights.
BUILDERS: dict[str, Callable[..., nn.Module]] = {**resnet.BUILDERS, **densenet.BUILDERS}

# What the published checkpoints of these networks were trained with: ImageNet's statistics, not CIFAR's.
CIFAR_PREPROCESSING = Preprocessing(
    channels=3,
    size=(32, 32),
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    normalization_from="family",
    size_from="family",
)
