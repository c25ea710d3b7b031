"""Extra state of modules: in every file, given back on every way, or refused before any work."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import asymswap
from asymswap.checkpoint import FORMAT, read_checkpoint
from asymswap.errors import AsymswapError, OutputError, SourceError
from asymswap.models.opening import open_model

SIZE = (3, 8, 8)


class Scale(nn.Module):
    """Multiplies by a number that is no tensor of the state dict."""

    def __init__(self, kept: Any = 1.0) -> None:
        super().__init__()
        self.kept = kept

    def get_extra_state(self) -> Any:
        return self.kept

    def set_extra_state(self, state: Any) -> None:
        self.kept = state

    def forward(self, x: Tensor) -> Tensor:
        factor = self.kept.get("scale") if isinstance(self.kept, dict) else self.kept
        return x * factor if isinstance(factor, float) or (isinstance(factor, Tensor) and factor.ndim == 0) else x


class Net(nn.Module):
    """A conv, batch norm and a scale with extra state."""

    def __init__(self, kept: Any = 1.0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.scale = Scale(kept)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale(self.norm(self.conv(x)))


NESTED = {
    "scale": 2.5,
    "history": [1, -2, float("inf"), None, True, "a\nb\ud800"],
    "pair": (1, OrderedDict(x=2.0)),
    3: {"amax": torch.arange(3.0), "again": torch.ones(2, dtype=torch.uint8)},
}


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return type(one) is type(other) and list(one) == list(other) and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("kept", [NESTED, 2.5, torch.tensor(2.5)], ids=["nested", "number", "tensor"])
def test_extra_state_comes_back_from_every_file(tmp_path: Path, suffix: str, kept: Any) -> None:
    net, x = Net(kept).eval(), torch.randn(2, *SIZE)
    net.norm.running_mean.normal_(generator=torch.Generator().manual_seed(0))
    conversion = asymswap.convert(asymswap.open_model(net, input_size=SIZE), "acnet")
    path = tmp_path / f"net{suffix}"
    asymswap.save(conversion, path)
    loaded = asymswap.load(path, model=Net())
    assert same(loaded.scale.kept, kept)
    torch.testing.assert_close(loaded(x), net(x))
    fusion = asymswap.fuse(asymswap.open_model(path, arch=Net()))
    assert same(fusion.model.scale.kept, kept)
    asymswap.save_fused(fusion, tmp_path / f"fused{suffix}")
    assert same(asymswap.load(tmp_path / f"fused{suffix}", model=Net()).scale.kept, kept)
    if suffix == ".pt":
        asymswap.save_fused(fusion, tmp_path / "plain.pt", as_original=True)
        plain = Net()
        plain.load_state_dict(torch.load(tmp_path / "plain.pt", weights_only=True))
        assert same(plain.scale.kept, kept)


def test_a_state_dict_of_such_a_network_fills_an_architecture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "extra_net.py").write_text(
        f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\nfrom test_extra_state import Net\n"
    )
    state = Net({"scale": 4.0}).state_dict()
    lacking = {key: value for key, value in state.items() if key != "scale._extra_state"}
    for number, (stored, kept, note) in enumerate(
        (
            (state, {"scale": 4.0}, None),
            ({"state_dict": {f"module.{key}": value for key, value in state.items()}}, {"scale": 4.0}, None),
            ({f"model.{key}": value for key, value in state.items()}, {"scale": 4.0}, None),
            (lacking, 1.0, "extra state that the file lacks stays as it was built: scale._extra_state"),
            (state | {"conv._extra_state": 3}, {"scale": 4.0}, "extra state that no module takes was left out: conv"),
        )
    ):
        path = tmp_path / f"{number}.pt"
        torch.save(stored, path)
        opened = open_model(path, arch=f"{tmp_path}/extra_net.py:Net", input_size=SIZE)
        assert opened.model.scale.kept == kept
        assert note is None or any(told.startswith(note) for told in opened.notes)


class Unset(Scale):
    set_extra_state = nn.Module.set_extra_state


class Failing(Scale):
    def get_extra_state(self) -> Any:
        raise OSError("no such device")


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (Scale({1, 2}), r"the extra state of 'scale' \(Scale\) holds a set; only tensors, numbers, text"),
        (Scale([b"12"]), r"'scale' \(Scale\) holds a bytes"),
        (Scale({"d": torch.float32}), r"holds a dtype"),
        (Scale({(1, 2): 3}), r"holds a tuple as a key"),
        (Scale(torch.eye(2).to_sparse()), r"holds a Tensor that is no ordinary tensor"),
        (Unset(1.0), r"the extra state of 'scale' \(Unset\) has no set_extra_state"),
        (Failing(1.0), r"the extra state of 'scale' \(Failing\) cannot be read \(OSError: no such device\)"),
    ],
)
def test_what_cannot_be_restored_is_refused_before_any_work(scale: Scale, message: str) -> None:
    net = Net()
    net.scale = scale
    with pytest.raises(SourceError, match=message):
        asymswap.convert(
            asymswap.open_model(net, input_size=SIZE), "acnet", progress=lambda *_: pytest.fail("work was done")
        )


def test_a_state_dict_that_could_not_be_loaded_again_is_refused() -> None:
    class Renames(Net):
        def __init__(self) -> None:
            super().__init__()
            self.register_state_dict_post_hook(lambda _, state, *__: state.update(version=3))

    class LeavesOut(Net):
        def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
            super()._save_to_state_dict(destination, prefix, keep_vars)
            destination.pop("offset", None)

    leaves_out = LeavesOut()
    leaves_out.register_buffer("offset", torch.zeros(1))
    for net, message in ((Renames(), "has 'version', a int"), (leaves_out, "leaves out 'offset'")):
        with pytest.raises(SourceError, match=message):
            asymswap.convert(asymswap.open_model(net, input_size=SIZE), "acnet")


def test_nothing_is_written_that_would_not_load_again(tmp_path: Path) -> None:
    """The structure is stored, and somebody has changed the converted network since."""
    conversion = asymswap.convert(
        asymswap.open_model(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), input_size=SIZE), "acnet"
    )
    conversion.model.append(nn.Linear(2, 2))
    with pytest.raises(OutputError, match=r"net.pt would not load again, so it is not written: unexpected: 2.weight"):
        asymswap.save(conversion, tmp_path / "net.pt")
    assert list(tmp_path.iterdir()) == []


def test_a_file_says_its_format_by_what_is_in_it(tmp_path: Path) -> None:
    for net, number in ((Net(), FORMAT), (nn.Sequential(nn.Conv2d(3, 8, 3)), 1)):
        path = tmp_path / f"{number}.pt"
        asymswap.save(asymswap.convert(asymswap.open_model(net, input_size=SIZE), "acnet"), path)
        header = torch.load(path, weights_only=True)["asymswap"]
        assert header.startswith(f'{{"format": {number},')
    damaged = torch.load(tmp_path / f"{FORMAT}.pt", weights_only=True)
    damaged["asymswap"] = damaged["asymswap"].replace("scale._extra_state", "other._extra_state")
    torch.save(damaged, tmp_path / "other.pt")
    with pytest.raises(AsymswapError, match=r"is not of class:.*: it has the extra state 'other._extra_state'"):
        asymswap.load(tmp_path / "other.pt", model=Net())


def test_files_of_format_1_with_a_tensor_as_extra_state_load(tmp_path: Path) -> None:
    net = Net(torch.tensor(2.5)).eval()
    path = tmp_path / "old.pt"
    asymswap.save(asymswap.convert(asymswap.open_model(net, input_size=SIZE), "acnet"), path)
    stored = torch.load(path, weights_only=True)
    text = stored["asymswap"].replace('"format": 2', '"format": 1')
    start = text.index(', "extra_state"')
    torch.save({"asymswap": text[:start] + "}", "state_dict": stored["state_dict"]}, path)
    assert read_checkpoint(path).extra.keys() == {"scale._extra_state"}
    assert asymswap.load(path, model=Net()).scale.kept == 2.5
