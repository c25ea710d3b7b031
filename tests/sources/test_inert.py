"""A pickle read as data says what is in it, and nothing of it happens."""

from __future__ import annotations

import argparse
import collections
import datetime
import io
import os
import pickle
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from asymswap.sources import inert
from asymswap.sources.audit import MOST_OPERATIONS
from asymswap.sources.inert import MalformedError, Name, Record, wants_code

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: (
        st.lists(inner)
        | st.dictionaries(st.text() | st.integers(), inner)
        | st.tuples(inner)
        | st.tuples(inner, inner, inner, inner)
    ),
    max_leaves=20,
)


def read(value: Any, protocol: int = 2) -> Any:
    return inert.read(io.BytesIO(pickle.dumps(value, protocol)))


class Trap:
    """Unpickled, it would make a file."""

    def __reduce__(self) -> Any:
        return os.system, ("touch sprung",)


class Config(dict[str, Any]):
    """What frameworks keep beside the weights."""

    def __init__(self) -> None:
        super().__init__(rate=0.1)
        self.frozen = True


@settings(max_examples=60, deadline=None)
@given(value=plain, protocol=st.integers(0, 5))
def test_plain_data_is_what_pickle_makes_of_it(value: Any, protocol: int) -> None:
    # In the first protocols bytes are a call to encode text, which stays a record here.
    if protocol > 2 or "bytes" not in {type(part).__name__ for part in inert.walk(value)}:
        assert read(value, protocol) == value


@settings(max_examples=150, deadline=None)
@given(data=st.binary(max_size=60), start=st.binary(max_size=2))
def test_any_bytes_are_read_or_refused(data: bytes, start: bytes) -> None:
    with suppress(MalformedError):
        inert.read(io.BytesIO(start + data + b"."))


def test_what_it_names_stays_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = read({"x": Trap(), "f": os.getcwd, "c": Config})
    assert isinstance(found["x"], Record)
    assert (found["x"].name, found["x"].arguments) == ("posix.system", ("touch sprung",))
    assert (found["f"], found["c"]) == (Name("posix.getcwd"), Name(f"{__name__}.Config"))
    parts = list(inert.walk(found))
    named = {part.name for part in parts if isinstance(part, Record)} | {p.full for p in parts if isinstance(p, Name)}
    assert named == {"posix.system", "posix.getcwd", f"{__name__}.Config"}
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("protocol", [2, 4])
def test_objects_become_records_with_all_that_they_hold(protocol: int) -> None:
    found = read([Config(), argparse.Namespace(lr=0.1)], protocol)
    assert (found[0].name, found[0].items, found[0].state) == (f"{__name__}.Config", {"rate": 0.1}, {"frozen": True})
    assert (found[1].name, found[1].state) == ("argparse.Namespace", {"lr": 0.1})


def test_dicts_in_order_are_dicts() -> None:
    ordered = collections.OrderedDict(b=1, a=2)
    ordered.hint = "metadata"  # type: ignore[attr-defined]
    found = read(ordered)
    assert type(found) is dict
    assert list(found.items()) == [("b", 1), ("a", 2)]


def test_what_is_shared_and_what_contains_itself() -> None:
    loop: list[Any] = [[1]]
    loop += [loop, loop[0]]
    found = read(loop)
    assert found[1] is found
    assert found[0] is found[2]
    assert len(list(inert.walk(found))) == 3


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", r"pickle exhausted before seeing STOP"),
        (b".", r"pop from empty list"),
        (b"\x80\x02]q\x00", r"pickle exhausted before seeing STOP"),
        (b"\x80\x02h\x07.", r"7"),
        (b"X\xff\xff\xff\x7fabc.", r"expected 2147483647 bytes"),
        (b"\x85.", r"the stack is empty"),
        (b"]]R.", r"it calls what is no name"),
        (b"\x82\x01.", r"opcode EXT1 has no place in a checkpoint"),
        (b"}(K\x01u.", r"shorter"),
        (b"}](]s.", r"."),
    ],
)
def test_no_pickle(content: bytes, expected: str) -> None:
    with pytest.raises(MalformedError, match=expected):
        inert.read(io.BytesIO(content))


def test_a_memo_of_absurd_size_takes_no_memory() -> None:
    assert inert.read(io.BytesIO(b"]r\xff\xff\xff\x7f.")) == []


def test_more_operations_than_a_checkpoint_needs() -> None:
    with pytest.raises(MalformedError, match=r"it has more than [\d,]+ operations"):
        inert.read(io.BytesIO(b"\x80\x02(" + b"]" * MOST_OPERATIONS + b"t."))


@pytest.mark.parametrize("name", ["set", "frozenset"])
def test_a_set_of_tuples_in_tuples_is_not_hashed(name: str) -> None:
    """Hashing these would overflow the stack, and end the process."""
    nested = b"N" + b"\x85" * 300_000
    for content in (b"](" + nested + b"e", b"]" + nested + b"a"):
        with pytest.raises(MalformedError, match="a key is nested too deeply"):
            inert.read(io.BytesIO(b"\x80\x02cbuiltins\n" + name.encode() + b"\n" + content + b"\x85R."))


@pytest.mark.parametrize(
    ("name", "wants"),
    [
        ("posix.system", True),
        ("builtins.eval", True),
        ("builtins.getattr", True),
        ("importlib.import_module", True),
        ("functools.partial", True),
        ("types.FunctionType", True),
        ("torch.fx.graph_module.reduce_graph_module", True),
        ("torch.hub.load", True),
        ("torch.load", True),
        ("torch.serialization.load", True),
        ("torch.serialization._get_layout", False),
        ("builtins.set", False),
        ("types.SimpleNamespace", False),
        ("datetime.datetime", False),
        ("collections.defaultdict", False),
        ("pathlib.PosixPath", False),
        ("mmengine.logging.history_buffer.HistoryBuffer", False),
        ("lightning.fabric.utilities.data.AttributeDict", False),
        ("__main__.Net", False),
        ("torch.optim.adam.Adam", False),
    ],
)
def test_what_runs_something(name: str, wants: bool) -> None:
    assert wants_code(name) is wants


def test_dates_are_records() -> None:
    assert read(datetime.timedelta(1)).name == "datetime.timedelta"


@pytest.mark.parametrize("size", [(-1,), (1.5,), (True,), ("a",)])
def test_sizes_that_are_none(size: tuple[Any, ...]) -> None:
    storage = inert.StorageRef("0", torch.float32, 4)
    with pytest.raises(MalformedError, match="a tensor's sizes are no whole numbers"):
        inert._called(Name("torch._utils._rebuild_tensor_v2"), (storage, 0, size, (1,)))
