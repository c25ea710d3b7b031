"""A bare state dict is told by the shipped table, which is that of the installed torchvision."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torchvision
from families import build, known_references, one_of_each_family
from torch import Tensor

from asymswap.errors import SourceError
from asymswap.models import opening, torchvision_models
from asymswap.models.builders import family_of, identify
from asymswap.models.fingerprints import matches, shapes_of, table
from asymswap.models.opening import open_model
from asymswap.types import Origin, silent
from asymswap.utils.tensors import WithoutMemory, meta_copy

pytestmark = pytest.mark.usefixtures("one_thread")

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "make_fingerprints.py"
SOME = ["resnet18", "googlenet", "vit_b_16", "squeezenet1_0", "densenet121", "mobilenet_v3_small", "regnet_y_400mf"]
OTHERS = [name for name in torchvision_models.classifiers() if name not in SOME]
each_classifier = pytest.mark.parametrize("name", [*SOME, *one_of_each_family(OTHERS, SOME)])


def on_meta(reference: str, arguments: dict[str, Any]) -> torch.nn.Module:
    return family_of(reference).on_meta(reference, arguments)


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_fingerprints", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def state_on_meta(reference: str, **arguments: Any) -> dict[str, Tensor]:
    return on_meta(reference, arguments).state_dict()


@each_classifier
def test_every_classifier_is_told_whatever_its_classes_and_channels(name: str) -> None:
    reference = f"torchvision:{name}"
    for arguments in ({}, {"num_classes": 7}, {"num_classes": 3, "in_channels": 1}):
        found, view = identify(state_on_meta(reference, **arguments), "x.pt", silent)
        assert (found.reference, found.arguments, view.prefix) == (reference, arguments, "")


@pytest.mark.nightly
def test_the_table_is_current() -> None:
    made = script().text()
    shipped = script().OUT.read_text(encoding="utf-8")
    if shipped.splitlines()[0] != made.splitlines()[0]:
        # Another torchvision may have further networks; those that the table knows must still look as it says.
        known = {line.split("\t")[0] for line in shipped.splitlines()[2:]}
        made, shipped = (
            "\n".join(line for line in text.splitlines()[2:] if line.split("\t")[0] in known)
            for text in (made, shipped)
        )
    assert shipped == made


def test_a_few_lines_of_the_table_are_current() -> None:
    make = script()
    lines = script().OUT.read_text(encoding="utf-8").splitlines()
    for reference in ("torchvision:resnet18", "torchvision:googlenet", "torchvision:fcn_resnet50", "cifar:resnet20"):
        shipped = [line for line in lines if line.split("\t")[0] == reference]
        assert shipped == [make.to_line(make.fingerprint(reference, arguments)) for arguments in make.forms(reference)]


def test_the_table_knows_every_network() -> None:
    known = {entry.reference for entry in table()}
    if torchvision.__version__.partition("+")[0] == script().OUT.read_text().split("\n")[0].rpartition(" ")[2]:
        assert known == {name for name in known_references() if not name.startswith("torchvision:quantized_")}


def test_lines_round_trip() -> None:
    make = script()
    lines = {line for line in make.OUT.read_text().splitlines() if not line.startswith("#")}
    assert {make.to_line(entry) for entry in table()} == lines


@pytest.mark.parametrize(
    ("reference", "arguments"),
    [
        ("torchvision:inception_v3", {"aux_logits": False, "num_classes": 5}),
        ("torchvision:deeplabv3_resnet50", {"aux_loss": True}),
        ("torchvision:fcn_resnet50", {"num_classes": 2, "in_channels": 4}),
        ("torchvision:vit_b_16", {"image_size": 384}),
        ("torchvision:fasterrcnn_resnet50_fpn", {"num_classes": 4}),
        ("torchvision:ssd300_vgg16", {"num_classes": 4}),
        ("torchvision:raft_small", {}),
        ("cifar:resnet20", {"num_classes": 100, "in_channels": 1}),
        ("digits-resnet", {"num_classes": 4}),
    ],
)
def test_other_networks_and_arguments(reference: str, arguments: dict[str, Any]) -> None:
    state = state_on_meta(reference, **arguments)
    found, _ = identify(state, "x.pt", silent)
    assert (found.reference, dict(found.arguments)) == (reference, arguments)
    fit = family_of(reference).fit(reference, {}, state)
    assert (fit.arguments, bool(fit.difference)) == (arguments, False)


@pytest.mark.parametrize(
    "change",
    [
        lambda s: {**s, "layer1.0.conv1.weight": torch.zeros(64, 64, 5, 5)},
        lambda s: {**s, "fc.bias": torch.zeros(9)},
        lambda s: {**s, "fc.bias": torch.zeros(0), "fc.weight": torch.zeros(0, 512)},
        lambda s: {key: tensor for key, tensor in s.items() if key != "fc.bias"},
        lambda s: {**s, "extra.weight": torch.zeros(1)},
    ],
)
def test_what_differs_anywhere_is_not_taken(change: Any) -> None:
    state = on_meta("torchvision:resnet18", {}).state_dict()
    assert [match.reference for match in matches(shapes_of(state))] == ["torchvision:resnet18"]
    assert matches(shapes_of(change(state))) == []


def test_several_that_fit_are_listed() -> None:
    state = state_on_meta("torchvision:fasterrcnn_mobilenet_v3_large_fpn")
    expected = (
        r"x\.pt holds a state_dict that fits fasterrcnn_mobilenet_v3_large_320_fpn, fasterrcnn_mobilenet_v3_large_fpn;"
    )
    with pytest.raises(SourceError, match=expected):
        identify(state, "x.pt", silent)


def test_no_network_is_built_to_find_out(monkeypatch: pytest.MonkeyPatch) -> None:
    state = state_on_meta("torchvision:efficientnet_v2_s", num_classes=12)
    monkeypatch.setattr(torchvision_models.Torchvision, "build", lambda *_: pytest.fail("a network was built"))
    assert identify(state, "x.pt", silent)[0].reference == "torchvision:efficientnet_v2_s"


def test_old_keys_are_told_too() -> None:
    state = state_on_meta("torchvision:densenet121")
    old = {key.replace(".norm1.", ".norm.1.").replace(".conv2.", ".conv.2."): tensor for key, tensor in state.items()}
    assert old.keys() != state.keys()
    assert identify(old, "x.pt", silent)[0].reference == "torchvision:densenet121"


@pytest.mark.parametrize(
    "name",
    ["resnet18", "googlenet", "mobilenet_v3_small", pytest.param("swin_t", marks=pytest.mark.nightly), "squeezenet1_1"],
)
def test_a_grey_stem_is_read_off_and_rebuilt(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build(f"torchvision:{name}", {"in_channels": 1, "num_classes": 3}).eval()
    torch.save(model.state_dict(), tmp_path / "x.pt")
    for request in ({}, {"arch": name}):
        opened = open_model(tmp_path / "x.pt", **request)
        assert opened.origin == Origin(f"torchvision:{name}", {"in_channels": 1, "num_classes": 3})
        assert opened.preprocessing.channels == len(opened.preprocessing.mean) == 1
        image = torch.rand(2, *opened.example()[0].shape[1:])
        with torch.no_grad():
            assert torch.equal(opened.model(image), model(image))


@pytest.mark.parametrize("name", ["resnet18", "googlenet", "mobilenet_v3_small", "swin_t", "squeezenet1_1"])
def test_a_grey_stem_differs_in_its_channels_alone(name: str) -> None:
    stems = []
    for arguments in ({}, {"in_channels": 1}):
        model = on_meta(f"torchvision:{name}", arguments)
        stems.append(next(repr(module) for module in model.modules() if isinstance(module, torch.nn.Conv2d)))
    assert stems[1] == stems[0].replace("Conv2d(3, ", "Conv2d(1, ") != stems[0]


@pytest.mark.parametrize(
    ("reference", "channels", "expected"),
    [
        ("torchvision:resnet18", 0, r"cannot have in_channels=0; give a whole number from 1 on"),
        ("torchvision:resnet18", "1", r"cannot have in_channels='1'"),
        (
            "torchvision:fasterrcnn_resnet50_fpn",
            1,
            r"does not take 'in_channels'; its input has the channels of an image",
        ),
    ],
)
def test_channels_that_cannot_be(reference: str, channels: Any, expected: str) -> None:
    with pytest.raises(SourceError, match=expected):
        on_meta(reference, {"in_channels": channels})


def test_a_network_that_runs_while_it_is_built_takes_no_more_memory_than_such_networks_need() -> None:
    """It has to be built with numbers, and how many classes it has is for a file to say."""
    reference = "torchvision:ssdlite320_mobilenet_v3_large"
    assert not any(tensor.is_meta for tensor in on_meta(reference, {"num_classes": 5}).state_dict().values())
    with pytest.raises(SourceError, match=r"num_classes': 30000}: its weights take more than 1,073,741,824 bytes"):
        on_meta(reference, {"num_classes": 30_000})


def test_channels_as_they_are_change_nothing() -> None:
    torch.manual_seed(0)
    one = build("torchvision:resnet18", {"in_channels": 3})
    torch.manual_seed(0)
    assert torch.equal(one.get_parameter("conv1.weight"), build("torchvision:resnet18", {}).conv1.weight)


def test_files_that_torchvision_publishes_are_known_by_their_hash() -> None:
    resnet18 = Origin("torchvision:resnet18", {})
    assert torchvision_models.published("f37072fd" + "0" * 56) == (resnet18, "IMAGENET1K_V1")
    assert torchvision_models.published("0" * 64) == (None, "")
    googlenet = torchvision.models.GoogLeNet_Weights.IMAGENET1K_V1.url.rpartition("-")[2].removesuffix(".pth")
    assert torchvision_models.published(googlenet + "0" * 56) == (
        Origin("torchvision:googlenet", {"transform_input": True}),
        "IMAGENET1K_V1",
    )


@pytest.mark.parametrize("given", [{}, {"arch": "googlenet"}])
def test_published_weights_set_what_they_were_trained_with(
    given: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(build("torchvision:googlenet", {}).state_dict(), tmp_path / "x.pt")
    unknown = open_model(tmp_path / "x.pt", **given)  # type: ignore[arg-type]
    assert unknown.origin.arguments == {}
    assert (
        "set the argument transform_input=True for weights that descend from torchvision's; it is off here"
        in unknown.notes
    )
    known = Origin("torchvision:googlenet", {"transform_input": True}), "IMAGENET1K_V1"
    monkeypatch.setattr(torchvision_models, "published", lambda _: known)
    opened = open_model(tmp_path / "x.pt", **given)  # type: ignore[arg-type]
    assert opened.origin.arguments == {"transform_input": True}
    assert opened.model.transform_input is True
    assert opened.notes == (
        "known by its SHA-256 as torchvision's IMAGENET1K_V1 of googlenet, which sets transform_input=True",
    )


@pytest.fixture
def without_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is built to be filled stays on the meta device, and filling it from there is allowed."""
    real = torchvision_models.Torchvision.build

    def build(self: Any, reference: str, arguments: Any) -> torch.nn.Module:
        with WithoutMemory(torch.empty):
            return real(self, reference, arguments)

    monkeypatch.setattr(torchvision_models.Torchvision, "build", build)
    monkeypatch.setattr(opening, "load_state_", lambda *_, **__: None)
    monkeypatch.setattr(opening, "check_numbers", lambda _: None)


@each_classifier
def test_a_state_dict_and_a_module_of_every_classifier_open(name: str, tmp_path: Path, without_numbers: None) -> None:
    """On the meta device the files are a few kilobytes."""
    model = meta_copy(on_meta(f"torchvision:{name}", {}))
    torch.save(model.state_dict(), tmp_path / "state.pt")
    torch.save(model, tmp_path / "module.pt")
    assert open_model(tmp_path / "state.pt").origin.reference == f"torchvision:{name}"
    opened = open_model(tmp_path / "module.pt")
    assert opened.origin.reference == f"skeleton:{type(model).__module__}.{type(model).__qualname__}"
