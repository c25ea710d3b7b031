"""What the small networks have in common."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


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
    """Draw every conv's weights anew, scaled for ReLU by fan-in (He et al. 2015, "Delving deep into rectifiers")."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
