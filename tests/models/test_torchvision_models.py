"""Torchvision's models by name: weights from torch.hub's cache, and origins that build the same structure again."""

from __future__ import annotations

import functools
import hashlib
import os
import random
import urllib.error
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import IncompleteRead
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build, one_of_each_family
from torch import Tensor, nn
from torchvision import models

from asymswap.errors import SourceError
from asymswap.models import torchvision_models
from asymswap.models.converted import rebuild
from asymswap.models.opened import OpenedModel
from asymswap.models.opening import open_model
from asymswap.types import Origin
from asymswap.utils.tensors import WithoutMemory

pytestmark = pytest.mark.usefixtures("one_thread")

State = dict[str, Tensor]

SMALL = ["googlenet", "mobilenet_v3_small", "resnet18", "shufflenet_v2_x0_5", "squeezenet1_1"]
SWAG = ["vit_b_16@IMAGENET1K_SWAG_E2E_V1", "vit_b_16@IMAGENET1K_SWAG_LINEAR_V1", "regnet_y_16gf@IMAGENET1K_SWAG_E2E_V1"]
OTHERS = [
    "fcn_resnet50",
    "retinanet_resnet50_fpn",
    "quantized_googlenet",
    "raft_small",
    "fasterrcnn_mobilenet_v3_large_fpn",
]


def references(names: list[str]) -> list[str]:
    """Every name with each of its weights."""
    return [f"{name}@{weights}" for name in names for weights in models.get_model_weights(name).__members__]


# The structures of the others are compared as well; only to fill and run them would take minutes.
MEDIUM = [
    name
    for name in torchvision_models.classifiers()
    if name not in SMALL and models.get_model_weights(name)["DEFAULT"].meta["num_params"] < 50_000_000
]
DEFAULT = [*references(["googlenet", "inception_v3", "resnet18"]), *SWAG]
REST = [reference for reference in references(models.list_models()) if reference not in DEFAULT]


@contextmanager
def as_if_downloaded() -> Iterator[None]:
    """While open, torchvision builds what it builds for published weights, and none are read or loaded."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torchvision_models, "_read_published", lambda *_: (Path("cached"), {}))
        patch.setattr(nn.Module, "load_state_dict", lambda *_, **__: None)
        yield


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, State], Path]:
    """Put a state dict where torch.hub would keep the default weights of a model, as if it was what is published."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    # What is published must not be looked up first while a test has its own.
    torchvision_models.published("")

    def put(name: str, state: State) -> Path:
        weights = models.get_model_weights(name)["DEFAULT"]
        path = tmp_path / "home" / "hub" / "checkpoints" / weights.url.rpartition("/")[2]
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, path)
        digits = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
        path = path.rename(path.with_name(f"{name}-{digits}.pth"))
        monkeypatch.setattr(weights.value, "url", f"https://download.pytorch.org/models/{path.name}")
        return path

    return put


def randomised(model: nn.Module) -> nn.Module:
    """The model in eval mode, with numbers in its batch norms that differ from those of a new one."""
    torch.manual_seed(2)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2)
    return model.eval()


def structure(model: nn.Module) -> Any:
    """All that distinguishes two models but their numbers."""
    state = {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in model.state_dict().items()}
    # An absent head and one that is None are the same to a module.
    lines = [line for line in repr(model).splitlines() if not line.endswith("): None")]
    plain = (bool, int, float, str, tuple)
    fields = {
        name: {key: value for key, value in vars(module).items() if isinstance(value, plain) and key != "training"}
        for name, module in model.named_modules()
    }
    return state, lines, fields


# What weights change and what is stored of it is seen in the structures below too; Inception has an auxiliary head.
@pytest.mark.parametrize(
    "name",
    [*SMALL, *(pytest.param(name, marks=[pytest.mark.nightly] * (name != "inception_v3")) for name in MEDIUM)],
)
def test_weights_come_from_the_cache_and_the_origin_builds_the_same(
    name: str, cache: Callable[[str, State], Path]
) -> None:
    arguments = {"aux_logits": True} if name in ("googlenet", "inception_v3") else {}
    cache(name, randomised(build(f"torchvision:{name}", arguments)).state_dict())
    source = open_model(name)
    again = rebuild(source.origin, source.skeleton)
    again.load_state_dict(source.model.state_dict())
    x = torch.rand(1, 3, *(min(side, 224) for side in source.preprocessing.size))
    if "inception" in name:
        x = torch.rand(1, 3, 96, 96)
    with torch.no_grad():
        assert torch.equal(again.eval()(x), source.model.eval()(x))


@pytest.mark.parametrize("reference", [*DEFAULT, *one_of_each_family(REST, DEFAULT)])
def test_origins_build_the_same_structure_for_all_weights(reference: str) -> None:
    # ssdlite runs itself while it is built, which needs numbers.
    if "ssdlite" in reference:
        with as_if_downloaded():
            source = open_model(f"torchvision:{reference}")
        assert structure(rebuild(source.origin, source.skeleton)) == structure(source.model)
        return
    with as_if_downloaded(), WithoutMemory(torch.empty):
        source = open_model(f"torchvision:{reference}")
    assert structure(rebuilt_on_meta(source)) == structure(source.model)


