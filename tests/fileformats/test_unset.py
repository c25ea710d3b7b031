"""A network that is built to be filled differs from one that is built by its unset weights alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import build, known_references, one_of_each_family
from torch import Tensor, nn

from asymswap.errors import SourceError
from asymswap.models import torchvision_models
from asymswap.models.builders import family_of
from asymswap.utils.tensors import WithoutMemory, allocated, list_tensors

pytestmark = pytest.mark.usefixtures("one_thread")

# Buffers outside of the state dict, a network that runs itself while it is built, tensors computed from widths.
TRICKY = ["swin_t", "ssdlite320_mobilenet_v3_large", "regnet_y_400mf", "raft_small", "googlenet", "vit_b_32"]
SMALL = ["digits-resnet", "cifar:resnet20", *(f"torchvision:{name}" for name in TRICKY)]


def rest_of(model: nn.Module) -> dict[str, Any]:
    """Every tensor that is not in the state dict, wherever a module keeps it."""
    stored = {id(tensor) for tensor in model.state_dict(keep_vars=True).values()}
    return {
        name: [tensor for tensor in list_tensors(dict(vars(module))) if id(tensor) not in stored]
        for name, module in model.named_modules()
    }


def facts(model: nn.Module) -> Any:
    return [
        (key, tensor.shape, tensor.dtype, tensor.stride(), tensor.device, type(tensor), tensor.requires_grad)
        for key, tensor in model.state_dict(keep_vars=True).items()
    ]


def build_unset(reference: str, arguments: dict[str, Any]) -> nn.Module:
    return family_of(reference).build_unset(reference, arguments)


@pytest.mark.parametrize("reference", SMALL)
def test_all_but_the_weights_is_there(reference: str) -> None:
    model, unset = build(reference, {}), build_unset(reference, {})
    assert repr(unset) == repr(model)
    assert facts(unset) == facts(model)
    wanted = rest_of(model)
    for name, tensors in rest_of(unset).items():
        assert len(tensors) == len(wanted[name])
        assert all(torch.equal(one, other) for one, other in zip(tensors, wanted[name], strict=True)), name


LAYOUTS = {
    "plain": torch.empty(3, 4, device="meta", dtype=torch.bfloat16),
    "a number": torch.empty((), device="meta", dtype=torch.int64),
    "nothing": torch.empty(0, 3, device="meta"),
    "channels last": torch.empty(2, 3, 4, 5, device="meta").to(memory_format=torch.channels_last),
    "flags": torch.empty(3, device="meta", dtype=torch.bool),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_is_given_in_the_layout_and_can_be_written(layout: str) -> None:
    module = nn.Module()
    module.register_buffer("ghost", LAYOUTS[layout])
    made: Any = allocated(module).ghost
    ghost = LAYOUTS[layout]
    assert (made.shape, made.stride(), made.dtype) == (ghost.shape, ghost.stride(), ghost.dtype)
    assert made.device.type == "cpu"
    assert bool((made.fill_(1) == 1).all())
    # What is stored of it is its own numbers.
    assert made.untyped_storage().nbytes() == made.numel() * made.element_size()


def test_where_memory_must_not_be_taken_none_is() -> None:
    layer = nn.Linear(3, 4, device="meta")
    with WithoutMemory(torch.empty, torch.empty_like):
        assert all(tensor.is_meta for tensor in allocated(layer).parameters())
    assert not any(tensor.is_meta for tensor in allocated(layer).parameters())


def test_more_memory_than_there_is_cannot_be_had() -> None:
    with pytest.raises(MemoryError, match=r"^4611686018427387904 bytes are not available$"):
        allocated(nn.Linear(2**40, 2**20, bias=False, device="meta"))


@pytest.mark.parametrize("reference", one_of_each_family(known_references()))
def test_no_tensor_is_left_without_memory(reference: str) -> None:
    unset = build_unset(reference, {})
    assert not any(tensor.is_meta for tensor in unset.state_dict().values())
    assert not any(tensor.is_meta for tensors in rest_of(unset).values() for tensor in tensors)


@pytest.mark.parametrize(
    "reference", ["torchvision:resnet18", "torchvision:swin_t", "torchvision:ssdlite320_mobilenet_v3_large"]
)
def test_no_random_number_of_others_is_drawn(reference: str) -> None:
    before = torch.get_rng_state()
    build_unset(reference, {})
    assert torch.equal(torch.get_rng_state(), before)


def test_what_no_state_dict_brings_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Grid(nn.Module):
        """A buffer outside of the state dict, made in memory that was empty before."""

        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            self.register_buffer("grid", torch.empty(5).copy_(torch.arange(5.0)), persistent=False)

    monkeypatch.setattr(torchvision_models.Torchvision, "construct", lambda *_: Grid())
    unset = build_unset("torchvision:resnet18", {})
    assert torch.equal(unset.get_buffer("grid"), torch.arange(5.0))


def test_memory_that_only_an_attribute_holds_is_computed_too(monkeypatch: pytest.MonkeyPatch) -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            self.scale: Tensor = torch.empty(2).fill_(3.0)

    monkeypatch.setattr(torchvision_models.Torchvision, "construct", lambda *_: Scale())
    unset = build_unset("torchvision:resnet18", {})
    assert torch.equal(unset.scale, torch.full((2,), 3.0))


def test_wrong_arguments_are_told_as_ever() -> None:
    with pytest.raises(SourceError, match=r"torchvision:resnet18 does not take \{'widht': 3\}"):
        build_unset("torchvision:resnet18", {"widht": 3})
