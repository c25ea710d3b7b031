"""What a conv can grow to without a change, and what is refused in one line."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conv_cases import Case
from torch import nn

from asymswap.errors import RecipeError
from asymswap.replacements import Original, load, parse_settings

KIND = load("resized")
X = torch.randn(2, 4, 13, 12, generator=torch.Generator().manual_seed(0))


def grown(conv: nn.Conv2d, **wish: Any) -> nn.Conv2d:
    site = Case(conv, X).site
    option = KIND.resolve(site, Original(conv), parse_settings("resized", wish))
    settled = parse_settings("resized", option.settings)
    new = KIND.build(site.conv, settled)
    KIND.init_(new, Original(conv), settled)
    return new


@pytest.mark.parametrize(
    ("fields", "wish"),
    [
        ({}, {}),
        ({"stride": 2}, {"kernel": "5x7"}),
        ({"padding": 1}, {"kernel": "5x5", "padding": "2x2"}),
        ({"padding": 1}, {"kernel": "5x5", "padding": "same"}),
        ({"padding": "same"}, {"kernel": "5x5", "padding": 2}),
        ({"dilation": 2, "padding": 2}, {}),
        ({"dilation": 2, "padding": 2}, {"kernel": "7x5", "dilation": 1}),
        ({"dilation": 4, "padding": 1}, {"kernel": "5x9", "dilation": "2x1"}),
        ({"kernel_size": 1}, {"kernel": "3x3", "dilation": 3}),
        ({"kernel_size": 2, "padding": "same"}, {}),
    ],
    ids=str,
)
def test_a_grown_conv_computes_the_same(fields: dict[str, Any], wish: dict[str, Any]) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 3, **{"kernel_size": 3, **fields})
    with torch.no_grad():
        assert torch.allclose(grown(conv, **wish)(X), conv(X), atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "wish", "told"),
    [
        ({}, {"padding": "foo"}, "kind 'resized': padding"),
        ({}, {"kernel": "4x5"}, "kernel = 4x5: a 3x3 kernel grows by an even number of taps on each axis"),
        ({}, {"kernel": "1x1", "dilation": 1}, "kernel = 1x1: a 3x3 kernel grows by an even number"),
        ({}, {"kernel": "5x5", "padding": 0}, "padding = 0x0: the output keeps its size and place with 2x2 only"),
        ({}, {"kernel": "5x5", "padding": 1}, "padding = 1x1: the output keeps"),
        ({}, {"kernel": "5x5", "padding": "valid"}, 'padding = "valid": the output keeps'),
        ({"stride": 2}, {"padding": "same"}, 'padding = "same": the output keeps its size and place with 2x2 only'),
        ({"stride": 2}, {"kernel": "5x5", "padding": 3}, "padding = 3x3: the output keeps"),
        ({"dilation": 3}, {"kernel": "5x5", "dilation": 2}, "kernel = 5x5, dilation = 2x2: its taps would not"),
        ({"dilation": 3}, {"kernel": "6x6", "dilation": 2}, "kernel = 6x6, dilation = 2x2: its taps would not"),
    ],
    ids=str,
)
def test_what_would_change_is_refused(fields: dict[str, Any], wish: dict[str, Any], told: str) -> None:
    conv = nn.Conv2d(4, 3, 3, **{"padding": 1, **fields})
    with pytest.raises(RecipeError) as caught:
        grown(conv, **wish)
    assert str(caught.value).startswith(told)
    assert "\n" not in str(caught.value)
