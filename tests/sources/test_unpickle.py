"""Training checkpoints load through the restricted unpickler; what could run code is refused before it is looked up."""

from __future__ import annotations

import argparse
import collections
import functools
import importlib
import importlib.util
import os
import pathlib
import sys
import zipfile
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import fx, nn

from asymswap.errors import SourceError
from asymswap.sources import plain_numpy, unpickle
from asymswap.sources.files import FileKind
from asymswap.sources.unpickle import allowed_names, load_object

ROOT = Path(__file__).parents[2]
ALLOWLIST = resources.files("asymswap.sources").joinpath("allowlist.txt").read_text().split()


class Mine(nn.Sequential):
    """A class of the user's own."""


def load(value: Any, path: Path, *, legacy: bool = False, trust: bool = False, protocol: int = 2) -> Any:
    torch.save(value, path, pickle_protocol=protocol, _use_new_zipfile_serialization=not legacy)
    return load_object(path, FileKind.LEGACY if legacy else FileKind.TORCH, trust, path.name)


# The list is that of this version; an older torch has fewer classes, none of which a file can then need.
OLDER = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 14)


def resolve(name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


@pytest.mark.parametrize("name", ALLOWLIST)
def test_the_allowlist_holds_modules_that_run_no_code_of_the_file(name: str) -> None:
    try:
        found = resolve(name)
    except AttributeError:
        assert OLDER
        pytest.skip("this torch has no such class yet")
    assert issubclass(found, nn.Module)
    assert not issubclass(found, fx.GraphModule | torch.jit.ScriptModule)
    assert f"{found.__module__}.{found.__qualname__}" == name


@pytest.mark.skipif(OLDER, reason="an older torch has fewer classes")
def test_the_allowlist_is_what_the_script_makes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("make_allowlist", ROOT / "benchmarks" / "make_allowlist.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.setattr(script, "OUT", tmp_path / "allowlist.txt")
    script.main()
    assert script.OUT.read_text().split() == ALLOWLIST


def test_other_allowed_globals_are_data_or_compute_on_tensors_alone() -> None:
    data = {
        argparse.Namespace,
        collections.OrderedDict,
        functools.partial,
        plain_numpy.Array,
        plain_numpy.DType,
        plain_numpy.array,
        plain_numpy.scalar,
        pathlib.PurePosixPath,
        pathlib.PureWindowsPath,
    }
    assert set(unpickle._HARMLESS.values()) == data
    for name in unpickle._HELPERS:
        assert name.startswith("torchvision.")
        assert not isinstance(resolve(name), nn.Module)


@pytest.mark.parametrize(
    "name",
    [
        "torch.fx.graph_module.reduce_graph_module",
        "torch.jit._pickle.build_intlist",
        "torch.load",
        "torch.hub.load",
        "builtins.eval",
        "builtins.getattr",
        "builtins.exec",
        "builtins.__import__",
        "posix.system",
        "subprocess.Popen",
        "operator.attrgetter",
        "copyreg._reconstructor",
        "torch.nn.functional.relu",
    ],
)
def test_names_that_must_never_be_allowed(name: str) -> None:
    assert name not in allowed_names()


TRAPS = {
    "system": (os.system, ("touch sprung",)),
    "eval": (eval, ("open('sprung', 'w')",)),
    "getattr": (getattr, (1, "real")),
    "graph": (fx.graph_module.reduce_graph_module, ({"_code": "open('sprung', 'w')"}, "")),
    "partial": (functools.partial, (os.system, "touch sprung")),
    "import": (importlib.import_module, ("sprung",)),
}


class Trap:
    def __init__(self, name: str) -> None:
        self.name = name

    def __reduce__(self) -> Any:
        return TRAPS[self.name]


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("protocol", [2, 3])
@pytest.mark.parametrize("name", TRAPS)
def test_traps_are_not_sprung(
    name: str, legacy: bool, protocol: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SourceError, match=r"x\.pt is a pickle that needs .*, outside of the allowlist; nothing of it"):
        load({"x": Trap(name)}, Path("x.pt"), legacy=legacy, protocol=protocol)
    assert not Path("sprung").exists()


@pytest.mark.parametrize("protocol", [4, 5])
@pytest.mark.parametrize("value", [Trap("system"), {"weight": torch.ones(1)}])
def test_newer_protocols_hide_their_names_and_are_refused(
    value: Any, protocol: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        SourceError, match=rf"written in pickle protocol {protocol}, not torch.save's own, and cannot be"
    ):
        load(value, Path("x.pt"), protocol=protocol)
    assert not Path("sprung").exists()


def write_pickle(content: bytes, path: Path) -> None:
    """A torch.save file that holds exactly this pickle."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in (("data.pkl", content), ("version", b"3\n"), ("byteorder", b"little")):
            archive.writestr(f"x/{name}", data)


def test_a_newer_operation_in_an_old_protocol_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    texts = b"X\x05\x00\x00\x00posixX\x06\x00\x00\x00system"
    write_pickle(b"\x80\x02" + texts + b"\x93X\x0c\x00\x00\x00touch sprung\x85R.", Path("x.pt"))
    with pytest.raises(SourceError, match=r"written in pickle protocol 4, not torch.save's own, and cannot be read"):
        load_object(Path("x.pt"), FileKind.TORCH, False, "x.pt")
    assert not Path("sprung").exists()


def test_an_unknown_class_is_named_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(
        SourceError, match=r"needs .*test_unpickle\.Mine, outside of .*; save model\.state_dict\(\) inst"
    ):
        load(Mine(nn.Conv2d(3, 4, 3)), tmp_path / "x.pt")


def test_many_unknown_names_are_counted(tmp_path: Path) -> None:
    many = [collections.deque, collections.ChainMap, collections.UserDict, collections.UserList]
    with pytest.raises(
        SourceError, match=r"needs collections\.ChainMap, .*, collections\.UserList and 1 more, outside"
    ):
        load(many, tmp_path / "x.pt")


def test_trust_loads_what_is_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setitem(sys.modules, Mine.__module__, sys.modules[__name__])
    assert isinstance(load(Mine(nn.Conv2d(3, 4, 3)), tmp_path / "x.pt", trust=True), Mine)
    assert load({"a": 1}, tmp_path / "x.pt", trust=True, protocol=4) == {"a": 1}
    assert load([slice(1)], tmp_path / "x.pt", trust=True) == [slice(1)]


def test_trust_does_not_help_where_the_code_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    write_pickle(b"\x80\x02cno_such_module\nNet\n.", tmp_path / "x.pt")
    with pytest.raises(SourceError, match=r"x\.pt needs code that cannot be imported here: .*no_such_module"):
        load_object(tmp_path / "x.pt", FileKind.TORCH, True, "x.pt")


def test_a_class_that_this_torchvision_lacks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "torchvision.models.resnet.NewBlock"
    for names in ("allowed_names", "module_names"):
        monkeypatch.setattr(unpickle, names, lambda: frozenset([name]))
    write_pickle(b"\x80\x02ctorchvision.models.resnet\nNewBlock\n)\x81.", tmp_path / "x.pt")
    with pytest.raises(SourceError, match=rf"x\.pt needs {name}, which the installed torch and torchvision lack"):
        load_object(tmp_path / "x.pt", FileKind.TORCH, False, "x.pt")


def test_names_of_python_2_are_understood(tmp_path: Path) -> None:
    write_pickle(b"\x80\x02c__builtin__\nset\n]\x85R.", tmp_path / "x.pt")
    assert load_object(tmp_path / "x.pt", FileKind.TORCH, False, "x.pt") == set()


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    "value",
    [
        *(np.dtype(name).type(1) for name in ("float16", "float32", "float64", "int8", "int64", "uint8", "bool")),
        np.complex64(1),
        np.str_("text"),
        np.random.RandomState(0).get_state(),
        argparse.Namespace(lr=0.1, inner=argparse.Namespace(path=pathlib.PurePosixPath("a/b"))),
        collections.OrderedDict(a=1),
        collections.Counter("aab"),
        {"set": {1, 2}, "bytes": b"x", "big": 2**70, "none": None, "size": torch.Size([1]), "dtype": torch.float16},
    ],
)
def test_training_checkpoints_hold_more_than_weights(value: Any, legacy: bool, tmp_path: Path) -> None:
    loaded = load({"state_dict": {"w": torch.ones(1)}, "extra": value}, tmp_path / "x.pt", legacy=legacy)
    assert str(loaded["extra"]) == str(value)
    assert loaded["state_dict"]["w"] == 1


def test_arrays_keep_their_values(tmp_path: Path) -> None:
    array = np.random.RandomState(0).randn(3, 4).astype(np.float32)
    np.testing.assert_array_equal(load({"a": array}, tmp_path / "x.pt")["a"], array)


def test_paths_are_read_as_paths_of_their_own_system(tmp_path: Path) -> None:
    assert load([Path("a/b")], tmp_path / "x.pt") == [pathlib.PurePosixPath("a/b")]
