"""timm's models: named, built, filled from caches, saved and loaded again; and what is said where that cannot be."""

from __future__ import annotations

import json
import re
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build
from safetensors.torch import save_file
from torch import nn

import asymswap
from asymswap.errors import CheckpointError, SourceError
from asymswap.models.builders import canonical
from asymswap.models.converted import rebuild
from asymswap.models.opened import OpenedModel
from asymswap.models.opening import is_file_reference, open_model

pytestmark = pytest.mark.usefixtures("one_thread")

Refusal = Callable[..., str]
Run = Callable[..., Any]

NAME = "test_resnet"  # timm's own, of 0.5 M parameters
TAG = "r160_in1k"


@pytest.fixture
def without_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name == "timm" or name.startswith("timm.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "timm", None)  # type: ignore[arg-type]


@pytest.mark.parametrize("reference", ["timm:resnet18", "timm:resnet18@a1_in1k", "timm:no/such"])
def test_a_reference_to_timm_is_told_without_loading_it(reference: str, without_timm: None) -> None:
    assert canonical(reference) == reference
    assert not is_file_reference(reference)


def test_without_timm_one_line_says_how_to_have_it(refusal: Refusal, without_timm: None) -> None:
    expected = "error: models of timm: need timm, which is not installed; install it: pip install 'asymswap[timm]'"
    torch.save({"fc.bias": torch.zeros(1)}, "w.pt")
    for arguments in (("candidates", f"timm:{NAME}"), ("candidates", "w.pt", "--arch", f"timm:{NAME}")):
        assert refusal(*arguments) in expected
    assert "did you mean resnet18" in refusal("candidates", "resnet1818")


class TestInstalled:
    """All of these need timm."""

    @pytest.fixture(autouse=True)
    def timm(self) -> Any:
        return pytest.importorskip("timm", reason="timm is not installed: pip install 'asymswap[timm]'")

    @pytest.fixture
    def hub(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., nn.Module]:
        """Hugging Face's cache in a folder of its own, with no network; call it to put a model's weights there."""
        from huggingface_hub import constants

        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "torch"))

        def put(name: str = f"{NAME}.{TAG}", change: Callable[[dict[str, Any]], Any] = dict) -> nn.Module:
            torch.manual_seed(1)
            model = build(f"timm:{name}", {}).eval()
            folder = tmp_path / "hub" / f"models--timm--{name}"
            (folder / "refs").mkdir(parents=True)
            (folder / "refs" / "main").write_text("0" * 40)
            (folder / "snapshots" / ("0" * 40)).mkdir(parents=True)
            save_file(change(dict(model.state_dict())), folder / "snapshots" / ("0" * 40) / "model.safetensors")
            return model

        return put

    @pytest.mark.parametrize("reference", [f"timm:{NAME}", f"timm:{NAME}@{TAG}", f"timm:{NAME}.{TAG}"])
    def test_published_weights_come_from_the_cache(self, reference: str, hub: Callable[..., nn.Module]) -> None:
        expected = hub()
        opened = open_model(reference)
        assert same_weights(opened.model, expected)
        assert opened.weights == TAG
        assert opened.origin.reference == f"timm:{NAME}"
        assert opened.origin.arguments == {"num_classes": 1000}
        assert opened.notes == ()
        assert not opened.model.training
        check_rebuilt(opened)

    def test_another_class_count_and_channels(self, hub: Callable[..., nn.Module]) -> None:
        expected = hub()
        opened = open_model(f"timm:{NAME}", arguments={"num_classes": 7, "in_chans": 1})
        assert opened.notes == ("the classifier is random: the published weights tell 1000 classes apart",)
        assert opened.preprocessing.channels == len(opened.preprocessing.mean) == 1
        assert opened.model.get_parameter("fc.weight").shape[0] == 7
        # timm makes the first conv of three channels one of one, and leaves all others as they are.
        assert torch.equal(opened.model.get_parameter("conv1.3.weight"), expected.get_parameter("conv1.3.weight"))
        check_rebuilt(opened)

    def test_torch_hubs_cache(self, hub: Callable[..., nn.Module], tmp_path: Path, monkeypatch: Any, timm: Any) -> None:
        """Some weights are on a plain web server: torch.hub keeps those."""
        import dataclasses

        from timm.models import _registry

        name = f"{NAME}.{TAG}"
        config = dataclasses.replace(
            _registry._model_pretrained_cfgs[name], url="https://x.invalid/w-1.pth", hf_hub_id=None
        )
        monkeypatch.setitem(_registry._model_pretrained_cfgs, name, config)
        with pytest.raises(SourceError, match=r"cannot be downloaded \(.*\); use `weights=\"none\"`"):
            open_model(f"timm:{name}")
        torch.manual_seed(1)
        expected = build(f"timm:{name}", {})
        (tmp_path / "torch" / "checkpoints").mkdir(parents=True, exist_ok=True)
        torch.save(expected.state_dict(), tmp_path / "torch" / "checkpoints" / "w-1.pth")
        assert same_weights(open_model(f"timm:{name}").model, expected)

    def test_random_weights_need_no_cache(self, hub: Callable[..., nn.Module]) -> None:
        opened = open_model(f"timm:{NAME}", weights="none", arguments={"num_classes": 3})
        assert opened.weights == "random"
        assert opened.origin.arguments == {"num_classes": 3}
        check_rebuilt(opened)

    def test_without_network_one_line_says_what_else_there_is(self, hub: object, refusal: Refusal) -> None:
        said = refusal("convert", f"timm:{NAME}", "--recipe", "3x3-only")
        assert said.startswith(f"the weights {NAME}.{TAG} of timm are in no cache and cannot be downloaded (")
        assert re.search(r"\); use .* for random weights or .* for a state_dict$", said)

    def test_an_unknown_hub_is_asked_once(self, hub: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
        """Its client retries for half a minute; and what is in the cache needs no hub."""
        from huggingface_hub import constants

        def unknown(*_: object) -> None:
            raise socket.gaierror(-2, "Name or service not known")

        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(socket, "getaddrinfo", unknown)
        monkeypatch.setattr("urllib.request.getproxies", dict)
        with pytest.raises(SourceError, match=r"cannot be downloaded \(\[Errno -2\] Name or service not known\); use"):
            open_model(f"timm:{NAME}")
        expected = hub()
        assert same_weights(open_model(f"timm:{NAME}").model, expected)

    def test_damaged_weights(self, hub: Callable[..., nn.Module], refusal: Refusal) -> None:
        hub(change=lambda state: {key: tensor for key, tensor in state.items() if key != "layer1.0.conv1.weight"})
        assert "cannot load the weights test_resnet.r160_in1k of timm: " in refusal("candidates", f"timm:{NAME}")

    @pytest.mark.parametrize(
        ("reference", "request_", "expected"),
        [
            ("timm:resnet5O", {}, r"timm [\d.]+ has no model 'resnet5O'; did you mean .*resnet50"),
            ("timm:qqqqqqqqqq", {}, r"has no model 'qqqqqqqqqq'; timm\.list_models\(\) lists them"),
            ("timm:hf-hub:timm/resnet18", {}, r"has no model 'hf-hub:timm/resnet18'"),
            ("timm:local-dir:here", {"weights": "none"}, r"has no model 'local-dir:here'"),
            ("timm:", {}, r"has no model ''"),
            ("timm:resnet18@a1_in1", {}, r"timm's resnet18 has no weights 'a1_in1', .*; did you mean a1_in1k"),
            ("timm:resnet18@zzzzz", {}, r"has no weights 'zzzzz', no FILE of that name either; known: a1_in1k"),
            ("timm:resnet18.zzzzz", {"weights": "none"}, r"timm's resnet18 has no weights 'zzzzz'"),
            (
                f"timm:{NAME}.{TAG}",
                {"weights": "other"},
                r'names weights and `weights="other"` others; give one of them',
            ),
            (
                f"timm:{NAME}@{TAG}",
                {"weights": "none"},
                r'names weights and `weights="none"` others; give one of them',
            ),
            (
                "timm:resnet10t",
                {"weights": "none", "arguments": {"foo": 1}},
                r"timm:resnet10t does not take .*'foo'",
            ),
            (
                f"timm:{NAME}",
                {"weights": "none", "arguments": {"pretrained": True}},
                r"'pretrained' is not an argument for timm's test_resnet; choose weights with `weights=…`",
            ),
            (
                f"timm:{NAME}",
                {"weights": "none", "arguments": {"checkpoint_path": "x.pt"}},
                r"'checkpoint_path' is not an argument for timm's",
            ),
            ("timm:dla34x", {}, r"has no model 'dla34x'; did you mean dla34"),
            ("timm:efficientnet_b2a", {}, r"has no model 'efficientnet_b2a' any more; its name is now timm:"),
            ("resnetv2_50", {}, r"no model 'resnetv2_50', and no such file; timm has one: timm:resnetv2_50"),
        ],
    )
    def test_names_and_arguments_that_timm_does_not_know(
        self, reference: str, request_: dict[str, Any], expected: str, hub: object
    ) -> None:
        with pytest.raises(SourceError, match=expected) as caught:
            open_model(reference, **request_)
        assert "\n" not in str(caught.value)

    def test_no_published_weights(self, hub: object, timm: Any) -> None:
        name = next(name for name in timm.list_models("resnet*") if not timm.get_pretrained_cfg(name).has_weights)
        with pytest.raises(SourceError, match=rf"timm's {name} has no published weights; use `weights=\"none\"`"):
            open_model(f"timm:{name}")

    @pytest.mark.parametrize(
        ("name", "arguments"),
        [
            (NAME, {}),
            (NAME, {"in_chans": 1, "num_classes": 10}),
            ("resnet18", {}),
            ("mobilenetv3_small_050", {"num_classes": 5}),
            ("convnext_atto", {}),
            ("test_efficientnet", {"num_classes": 2}),
        ],
    )
    def test_preprocessing_is_what_timm_itself_does(self, name: str, arguments: dict[str, Any], timm: Any) -> None:
        """Compared with the transform that timm's evaluation builds."""
        from timm.data import create_transform, resolve_data_config

        opened = open_model(f"timm:{name}", weights="none", arguments=arguments)
        own = opened.preprocessing
        config = resolve_data_config({}, model=opened.model)
        resize, crop, _, normalize = create_transform(**config).transforms
        assert (own.resize, own.size) == (resize.size, tuple(crop.size))
        assert own.interpolation == resize.interpolation.value
        if not arguments.get("in_chans"):
            assert own.mean == pytest.approx(normalize.mean.tolist())
            assert own.std == pytest.approx(normalize.std.tolist())
        assert own.channels == arguments.get("in_chans", 3)
        assert opened.example()[0].shape == (1, own.channels, *config["input_size"][1:])

    def test_an_image_size_that_is_asked_for(self) -> None:
        opened = open_model("timm:test_vit", weights="none", arguments={"img_size": [96, 96]})
        assert opened.preprocessing.size == (96, 96)
        check_rebuilt(opened)

    @pytest.mark.parametrize("form", ["pt", "safetensors"])
    def test_a_converted_model_is_saved_and_loaded_again(
        self, form: str, hub: Callable[..., nn.Module], tmp_path: Path, request: pytest.FixtureRequest
    ) -> None:
        original = hub()
        conversion = asymswap.convert(f"timm:{NAME}", "3x3-only")
        assert conversion.plan.swaps
        path = tmp_path / f"out.{form}"
        asymswap.save(conversion, path)
        x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
        again = asymswap.load(path)
        assert type(again) is type(conversion.model)
        assert torch.equal(again(x), conversion.model.eval()(x))
        assert conversion.header.provenance["versions"]["timm"]
        request.getfixturevalue("without_timm")
        expected = r"out\.\w+ cannot be rebuilt: .* need timm, which is not installed; install it: pip install"
        with pytest.raises(CheckpointError, match=expected):
            asymswap.load(path)
        assert torch.equal(asymswap.load(path, model=original)(x), again(x))

    @pytest.mark.parametrize("arch", [f"timm:{NAME}", f"timm:{NAME}.{TAG}", f"timm:{NAME}@{TAG}"])
    @pytest.mark.parametrize(
        ("built", "arguments"),
        [
            ({}, {"num_classes": 1000}),
            ({"num_classes": 7, "in_chans": 1}, {"num_classes": 7, "in_chans": 1}),
            ({"num_classes": 0}, {"num_classes": 0}),
        ],
    )
    def test_state_dicts(self, built: dict[str, int], arguments: dict[str, int], arch: str, tmp_path: Path) -> None:
        torch.manual_seed(1)
        model = build(f"timm:{NAME}", built)
        torch.save({"epoch": 1, "arch": NAME, "state_dict": model.state_dict()}, tmp_path / "w.pt")
        opened = open_model(tmp_path / "w.pt", arch=arch)
        assert same_weights(opened.model, model)
        assert opened.origin.reference == f"timm:{NAME}"
        assert opened.origin.arguments == arguments
        check_rebuilt(opened)

    @pytest.mark.slow
    def test_a_state_dict_that_fits_another_model(self, tmp_path: Path, refusal: Refusal) -> None:
        torch.save(build("timm:test_efficientnet", {}).state_dict(), tmp_path / "w.pt")
        assert "w.pt does not fit timm:test_resnet: missing: " in refusal(
            "candidates", "w.pt", "--arch", f"timm:{NAME}"
        )

    def test_keys_as_authors_published_them(self, tmp_path: Path) -> None:
        """Facebook's ConvNeXt files nest the weights and name blocks otherwise; timm renames them."""
        model = build("timm:test_convnext", {})
        old = {theirs(key): tensor for key, tensor in model.state_dict().items()}
        assert not old.keys() <= model.state_dict().keys()
        torch.save({"model": old}, tmp_path / "w.pt")
        assert same_weights(open_model(tmp_path / "w.pt", arch="timm:test_convnext").model, model)

    def test_a_module_in_memory_is_recognised(self, timm: Any, tmp_path: Path) -> None:
        model = timm.create_model(NAME, num_classes=4, in_chans=1, output_stride=16, drop_rate=0.25).eval()
        if not hasattr(model, "_model_args"):
            pytest.skip("this version of timm does not remember with which arguments it has built a model")
        conversion = asymswap.convert(model, "3x3-only")
        assert conversion.header.origin.reference == f"timm:{NAME}"
        assert conversion.header.preprocessing.channels == 1
        asymswap.save(conversion, tmp_path / "out.pt")
        again = asymswap.load(tmp_path / "out.pt")
        assert again.drop_rate == 0.25
        x = torch.randn(1, 1, 64, 64, generator=torch.Generator().manual_seed(0))
        assert torch.equal(again(x), conversion.model.eval()(x))

    def test_a_changed_module_in_memory_is_not_taken_for_timms_own(self, timm: Any) -> None:
        def renamed(model: Any) -> None:
            model.fc = nn.Sequential(model.fc, nn.ReLU())

        def with_attribute(model: Any) -> None:
            model.layer1[0].bn1.eps = 1e-3

        def with_forward(model: Any) -> None:
            model.layer2.forward = model.layer2.forward

        def with_class(model: Any) -> None:
            model.act1 = nn.GELU()

        for change in (renamed, with_attribute, with_forward, with_class):
            model = timm.create_model(NAME).eval()
            assert open_model(model).origin.reference == f"timm:{NAME}"
            change(model)
            opened = open_model(model)
            assert opened.origin.reference == "class:timm.models.resnet.ResNet", change
            assert "load the result with asymswap.load(path, model=…)" in opened.notes[0]
            assert opened.preprocessing.size == (160, 160)

    def test_what_a_factory_gets_from_timm_needs_the_factory_no_more(self, tmp_path: Path, monkeypatch: Any) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "path", list(sys.path))
        Path("net.py").write_text(f"import timm\ndef net(): return timm.create_model({NAME!r}, num_classes=3)")
        opened = open_model("net.py:net")
        assert opened.origin.reference == f"timm:{NAME}"
        check_rebuilt(opened)

    @pytest.mark.parametrize(
        "arguments",
        [{"pretrained": True}, {"pretrained_cfg": {"file": "x"}}, {"checkpoint_path": "x"}, {"cache_dir": "."}],
    )
    def test_a_stored_origin_makes_timm_read_no_file(
        self, arguments: dict[str, Any], hub: Callable[..., nn.Module], tmp_path: Path
    ) -> None:
        hub()
        asymswap.save(asymswap.convert(f"timm:{NAME}", "3x3-only"), tmp_path / "out.pt")
        saved = torch.load(tmp_path / "out.pt", weights_only=True)
        header = json.loads(saved["asymswap"])
        header["origin"]["arguments"] |= arguments
        torch.save({**saved, "asymswap": json.dumps(header)}, tmp_path / "out.pt")
        with pytest.raises(CheckpointError, match=rf"'{next(iter(arguments))}' is not an argument for timm's"):
            asymswap.load(tmp_path / "out.pt")

    @pytest.mark.parametrize(
        ("name", "kind", "reason"),
        [
            ("tf_mobilenetv3_small_minimal_100", "Conv2dSame", "padding computed at run time"),
            (
                "test_nfnet",
                "ScaledStdConv2d",
                "weights standardised and scaled at every run",
            ),
            ("resnetv2_50x1_bit", "StdConv2d", "weights standardised at every run"),
        ],
    )
    def test_convs_of_subclasses_are_listed_with_the_reason(self, name: str, kind: str, reason: str) -> None:
        found = asymswap.candidates(asymswap.open_model(f"timm:{name}", weights="none", input_size=(3, 64, 64)))
        refused = [row.reason or "" for row in found.rows if row.site.refusal]
        assert f"is a {kind}: {reason}" in refused

    def test_functional_convs_are_noted(self, run: Run) -> None:
        listed = run("candidates", "timm:resnetblur18", "--weights", "none", "--json")
        (note,) = json.loads(listed.out)["notes"]
        assert note.startswith("4 convolutions are function calls (conv2d without an nn.Conv2d)")
        assert "BlurPool2d maxpool.1, layer2.0.aa, layer3.0.aa, layer4.0.aa" in note
        shown = run("candidates", "timm:resnetblur18", "--weights", "none").out
        assert "4 convolutions are function calls" in " ".join(shown.split())

    def test_string_padding_is_swapped(self) -> None:
        from timm.models.convmixer import ConvMixer

        torch.manual_seed(0)
        model = ConvMixer(dim=8, depth=2, kernel_size=6, patch_size=4, num_classes=3).eval()
        assert model.get_submodule("blocks.0.0.fn.0").padding == "same"
        conversion = asymswap.convert(
            asymswap.open_model(model, input_size=(3, 33, 31)),
            "all-spatial",
            overrides={"energy": 1.0, "allow_growth": True},
        )
        assert len(conversion.plan.swaps) == 3
        assert conversion.report.output.relative < 1e-5


def theirs(key: str) -> str:
    """A key of timm's ConvNeXt as the authors' own files have it."""
    for own, other in (("stem.", "downsample_layers.0."), (".mlp.fc1.", ".pwconv1."), (".mlp.fc2.", ".pwconv2.")):
        key = key.replace(own, other)
    parts = key.split(".")
    if parts[0] == "stages" and parts[2] == "downsample":
        return ".".join(["downsample_layers", parts[1], *parts[3:]])
    if parts[0] == "stages":
        parts.remove("blocks")
        key = ".".join(parts).replace("conv_dw", "dwconv")
    return key.replace("head.fc.", "head.").replace("head.norm.", "norm.")


def check_rebuilt(opened: OpenedModel) -> None:
    """The origin leads to the same structure, and it takes the state."""
    again = rebuild(opened.origin, opened.skeleton)
    assert type(again) is type(opened.model)
    assert repr(again) == repr(opened.model)
    again.load_state_dict(opened.model.state_dict())


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(tensor, second[key]) for key, tensor in first.items())
