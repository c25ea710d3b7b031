"""Convolutions without a Conv2d are seen where the model runs, with the module that makes them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from asymswap.graph.trace import trace

INPUT = (torch.ones(1, 4, 8, 8),)


class Blur(nn.Module):
    """A fixed filter."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("filter", torch.ones(4, 1, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, weight=self.filter, groups=4)


class ValueDependent(Blur):
    """What torch.fx cannot follow, and meta tensors cannot run."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if bool(x.isfinite().all()) else x


class ReadsAnother(nn.Module):
    """Calls the weight of a conv, and leaves the conv itself aside."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3)
        self.other = nn.Conv2d(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        # The loop hides the weight from torch.fx: its bound depends on a value.
        return torch.conv2d(self.other(x), self.conv.weight) * (1 if x.shape[0] == int(x.abs().sum()) else 2)


class Subclass(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * 2, self.bias)


@pytest.mark.parametrize("blur", [Blur, ValueDependent])
def test_functional_convs_are_named(blur: type[nn.Module]) -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), blur(), nn.Sequential(blur()))
    assert trace(model, INPUT).notes == (
        "2 convolutions are function calls (conv2d without an nn.Conv2d), which nothing can be swapped for: "
        f"{blur.__name__} 1, 2.0",
    )


def test_calls_are_counted_and_long_lists_are_cut() -> None:
    blur = nn.Sequential(Blur())
    (note,) = trace(nn.Sequential(nn.Conv2d(4, 4, 3), blur, blur), INPUT).notes
    assert note.startswith("2 convolutions are function calls")
    assert note.endswith("Blur 1.0 (2 times)")
    many = nn.Sequential(nn.Conv2d(4, 4, 1), *(Blur() for _ in range(6)))
    (note,) = trace(many, (torch.empty(1, 4, 20, 20),)).notes
    assert note.endswith("Blur 1, 2, 3, 4 and 2 more")


def test_the_model_itself_may_call_one() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(self.conv(x), torch.ones(2, 4, 1, 1, device=x.device))

    (note,) = trace(Net(), INPUT).notes
    assert note == (
        "1 convolution is a function call (conv2d without an nn.Conv2d), which nothing can be swapped for: "
        "Net the model itself"
    )


def test_a_convs_own_call_is_none() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, padding="same"), Subclass(4, 4, 3))
    assert trace(model, INPUT).notes == ()


def test_a_conv_whose_weight_another_call_uses_is_not_swapped() -> None:
    found = {site.name: site for site in trace(ReadsAnother(), INPUT).sites}
    assert found["conv"].refusal == "has parameters that the model reads without calling it"
    assert found["other"].refusal is None


def test_torch_has_one_conv2d_under_two_names() -> None:
    assert torch.conv2d is F.conv2d


def test_no_hook_stays_behind() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3), Blur())
    trace(model, INPUT)
    with pytest.raises(RuntimeError, match="channels"):
        model(torch.empty(1, 3, 8, 8))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
