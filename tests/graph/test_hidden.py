"""Models in which no conv is seen to run, which would be converted by doing nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import asymswap
from asymswap.errors import AsymswapError, RecipeError, TraceError
from asymswap.models.opened import costs_of
from asymswap.models.opening import open_model

SIZE = (8, 8, 8)


def net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU())


class Predicts(nn.Module):
    """Holds the network and runs a copy of it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = net()

    def forward(self, x: Tensor) -> Tensor:
        return net().to(x.device)(x)


class Hides(nn.Module):
    """Holds the network where torch does not look."""

    def __init__(self, *_: object) -> None:
        super().__init__()
        self.parts = [net()]

    def forward(self, x: Tensor) -> Tensor:
        return self.parts[0].to(x.device)(x)


class Walled(Predicts):
    """Says that it has no modules."""

    def named_modules(self, *args: object, **kwargs: object) -> object:  # type: ignore[override]
        yield "", self


HIDDEN: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "runs a copy": (Predicts, "none of its 1 Conv2d was seen to run.*; give the network itself, its attribute 'inner'"),
    "a plain list": (Hides, "has no Conv2d to swap.*; give the network itself, its attribute 'parts'"),
    "own named_modules": (Walled, "has no Conv2d to swap"),
    "a ScriptModule": (
        lambda: torch.jit.freeze(torch.jit.script(net().eval())),
        "has no Conv2d to swap.*; it is a ScriptModule, whose layers are compiled: give the module that it was made",
    ),
    "linear layers": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(512, 4)), "Sequential on an input of 1x8x8x8: the"),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("name", HIDDEN)
def test_a_model_in_which_no_conv_runs_is_an_error_that_says_what_was_seen(name: str) -> None:
    make, message = HIDDEN[name]
    for verb in (
        lambda model: asymswap.candidates(asymswap.open_model(model, input_size=SIZE)),
        lambda model: asymswap.plan(asymswap.open_model(model, input_size=SIZE), "half-macs"),
        lambda model: asymswap.convert(asymswap.open_model(model, input_size=SIZE), "half-macs"),
    ):
        with pytest.raises(TraceError, match=message):
            verb(make().eval())


def test_a_model_of_no_macs_has_no_cost_to_compare() -> None:
    opened = open_model(nn.Sequential(nn.AvgPool2d(2), nn.ReLU()), input_size=SIZE)
    with pytest.raises(TraceError, match="Sequential costs 0 MACs on an input of 1x8x8x8: no convolution"):
        costs_of(opened)
    with pytest.raises(AsymswapError, match="costs 0 MACs"):
        asymswap.compare(
            [
                asymswap.open_model(nn.Sequential(nn.ReLU()), input_size=SIZE),
                asymswap.open_model(net(), input_size=SIZE),
            ]
        )


def test_a_conversion_that_would_swap_nothing_is_an_error_with_the_reasons() -> None:
    with pytest.raises(RecipeError, match=r"the budget of .* is met without a single swap \(0: rule 1, but the budget"):
        asymswap.convert(
            asymswap.open_model(net(), input_size=SIZE),
            "half-macs",
            overrides={"budget.macs": 1.0, "budget.over": "model"},
        )
    hooked = net()
    hooked[0].register_forward_hook(lambda *_: None)
    with pytest.raises(RecipeError, match=r"nothing would be swapped \(0: rule 1, but has hooks"):
        asymswap.convert(asymswap.open_model(hooked, input_size=SIZE), "acnet")
