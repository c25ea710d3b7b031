"""The small networks that torchvision lacks: those of CIFAR size, and the demo's.

Residual networks (He et al. 2015), with squeeze-and-excitation (Hu et al. 2018) where asked for, and densely connected
ones (Huang et al. 2017, "Densely connected convolutional networks"). The module names, and the order in which dense
layers join channels (the new ones first), are those of the checkpoints in circulation for 32x32 images.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from asymswap.models.preprocessing import IMAGENET_MEAN, IMAGENET_STD
from asymswap.types import Preprocessing

# What the published checkpoints of these networks were trained with: ImageNet's statistics, not CIFAR's.
CIFAR_PREPROCESSING = Preprocessing(
    3, (32, 32), IMAGENET_MEAN, IMAGENET_STD, normalization_from="family", size_from="family"
)
# Mean and standard deviation of the training part's pixels on the scale [0, 1].
DIGITS_PREPROCESSING = Preprocessing(1, (8, 8), (0.3054,), (0.3761,), normalization_from="family", size_from="family")
# Written by benchmarks/train_digits_resnet.py.
DIGITS_WEIGHTS = Path(__file__).with_name("digits-resnet.safetensors")

# Makes the shortcut of a block that changes the shape, from input channels, output channels and stride.
Shortcut = Callable[[int, int, int], nn.Module]


def _conv(in_channels: int, out_channels: int, side: int, stride: int = 1) -> nn.Conv2d:
    """A square conv that keeps the size of the feature map (at stride 1), without bias: batch norm brings its own."""
    return nn.Conv2d(in_channels, out_channels, side, stride, padding=side // 2, bias=False)


class _Classifier(nn.Module):
    """Stages by name, and a linear layer on the average of the last feature map."""

    def _finish_(self, channels: int, num_classes: int) -> None:
        """Add the classifier, and draw every conv's weights, scaled for ReLU by fan-in (He et al. 2015, Rectifiers)."""
        self.linear = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def _run_stages(self, out: Tensor) -> Tensor:
        for name, stage in self.named_children():
            if name.startswith(("layer", "dense", "trans")):
                out = stage(out)
        return out

    def _scores(self, features: Tensor) -> Tensor:
        """N x C x H x W to N x classes."""
        return self.linear(F.adaptive_avg_pool2d(features, 1).flatten(1))  # type: ignore[no-any-return]


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
    return nn.Sequential(_conv(in_channels, out_channels, 1, stride), nn.BatchNorm2d(out_channels))


class SqueezeExcite(nn.Module):
    """Channels weighted by what the whole feature map holds (Hu et al. 2018, equations 2 to 4)."""

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, channels // reduction, bias=False)  # ResNets do better without, they found
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
        self.conv1 = _conv(in_channels, out_channels, 3, stride)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = _conv(out_channels, out_channels, 3)
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


class ResNet(_Classifier):
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
        self.conv1 = _conv(in_channels, widths[0], 3)
        self.bn1 = nn.BatchNorm2d(widths[0])
        channels, stride = widths[0], 1
        for number, (width, depth) in enumerate(zip(widths, depths, strict=True), start=1):
            first = BasicBlock(channels, width, stride, shortcut, squeeze)
            others = [BasicBlock(width, width, 1, shortcut, squeeze) for _ in range(depth - 1)]
            self.add_module(f"layer{number}", nn.Sequential(first, *others))
            channels, stride = width, 2
        self._finish_(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """N x channels x H x W to N x classes."""
        return self._scores(self._run_stages(F.relu(self.bn1(self.conv1(x)))))


class DenseLayer(nn.Module):
    """BN-ReLU-conv3x3 that adds `growth` channels to its input (Huang et al. 2017, section 3).

    With `bottleneck` after another BN-ReLU and a 1x1 conv to 4 x `growth` channels (DenseNet-B).
    """

    def __init__(self, in_channels: int, growth: int, bottleneck: bool = False) -> None:
        super().__init__()
        self.bottleneck = bottleneck
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = _conv(in_channels, 4 * growth, 1) if bottleneck else _conv(in_channels, growth, 3)
        if bottleneck:
            self.bn2 = nn.BatchNorm2d(4 * growth)
            self.conv2 = _conv(4 * growth, growth, 3)

    def forward(self, x: Tensor) -> Tensor:
        """N x C x H x W to N x (growth + C) x H x W."""
        out = self.conv1(F.relu(self.bn1(x)))
        if self.bottleneck:
            out = self.conv2(F.relu(self.bn2(out)))
        return torch.cat([out, x], 1)


class Transition(nn.Module):
    """BN-ReLU-conv1x1 and 2x2 average pooling between two dense blocks."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(in_channels)
        self.conv = _conv(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """N x C x H x W to N x C' x H/2 x W/2."""
        return F.avg_pool2d(self.conv(F.relu(self.bn(x))), 2)


class DenseNet(_Classifier):
    """A 3x3 stem of `stem` channels, dense blocks `dense1` … with transitions `trans1` … between them, a classifier.

    `depths` gives the layers of each block; a transition keeps the fraction `compression` of the channels.
    """

    def __init__(
        self,
        depths: Sequence[int],
        growth: int,
        *,
        stem: int,
        compression: float,
        bottleneck: bool = False,
        num_classes: int = 10,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        self.conv1 = _conv(in_channels, stem, 3)
        channels = stem
        for number, depth in enumerate(depths, start=1):
            if number > 1:
                kept = int(channels * compression)
                self.add_module(f"trans{number - 1}", Transition(channels, kept))
                channels = kept
            layers = [DenseLayer(channels + i * growth, growth, bottleneck) for i in range(depth)]
            self.add_module(f"dense{number}", nn.Sequential(*layers))
            channels += depth * growth
        self.bn = nn.BatchNorm2d(channels)
        self._finish_(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """N x channels x H x W to N x classes."""
        return self._scores(F.relu(self.bn(self._run_stages(self.conv1(x)))))


# The networks of 6n + 2 layers for 32x32 images of He et al. 2015, section 4.2, with option A.
_resnets = {6 * n + 2: partial(ResNet, (16, 32, 64), (n, n, n), PadShortcut) for n in (3, 5, 7, 9, 18)}
# ResNet-18 of He et al. 2015, table 1, for 32x32 images: a 3x3 stem at stride 1 and no max-pool.
_resnet18 = partial(ResNet, (64, 128, 256, 512), (2, 2, 2, 2), project_shortcut)

# Each takes `num_classes` and `in_channels` and returns the network with fresh weights.
BUILDERS: dict[str, Callable[..., nn.Module]] = {
    **{f"resnet{depth}": builder for depth, builder in _resnets.items()},
    "resnet18": _resnet18,
    "se-resnet20": partial(_resnets[20], squeeze=True),
    "se-resnet18": partial(_resnet18, squeeze=True),
    # 28 layers, growth 12: Huang et al. 2017's plain network for CIFAR with 8 layers a block, not 12.
    "densenet": partial(DenseNet, (8, 8, 8), 12, stem=16, compression=1.0),
    # Huang et al. 2017, table 1, for 32x32 images: a 3x3 stem at stride 1 and no max-pool.
    "densenet121": partial(DenseNet, (6, 12, 24, 16), 32, stem=64, compression=0.5, bottleneck=True),
}

# The demo's network for 8x8 digits: two stages of two basic blocks, 24 channels at 8x8 and 48 at 4x4.
digits_resnet = partial(ResNet, (24, 48), (2, 2), PadShortcut, in_channels=1)
