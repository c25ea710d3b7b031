"""Networks of which tests/data/specimens has checkpoints; they stay as they are, or the files fit no longer."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

SIZE = (4, 12, 12)


class Net(nn.Module):
    """A conv of stride 2, a grouped one, a pointwise one, one with a bias and no batch norm, and a residual sum."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(4, 8, 3, stride=2, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2, bias=False)
        self.norm2 = nn.BatchNorm2d(8)
        self.pointwise = nn.Conv2d(8, 6, 1)
        self.biased = nn.Conv2d(6, 6, 3, padding=1)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.stem(x)).relu()
        x = (x + self.norm2(self.grouped(x))).relu()
        return self.head(self.biased(self.pointwise(x)).relu().mean((2, 3)))


class Scale(nn.Module):
    """Multiplies by a number that is no tensor of the state dict."""

    def __init__(self, kept: Any = None) -> None:
        super().__init__()
        self.kept = {"scale": 1.0} if kept is None else kept

    def get_extra_state(self) -> Any:
        return self.kept

    def set_extra_state(self, state: Any) -> None:
        self.kept = state

    def forward(self, x: Tensor) -> Tensor:
        return x * self.kept["scale"]


class ExtraNet(nn.Module):
    """With extra state of every form that a file can hold."""

    def __init__(self, kept: Any = None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.scale = Scale(kept)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale(self.norm(self.conv(x))).mean((2, 3))


def extra_state() -> dict[Any, Any]:
    """What the file of an `ExtraNet` keeps beside tensors."""
    return {
        "scale": 2.5,
        "history": [1, -2, float("inf"), None, True, "a\nb"],
        "pair": (1, OrderedDict(x=2.0)),
        3: {"largest": torch.arange(3.0), "again": torch.ones(2, dtype=torch.uint8)},
    }


class TiedNet(nn.Module):
    """A conv that runs twice under two names, and two pointwise convs with one weight."""

    def __init__(self) -> None:
        super().__init__()
        shared, one, other = nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1)
        other.weight = one.weight
        self.layers = nn.Sequential(nn.Conv2d(4, 6, 3, stride=2), shared, nn.ReLU(), one, shared, other)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).mean((2, 3))


def structure() -> nn.Sequential:
    """Of torch's own classes alone, so that a file stores its structure and needs nobody to build it."""
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, (3, 5), padding="same", dilation=2, padding_mode="reflect"),
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    )
