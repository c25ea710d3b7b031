"""Exported files, run by other programs than the one that wrote them."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build
from processes import forked
from torch import Tensor, nn

import asymswap
from asymswap.api import export as exporting
from asymswap.measure import runtimes

RECIPE = '[[rules]]\nmatch = {{ kernel = "3x3", in_channels = {{ min = 8 }} }}\nswap = {{ {swap} }}\n'
SWAPS = {
    "separable": 'kind = "separable", rank = 4',
    "separable-between": 'kind = "separable", rank = 4, between = "bn-relu"',
    "cross": 'kind = "cross"',
    "acb": 'kind = "acb", bn = "shared"',
    "acb-branch": 'kind = "acb", bn = "branch"',
    "offset": 'kind = "offset"',
    "weighted-offset": 'kind = "weighted-offset"',
    "predicted-offset": 'kind = "predicted-offset"',
    "predicted-offset-mask": 'kind = "predicted-offset", mask = true, offset_groups = 2',
}


def converted(folder: Path, name: str) -> Path:
    """A conversion whose parameters have all been shaken, so that nothing is zero or one any more."""
    (folder / "recipe.toml").write_text(RECIPE.format(swap=SWAPS[name]))
    conversion = asymswap.convert("digits-resnet", folder / "recipe.toml")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in conversion.model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    asymswap.save(conversion, folder / "model.pt")
    return folder / "model.pt"


def run_onnx(path: Path, images: torch.Tensor) -> torch.Tensor:
    """In another process, which knows nothing of torch or of asymswap."""
    (path.parent / "in.npy").unlink(missing_ok=True)
    import numpy as np

    np.save(path.parent / "in.npy", images.numpy())
    code = f"""
import numpy, onnxruntime
session = onnxruntime.InferenceSession({str(path)!r}, providers=["CPUExecutionProvider"])
images = numpy.load({str(path.parent / "in.npy")!r})
numpy.save({str(path.parent / "out.npy")!r}, session.run(None, {{session.get_inputs()[0].name: images}})[0])
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=120)
    return torch.from_numpy(np.load(path.parent / "out.npy"))


FUSABLE = [name for name in SWAPS if name.startswith(("acb", "offset", "weighted"))]


IN_SHORT = [("predicted-offset-mask", False), ("acb-branch", True)]
"""What `make test` tries, and pairs by `test_any_size_is_any_size`; `make test-nightly` tries all."""


