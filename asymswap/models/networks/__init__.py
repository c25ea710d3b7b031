"""The small networks that torchvision lacks: those of CIFAR size, and the demo's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import nn

from asymswap.models.networks import densenet, resnet
from asymswap.types import Preprocessing

# Each takes `num_classes` and `in_channels` and returns the network with fresh weights.
BUILDERS: dict[str, Callable[..., nn.Module]] = {**resnet.BUILDERS, **densenet.BUILDERS}

# What the published checkpoints of these networks were trained with: ImageNet's statistics, not CIFAR's.
CIFAR_PREPROCESSING = Preprocessing(
    3, (32, 32), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), normalization_from="family", size_from="family"
)

# Mean and standard deviation of the training part's pixels on the scale [0, 1].
DIGITS_PREPROCESSING = Preprocessing(1, (8, 8), (0.3054,), (0.3761,), normalization_from="family", size_from="family")

# Written by benchmarks/train_digits_resnet.py.
DIGITS_WEIGHTS = Path(__file__).with_name("digits-resnet.safetensors")


def digits_resnet(num_classes: int = 10, in_channels: int = 1) -> nn.Module:
    """Build the demo's network for 8x8 digits: two stages of two basic blocks, 24 channels at 8x8 and 48 at 4x4."""
    return resnet.ResNet((24, 48), (2, 2), resnet.PadShortcut, num_classes=num_classes, in_channels=in_channels)
