from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conv_cases import Case, cases
from hypothesis import given
from torch.nn import functional as F

from asymswap.graph.trace import read_conv
from asymswap.replacements import _convs, load
from asymswap.types import ConvSpec


def pad_by_hand(case: Case) -> torch.Tensor:
    """The input as the conv sees it, border included."""
    conv = case.conv
    if conv.padding == "same":
        rows, columns = (d * (k - 1) // 2 for d, k in zip(conv.dilation, conv.kernel_size, strict=True))
    else:
        rows, columns = (0, 0) if conv.padding == "valid" else conv.padding
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    return F.pad(case.x, (columns, columns, rows, rows), mode=mode)


@given(case=cases(dtype=torch.float64, sides=(3, 5)))
def test_strips_see_the_centre_column_and_row_of_what_the_kernel_sees(case: Case) -> None:
    conv = case.conv
    (dh, dw), (kh, kw) = conv.dilation, conv.kernel_size
    padded = pad_by_hand(case)
    across, along = dw * (kw - 1) // 2, dh * (kh - 1) // 2
    seen = (padded[..., across : padded.shape[3] - across], padded[..., along : padded.shape[2] - along, :])
    for kernel, inputs in (((kh, 1), seen[0]), ((1, kw), seen[1])):
        strip, crop = _convs.centred(replace(read_conv(conv), bias=False), kernel)
        module = _convs.new_conv(strip)
        torch.nn.init.normal_(module.weight)
        got = _convs.CroppedSum({"strip": (module, crop)})(case.x)
        expected = F.conv2d(inputs, module.weight, None, conv.stride, 0, conv.dilation, conv.groups)
        assert got.shape == case.conv(case.x).shape
        assert torch.allclose(got, expected, atol=1e-12)


def test_taps_keep_their_places_about_the_middle() -> None:
    column, row = torch.arange(1.0, 4).reshape(1, 1, 3, 1), torch.tensor([10.0, 20, 30, 40, 50]).reshape(1, 1, 1, 5)
    square = _convs.placed(column, (3, 5)) + _convs.placed(row, (3, 5))
    assert square[0, 0].tolist() == [[0, 0, 1, 0, 0], [10, 20, 32, 40, 50], [0, 0, 3, 0, 0]]
    assert torch.equal(_convs.placed(square, (1, 5))[0, 0], torch.tensor([[10.0, 20, 32, 40, 50]]))
    assert _convs.placed(row, (1, 5), ((1, 1), (1, 2))).tolist() == [[[[0, 10, 30, 50, 0]]]]
    assert _convs.placed(row[..., :2], (1, 4), ((1, 3), (1, 1))).tolist() == [[[[10, 0, 0, 20]]]]


@pytest.mark.parametrize(
    ("conv", "reason"),
    [
        (ConvSpec(4, 4, (1, 1)), "a 1x1 kernel has no row and column to tell apart"),
        (ConvSpec(4, 4, (1, 7)), "1x7 is asymmetric already"),
        (ConvSpec(4, 4, (7, 1)), "7x1 is asymmetric already"),
        (ConvSpec(4, 4, (4, 4)), "a 4x4 kernel has no centre row and column, since not both of its sides are odd"),
        (ConvSpec(4, 4, (3, 2)), "a 3x2 kernel has no centre row and column, since not both of its sides are odd"),
        (ConvSpec(4, 4, (3, 3), dtype="complex64"), "complex64 weights are not real floating-point numbers"),
        (ConvSpec(4, 4, (3, 5)), None),
    ],
)
@pytest.mark.parametrize("kind", ["acb", "cross"])
def test_what_has_no_strips(conv: ConvSpec, reason: str | None, kind: str) -> None:
    assert load(kind).unsupported(conv) == reason