@pytest.mark.parametrize(
    ("name", "fuse"),
    [
        pytest.param(*case, marks=() if case in IN_SHORT else pytest.mark.nightly)
        for case in [*((name, False) for name in SWAPS), *((name, True) for name in FUSABLE)]
    ],
)
def test_onnx_computes_what_the_model_does(name: str, fuse: bool, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    source = converted(tmp_path, name)
    report = asymswap.export(source, tmp_path / "model.onnx", fuse=fuse)
    images = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = asymswap.load(source)(images)
    assert torch.allclose(run_onnx(tmp_path / "model.onnx", images), wanted, atol=1e-4, rtol=1e-4)
    assert (report.form, report.opset, report.dynamic) == ("onnx", 20, ("batch",))
    assert [check.inputs for check in report.checks] == ["1x1x8x8", "3x1x8x8"]
    assert (report.fused > 0) == fuse


@pytest.mark.parametrize(
    "name",
    [
        "separable",
        pytest.param("predicted-offset-mask", marks=pytest.mark.nightly),
        pytest.param("acb-branch", marks=pytest.mark.nightly),
    ],
)
def test_pt2_comes_back_in_another_process(name: str, tmp_path: Path) -> None:
    source = converted(tmp_path, name)
    asymswap.export(source, tmp_path / "model.pt2")
    images = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    torch.save(images, tmp_path / "in.pt")
    code = f"""
import torch, torchvision
program = torch.export.load({str(tmp_path / "model.pt2")!r}).module()
with torch.no_grad():
    torch.save(program(torch.load({str(tmp_path / "in.pt")!r})), {str(tmp_path / "out.pt")!r})
"""
    done = forked(code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        wanted = asymswap.load(source)(images)
    assert torch.allclose(torch.load(tmp_path / "out.pt"), wanted, atol=1e-5)


def test_any_size_is_any_size(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    source = converted(tmp_path, "separable")
    report = asymswap.export(source, tmp_path / "model.onnx", dynamic_size=True, fuse=True)
    assert report.fused == 0
    assert report.dynamic == ("batch", "height", "width")
    assert [check.inputs for check in report.checks] == ["1x1x8x8", "3x1x8x8", "3x1x12x10"]
    images = torch.randn(2, 1, 16, 20)
    with torch.no_grad():
        wanted = asymswap.load(source)(images)
    assert torch.allclose(run_onnx(tmp_path / "model.onnx", images), wanted, atol=1e-4, rtol=1e-4)


def test_a_fused_model_becomes_the_originals_state_dict(tmp_path: Path) -> None:
    source = converted(tmp_path, "acb-branch")
    report = asymswap.export(source, tmp_path / "plain.pt", form="state-dict")
    assert report.checks == ()
    original = build("digits-resnet", {}).eval()
    original.load_state_dict(torch.load(tmp_path / "plain.pt", weights_only=True))
    images = torch.randn(4, 1, 8, 8)
    with torch.no_grad():
        assert torch.allclose(original(images), asymswap.load(source)(images), atol=1e-4)


def test_the_users_module_stays_as_it_is(tmp_path: Path) -> None:
    """A module in train mode was left in eval mode."""
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).train()
    asymswap.export(module, tmp_path / "plain.pt", form="state-dict")
    assert all(part.training for part in module.modules())
    assert (tmp_path / "plain.pt").exists()


def test_what_computes_something_else_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = converted(tmp_path, "separable")
    real = torch.export.export

    def wrong(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        other = copy.deepcopy(model)
        other.linear.bias.data += 1.0
        return real(other, *args, **kwargs)

    monkeypatch.setattr(exporting.torch.export, "export", wrong)
    with pytest.raises(
        asymswap.AsymswapError, match=r"computes something else than PyTorch on 1x1x8x8: .* nothing was"
    ):
        asymswap.export(source, tmp_path / "model.pt2")
    assert not list(tmp_path.glob("*.pt2"))
    assert not list(tmp_path.glob("*.part"))


class _Loaded:
    """A program that was exported and loaded, whose numbers are spoilt."""

    def __init__(self, program: nn.Module, spoil: Callable[[Tensor], Tensor]) -> None:
        self._program, self._spoil = program, spoil

    def module(self) -> Callable[[Tensor], Tensor]:
        return lambda images: self._spoil(self._program(images))


def spoil_programs(monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Tensor], Tensor]) -> None:
    """From now on every loaded program gives spoilt numbers."""
    real = torch.export.load
    monkeypatch.setattr(exporting.torch.export, "load", lambda file: _Loaded(real(file).module(), spoil))


def test_what_gives_nan_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = converted(tmp_path, "separable")
    spoil_programs(monkeypatch, lambda logits: logits.clone().index_fill_(1, torch.tensor([3]), torch.nan))
    with pytest.raises(asymswap.AsymswapError, match=r"computes something else than PyTorch on 1x1x8x8: nan at most"):
        asymswap.export(source, tmp_path / "model.pt2")
    assert not list(tmp_path.glob("*.pt2"))


def test_half_precision_may_round_as_it_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A number below 1 in float16 has a neighbour 5e-4 away: five times what float32 is allowed."""
    (tmp_path / "recipe.toml").write_text(RECIPE.format(swap=SWAPS["separable"]))
    network = build("digits-resnet", {}).half()
    conversion = asymswap.convert(asymswap.open_model(network, input_size=(1, 8, 8)), tmp_path / "recipe.toml")
    asymswap.save(conversion, tmp_path / "model.pt")
    spoil_programs(monkeypatch, lambda logits: logits + 5e-4)
    report = asymswap.export(asymswap.open_model(tmp_path / "model.pt", arch=network), tmp_path / "model.pt2")
    assert all(check.largest > 1e-4 for check in report.checks)


def test_what_cannot_be_exported_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = converted(tmp_path, "separable")
    with pytest.raises(asymswap.AsymswapError, match=r"model\.doc: an export ends in one of \.onnx, \.pt2, \.pt"):
        asymswap.export(source, tmp_path / "model.doc")
    with pytest.raises(asymswap.AsymswapError, match=r"the file of a pt2 export ends in \.pt2"):
        asymswap.export(source, tmp_path / "model.onnx", form="pt2")
    with pytest.raises(asymswap.AsymswapError, match="a plain state_dict is one that digits-resnet loads, and some"):
        asymswap.export(source, tmp_path / "plain.pt")
    monkeypatch.setitem(runtimes.ONNX_RUNTIME, "onnxruntime", (99,))
    pytest.importorskip("onnxruntime")
    with pytest.raises(
        asymswap.AsymswapError, match=r"onnxruntime .* is too old for ONNX, which needs 99; pip install"
    ):
        asymswap.export(source, tmp_path / "model.onnx")
    monkeypatch.setitem(runtimes.ONNX_RUNTIME, "no_such_module", (1,))
    monkeypatch.delitem(runtimes.ONNX_RUNTIME, "onnxruntime")
    with pytest.raises(asymswap.AsymswapError, match="ONNX needs no_such_module; pip install"):
        asymswap.export(source, tmp_path / "model.onnx")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.pt", "recipe.toml"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_onnx_runtime_has_no_convs_of_some_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    conversion = asymswap.convert(
        asymswap.open_model(nn.Sequential(nn.Conv2d(3, 32, 3)).to(dtype), input_size=(3, 16, 16)), "acnet"
    )
    asymswap.save(conversion, tmp_path / "x.pt")
    with pytest.raises(
        asymswap.AsymswapError, match=r"no convolutions of (float64|bfloat16) on the processor; export a model"
    ):
        asymswap.export(tmp_path / "x.pt", tmp_path / "x.onnx")
    assert not (tmp_path / "x.onnx").exists()
