from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from asymswap.graph.surgery import swap, take_over_


class Shared(nn.Module):
    """One conv under two names and in a plain list, beside one of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.inner = nn.ModuleDict({"again": self.conv, "other": nn.Conv2d(4, 4, 1)})
        self.hidden = [self.conv]

    def forward(self, x: Tensor) -> Tensor:
        return self.hidden[0](self.inner["other"](self.inner["again"](self.conv(x))))


def test_a_shared_module_is_swapped_everywhere_by_one_module() -> None:
    model, new = Shared(), nn.Conv2d(4, 4, 3, padding=1)
    swapped = swap(model, {"conv": new})
    assert isinstance(swapped, Shared)
    assert swapped.conv is new
    assert swapped.inner["again"] is new
    assert swapped.hidden[0] is new


def test_the_model_is_unchanged_and_shares_nothing() -> None:
    model = Shared().train()
    conv, other = model.conv, model.inner["other"]
    swapped = swap(model, {"conv": nn.Conv2d(4, 4, 3, padding=1)})
    assert model.conv is conv
    assert model.inner["other"] is other
    copied = swapped.inner["other"]
    assert torch.equal(copied.weight, other.weight)
    assert copied.weight.data_ptr() != other.weight.data_ptr()
    assert swapped.training


def test_the_weights_of_a_swapped_conv_are_not_copied() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU())
    copies: list[int] = []

    class Watched(nn.Parameter):
        def __deepcopy__(self, memo: object) -> nn.Parameter:
            copies.append(1)
            return nn.Parameter(self.data.clone())

    model[0].weight = Watched(model[0].weight.data)
    swap(model, {"0": nn.Identity()})
    assert copies == []


def test_a_replacement_takes_over_mode_trainability_and_memory_format() -> None:
    conv = nn.Conv2d(8, 8, 3).eval().to(memory_format=torch.channels_last)
    conv.requires_grad_(False)
    new = take_over_(nn.Sequential(nn.Conv2d(8, 4, (3, 1)), nn.Conv2d(4, 8, (1, 3))), conv)
    assert not any(module.training for module in new.modules())
    assert not any(parameter.requires_grad for parameter in new.parameters())
    assert all(m.weight.is_contiguous(memory_format=torch.channels_last) for m in new)


def test_a_model_with_weight_norm_elsewhere_is_swapped_and_still_runs() -> None:
    with pytest.warns(FutureWarning, match="weight_norm"):
        model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.utils.weight_norm(nn.Conv2d(4, 4, 3)))
    x = torch.randn(1, 4, 8, 8)
    swapped = swap(model, {"0": model[0]})
    assert torch.equal(swapped(x), model(x))


def test_a_frozen_bias_stays_frozen_beside_weights_that_train() -> None:
    conv = nn.Conv2d(8, 8, 3)
    conv.bias.requires_grad_(False)
    new = take_over_(nn.Sequential(nn.Conv2d(8, 4, (3, 1), bias=False), nn.Conv2d(4, 8, (1, 3))), conv)
    assert {name: p.requires_grad for name, p in new.named_parameters()} == {
        "0.weight": True,
        "1.weight": True,
        "1.bias": False,
    }
