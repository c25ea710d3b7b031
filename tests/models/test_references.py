"""Every way to name a model leads to the model that is meant, and to an origin from which it is built again."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build, known_references
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision import models

import asymswap
from asymswap.errors import SourceError, TraceError
from asymswap.graph.trace import trace
from asymswap.models.converted import rebuild
from asymswap.models.factories import UserCode
from asymswap.models.fingerprints import near
from asymswap.models.networks import BUILDERS
from asymswap.models.opened import OpenedModel
from asymswap.models.opening import is_file_reference, open_model
from asymswap.types import Origin

pytestmark = pytest.mark.usefixtures("one_thread")

State = dict[str, Tensor]
Save = Callable[[Any, Path], object]

FORMS: dict[str, Save] = {
    "zip": torch.save,
    "legacy": lambda value, path: torch.save(value, path, _use_new_zipfile_serialization=False),
    "safetensors": lambda value, path: save_file(value, path),
}
# Safetensors files hold nothing but tensors.
NESTED = [
    *((form, "") for form in FORMS),
    *itertools.product(("zip", "legacy"), ("state_dict", "model", "model_state_dict", "net", "ema")),
]
USER_NETS = """
from torch import nn

class Own(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(1, width, 3)

    def forward(self, x):
        return self.conv(x)

def own(width=4):
    return Own(width)

def plain(width=4):
    return nn.Sequential(nn.Conv2d(1, width, 3))
"""


@pytest.fixture
def user_nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module in the working directory, which is not on the path otherwise."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    monkeypatch.delitem(sys.modules, "user_nets", raising=False)
    (tmp_path / "user_nets.py").write_text(USER_NETS)
    return "user_nets"


def random_net(reference: str, **arguments: Any) -> nn.Module:
    torch.manual_seed(1)
    return build(reference, arguments).eval()


def check_rebuilt(opened: OpenedModel) -> None:
    """The origin leads to the same structure, and it takes the state."""
    again = rebuild(opened.origin, opened.skeleton)
    assert type(again) is type(opened.model)
    assert repr(again) == repr(opened.model)
    again.to(opened.dtype()).load_state_dict(opened.model.state_dict())


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(tensor, second[key]) for key, tensor in first.items())


@pytest.mark.parametrize(
    ("reference", "is_file"),
    [
        ("resnet18", False),
        ("torchvision:resnet18@DEFAULT", False),
        ("resnet18@weights/file.pt", False),
        ("digits-resnet", False),
        ("cifar:resnet20", False),
        ("pkg.mod:factory", False),
        ("resnet19", False),
        ("model.pt", True),
        ("model.safetensors", True),
        ("runs/model", True),
        ("here", True),
        ("n" * 300, False),
    ],
)
def test_what_means_a_file(reference: str, is_file: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("here").touch()
    Path("resnet18").touch()
    assert is_file_reference(reference) is is_file


def test_digits_resnet_brings_its_weights() -> None:
    opened = open_model("digits-resnet")
    assert opened.weights == "shipped, trained on scikit-learn's digits"
    assert (opened.preprocessing.channels, opened.preprocessing.size) == (1, (8, 8))
    assert not same_weights(opened.model, open_model("digits-resnet", weights="none").model)
    check_rebuilt(opened)


@pytest.mark.parametrize("name", sorted(BUILDERS))
@pytest.mark.parametrize("arguments", [{}, {"num_classes": 7, "in_channels": 1}])
def test_networks_of_cifar_size(name: str, arguments: dict[str, int]) -> None:
    opened = open_model(f"cifar:{name}", weights="none", arguments=arguments)
    assert opened.origin == Origin(f"cifar:{name}", arguments)
    assert opened.preprocessing.channels == len(opened.preprocessing.mean) == arguments.get("in_channels", 3)
    assert opened.example()[0].shape == (1, arguments.get("in_channels", 3), 32, 32)
    check_rebuilt(opened)


def test_a_factory_is_called_with_its_arguments(user_nets: str) -> None:
    opened = open_model(f"{user_nets}:own", arguments={"width": 6})
    assert opened.origin == Origin("user_nets:own", {"width": 6})
    assert opened.model.get_submodule("conv").out_channels == 6
    assert opened.preprocessing.channels == 1
    assert "user_nets.Own is not made of allowlisted classes alone" in opened.notes[0]
    with pytest.raises(SourceError, match=r"it was built by user_nets:own, which is code or a file of yours"):
        rebuild(opened.origin, opened.skeleton)


def test_what_a_factory_makes_of_allowed_classes_is_built_again_without_it(user_nets: str) -> None:
    opened = open_model(f"{user_nets}:plain")
    assert opened.notes == ()
    check_rebuilt(opened)


def test_a_factory_takes_weights_from_a_file(user_nets: str) -> None:
    for request in (
        {"weights": "w.pt", "arguments": {"width": 5}},
        {"arch": f"{user_nets}:own", "arguments": {"width": 5}},
    ):
        model = UserCode().build(f"{user_nets}:own", {"width": 5})
        torch.save({"state_dict": model.state_dict()}, "w.pt")
        opened = open_model(f"{user_nets}:own" if "weights" in request else "w.pt", **request)
        assert same_weights(opened.model, model)
        assert opened.file == Path("w.pt")


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize(("form", "nest"), NESTED)
def test_state_dicts_in_every_form(nest: str, prefix: str, form: str, tmp_path: Path) -> None:
    model = random_net("digits-resnet")
    state = {f"{prefix}{key}": tensor for key, tensor in model.state_dict().items()}
    path = tmp_path / "weights.bin"
    FORMS[form]({"epoch": 1, nest: state} if nest else state, path)
    opened = open_model(path, arch="digits-resnet")
    assert same_weights(opened.model, model)
    assert opened.weights == "file weights.bin"
    assert opened.notes == ((f"weights taken from {nest!r} in weights.bin",) if nest else ())
    check_rebuilt(opened)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_state_dicts_stay_in_their_dtype(dtype: torch.dtype, form: str, tmp_path: Path) -> None:
    model = random_net("digits-resnet").to(dtype)
    FORMS[form](model.state_dict(), tmp_path / "w.pt")
    opened = open_model(tmp_path / "w.pt", arch="digits-resnet")
    assert opened.dtype() == opened.example()[0].dtype == dtype
    assert same_weights(opened.model, model)
    check_rebuilt(opened)


@pytest.mark.parametrize(
    ("reference", "arguments"),
    [
        ("digits-resnet", {"num_classes": 3}),
        ("cifar:resnet20", {"num_classes": 100, "in_channels": 1}),
        ("cifar:densenet", {"in_channels": 4}),
        ("torchvision:resnet18", {"num_classes": 7}),
        ("torchvision:mobilenet_v3_small", {"num_classes": 7}),
        ("torchvision:squeezenet1_1", {"num_classes": 7}),
        ("torchvision:googlenet", {"num_classes": 7, "aux_logits": False}),
        pytest.param("torchvision:densenet121", {"num_classes": 7}, marks=pytest.mark.slow),
    ],
)
def test_class_count_and_channels_follow_the_weights(reference: str, arguments: dict[str, Any], tmp_path: Path) -> None:
    model = random_net(reference, **arguments)
    torch.save(model.state_dict(), tmp_path / "w.pt")
    for request, name in (
        ({"arch": reference}, tmp_path / "w.pt"),
        ({"weights": str(tmp_path / "w.pt")}, reference),
    ):
        opened = open_model(name, **request)
        assert opened.origin == Origin(reference, arguments)
        assert opened.preprocessing.channels == arguments.get("in_channels", opened.preprocessing.channels)
        assert same_weights(opened.model, model)


@pytest.mark.parametrize(
    ("reference", "arguments"),
    [
        ("digits-resnet", {}),
        ("cifar:resnet32", {}),
        ("cifar:se-resnet20", {"num_classes": 7}),
        ("torchvision:shufflenet_v2_x0_5", {}),
        ("torchvision:mobilenet_v3_small", {"num_classes": 7}),
    ],
)
def test_architectures_are_told_by_their_keys_and_shapes(
    reference: str, arguments: dict[str, Any], tmp_path: Path
) -> None:
    model = random_net(reference, **arguments)
    torch.save({"model": model.state_dict()}, tmp_path / "w.pt")
    opened = open_model(tmp_path / "w.pt")
    assert opened.origin == Origin(reference, arguments)
    taken = f"architecture taken from keys and shapes: {reference} (`arch=…` names another); a variant that"
    assert any(note.startswith(taken) for note in opened.notes)
    assert same_weights(opened.model, model)


@pytest.mark.parametrize("wrap", [lambda model: model, nn.DataParallel])
@pytest.mark.parametrize(
    "make", [models.mobilenet_v3_small, lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU())]
)
def test_pickled_modules(make: Callable[[], nn.Module], wrap: Callable[[nn.Module], nn.Module], tmp_path: Path) -> None:
    model = make().eval()
    torch.save(wrap(model), tmp_path / "m.pt")
    opened = open_model(tmp_path / "m.pt")
    assert opened.origin.reference == f"skeleton:{type(model).__module__}.{type(model).__qualname__}"
    assert same_weights(opened.model, model)
    check_rebuilt(opened)
    noted = open_model(tmp_path / "m.pt", arch="resnet18").notes
    assert noted == ('`arch="resnet18"` was not needed: m.pt holds the whole module',)


def test_a_module_that_exists_is_taken_as_it_is() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3))
    opened = open_model(model, input_size=(2, 9, 9))
    assert opened.model is model
    assert (opened.reference, opened.example()[0].shape) == ("Sequential", (1, 2, 9, 9))


def test_a_converted_model_is_opened_with_its_plans(tmp_path: Path) -> None:
    asymswap.save(asymswap.convert("digits-resnet", "3x3-only"), tmp_path / "one.pt")
    opened = open_model(tmp_path / "one.pt")
    assert len(opened.plans) == 1
    assert opened.origin == Origin("digits-resnet")
    again = asymswap.convert(tmp_path / "one.pt", "all-spatial", overrides={"rank": 2, "allow_growth": True})
    asymswap.save(again, tmp_path / "two.pt")
    assert len(open_model(tmp_path / "two.pt").plans) == 2
    assert same_weights(asymswap.load(tmp_path / "two.pt"), again.model)


@pytest.mark.parametrize(
    ("name", "request_", "expected"),
    [
        ("digits-resnet", {"arch": "resnet18"}, r"`arch=…` goes with a file, and 'digits-resnet' names a network"),
        ("resnet18@DEFAULT", {"weights": "none"}, r"'resnet18@DEFAULT' names weights and `weights=.none.` others"),
        ("digits-resnet", {"arguments": {"num_classes": 3}}, r'one set of weights; use `weights="none"` to change'),
        (
            "cifar:resnet20",
            {},
            r'cifar:resnet20 has no published weights; use `weights="none"` for random weights or `weights="FILE"`',
        ),
        ("cifar:resnet20", {"weights": "no.pt"}, r"no file no\.pt"),
        ("w.pt", {"weights": "none"}, r"`weights=…` goes with a reference; w\.pt brings its own weights"),
        ("w.pt", {"arch": "resnet18", "arguments": {"foo": 1}}, r"torchvision:resnet18 does not take \{'foo': 1\}: "),
    ],
)
def test_what_does_not_go_together(
    name: str, request_: dict[str, Any], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(random_net("digits-resnet").state_dict(), "w.pt")
    with pytest.raises(SourceError, match=expected):
        open_model(name, **request_)


def test_a_model_without_convs_that_takes_no_images_is_refused() -> None:
    opened = open_model(nn.Linear(1, 1))
    with pytest.raises(TraceError, match="the model has no Conv2d, so there is nothing to swap"):
        trace(opened.model, opened.example())


def test_near_names_of_every_known_reference() -> None:
    """A slip at the end is understood, with and without the prefix, and what is offered is itself known."""
    known = set(known_references())
    for written in known | {reference.rpartition(":")[2] for reference in known}:
        hint = near(f"{written}x")
        assert hint.startswith("; did you mean "), written
        for offered in hint.removeprefix("; did you mean ").removesuffix("?").split(", "):
            assert {offered, f"torchvision:{offered}"} & known, written


def test_far_names_give_no_hint() -> None:
    assert near("qqqq").startswith("; known are")
    with pytest.raises(
        SourceError, match=r"no model 'qqqq', and no such file; known are torchvision's names, timm:…, cifar:…"
    ):
        open_model("qqqq")
