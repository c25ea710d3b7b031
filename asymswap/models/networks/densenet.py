"""Densely connected networks of CIFAR size (Huang et al. 2017, "Densely connected convolutional networks").

The module names, and the order in which channels are joined (the new ones first), are those of the checkpoints in
circulation for 32x32 images: `conv1`, `dense1.0.conv1` …, `trans1.conv`, `bn`, `linear`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from asymswap.models.networks.resnet import class_scores, conv1x1, conv3x3, init_convs_


class DenseLayer(nn.Module):
    """BN-ReLU-conv3x3 that adds `growth` channels to its input (Huang et al. 2017, section 3)."""

    def __init__(self, in_channels: int, growth: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = conv3x3(in_channels, growth)

    def forward(self, x: Tensor) -> Tensor:
        """N x C x H x W to N x (growth + C) x H x W."""
        return torch.cat([self.conv1(F.relu(self.bn1(x))), x], 1)


class BottleneckLayer(nn.Module):
    """A dense layer with a 1x1 conv to 4 x `growth` channels before the 3x3 conv (Huang et al. 2017, DenseNet-B)."""

    def __init__(self, in_channels: int, growth: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = conv1x1(in_channels, 4 * growth)
        self.bn2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = conv3x3(4 * growth, growth)

    def forward(self, x: Tensor) -> Tensor:
        """N x C x H x W to N x (growth + C) x H x W."""
        out = self.conv1(F.relu(self.bn1(x)))
        return torch.cat([self.conv2(F.relu(self.bn2(out))), x], 1)


class Transition(nn.Module):
    """BN-ReLU-conv1x1 and 2x2 average pooling between two dense blocks."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(in_channels)
        self.conv = conv1x1(in_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """N x C x H x W to N x C' x H/2 x W/2."""
        return F.avg_pool2d(self.conv(F.relu(self.bn(x))), 2)


class DenseNet(nn.Module):
    """A 3x3 stem of `stem` channels, dense blocks `dense1` … with transitions `trans1` … between them, a classifier.

    `depths` gives the layers of each block; a transition keeps the fraction `compression` of the channels.
    """

    def __init__(
        self,
        layer: Callable[[int, int], nn.Module],
        depths: Sequence[int],
        growth: int,
        *,
        stem: int,
        compression: float,
        num_classes: int = 10,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_channels, stem)
        self.stages: list[str] = []
        channels = stem
        for number, depth in enumerate(depths, start=1):
            if number > 1:
                kept = int(channels * compression)
                self.add_module(f"trans{number - 1}", Transition(channels, kept))
                self.stages.append(f"trans{number - 1}")
                channels = kept
            layers = [layer(channels + i * growth, growth) for i in range(depth)]
            self.add_module(f"dense{number}", nn.Sequential(*layers))
            self.stages.append(f"dense{number}")
            channels += depth * growth
        self.bn = nn.BatchNorm2d(channels)
        self.linear = nn.Linear(channels, num_classes)
        init_convs_(self)

    def forward(self, x: Tensor) -> Tensor:
        """N x channels x H x W to N x classes."""
        out = self.conv1(x)
        for name in self.stages:
            out = self.get_submodule(name)(out)
        return class_scores(F.relu(self.bn(out)), self.linear)


BUILDERS: dict[str, Callable[..., nn.Module]] = {
    # 28 layers, growth 12: Huang et al. 2017's plain network for CIFAR with 8 layers a block, not 12.
    "densenet": partial(DenseNet, DenseLayer, (8, 8, 8), 12, stem=16, compression=1.0),
    # Huang et al. 2017, table 1, for 32x32 images: a 3x3 stem at stride 1 and no max-pool.
    "densenet121": partial(DenseNet, BottleneckLayer, (6, 12, 24, 16), 32, stem=64, compression=0.5),
}
