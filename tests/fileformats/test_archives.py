"""Weights out of TorchScript, torch.export and pickles of unknown classes, equal to those that torch would load."""

from __future__ import annotations

import io
import json
import sys
import types
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from asymswap.errors import SourceError
from asymswap.fileformats.detect import FileKind, sniff
from asymswap.fileformats.model_file import read_raw, states_of_modules
from asymswap.fileformats.torch_files import load, load_object
from asymswap.models.opening import open_model

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated", "ignore:.*deprecated.*:DeprecationWarning"),
]

State = dict[str, Tensor]


class Net(nn.Module):
    """Nested, tied, with a buffer that is stored, one that is not, and one of whole numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.one, self.two = nn.Conv2d(4, 4, 1, bias=False), nn.Conv2d(4, 4, 1, bias=False)
        self.two.weight = self.one.weight
        self.register_buffer("table", torch.arange(5))
        self.register_buffer("passing", torch.ones(2), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(self.stem(x))) * self.table.sum() + self.passing.sum()


def net(dtype: torch.dtype = torch.float32) -> Net:
    torch.manual_seed(3)
    return Net().to(dtype).eval()


def x(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(1, 3, 8, 8, dtype=dtype)


def save_scripted(model: nn.Module, path: Path) -> None:
    torch.jit.save(torch.jit.script(model), path)


def save_traced(model: nn.Module, path: Path) -> None:
    torch.jit.save(torch.jit.trace(model, x(next(model.parameters()).dtype)), path)


def save_exported(model: nn.Module, path: Path) -> None:
    torch.export.save(torch.export.export(model, (x(next(model.parameters()).dtype),)), path)


def read_described(path: Path) -> Any:
    loaded = load(path, FileKind.TORCH, False, path.name)
    assert loaded.unread
    return loaded.value


def equal(found: State, model: nn.Module) -> bool:
    expected = model.state_dict()
    return found.keys() >= expected.keys() and all(
        torch.equal(tensor, found[key]) and tensor.dtype == found[key].dtype for key, tensor in expected.items()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("save", [save_scripted, save_traced])
def test_torchscript(save: Callable[[nn.Module, Path], None], dtype: torch.dtype, tmp_path: Path) -> None:
    save(net(dtype), tmp_path / "x.pt")
    assert sniff(tmp_path / "x.pt") is FileKind.TORCHSCRIPT
    found = read_raw(tmp_path / "x.pt", False).value
    assert equal(found, net(dtype))
    assert found["one.weight"].data_ptr() == found["two.weight"].data_ptr()


def test_frozen_torchscript_has_lost_its_names(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.freeze(torch.jit.script(net())), tmp_path / "x.pt")
    with pytest.raises(
        SourceError, match=r"x\.pt is a TorchScript archive without named weights, as torch\.jit\.freeze"
    ):
        read_raw(tmp_path / "x.pt", False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_exported(dtype: torch.dtype, tmp_path: Path) -> None:
    save_exported(net(dtype), tmp_path / "x.pt2")
    assert sniff(tmp_path / "x.pt2") is FileKind.EXPORTED
    found = read_raw(tmp_path / "x.pt2", False).value
    assert equal(found, net(dtype))
    assert found.keys() == net().state_dict().keys()


def older_export(value: object, path: Path, entry: str) -> None:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/serialized_exported_program.json" if "serialized" in entry else "a/archive_format", "pt2")
        archive.writestr(f"a/{entry}", buffer.getvalue())


@pytest.mark.parametrize("entry", ["serialized_state_dict.pt", "data/weights/model.pt"])
def test_exported_by_older_versions(entry: str, tmp_path: Path) -> None:
    older_export(OrderedDict(net().state_dict()), tmp_path / "x.pt2", entry)
    assert sniff(tmp_path / "x.pt2") is FileKind.EXPORTED
    assert equal(read_raw(tmp_path / "x.pt2", False).value, net())
    older_export([1], tmp_path / "y.pt2", entry)
    with pytest.raises(SourceError, match=rf"its entry a/{entry} holds a list, not a state_dict"):
        read_raw(tmp_path / "y.pt2", False)
    older_export(types.SimpleNamespace(a=1), tmp_path / "z.pt2", entry)
    with pytest.raises(SourceError, match=r"needs types\.SimpleNamespace, outside of the allowlist; nothing of it was"):
        read_raw(tmp_path / "z.pt2", False)
    # Trust changes nothing about it, so that it is not advised either.
    for trusted in (False, True):
        with pytest.raises(SourceError, match=r"executed; save the program's state_dict and give it with `arch=…`$"):
            read_raw(tmp_path / "z.pt2", trusted)


def rewritten(path: Path, change: Callable[[str, bytes], bytes | None], compression: int = zipfile.ZIP_STORED) -> None:
    """Write an archive again with every entry changed, or left out."""
    with zipfile.ZipFile(path) as archive:
        entries = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in entries.items():
            other = change(name, content)
            if other is not None:
                archive.writestr(name, other)


def with_config(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the entry of the first weight in a torch.export archive's list."""

    def edited(name: str, content: bytes) -> bytes:
        if not name.endswith("_weights_config.json"):
            return content
        listed = json.loads(content)
        change(listed["config"]["stem.0.weight"])
        return json.dumps(listed).encode()

    rewritten(path, edited)


