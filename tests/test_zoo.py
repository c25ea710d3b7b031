"""Every torchvision classifier, without its weights: what we read of it against what torch counts."""

from __future__ import annotations

import pytest
import torch
from families import one_of_each_family
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision import models

from asymswap.graph.trace import trace
from asymswap.measure.macs import count_costs
from asymswap.models import builders
from asymswap.utils.tensors import WithoutMemory

NAMES = models.list_models(models)


def build(name: str) -> nn.Module:
    """The network in eval mode, its weights on the meta device: the largest would hold 2.5 GB."""
    with WithoutMemory(torch.empty):
        return builders.family_of(f"torchvision:{name}").build(f"torchvision:{name}", {}).eval().to("meta")


def torch_counts(model: nn.Module, image: torch.Tensor) -> FlopCounterMode:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(image)
    return counter


def test_there_are_as_many_as_ever() -> None:
    assert len(NAMES) >= 80


@pytest.mark.parametrize("name", one_of_each_family(NAMES))
def test_costs_and_convs_are_those_that_torch_finds(name: str) -> None:
    model = build(name)
    preprocessing = builders.TORCHVISION.preprocessing(f"torchvision:{name}", model, {})
    image = torch.empty(1, 3, *preprocessing.size, device="meta")
    sites = trace(model, (image,)).sites
    counted = count_costs(model, (image,), [site.name for site in sites])
    counter = torch_counts(model, image)

    convs = {each: module for each, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    assert {site.name for site in sites} == convs.keys()
    assert counted.total.flops == counter.get_total_flops()
    assert counted.total.params == sum(parameter.numel() for parameter in model.parameters())
    # Torchvision's classifiers have no other convolutions than their Conv2d.
    by_formula = sum(site.cost.flops for site in sites)
    assert by_formula == counter.get_flop_counts()["Global"][torch.ops.aten.convolution]
    assert {site.name: site.cost for site in sites} == dict(counted.by_name)
