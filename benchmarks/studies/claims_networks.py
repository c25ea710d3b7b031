"""Networks of claims.py: those of `cifar:`, narrow enough to train many times on two cores."""

from __future__ import annotations

from torch import nn

from asymswap.models.networks import BasicBlock, DenseNet, ResNet, SqueezeExcite, project_shortcut

WIDTHS = (8, 16, 32, 64)
REDUCTION = 4
"""Of squeeze-and-excitation: the usual 16 would leave no channel of 8."""


def resnet18(num_classes: int = 10, in_channels: int = 3) -> nn.Module:
    """`cifar:resnet18` at an eighth of its width."""
    return ResNet(WIDTHS, (2, 2, 2, 2), project_shortcut, num_classes=num_classes, in_channels=in_channels)


def se_resnet18(num_classes: int = 10, in_channels: int = 3) -> nn.Module:
    """`cifar:se-resnet18` at an eighth of its width."""
    model = resnet18(num_classes, in_channels)
    for block in model.modules():
        if isinstance(block, BasicBlock):
            block.se = SqueezeExcite(block.conv2.out_channels, REDUCTION)
    return model


def densenet(num_classes: int = 10, in_channels: int = 3) -> nn.Module:
    """`cifar:densenet` with growth 8, not 12, and four blocks of three layers, halved between, not three of eight.

    Four, so that it ends at the same feature maps as the others.
    """
    return DenseNet((3, 3, 3, 3), 8, stem=16, compression=0.5, num_classes=num_classes, in_channels=in_channels)