EXPORTS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "path": (lambda e: e.update(path_name="../../../etc/passwd"), r"entry .*/\.\./\.\./\.\./etc/passwd is missing"),
    "absolute": (lambda e: e.update(path_name="/etc/passwd"), r"entry .*/etc/passwd is missing"),
    "pickle": (lambda e: e.update(use_pickle=True), r"is a tensor of another class or dtype than networks have"),
    "dtype": (lambda e: e["tensor_meta"].update(dtype=99), r"is a tensor of another class or dtype"),
    "no meta": (lambda e: e.update(tensor_meta=None), r"is a tensor of another class or dtype"),
    "terabytes": (
        lambda e: e["tensor_meta"].update(sizes=[{"as_int": 10**13}], strides=[{"as_int": 0}]),
        r"(the sizes of .* are not those of a tensor|expanded from)",
    ),
    "offset": (lambda e: e["tensor_meta"].update(storage_offset={"as_int": 9}), r"reaches beyond the 432 bytes"),
    "negative": (lambda e: e["tensor_meta"].update(sizes=[{"as_int": -1}] * 4), r"the sizes of .* are not those of"),
    "rank": (lambda e: e["tensor_meta"].update(sizes=[{"as_int": 2}]), r"the sizes of .* are not those of a tensor"),
    "symbol": (lambda e: e["tensor_meta"].update(sizes=[{"as_expr": "s0"}]), r"is not what torch\.export writes"),
    "lacking": (lambda e: e.clear(), r"is not what torch\.export writes \('tensor_meta'\)"),
}  # fmt: skip


