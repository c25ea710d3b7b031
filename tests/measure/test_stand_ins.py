"""Networks whose code treats nn.Conv2d unlike other modules: no conv of theirs is swapped in silence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import asymswap
from asymswap.errors import AsymswapError
from asymswap.measure.fidelity import check_stand_ins

X = torch.empty(1, 3, 8, 8, device="meta")


class Net(nn.Module):
    """Two convs that `run` calls as it likes."""

    def __init__(self, run: Callable[[Net, Tensor], Any]) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3)
        self.run = run

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def is_conv(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d)


def alike(net: Net, x: Tensor) -> Tensor:
    return net.two(net.one(input=x))


def pads(net: Net, x: Tensor) -> Tensor:
    return net.two(F.pad(net.one(x), (1, 1, 1, 1)) if is_conv(net.two) else net.one(x))


def calls_again(net: Net, x: Tensor) -> Tensor:
    y = net.one(x)
    return net.two(y) + net.two(y) if is_conv(net.two) else net.two(y)


def collects(net: Net, x: Tensor) -> list[Tensor]:
    y = net.one(x)
    return [out for layer, out in ((net.one, y), (net.two, net.two(y))) if is_conv(layer)]


def activates(net: Net, x: Tensor) -> Tensor:
    y = net.two(net.one(x))
    return F.relu(y) if is_conv(net.two) else y


def reads(net: Net, x: Tensor) -> Tensor:
    return net.two(net.one(x)) / net.two.in_channels


def finds_by_walking(net: Net, x: Tensor) -> Tensor:
    for layer in net.modules():
        if is_conv(layer):
            x = layer(x)
    return x


SPECIAL: dict[Callable[[Net, Tensor], Any], str] = {
    pads: "two cannot be swapped: .*two is called on 1 of 8x8 to 6x6 pixels instead of 1 of 10x10 to 8x8",
    calls_again: "two cannot be swapped: .*two is called 1 times instead of 2",
    collects: "one cannot be swapped: .*the model's outputs are others in number or size",
    activates: "two cannot be swapped: .*the model's output changes by .* although the layer computes the same",
    reads: "two cannot be swapped: .*AttributeError: .*'in_channels'",
    finds_by_walking: "one cannot be swapped: .*",
}


@pytest.mark.parametrize("run", SPECIAL)
def test_a_network_that_looks_at_the_class_of_a_layer_is_refused(
    run: Callable[[Net, Tensor], Any],
) -> None:
    with pytest.raises(AsymswapError, match=SPECIAL[run]):
        check_stand_ins(Net(run), ["one", "two"], (X,))


def test_what_runs_alike_passes_also_where_it_draws_random_numbers_or_remembers() -> None:
    def counts(net: Net, x: Tensor) -> Tensor:
        net.seen = getattr(net, "seen", 0) + 1
        return net.two(net.one(x)) * net.seen

    for run in (alike, lambda net, x: net.two(net.one(x)) + torch.rand(1), counts):
        check_stand_ins(Net(run), ["one", "two"], (X,))


def test_convert_refuses_it_and_goes_on_where_the_layer_is_kept(tmp_path: Path) -> None:
    with pytest.raises(AsymswapError, match="two cannot be swapped"):
        asymswap.convert(asymswap.open_model(Net(activates), input_size=(3, 8, 8)), "acnet")
    recipe = tmp_path / "keep.toml"
    rules = '[[rules]]\nmatch = { names = ["two"] }\nkeep = true\n[[rules]]\nmatch = {}\nswap = { kind = "acb" }\n'
    recipe.write_text('summary = "all but two"\n' + rules)
    conversion = asymswap.convert(asymswap.open_model(Net(activates), input_size=(3, 8, 8)), recipe)
    assert [swap.site for swap in conversion.plan.swaps] == ["one"]


def test_the_replacement_itself_must_be_called_as_the_conv_was() -> None:
    """A stand-in is called alike; the convs inside of a replacement are what this network runs twice."""

    def inner(net: Net, x: Tensor) -> Tensor:
        y = net.one(x)
        return net.two(y) if is_conv(net.two) or not list(net.two.children()) else net.two(F.pad(y, (1, 1, 1, 1)))

    with pytest.raises(AsymswapError, match="in the converted model two is called on 1 of 10x10 to 8x8 pixels"):
        asymswap.convert(asymswap.open_model(Net(inner), input_size=(3, 8, 8)), "acnet")


def test_what_a_forward_keeps_on_its_model_is_kept_on_a_copy() -> None:
    def keeps(net: Net, x: Tensor) -> Tensor:
        net.remembered = object()
        return net.two(net.one(x))

    net = Net(keeps)
    check_stand_ins(net, ["one", "two"], (X,))
    assert not hasattr(net, "remembered")


def test_a_wrapper_that_reads_its_layers_is_told_to_give_the_network_inside() -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())

        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, self.model[0].weight) + self.model(x)

    with pytest.raises(AsymswapError, match="give the network itself if it is the attribute 'model'"):
        check_stand_ins(Wrapper(), ["model.0"], (X,))
