"""Training checkpoints are read as data; a file that names what could run code is refused."""

from __future__ import annotations

import argparse
import collections
import datetime
import functools
import importlib
import importlib.util
import math
import os
import pathlib
import pickle
import sys
import tempfile
import zipfile
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import fx, nn

from asymswap.errors import SourceError
from asymswap.fileformats import pickle_objects, torch_files
from asymswap.fileformats.detect import FileKind, sniff
from asymswap.fileformats.pickle_objects import allowed_names
from asymswap.fileformats.pickle_reader import Record
from asymswap.fileformats.torch_files import load_object

ROOT = Path(__file__).parents[2]
ALLOWLIST = resources.files("asymswap.fileformats").joinpath("allowlist.txt").read_text().split()


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


def test_what_is_imported_beside_modules_computes_on_tensors_alone() -> None:
    for name in pickle_objects.HELPERS:
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
@pytest.mark.parametrize("protocol", [2, 5])
@pytest.mark.parametrize("name", TRAPS)
def test_traps_are_not_sprung(
    name: str, legacy: bool, protocol: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SourceError, match=r"x\.pt is a pickle that needs .*, outside of the allowlist; nothing of it"):
        load({"x": Trap(name)}, Path("x.pt"), legacy=legacy, protocol=protocol)
    assert not Path("sprung").exists()


def write_pickle(content: bytes, path: Path) -> None:
    """A torch.save file that holds exactly this pickle."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in (("data.pkl", content), ("version", b"3\n"), ("byteorder", b"little")):
            archive.writestr(f"x/{name}", data)


def test_a_name_put_together_of_two_texts_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    texts = b"X\x05\x00\x00\x00posixX\x06\x00\x00\x00system"
    write_pickle(b"\x80\x02" + texts + b"\x93X\x0c\x00\x00\x00touch sprung\x85R.", Path("x.pt"))
    with pytest.raises(SourceError, match=r"needs posix\.system, outside of the allowlist; nothing of it was"):
        load_object(Path("x.pt"), FileKind.TORCH, False, "x.pt")
    assert not Path("sprung").exists()


def test_an_unknown_class_is_named_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(
        SourceError, match=r"needs .*test_torch_files\.Mine, outside of .*; save model\.state_dict\(\) inst"
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
        monkeypatch.setattr(pickle_objects, names, lambda: frozenset([name]))
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


def test_the_functions_that_build_modules_run_no_code_of_theirs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind in (nn.Module, nn.LSTM, nn.Conv2d):
        if "__setstate__" in vars(kind):
            monkeypatch.setattr(kind, "__setstate__", lambda *_: pytest.fail("it must not be called"))
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("it must not be called"))
    model, x = nn.LSTM(3, 4, 2, bidirectional=True), torch.ones(2, 1, 3)
    assert torch.equal(load(model, tmp_path / "x.pt")(x)[0], model(x)[0])


STATE = {"w": torch.arange(6.0).reshape(2, 3), "n": torch.tensor(3), "half": torch.ones(2, dtype=torch.bfloat16)}


@pytest.mark.parametrize("protocol", range(6))
def test_plain_pickles_and_all_protocols(protocol: int, tmp_path: Path) -> None:
    path = tmp_path / "x.pkl"
    value = {**STATE, "array": np.arange(6.0).reshape(2, 3).T, "epoch": 3, "frozen": frozenset("ab")}
    path.write_bytes(pickle.dumps(value, protocol))
    found = load_object(path, sniff(path), False, "x.pkl")
    assert all(torch.equal(found[key], tensor) and found[key].dtype == tensor.dtype for key, tensor in STATE.items())
    np.testing.assert_array_equal(found["array"], value["array"])
    assert (found["epoch"], found["frozen"]) == (3, {"a", "b"})
    for legacy in (False, True) if protocol >= 2 else ():
        again = load(value, tmp_path / "x.pt", protocol=protocol, legacy=legacy)
        assert all(torch.equal(again[key], tensor) for key, tensor in STATE.items())


@pytest.mark.parametrize("legacy", [False, True])
def test_other_objects_stay_records_beside_the_weights(legacy: bool, tmp_path: Path) -> None:
    value = {
        "w": STATE["w"],
        "when": datetime.datetime(2026, 1, 1),
        "args": argparse.Namespace(day=datetime.date(1, 1, 1)),
    }
    torch.save(value, tmp_path / "x.pt", _use_new_zipfile_serialization=not legacy)
    loaded = torch_files.load(tmp_path / "x.pt", sniff(tmp_path / "x.pt"), False, "x.pt")
    assert loaded.unread == ("datetime.date", "datetime.datetime")
    assert torch.equal(loaded.value["w"], STATE["w"])
    assert isinstance(loaded.value["when"], Record)


def test_a_module_that_was_compiled_is_what_was_compiled(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    found = load(torch.compile(model), tmp_path / "x.pt")
    assert repr(found) == repr(model)
    assert torch.equal(found[0].weight, model[0].weight)


tensors = st.builds(
    lambda size, dtype, turned: (
        torch.arange(math.prod(size)).reshape(size).to(dtype).permute(sorted(range(len(size)), reverse=turned))
    ),
    st.lists(st.integers(0, 3), max_size=3),
    st.sampled_from([torch.float32, torch.float16, torch.int64, torch.bool, torch.complex64]),
    st.booleans(),
)
states = st.recursive(
    tensors
    | st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False)
    | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=5) | st.integers(-9, 9), inner, max_size=3)
        | st.dictionaries(st.text(max_size=5), inner, max_size=3).map(collections.OrderedDict)
        | st.tuples(inner, inner)
    ),
    max_leaves=12,
)


def same(one: Any, other: Any) -> bool:
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other) and one.dtype == other.dtype and one.stride() == other.stride()
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


@given(value=states, legacy=st.booleans())
def test_what_is_read_is_what_torch_reads(value: Any, legacy: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.pt"
        torch.save({"x": value}, path, _use_new_zipfile_serialization=not legacy)
        expected = torch.load(path, weights_only=True)
        assert same(load_object(path, sniff(path), False, "x.pt"), expected)


def test_arrays_keep_their_values(tmp_path: Path) -> None:
    array = np.random.RandomState(0).randn(3, 4).astype(np.float32)
    np.testing.assert_array_equal(load({"a": array}, tmp_path / "x.pt")["a"], array)


def test_paths_are_read_as_paths_of_their_own_system(tmp_path: Path) -> None:
    assert load([Path("a/b")], tmp_path / "x.pt") == [pathlib.PurePosixPath("a/b")]