@pytest.fixture(scope="module")
def an_export(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("export") / "x.pt2"
    save_exported(net(), path)
    return path.read_bytes()


@pytest.mark.parametrize("name", EXPORTS)
def test_hostile_exports(name: str, an_export: bytes, tmp_path: Path) -> None:
    change, expected = EXPORTS[name]
    (tmp_path / "x.pt2").write_bytes(an_export)
    with_config(tmp_path / "x.pt2", change)
    with pytest.raises(SourceError, match=rf"x\.pt2 is cut off or damaged: .*{expected}"):
        read_raw(tmp_path / "x.pt2", False)


def test_an_export_without_weights(an_export: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.pt2").write_bytes(an_export)
    rewritten(tmp_path / "x.pt2", lambda name, content: None if "weights" in name else content)
    with pytest.raises(SourceError, match=r"a torch\.export archive that holds no weights of its own"):
        read_raw(tmp_path / "x.pt2", False)


ARCHIVES: dict[str, tuple[Callable[[str, bytes], bytes | None], str]] = {
    "missing": (
        lambda n, c: None if n.endswith("/data/0") else c,
        r"claims .* for the storage '0'",
    ),
    "short": (
        lambda n, c: c[:-4] if n.endswith("/data/0") else c,
        r"claims .* for the storage '0'",
    ),
    "no pickle": (lambda n, c: None if n.endswith("data.pkl") else c, r"entry data\.pkl is missing"),
    "cut pickle": (lambda n, c: c[:50] if n.endswith("data.pkl") else c, r"."),
    "order": (lambda n, c: b"big" if n.endswith("byteorder") else c, r"it was written on a big-endian machine"),
}


@pytest.mark.parametrize("name", ARCHIVES)
def test_damaged_archives(name: str, tmp_path: Path) -> None:
    change, expected = ARCHIVES[name]
    save_traced(net(), tmp_path / "x.pt")
    rewritten(tmp_path / "x.pt", change)
    with pytest.raises(SourceError, match=rf"x\.pt is cut off or damaged: {expected}"):
        read_raw(tmp_path / "x.pt", False)


def test_a_bomb_is_not_unpacked(tmp_path: Path) -> None:
    save_traced(net(), tmp_path / "x.pt")
    rewritten(tmp_path / "x.pt", lambda name, content: content, zipfile.ZIP_DEFLATED)
    assert equal(read_raw(tmp_path / "x.pt", False).value, net())
    rewritten(
        tmp_path / "x.pt",
        lambda name, content: bytes(65 * 2**20) if name.endswith("/data/0") else content,
        zipfile.ZIP_DEFLATED,
    )
    with pytest.raises(SourceError, match=r"is an archive of [\d,]+ bytes that would unpack to 68,[\d,]+"):
        read_raw(tmp_path / "x.pt", False)


def test_a_flipped_bit_is_seen(tmp_path: Path) -> None:
    save_traced(net(), tmp_path / "x.pt")
    weight = net().stem[0].weight.detach().numpy().tobytes()  # type: ignore[union-attr]
    content = (tmp_path / "x.pt").read_bytes()
    assert content.count(weight) == 1
    (tmp_path / "x.pt").write_bytes(content.replace(weight, weight[:-1] + bytes([weight[-1] ^ 1])))
    with pytest.raises(SourceError, match=r"Bad CRC-32 for file .*/data/\d"):
        read_raw(tmp_path / "x.pt", False)


def test_a_module_in_itself_and_one_named_without_end(tmp_path: Path) -> None:
    def write(root: bytes) -> None:
        with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
            archive.writestr("x/data.pkl", root)
            archive.writestr("x/constants.pkl", b"\x80\x02).")

    head = b"c__torch__\nNet\n)\x81q\x00"
    write(b"\x80\x02" + head + b"}X\x01\x00\x00\x00ah\x00sb.")
    with pytest.raises(SourceError, match="it claims more modules than any network has"):
        read_raw(tmp_path / "x.pt", False)
    # Each names the one before it twice: 2^60 in all.
    doubled = b"".join(
        b"c__torch__\nNet\n)\x81}(X\x01\x00\x00\x00ah%cX\x01\x00\x00\x00bh%cubq%c" % (n, n, n + 1) for n in range(60)
    )
    write(b"\x80\x02" + head + doubled + b".")
    with pytest.raises(SourceError, match="it claims more modules than any network has"):
        read_raw(tmp_path / "x.pt", False)


class Mine(Net):
    """A class that the reader is not to import."""


def test_a_module_of_an_unknown_class_gives_its_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Mine().eval()
    torch.save({"model": model, "epoch": 3}, tmp_path / "x.pt")
    # As if its code were nowhere.
    monkeypatch.delitem(sys.modules, __name__)
    value, names = states_of_modules(read_described(tmp_path / "x.pt"), "x.pt")
    assert names == (f"{__name__}.Mine",)
    assert equal(value["model"], model)
    assert value["model"].keys() == model.state_dict().keys()
    assert value["epoch"] == 3


class Loop(Net):
    """Holds itself."""

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_modules": {**self._modules, "again": self}}


class Hollow(Net):
    """Lacks what every module has."""

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_parameters": None}


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (Loop, r"x\.pt is cut off or damaged: it claims more modules than any"),
        (Hollow, r"Hollow, outside of the allowlist"),
    ],
)
def test_a_module_that_is_none_is_refused_in_one_line(kind: type[Net], expected: str, tmp_path: Path) -> None:
    torch.save({"model": kind()}, tmp_path / "x.pt")
    with pytest.raises(SourceError, match=expected) as caught:
        open_model(tmp_path / "x.pt", arch="resnet18")
    assert "\n" not in str(caught.value)


def test_what_lies_beside_the_weights_is_passed_over(tmp_path: Path) -> None:
    state = net().state_dict()
    optimizer = torch.optim.AdamW(net().parameters()).state_dict()
    torch.save({"state_dict": state, "config": Mine, "optimizer": optimizer}, tmp_path / "x.pt")
    found = read_described(tmp_path / "x.pt")
    assert found["state_dict"].keys() == state.keys()
    assert all(torch.equal(tensor, state[key]) for key, tensor in found["state_dict"].items())


def test_views_of_one_storage_stay_views(tmp_path: Path) -> None:
    whole = torch.arange(24.0).reshape(4, 6)
    torch.save({"whole": whole, "part": whole[1:, ::2], "turned": whole.T, "none": whole[:0]}, tmp_path / "x.pt")
    found = load_object(tmp_path / "x.pt", FileKind.TORCH, False, "x.pt")
    expected = torch.load(tmp_path / "x.pt", weights_only=True)
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor)
        assert found[key].stride() == tensor.stride() or key == "none"
    assert found["part"].untyped_storage().data_ptr() == found["whole"].untyped_storage().data_ptr()


def test_no_code_of_an_archive_is_opened(tmp_path: Path) -> None:
    """Even code that is no code does not matter."""
    save_scripted(net(), tmp_path / "x.pt")
    rewritten(tmp_path / "x.pt", lambda name, content: b"raise SystemExit" if "/code/" in name else content)
    assert equal(read_raw(tmp_path / "x.pt", False).value, net())