def rebuilt_on_meta(source: OpenedModel) -> nn.Module:
    if source.skeleton is not None:
        return rebuild(source.origin, source.skeleton)
    with WithoutMemory(torch.empty):
        return rebuild(source.origin, None)


@pytest.mark.parametrize("name", OTHERS)
def test_what_weights_change_in_other_than_classifiers_is_stored(name: str) -> None:
    with as_if_downloaded(), WithoutMemory(torch.empty):
        source = open_model(name)
    assert structure(rebuilt_on_meta(source)) == structure(source.model)


def test_arguments_that_weights_set_are_in_the_origin(cache: Callable[[str, State], Path]) -> None:
    model = build("torchvision:googlenet", {"aux_logits": True})
    cache("googlenet", model.state_dict())
    source = open_model("googlenet")
    assert source.origin == Origin("torchvision:googlenet", {"transform_input": True, "aux_logits": False})
    assert source.weights == "IMAGENET1K_V1"


def test_arguments_that_do_not_fit_the_weights(cache: Callable[[str, State], Path]) -> None:
    cache("resnet18", build("torchvision:resnet18", {}).state_dict())
    with pytest.raises(SourceError, match=r"torchvision's resnet18 does not take \{'num_classes': 7\}: .*1000"):
        open_model("resnet18", arguments={"num_classes": 7})
    source = open_model("resnet18", arguments={"zero_init_residual": True})
    assert source.origin.arguments == {"zero_init_residual": True}


