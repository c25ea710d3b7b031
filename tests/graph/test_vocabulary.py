from __future__ import annotations

import operator

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from asymswap.graph.vocabulary import ACTIVATIONS, OTHERS, canonical

ACTIVATION_CLASSES = [
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Sigmoid, nn.Tanh,
    nn.Softmax, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh,
]  # fmt: skip


@pytest.mark.parametrize("activation", ACTIVATION_CLASSES, ids=lambda cls: cls.__name__)
def test_activation_classes_are_known(activation: type[nn.Module]) -> None:
    assert canonical(activation.__name__) in ACTIVATIONS


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (nn.BatchNorm2d.__name__, "batch_norm"),
        (nn.SyncBatchNorm.__name__, "batch_norm"),
        ("FrozenBatchNorm2d", "batch_norm"),
        (nn.AdaptiveAvgPool2d.__name__, "avg_pool"),
        (nn.MaxPool2d.__name__, "max_pool"),
        (F.max_pool2d.__name__, "max_pool"),
        (F.relu.__name__, "relu"),
        (torch.cat.__name__, "concat"),
        (operator.add.__name__, "add"),
        (operator.iadd.__name__, "add"),
        ("add_", "add"),
        (operator.mul.__name__, "mul"),
        (operator.imul.__name__, "mul"),
        ("mul_", "mul"),
        (operator.isub.__name__, "sub"),
        (operator.truediv.__name__, "div"),
        (operator.itruediv.__name__, "div"),
        (F.relu_.__name__, "relu"),
        (torch.flatten.__name__, "flatten"),
        (nn.Linear.__name__, "linear"),
        (nn.ConvTranspose2d.__name__, "conv_transpose"),
        (nn.LayerNorm.__name__, "layer_norm"),
        (nn.Dropout2d.__name__, "dropout"),
        (nn.Upsample.__name__, "interpolate"),
    ],
)
def test_canonical_names(name: str, expected: str) -> None:
    assert canonical(name) == expected
    assert expected in ACTIVATIONS | OTHERS
