"""What every family can tell of a network that it did not build."""

from __future__ import annotations

import pytest
from torch import Tensor, nn

from asymswap.models.family import input_channels


class DefinedInAnotherOrder(nn.Module):
    """As VDSR in many repositories: the conv that runs first is defined behind the others."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.middle = nn.Conv2d(16, 16, 3, padding=1)
        self.first = nn.Conv2d(inputs, 16, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.middle(self.first(x))
        return found


@pytest.mark.parametrize("inputs", [1, 3])
def test_the_conv_that_is_defined_first_may_not_be_the_first(inputs: int) -> None:
    assert input_channels(DefinedInAnotherOrder(inputs)) == inputs
    assert input_channels(nn.Sequential(nn.Conv2d(4, 8, 1), nn.Conv2d(8, 3, 1), nn.Conv2d(3, 1, 1))) == 4
    assert input_channels(nn.Sequential(nn.Conv2d(64, 8, 1))) == 64