@pytest.mark.parametrize("weights", ["none", "IMAGENET1K_V1", "w.pt"])
@pytest.mark.parametrize("spelled", ["squeezenet1_1@{}", "torchvision:squeezenet1_1@{}", "squeezenet1_1 --weights {}"])
def test_every_way_to_choose_weights(
    spelled: str, weights: str, cache: Callable[[str, State], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(1)
    state = build("torchvision:squeezenet1_1", {}).state_dict()
    cache("squeezenet1_1", state)
    torch.save({"model": state}, "w.pt")
    reference, _, option = spelled.format(weights).partition(" --weights ")
    # Other numbers than those of the state dict: reading one draws none in between.
    torch.manual_seed(3)
    opened = open_model(reference, weights=option or None)
    assert opened.origin == Origin("torchvision:squeezenet1_1")
    same = torch.equal(opened.model.state_dict()["features.0.weight"], state["features.0.weight"])
    assert same is (weights != "none")
    assert opened.weights == {"none": "random", "w.pt": "file w.pt"}.get(weights, weights)


@pytest.mark.parametrize("change", [lambda s: {}, lambda s: {"x": torch.ones(1)}, lambda s: [1]])
def test_damaged_files_in_the_cache_are_named(change: Any, cache: Callable[[str, State], Path]) -> None:
    path = cache("squeezenet1_1", change({}))
    with pytest.raises(SourceError, match=rf"cannot load {path} into squeezenet1_1: .*; delete that file if it is dam"):
        open_model("squeezenet1_1")


class Trap:
    """Unpickled, it would make a file."""

    def __reduce__(self) -> Any:
        return os.system, ("touch sprung",)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", ["resnet18", "densenet121"])
def test_nothing_in_the_cache_is_executed(
    name: str, legacy: bool, cache: Callable[[str, Any], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch, "save", functools.partial(torch.save, _use_new_zipfile_serialization=not legacy))
    path = cache(name, {"x": Trap()})
    expected = (
        rf"cannot load {path} into {name}: it is a pickle that needs posix\.system, .*; delete that file if it is"
    )
    with pytest.raises(SourceError, match=expected) as caught:
        open_model(name)
    assert "trust_pickle" not in str(caught.value)
    assert not Path("sprung").exists()


def test_a_file_in_the_cache_is_the_one_that_its_name_says(cache: Callable[[str, State], Path]) -> None:
    path = cache("squeezenet1_1", build("torchvision:squeezenet1_1", {}).state_dict())
    torch.save(build("torchvision:squeezenet1_1", {}).state_dict(), path)
    with pytest.raises(SourceError, match=rf"cannot load {path} into .*: its SHA-256 is not the one in its name; dele"):
        open_model("squeezenet1_1")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (urllib.error.URLError(OSError(-2, "Name or service not known")), "Name or service not known"),
        (ConnectionResetError(104, "Connection reset by peer"), "Connection reset by peer"),
        (IncompleteRead(b"", 9), "IncompleteRead"),
        (RuntimeError('invalid hash value (expected "f37072fd", got "00")'), "invalid hash value"),
        (PermissionError(13, "Permission denied"), "Permission denied"),
    ],
)
def test_weights_that_cannot_be_downloaded(
    error: Exception, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    expected = (
        rf"the weights IMAGENET1K_V1 of resnet18 are not in .* \(.*{reason}.*\); use `weights=\"none\"` for random"
    )
    with pytest.raises(SourceError, match=expected):
        open_model("resnet18")


def test_missing_weights_are_downloaded_into_the_cache(
    cache: Callable[[str, State], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    state = build("torchvision:squeezenet1_1", {}).state_dict()
    path = cache("squeezenet1_1", state)
    content = path.read_bytes()
    path.unlink()
    asked: list[Any] = []

    def download(url: str, target: str, hash_prefix: str, progress: bool) -> None:
        asked.append((url, target, hash_prefix))
        Path(target).write_bytes(content)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    assert open_model("squeezenet1_1").weights == "IMAGENET1K_V1"
    url = models.SqueezeNet1_1_Weights.DEFAULT.url
    assert asked == [(url, str(path), url.rpartition("-")[2].removesuffix(".pth"))]


@pytest.mark.parametrize("key", ["weights", "weights_backbone", "progress", "pretrained"])
def test_weights_are_no_argument(key: str) -> None:
    with pytest.raises(
        SourceError, match=rf"'{key}' is not an argument for torchvision's resnet18; choose weights with"
    ):
        build("torchvision:resnet18", {key: "DEFAULT"})


@pytest.mark.parametrize("arguments", [{"num_classes": "x"}, {"num_classes": -1}, {"foo": 1}, {"norm_layer": "x"}])
@pytest.mark.parametrize("reference", ["torchvision:resnet18", "cifar:resnet20", "digits-resnet"])
def test_arguments_that_no_builder_takes(reference: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(SourceError, match=rf"{reference} does not take "):
        build(reference, arguments)


@pytest.mark.parametrize(
    ("name", "weights", "size", "resize"),
    [
        ("resnet18", "IMAGENET1K_V1", 224, 256),
        ("resnet50", "IMAGENET1K_V2", 224, 232),
        ("inception_v3", "IMAGENET1K_V1", 299, 342),
        ("efficientnet_b3", "IMAGENET1K_V1", 300, 320),
        ("vit_b_16", "IMAGENET1K_SWAG_E2E_V1", 384, 384),
        ("fcn_resnet50", "COCO_WITH_VOC_LABELS_V1", 224, 520),
    ],
)
def test_images_are_prepared_as_the_weights_say(name: str, weights: str, size: int, resize: int) -> None:
    with as_if_downloaded(), WithoutMemory(torch.empty):
        preprocessing = open_model(f"{name}@{weights}").preprocessing
    assert (preprocessing.size, preprocessing.resize, preprocessing.channels) == ((size, size), resize, 3)
    assert preprocessing.mean == torchvision_models.IMAGENET_MEAN


def test_a_vision_transformer_of_another_size_says_so() -> None:
    with WithoutMemory(torch.empty):
        source = open_model("vit_b_16", weights="none", arguments={"image_size": 64})
    assert (source.preprocessing.size, source.preprocessing.resize) == ((64, 64), None)


def old_keys(state: State) -> State:
    """The names that torchvision's densenets had when their weights were published."""
    pairs = [("norm1", "norm.1"), ("norm2", "norm.2"), ("conv1", "conv.1"), ("conv2", "conv.2")]
    renamed = {}
    for key, tensor in state.items():
        for new, old in pairs if "denselayer" in key else []:
            key = key.replace(f".{new}.", f".{old}.")
        renamed[key] = tensor
    return renamed


@pytest.mark.parametrize("request_", [pytest.param({"arch": "densenet121"}, marks=pytest.mark.nightly), {}])
def test_published_densenets_load_from_their_files(request_: dict[str, Any], tmp_path: Path) -> None:
    model = randomised(build("torchvision:densenet121", {}))
    state = old_keys(model.state_dict())
    assert not state.keys() & {"features.denseblock1.denselayer1.norm1.weight"}
    torch.save(state, tmp_path / "densenet121-a639ec97.pth")
    opened = open_model(tmp_path / "densenet121-a639ec97.pth", **request_)
    assert opened.origin == Origin("torchvision:densenet121")
    assert all(torch.equal(tensor, model.state_dict()[key]) for key, tensor in opened.model.state_dict().items())


def test_published_vision_transformers_have_old_keys_too() -> None:
    with WithoutMemory(torch.empty):
        state = build("torchvision:vit_b_16", {}).state_dict()
    old = {key.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2."): t for key, t in state.items()}
    assert old.keys() != state.keys()
    assert torchvision_models.with_current_keys(old).keys() == state.keys()


@pytest.mark.parametrize("name", random.Random(0).sample(torchvision_models.classifiers(), 10))
def test_current_keys_stay(name: str) -> None:
    with WithoutMemory(torch.empty):
        state = build(f"torchvision:{name}", {}).state_dict()
    assert list(torchvision_models.with_current_keys(state)) == list(state)
