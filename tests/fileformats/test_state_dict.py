"""State dicts: found wherever training scripts put them, compared, and loaded without a change of dtype or ties."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from asymswap.errors import SourceError
from asymswap.fileformats.state_dict import NESTS, compare, find_weights, load_state_, strip_prefixes

PREFIXES = ("", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "module.module.")
State = dict[str, Tensor]


def net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3))


def keys(value: Any) -> list[str]:
    found = find_weights(value, "x.pt").value
    assert isinstance(found, dict)
    return list(found)


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("nest", ["", *NESTS, "state_dict.model", "ema.state_dict"])
def test_found_in_a_training_checkpoint(nest: str, prefix: str) -> None:
    state = {f"{prefix}{key}": tensor for key, tensor in net().state_dict().items()}
    value: Any = state
    for name in filter(None, reversed(nest.split("."))):
        value = {"epoch": 3, name: value, "optimizer": {"state": {}}}
    found = find_weights(value, "x.pt")
    assert found.key == nest
    assert keys(value) == list(net().state_dict())


def test_the_likeliest_key_is_taken_and_empty_ones_are_passed_over() -> None:
    state = net().state_dict()
    assert find_weights({"ema": state, "model": state, "state_dict": state}, "x.pt").key == "state_dict"
    assert find_weights({"state_dict": {}, "model": "resnet18", "net": state}, "x.pt").key == "net"
    assert find_weights({"ema": {"decay": 0.9}, "params": state}, "x.pt").key == "params"


def test_a_moving_average_loses_its_prefix_and_its_counter() -> None:
    averaged = torch.optim.swa_utils.AveragedModel(net())
    assert keys({"model_ema": averaged.state_dict()}) == list(net().state_dict())


def test_prefixes_stay_where_not_every_key_has_them() -> None:
    mixed = {"module.a": torch.ones(1), "b": torch.ones(1)}
    assert strip_prefixes(mixed) == mixed
    assert strip_prefixes({"n_averaged": torch.ones(1)}).keys() == {"n_averaged"}
    assert strip_prefixes({}) == {}


def test_modules_are_found_too() -> None:
    model = net()
    assert find_weights(model, "x.pt").value is model
    assert find_weights({"model": model}, "x.pt").key == "model"
    assert find_weights(nn.DataParallel(model), "x.pt").value is model


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ([1], r"x\.pt holds a list, neither a state_dict nor a module"),
        (torch.ones(1), r"x\.pt holds a Tensor, neither"),
        (None, r"x\.pt holds a NoneType, neither"),
        ({}, r"x\.pt holds no state_dict: looked under state_dict, model_state_dict, .*; it holds nothing"),
        ({"lr": 0.1, "epoch": 3}, r"it holds lr, epoch$"),
        ({0: torch.ones(1)}, r"it holds 0$"),
        ({"state_dict": {"model": {}}}, r"it holds state_dict$"),
        ({"a": torch.ones(1), "epoch": 3}, r"it holds a, epoch$"),
    ],
)
def test_nothing_found(value: Any, expected: str) -> None:
    with pytest.raises(SourceError, match=expected):
        find_weights(value, "x.pt")


def test_equal_states_do_not_differ() -> None:
    assert not compare(net(), net().state_dict())
    assert str(compare(net(), net().state_dict())) == ""


def test_old_files_lack_counters_of_batches() -> None:
    state = {key: tensor for key, tensor in net().state_dict().items() if not key.endswith("num_batches_tracked")}
    assert not compare(net(), state)
    model = net()
    load_state_(model, state)
    assert torch.equal(model.state_dict()["0.weight"], state["0.weight"])


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda s: {k: t for k, t in s.items() if k != "0.bias"}, "missing: 0.bias"),
        (lambda s: {**s, "x": torch.ones(1)}, "unexpected: x"),
        (lambda s: {**s, "0.bias": torch.ones(5)}, "0.bias is 5, the model's 4"),
        (lambda s: {**s, "0.bias": torch.tensor(1.0)}, "0.bias is a scalar, the model's 4"),
        (lambda s: {}, "missing: 0.weight, 0.bias and 6 more"),
        (lambda s: {k: t[None] for k, t in s.items()}, "7 more shapes differ"),
    ],
)
def test_differences_are_told(change: Callable[[State], State], expected: str) -> None:
    difference = compare(net(), change(net().state_dict()))
    assert difference
    assert expected in str(difference)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_weights_stay_in_their_dtype(dtype: torch.dtype) -> None:
    model, state = net(), net().to(dtype).state_dict()
    load_state_(model, state)
    for key, tensor in model.state_dict().items():
        assert tensor.dtype == state[key].dtype, key
        assert torch.equal(tensor, state[key])
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_counters_stay_whole_numbers() -> None:
    state = {key: tensor.half() for key, tensor in net().state_dict().items()}
    model = net()
    load_state_(model, state)
    assert model.state_dict()["1.num_batches_tracked"].dtype == torch.int64


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_what_is_tied_stays_tied(dtype: torch.dtype) -> None:
    def tied() -> nn.Sequential:
        shared = nn.Conv2d(4, 4, 3)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), shared, nn.Conv2d(4, 4, 3), shared)
        model[2].weight = shared.weight
        return model

    model, state = tied(), tied().to(dtype).state_dict()
    load_state_(model, state)
    assert model[1] is model[3]
    assert model[1].weight is model[2].weight
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())


def test_a_state_dict_of_parameters_and_of_other_layouts() -> None:
    model, other = net(), net().to(memory_format=torch.channels_last)
    state = OrderedDict((key, nn.Parameter(t) if t.is_floating_point() else t) for key, t in other.state_dict().items())
    load_state_(model, state)
    assert torch.equal(model.state_dict()["0.weight"], other.state_dict()["0.weight"])
    assert model.state_dict()["0.weight"].is_contiguous()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda t: t.to("meta"), r"'0\.weight' is on the meta device and holds no numbers; save the state_dict of"),
        (lambda t: t.to_sparse(), r"'0\.weight' is sparse; save the state_dict"),
        (lambda t: t.to(torch.int8), r"'0\.weight' is of dtype int8; save the state_dict of a model in float32, "),
        (lambda t: t.to(torch.complex64), r"'0\.weight' is of dtype complex64"),
        (lambda t: t.to(torch.float8_e4m3fn), r"'0\.weight' is of dtype float8_e4m3fn"),
        (lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8), r"'0\.weight' is of dtype qint8"),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*quantiz.*:UserWarning")
def test_what_cannot_be_computed_with_is_refused_before_anything_changes(
    change: Callable[[Tensor], Tensor], expected: str
) -> None:
    model = net()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    state = {key: tensor + 1 for key, tensor in net().state_dict().items()}
    with pytest.raises(SourceError, match=expected):
        load_state_(model, {**state, "0.weight": change(state["0.weight"])})
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_counters_that_an_old_file_lacks_start_at_zero() -> None:
    model = nn.BatchNorm2d(3)
    model.num_batches_tracked.fill_(12345)
    state = {key: tensor.clone() for key, tensor in nn.BatchNorm2d(3).state_dict().items() if "num_batches" not in key}
    load_state_(model, state)
    assert int(model.num_batches_tracked) == 0
