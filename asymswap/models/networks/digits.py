"""The demo's network: a small residual network for scikit-learn's 8x8 images of digits, shipped with its weights."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from asymswap.models.networks.resnet import PadShortcut, ResNet
from asymswap.types import Preprocessing

# Mean and standard deviation of the training part's pixels on the scale [0, 1].
DIGITS_PREPROCESSING = Preprocessing(
    channels=1, size=(8, 8), mean=(0.3054,), std=(0.3761,), normalization_from="family", size_from="family"
)

# Written by benchmarks/train_digits_resnet.py.
DIGITS_WEIGHTS = Path(__file__).with_name("digits-resnet.safetensors")


def digits_resnet(num_classes: int = 10, in_channels: int = 1) -> nn.Module:
    """Two stages of two basic blocks, 24 channels at 8x8 and 48 at 4x4 (He et al. 2015, with option-A shortcuts)."""
    return ResNet((24, 48), (2, 2), PadShortcut, num_classes=num_classes, in_channels=in_channels)
