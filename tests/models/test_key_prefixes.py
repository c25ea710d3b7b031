"""Prefixes of training frameworks come off, and what is left out is never a silent part of the network."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from asymswap.models.builders import views

State = dict[str, Tensor]
names = st.sampled_from(["model", "net", "backbone", "student", "m0", "0"])


def network() -> State:
    return {
        "conv1.weight": torch.zeros(4, 3, 3, 3),
        "bn1.weight": torch.zeros(4),
        "bn1.bias": torch.zeros(4),
        "fc.weight": torch.zeros(10, 4),
    }


def behind(prefix: str, state: State) -> State:
    return {f"{prefix}{key}": tensor for key, tensor in state.items()}


@given(parts=st.lists(names, max_size=2))
def test_one_or_two_parts_come_off(parts: list[str]) -> None:
    prefix = "".join(f"{part}." for part in parts)
    found = [view for view in views(behind(prefix, network())) if view.state.keys() == network().keys()]
    assert [(view.prefix, view.left_out, view.whole) for view in found] == [(prefix, (), True)]


def test_a_state_dict_as_it_is_comes_first() -> None:
    assert views(network())[0].state.keys() == network().keys()
    assert views(network())[0].notes() == ()
    assert [view.state for view in views({})] == [{}]


def test_a_loss_and_a_metric_are_left_out_and_named() -> None:
    state = behind("model.", network()) | {"loss.weight": torch.zeros(10), "metric.tp": torch.tensor(3)}
    view = next(view for view in views(state) if view.prefix == "model.")
    assert (view.state.keys(), view.whole) == (network().keys(), True)
    assert view.notes() == ("keys without their 'model.'; left out (`key=…` chooses): loss.weight, metric.tp",)


def test_a_copy_beside_the_network_is_left_out() -> None:
    state = behind("model.", network()) | behind("ema_model.", network())
    found = {view.prefix: view for view in views(state)}
    assert list(found)[:3] == ["", "model.", "ema_model."]
    assert found["model."].whole
    assert (
        found["model."]
        .notes()[0]
        .endswith("ema_model.conv1.weight, ema_model.bn1.weight, ema_model.bn1.bias and 1 more")
    )


def test_a_further_layer_is_not_left_out_unasked() -> None:
    for extra in ({"head.weight": torch.zeros(3, 10)}, {"scale": torch.zeros(2, 2)}):
        view = next(view for view in views(behind("model.", network()) | extra) if view.prefix == "model.")
        assert not view.whole
    nested = behind("a.", behind("model.", network()) | {"head.weight": torch.zeros(3, 10)})
    assert not next(view for view in views(nested) if view.prefix == "a.model.").whole


def test_wrappers_below_the_prefix_come_off_too() -> None:
    found = views(behind("model.module.", network()))
    assert any(view.prefix == "model." and view.state.keys() == network().keys() for view in found)


def test_mmpretrains_two_parts() -> None:
    state = {("head." if key.startswith("fc") else "backbone.") + key: tensor for key, tensor in network().items()}
    view = next(view for view in views(state) if view.state.keys() == network().keys())
    assert (view.whole, view.notes()) == (True, ("keys without their 'backbone.' and 'head.'",))
