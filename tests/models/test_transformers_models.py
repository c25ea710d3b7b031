"""Folders that transformers has written: read, converted, loaded again without the folder, or refused with a reason."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from processes import forked

import asymswap
from asymswap.errors import AsymswapError
from asymswap.models import transformers_models

transformers = pytest.importorskip("transformers")

PREPROCESSOR = {
    "do_normalize": True, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25], "resample": 3,
    "size": {"shortest_edge": 32}, "crop_pct": 0.8,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = transformers.ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic", num_labels=10, image_size=32
    )
    path = tmp_path_factory.mktemp("hf") / "resnet"
    transformers.ResNetForImageClassification(config).eval().save_pretrained(path)
    (path / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    return path


def test_a_folder_is_the_model_that_it_holds(folder: Path) -> None:
    opened = asymswap.open_model(folder)
    theirs = transformers.ResNetForImageClassification.from_pretrained(folder).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(opened.model(x).logits, theirs(x).logits)
    assert opened.origin.reference == "transformers:ResNetForImageClassification"
    known = opened.preprocessing
    assert (known.size, known.resize, known.interpolation) == ((32, 32), 40, "bicubic")
    assert (known.mean, known.std) == ((0.5,) * 3, (0.25,) * 3)


def test_what_is_converted_needs_the_folder_no_more(folder: Path, tmp_path: Path) -> None:
    moved = tmp_path / "resnet"
    shutil.copytree(folder, moved)
    calibration = asymswap.Calibration(torch.randn(64, 3, 32, 32))
    conversion = asymswap.convert(moved, "half-macs", macs=0.6, calibration=calibration)
    assert conversion.report.swapped
    assert [one.output for one in conversion.report.agreement.outputs] == ["logits"]
    asymswap.save(conversion, tmp_path / "model.pt")
    shutil.rmtree(moved)
    x = torch.randn(2, 3, 32, 32)
    torch.save(x, tmp_path / "x.pt")
    code = f"""
import torch, asymswap
model = asymswap.load({str(tmp_path / "model.pt")!r}).eval()
assert type(model).__name__ == "ResNetForImageClassification", type(model)
with torch.no_grad():
    torch.save(model(torch.load({str(tmp_path / "x.pt")!r})).logits, {str(tmp_path / "y.pt")!r})
"""
    done = forked(code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "y.pt"), conversion.model.eval()(x).logits)


def test_scores_of_their_classifiers_are_evaluated(folder: Path, tmp_path: Path) -> None:
    torch.save({"images": torch.rand(20, 3, 32, 32), "labels": torch.arange(20) % 10}, tmp_path / "data.pt")
    found = asymswap.evaluate(str(folder), str(tmp_path / "data.pt"))
    assert found.images == 20


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["ResNetForImageClasification"]}, "did you mean ResNetForImageClassification"),
        ({"architectures": ["AutoConfig"]}, "has no model 'AutoConfig'"),
        ({"model_type": "no-such"}, "no-such"),
        ({"backbone": "microsoft/resnet-50"}, "takes its backbone from elsewhere"),
        ({"architecture": "hf-hub:some/network"}, "takes its architecture from elsewhere"),
        ({"architecture": "local-dir:/etc"}, "takes its architecture from elsewhere"),
        ({"model_args": {"checkpoint_path": "/etc/w.pth"}}, "takes its checkpoint_path from elsewhere"),
        ({"text_config": {"use_timm_backbone": True}}, "takes its use_timm_backbone from elsewhere"),
    ],
)
def test_what_it_cannot_be(folder: Path, tmp_path: Path, change: dict[str, object], message: str) -> None:
    shutil.copytree(folder, tmp_path / "net")
    path = tmp_path / "net" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(AsymswapError, match=message):
        asymswap.open_model(tmp_path / "net")


def test_code_in_a_folder_is_not_run(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "net")
    path = tmp_path / "net" / "config.json"
    own: dict[str, object] = {"auto_map": {"AutoConfig": "evil.Evil", "AutoModelForImageClassification": "evil.Evil"}}
    own |= {"attn_implementation": "evil/kernels", "_attn_implementation": "evil/kernels"}
    path.write_text(json.dumps(json.loads(path.read_text()) | own))
    (tmp_path / "net" / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    opened = asymswap.open_model(tmp_path / "net")
    assert type(opened.model).__name__ == "ResNetForImageClassification"
    assert not (tmp_path / "ran").exists()


def test_without_transformers_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(AsymswapError, match=r"pip install 'asymswap\[transformers\]'"):
        asymswap.open_model(folder)


def test_other_folders_name_nothing(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[1]")
    assert transformers_models.named_in(tmp_path) is None


def test_from_pretrained_says_how_a_converted_network_is_loaded(folder: Path, tmp_path: Path) -> None:
    conversion = asymswap.convert(folder, "acnet")
    report = asymswap.export(conversion, tmp_path / "swapped", form="transformers")
    for loader in (transformers.AutoModel, transformers.AutoModelForImageClassification):
        with pytest.raises(ValueError, match=r"asymswap\.load"):
            loader.from_pretrained(tmp_path / "swapped")
    with pytest.raises((OSError, ValueError)):
        transformers.ResNetForImageClassification.from_pretrained(tmp_path / "swapped")
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        want = conversion.model.eval()(x).logits
        assert torch.equal(asymswap.load(report.files[0].path)(x).logits, want)
        assert torch.equal(asymswap.open_model(tmp_path / "swapped").model(x).logits, want)
    with pytest.raises(AsymswapError, match="no network of transformers"):
        asymswap.export("digits-resnet", tmp_path / "digits", form="transformers")
    with pytest.raises(AsymswapError, match="it is a folder"):
        asymswap.export(conversion, tmp_path / "swapped.pt", form="transformers")
