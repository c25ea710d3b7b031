"""Residual networks of CIFAR size (He et al. 2015), with squeeze-and-excitation (Hu et al. 2018) where asked for.

The module names are those of the checkpoints in circulation: `conv1`, `bn1`, `layer1.0.conv1` …, `shortcut`, `linear`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Makes the shortcut of a block that changes the shape, from input channels, output channels and stride.
Shortcut = Callable[[int, int, int], nn.Module]


def conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    """A 3x3 conv that keeps the size of the feature map (at stride 1), without bias: batch norm brings its own."""
    return nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=stride, padding=1, bias=False)


def conv1x1(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    """A 1x1 conv without bias."""
    return nn.Conv2d(in_channels, out_channels, kernel_size=1, stride=stride, bias=False)


def class_scores(features: Tensor, linear: nn.Linear) -> Tensor:
    """Average N x C x H x W features over their pixels and map them to N x classes scores."""
    scores: Tensor = linear(F.adaptive_avg_pool2d(features, 1).flatten(1))
    return scores


def init_convs_(model: nn.Module) -> None:
    """Draw every conv's weights again, scaled for ReLU by fan-in (He et al. 2015, "Delving deep into rectifiers")."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")


class PadShortcut(nn.Module):
    """Option A of He et al. 2015, section 3.3: every `stride`-th pixel; new channels are zero, half on each side."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.before = (out_channels - in_channels) // 2
        self.after = out_channels - in_channels - self.before

    def forward(self, x: Tensor) -> Tensor:
        """N x C x H x W to N x C' x H/stride x W/stride."""
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.before, self.after))


def project_shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    """Option B of He et al. 2015, section 3.3: a 1x1 conv and batch norm."""
    return nn.Sequential(conv1x1(in_channels, out_channels, stride), nn.BatchNorm2d(out_channels))


class SqueezeExcite(nn.Module):
    """Channels weighted by what the whole feature map holds (Hu et al. 2018, equations 2 to 4).

    The two layers have no biases: the authors found that ResNets do better without.
    """

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, channels // reduction, bias=False)
        self.fc2 = nn.Linear(channels // reduction, channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """N x C x H x W to the same shape."""
        squeezed = F.adaptive_avg_pool2d(x, 1).flatten(1)
        weights = torch.sigmoid(self.fc2(F.relu(self.fc1(squeezed))))
        return x * weights[:, :, None, None]


class BasicBlock(nn.Module):
    """Two 3x3 convs and a shortcut around them (He et al. 2015, figure 2)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, shortcut: Shortcut, squeeze: bool) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_channels, out_channels, stride)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = conv3x3(out_channels, out_channels)
        self.bn2 = nn.BatchNorm2d(out_channels)
        reshapes = stride != 1 or in_channels != out_channels
        # An empty Sequential hands its input through and, unlike Identity, leaves no node in the fx graph.
        self.se = SqueezeExcite(out_channels) if squeeze else nn.Sequential()
        self.shortcut = shortcut(in_channels, out_channels, stride) if reshapes else nn.Sequential()

    def forward(self, x: Tensor) -> Tensor:
        """N x C x H x W to N x C' x H/stride x W/stride."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.se(self.bn2(self.conv2(out)))
        return F.relu(out + self.shortcut(x))


class ResNet(nn.Module):
    """A 3x3 stem, stages `layer1`, `layer2` … of basic blocks, each after the first at half the size, a classifier.

    `widths` and `depths` give the channels and the blocks of each stage.
    """

    def __init__(
        self,
        widths: Sequence[int],
        depths: Sequence[int],
        shortcut: Shortcut,
        *,
        squeeze: bool = False,
        num_classes: int = 10,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_channels, widths[0])
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.stages = [f"layer{number}" for number in range(1, len(widths) + 1)]
        channels = widths[0]
        for name, width, depth in zip(self.stages, widths, depths, strict=True):
            stride = 1 if name == self.stages[0] else 2
            first = BasicBlock(channels, width, stride, shortcut, squeeze)
            others = [BasicBlock(width, width, 1, shortcut, squeeze) for _ in range(depth - 1)]
            self.add_module(name, nn.Sequential(first, *others))
            channels = width
        self.linear = nn.Linear(channels, num_classes)
        init_convs_(self)

    def forward(self, x: Tensor) -> Tensor:
        """N x channels x H x W to N x classes."""
        out = F.relu(self.bn1(self.conv1(x)))
        for name in self.stages:
            out = self.get_submodule(name)(out)
        return class_scores(out, self.linear)


def _cifar_resnet(depth: int, squeeze: bool = False) -> Callable[..., ResNet]:
    """Build the network of `depth` = 6n + 2 layers for 32x32 images of He et al. 2015, section 4.2, with option A."""
    return partial(ResNet, (16, 32, 64), ((depth - 2) // 6,) * 3, PadShortcut, squeeze=squeeze)


# ResNet-18 of He et al. 2015, table 1, for 32x32 images: a 3x3 stem at stride 1 and no max-pool.
_resnet18 = partial(ResNet, (64, 128, 256, 512), (2, 2, 2, 2), project_shortcut)

BUILDERS: dict[str, Callable[..., nn.Module]] = {
    **{f"resnet{depth}": _cifar_resnet(depth) for depth in (20, 32, 44, 56, 110)},
    "resnet18": _resnet18,
    "se-resnet20": _cifar_resnet(20, squeeze=True),
    "se-resnet18": partial(_resnet18, squeeze=True),
}
