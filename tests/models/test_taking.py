"""A state dict of ours is taken over without a copy, wherever nothing but its numbers gets into the model."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from asymswap.fileformats.state_dict import load_state_

State = dict[str, Tensor]


def net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1))


def state_of(seed: int = 1) -> State:
    """A state dict for `net` in memory of its own."""
    generator = torch.Generator().manual_seed(seed)
    return {
        key: torch.randn(t.shape, generator=generator) if t.is_floating_point() else torch.tensor(seed)
        for key, t in net().state_dict().items()
    }


class Marked(Tensor):
    """A tensor with a class of its own."""


def part_of_more(tensor: Tensor) -> Tensor:
    return torch.cat([tensor, tensor])[: len(tensor)]


def channels_last(tensor: Tensor) -> Tensor:
    # As the model's by its numbers of steps, though not in their order: a 1x1 kernel is contiguous either way.
    return tensor.clone().to(memory_format=torch.channels_last) if tensor.dim() == 4 else part_of_more(tensor)


def repeated(tensor: Tensor) -> Tensor:
    return tensor.flatten()[0].expand(tensor.shape)


def marked(tensor: Tensor) -> Tensor:
    return tensor.clone().as_subclass(Marked)


COPIED = [part_of_more, channels_last, repeated, marked]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize("wrap", [lambda tensor: tensor, nn.Parameter])
def test_tensors_become_the_models_own(wrap: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    model, state = net(), {k: wrap(t.to(dtype)) if t.is_floating_point() else t for k, t in state_of().items()}
    parameters = list(model.parameters())
    load_state_(model, state, take=True)
    assert [id(p) for p in model.parameters()] == [id(p) for p in parameters]
    assert all(p.requires_grad and p.is_leaf for p in parameters)
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[key])
        assert tensor.dtype == state[key].dtype
        assert (tensor.data_ptr() == state[key].data_ptr()) == tensor.is_floating_point()


def test_nothing_is_taken_unasked() -> None:
    model, state = net(), state_of()
    load_state_(model, state)
    assert not {t.data_ptr() for t in model.state_dict().values()} & {t.data_ptr() for t in state.values()}


@pytest.mark.parametrize("key", ["0.weight", "2.weight", "1.running_mean"])
@pytest.mark.parametrize("change", COPIED)
def test_what_would_bring_more_than_numbers_is_copied(change: Callable[[Tensor], Tensor], key: str) -> None:
    model, state = net(), state_of()
    state[key] = change(state[key])
    load_state_(model, state, take=True)
    own = model.state_dict()[key]
    assert torch.equal(own, state[key].as_subclass(Tensor))
    assert own.data_ptr() != state[key].data_ptr()
    assert own.untyped_storage().nbytes() == own.nbytes
    assert own.stride() == net().state_dict()[key].stride()
    assert type(own) is Tensor


def test_two_that_share_memory_do_not_share_it_in_the_model() -> None:
    model, state = net(), state_of()
    wanted = state["1.bias"].clone()
    state["0.bias"] = state["2.bias"] = state["1.bias"]
    load_state_(model, state, take=True)
    with torch.no_grad():
        model.get_parameter("0.bias").add_(1)
    assert torch.equal(model.get_parameter("1.bias"), wanted)
    assert torch.equal(model.get_parameter("2.bias"), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_what_is_tied_stays_tied(dtype: torch.dtype) -> None:
    def tied() -> nn.Sequential:
        model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3))
        model[1].weight = model[0].weight
        return model

    model, state = tied(), tied().to(dtype).state_dict()
    load_state_(model, state, take=True)
    assert model[0].weight is model[1].weight
    assert model[0].weight.data_ptr() == state["0.weight"].data_ptr()
    # As a file without ties has it: the last one counts, as it does where all are copied.
    load_state_(model, {key: tensor + n for n, (key, tensor) in enumerate(state.items())}, take=True)
    assert torch.equal(model[0].weight, state["1.weight"] + 2)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    changes=st.dictionaries(st.sampled_from(sorted(state_of())), st.sampled_from(COPIED)),
    same=st.lists(st.sampled_from(["0.bias", "1.weight", "1.bias", "1.running_mean", "2.bias"]), max_size=3),
    half=st.booleans(),
)
def test_taking_makes_the_same_model_as_copying(
    changes: dict[str, Callable[[Tensor], Tensor]], same: list[str], half: bool
) -> None:
    def changed() -> State:
        state = state_of()
        for key, change in changes.items():
            if state[key].is_floating_point():
                state[key] = change(state[key])
        if same:
            state |= dict.fromkeys(same, state[same[0]])
        return {key: t.half() if half and t.is_floating_point() else t for key, t in state.items()}

    one, other = net(), net()
    load_state_(one, changed(), take=True)
    load_state_(other, changed())
    found = one.state_dict()
    for key, tensor in other.state_dict().items():
        assert torch.equal(found[key], tensor)
        assert (found[key].dtype, found[key].stride()) == (tensor.dtype, tensor.stride())
    assert len({tensor.untyped_storage().data_ptr() for tensor in found.values()}) == len(found)
