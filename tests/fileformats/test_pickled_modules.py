"""Pickled modules of torch.nn and torchvision load as what they were, and their structures can be stored."""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from families import build, one_of_each_family
from torch import nn
from torchvision import models

from asymswap.errors import SourceError
from asymswap.fileformats.detect import FileKind
from asymswap.fileformats.state_dict import find_weights
from asymswap.fileformats.torch_files import from_structure, load_object, to_structure
from asymswap.models.opening import open_model
from asymswap.utils.tensors import WithoutMemory, meta_copy

SMALL = ["alexnet", "resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5", "squeezenet1_1", "mnasnet0_5"]
# The quantisable ones hold stubs of torch.ao, which nobody would convert after quantising.
OTHERS = [name for name in models.list_models() if name not in SMALL and not name.startswith("quantized")]
each_torchvision = pytest.mark.parametrize("name", [*SMALL, *one_of_each_family(OTHERS, SMALL)])


class Mine(nn.Sequential):
    """A class of the user's own."""


def quantised() -> nn.Module:
    module = nn.Sequential(nn.Conv2d(3, 4, 3))
    module.register_buffer("scale", torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8))
    return module


def sparse() -> nn.Module:
    module = nn.Sequential(nn.Conv2d(3, 4, 3))
    module.register_buffer("mask", torch.eye(2).to_sparse())
    return module


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (
            lambda: nn.Sequential(nn.Conv2d(3, 4, 3, device="meta")),
            r"'0\.weight' is on the meta device and holds no num",
        ),
        (quantised, r"'scale' is of dtype qint8; save the state_dict of a model in float32"),
        (sparse, r"'mask' is sparse; save the state_dict"),
    ],
)
def test_modules_without_numbers_to_compute_with(make: Callable[[], nn.Module], reason: str, tmp_path: Path) -> None:
    torch.save(make(), tmp_path / "x.pt")
    with pytest.raises(SourceError, match=rf"x\.pt cannot be used: {reason}"):
        open_model(tmp_path / "x.pt")


def plain() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1))


def load(value: object, path: Path, *, legacy: bool = False, trust: bool = False) -> nn.Module:
    torch.save(value, path, _use_new_zipfile_serialization=not legacy)
    found = find_weights(load_object(path, FileKind.LEGACY if legacy else FileKind.TORCH, trust, path.name), path.name)
    assert isinstance(found.value, nn.Module)
    return found.value


@each_torchvision
def test_torchvisions_modules_load(name: str) -> None:
    # On the meta device the structure is pickled without the weights: a few kilobytes for each of them. Ssdlite runs
    # itself while it is built, which needs numbers.
    with nullcontext() if name.startswith("ssdlite") else WithoutMemory(torch.empty):
        model = meta_copy(build(f"torchvision:{name}", {}))
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = load_object(buffer, FileKind.TORCH, False, name)
    assert type(loaded) is type(model)
    assert repr(loaded) == repr(model)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert to_structure(model) is not None


@pytest.mark.parametrize("wrap", [lambda model: model, nn.DataParallel, lambda model: {"epoch": 1, "model": model}])
@pytest.mark.parametrize("build", [plain, models.mobilenet_v3_small])
def test_loaded_modules_compute_the_same(
    build: Callable[[], nn.Module], wrap: Callable[[nn.Module], object], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model, x = build().eval(), torch.randn(1, 3, 32, 32)
    loaded = load(wrap(model), tmp_path / "x.pt")
    assert type(loaded) is type(model)
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))


def test_a_module_of_the_old_form_is_read_without_its_source_code(tmp_path: Path) -> None:
    model, x = plain().eval(), torch.randn(1, 3, 8, 8)
    assert torch.equal(load(model, tmp_path / "x.pt", legacy=True).eval()(x), model(x))


def test_structures_round_trip_without_weights() -> None:
    model = plain()
    data = to_structure(model)
    assert data is not None
    assert len(data) < 20_000
    again = from_structure(data)
    assert repr(again) == repr(model)
    assert not any(tensor.is_meta for tensor in again.state_dict().values())
    assert [p.dtype for p in again.parameters()] == [p.dtype for p in model.parameters()]


def test_structures_keep_ties_and_what_is_not_in_the_state_dict() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3))
    model[1].weight = model[0].weight
    model.register_buffer("table", torch.arange(3.0), persistent=False)
    data = to_structure(model)
    assert data is not None
    again = from_structure(data)
    assert again.get_parameter("0.weight") is again.get_parameter("1.weight")
    assert torch.equal(again.get_buffer("table"), torch.arange(3.0))


def hooked() -> nn.Module:
    model = plain()
    model.register_forward_hook(lambda *_: None)
    return model


def with_function() -> nn.Module:
    model = plain()
    model.activation = nn.functional.relu  # type: ignore[assignment]
    return model


@pytest.mark.parametrize(
    "build", [lambda: Mine(nn.ReLU()), lambda: nn.Sequential(nn.Sequential(Mine())), hooked, with_function]
)
def test_structures_that_could_not_be_read_back_are_not_stored(build: Callable[[], nn.Module]) -> None:
    assert to_structure(build()) is None


@pytest.mark.parametrize("value", [{"a": 1}, [1], torch.ones(1)])
def test_a_structure_that_is_none(value: object) -> None:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    with pytest.raises(SourceError, match=r"the checkpoint's stored structure is a \w+, not a module"):
        from_structure(buffer.getvalue())
