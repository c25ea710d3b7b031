"""Networks that take other things than a batch of images, or give other things than scores: all of torchvision's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build
from torch import Tensor, nn
from torchvision import models

import asymswap
from asymswap.models import torchvision_models
from asymswap.types import Preprocessing
from asymswap.utils.inputs import Inputs, probe
from asymswap.utils.tensors import list_tensors, map_tensors

FULL_RANK = {"energy": 1.0, "allow_growth": True}
CLASSIFIERS = models.list_models(models)
VIDEO = models.list_models(models.video)
OTHERS = [name for name in models.list_models() if name not in [*CLASSIFIERS, *VIDEO]]
QUICK = ["ssdlite320_mobilenet_v3_large"]
EVERY = [pytest.param(name, marks=() if name in QUICK else pytest.mark.nightly) for name in OTHERS]


def convert(name: str) -> asymswap.Conversion:
    torch.manual_seed(0)
    return asymswap.convert(asymswap.open_model(name, weights="none"), "all-spatial", overrides=FULL_RANK)


def training_inputs(name: str, preprocessing: Preprocessing) -> Inputs:
    """What a network is trained on: for detectors, with boxes, labels, masks and keypoints."""
    inputs = probe(preprocessing, torch.float32)
    if preprocessing.form != "image-list":
        return inputs
    height, width = preprocessing.size
    target: dict[str, Tensor] = {
        "boxes": torch.tensor([[0.1 * width, 0.2 * height, 0.7 * width, 0.8 * height]]),
        "labels": torch.tensor([1]),
    }
    if name.startswith("maskrcnn"):
        target["masks"] = torch.ones(1, height, width, dtype=torch.uint8)
    if name.startswith("keypointrcnn"):
        target["keypoints"] = torch.rand(1, 17, 3) * torch.tensor([width, height, 1.0])
    return (*inputs, [target, target])


def form_of(value: Any) -> Any:
    """The types in a nested value, and the sizes of the tensors in it."""
    if isinstance(value, Tensor):
        return tuple(value.shape)
    if isinstance(value, dict):
        return type(value), {key: form_of(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value), [form_of(item) for item in value]
    return type(value)


@pytest.mark.parametrize("name", EVERY)
def test_a_model_of_any_family_is_read_converted_written_and_trained(name: str, tmp_path: Path) -> None:
    found = asymswap.candidates(asymswap.open_model(name, weights="none"))
    conversion = convert(name)
    report = conversion.report
    torch.manual_seed(0)
    original = build(f"torchvision:{name}", {})
    convs = [each for each, module in original.named_modules() if isinstance(module, nn.Conv2d)]

    assert {row.site.name for row in found.rows} == set(convs) == {row.site for row in report.sites}
    assert bool(report.swapped) == any(original.get_submodule(each).weight[0, 0].numel() > 3 for each in convs)
    assert report.output.relative < 1e-4
    assert all(row.output_error < 1e-4 for row in report.swapped)
    before = report.rest.macs + sum(row.before.macs for row in report.sites)
    after = report.rest.macs + sum(row.after.macs for row in report.sites)
    assert (before, after) == (report.before.macs, report.after.macs)
    swapped = tuple(f"{row.site}." for row in report.swapped)
    untouched = [key for key in original.state_dict() if not key.startswith(swapped)]
    assert [key for key in conversion.model.state_dict() if not key.startswith(swapped)] == untouched
    if name == "ssdlite320_mobilenet_v3_large":
        assert report.model.traced_by == "torch.fx in 13 parts"
        assert report.output.probe == "2 random images (seed 0), compared at the outputs of 13 parts"
        assert report.model.input == "3x320x320"
    check_written(conversion, tmp_path / "model.pt")
    check_training(name, original, conversion)


def check_training(name: str, original: nn.Module, conversion: asymswap.Conversion) -> None:
    """The losses of detectors, auxiliary outputs and lists of flows come out as the original's do."""
    inputs = training_inputs(name, conversion.header.preprocessing)
    with torch.no_grad():
        wanted = form_of(original.train()(*inputs))
    output = conversion.model.train()(*inputs)
    assert form_of(output) == wanted
    floats = [tensor for tensor in list_tensors(output) if tensor.is_floating_point()]
    sum(tensor.sum() for tensor in floats).backward()  # type: ignore[union-attr]
    for row in conversion.report.swapped[:3]:
        gradients = [parameter.grad for parameter in conversion.model.get_submodule(row.site).parameters()]
        assert all(gradient is not None and bool(torch.isfinite(gradient).all()) for gradient in gradients)


def check_written(conversion: asymswap.Conversion, path: Path) -> None:
    asymswap.save(conversion, path)
    inputs = probe(conversion.header.preprocessing, torch.float32, images=1)
    loaded = asymswap.load(path)
    with torch.no_grad():
        # Networks may change what they are given.
        wanted, found = (
            list_tensors(model(*map_tensors(inputs, Tensor.clone))) for model in (conversion.model, loaded)
        )
    assert len(found) == len(wanted) > 0
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


