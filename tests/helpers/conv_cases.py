"""Convolutions of every form for property tests: small sizes, every field varied."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import nn

from asymswap.graph.trace import read_conv
from asymswap.types import Call, Site


@dataclass(frozen=True)
class Case:
    """A conv with random weights, an input that it can take, and its site."""

    conv: nn.Conv2d
    x: torch.Tensor

    @property
    def site(self) -> Site:
        """The site of this conv when it runs once on one image of this size."""
        y = self.conv(self.x)
        call = Call((self.x.shape[2], self.x.shape[3]), (y.shape[2], y.shape[3]))
        return Site("conv", read_conv(self.conv), (call,))


@st.composite
def cases(draw: st.DrawFn, dtype: torch.dtype = torch.float32, sides: Sequence[int] = (2, 3, 4, 5)) -> Case:
    """Any conv whose kernel has these sides, by default more than one row and column of taps."""
    groups = draw(st.integers(1, 3))
    group_in, group_out = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    kernel = (draw(st.sampled_from(sides)), draw(st.sampled_from(sides)))
    dilation = (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    padding = draw(st.one_of(st.sampled_from(["same", "valid"]), st.tuples(st.integers(0, 3), st.integers(0, 3))))
    stride = (1, 1) if padding == "same" else (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    torch.manual_seed(draw(st.integers(0, 2**16)))
    conv = nn.Conv2d(
        groups * group_in,
        groups * group_out,
        kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        bias=draw(st.booleans()),
        padding_mode=draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"])),
        dtype=dtype,
    )
    # Large enough for the dilated kernel, and for reflect padding, which needs more pixels than it adds.
    height, width = (d * (k - 1) + 1 + draw(st.integers(4, 7)) for d, k in zip(dilation, kernel, strict=True))
    return Case(conv, torch.randn(2, groups * group_in, height, width, dtype=dtype))