def test_a_changed_detector_is_told_by_its_parts() -> None:
    """The comparison can fail: pairs of rank 1 do not compute the same."""
    torch.manual_seed(0)
    overrides = {"rank": 1, "allow_growth": True}
    detector = "ssdlite320_mobilenet_v3_large"
    report = asymswap.convert(asymswap.open_model(detector, weights="none"), "all-spatial", overrides=overrides).report
    assert report.output.relative > 0.01


@pytest.mark.nightly  # the comparison of models of every form, below, opens one too
def test_a_pickled_detector_is_known_by_its_class(tmp_path: Path) -> None:
    torch.save(build("torchvision:ssdlite320_mobilenet_v3_large", {}), tmp_path / "detector.pt")
    found = asymswap.candidates(tmp_path / "detector.pt")
    assert found.input == "an input of 3x320x320"
    assert len(found.rows) == 98


@pytest.mark.parametrize(
    "name", [pytest.param(each, marks=[pytest.mark.nightly] * (each != "r3d_18")) for each in VIDEO]
)
def test_a_network_of_other_convs_has_nothing_to_swap(name: str) -> None:
    with pytest.raises(asymswap.AsymswapError, match=r"the model has no Conv2d to swap; its \d+ Conv3d are none"):
        asymswap.candidates(asymswap.open_model(name, weights="none"))


def test_clips_have_frames() -> None:
    with pytest.raises(
        asymswap.AsymswapError, match="`input_size=3x64x64` does not suit: one input is channels x frames x"
    ):
        asymswap.candidates(asymswap.open_model("r3d_18", weights="none", input_size=(3, 64, 64)))
    with pytest.raises(
        asymswap.AsymswapError, match="`input_size=3x8x64x64` does not suit: one input is channels x height"
    ):
        asymswap.candidates(asymswap.open_model("resnet18", weights="none", input_size=(3, 8, 64, 64)))


def test_data_is_for_networks_that_take_single_images() -> None:
    with pytest.raises(asymswap.AsymswapError, match="this network takes pairs of images; data can be given to"):
        asymswap.convert(
            asymswap.open_model("raft_small", weights="none"),
            "3x3-only",
            calibration=asymswap.Calibration(data="digits"),
        )
    with pytest.raises(asymswap.AsymswapError, match="this network takes lists of images; data can be given to"):
        asymswap.convert(
            asymswap.open_model("ssdlite320_mobilenet_v3_large", weights="none"), "3x3-only", evaluate="digits"
        )


def test_every_form_has_a_preprocessing() -> None:
    """The families take what torchvision's own documentation says."""
    expected = {
        "lraspp_mobilenet_v3_large": "images",
        "quantized_mobilenet_v2": "images",
        "r3d_18": "clips",
        "raft_small": "image-pair",
        "ssdlite320_mobilenet_v3_large": "image-list",
    }
    forms = {name: torchvision_models.assumed_preprocessing(build(f"torchvision:{name}", {})).form for name in expected}
    assert forms == expected


@pytest.mark.parametrize(
    ("name", "small"),
    [
        pytest.param("raft_small", (3, 128, 128), marks=pytest.mark.nightly),
        ("r3d_18", (3, 4, 32, 32)),
        ("ssdlite320_mobilenet_v3_large", None),
    ],
)
def test_models_of_every_form_can_stand_beside_each_other(
    name: str, small: tuple[int, ...] | None, tmp_path: Path
) -> None:
    torch.save(build(f"torchvision:{name}", {}), tmp_path / "x.pt")
    second = asymswap.compare([asymswap.open_model(tmp_path / "x.pt", input_size=small)] * 2).models[1]
    if small is None:
        assert second.gap is None
        assert "which boxes it keeps jumps where scores are close, so its outputs are not compared" in second.notes
    else:
        assert second.gap is not None
        assert second.gap.relative == 0


def test_models_of_two_forms_cannot_be_compared_on_the_same_inputs() -> None:
    mixed = asymswap.compare(
        [asymswap.open_model("mobilenet_v3_small", weights="none"), asymswap.open_model("r3d_18", weights="none")]
    )
    assert "it takes 3x16x112x112, so its outputs cannot be compared with the first's; give `input_size=…`" in (
        mixed.models[1].notes
    )


@pytest.mark.parametrize("form", ["images", "image-pair", "clips"])
def test_an_export_of_any_size_keeps_the_form(form: Any) -> None:
    preprocessing = Preprocessing(3, (8, 8), (0.5,) * 3, (0.5,) * 3, form=form, frames=4 if form == "clips" else 1)
    both = (preprocessing, replace(preprocessing, size=(12, 10)))
    plain, resized = (probe(one, torch.float32, 2, seed=0) for one in both)
    assert [tensor.shape[:-2] for tensor in resized] == [tensor.shape[:-2] for tensor in plain]
    assert all(tensor.shape[-2:] == (12, 10) for tensor in resized)


def test_a_network_of_ones_own_in_a_package_named_as_torchvisions_takes_images() -> None:
    for package in ("detection", "video.nets", "optical_flow"):
        own = type("Net", (nn.Sequential,), {"__module__": package})(nn.Conv2d(3, 4, 3))
        assert torchvision_models.assumed_preprocessing(own).form == "images"
