"""What a pickle does is found out without doing it, and only what torch.save writes is let through."""

from __future__ import annotations

import functools
import io
import pickle
import pickletools
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hostile
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision import models

from asymswap.errors import SourceError
from asymswap.fileformats import pickle_reader, torch_files
from asymswap.fileformats.detect import FileKind
from asymswap.fileformats.model_file import read_raw
from asymswap.fileformats.pickle_objects import DEEPEST, Builder, is_safe_name
from asymswap.fileformats.pickle_reader import Odd, StorageRef, described_tensor
from asymswap.fileformats.torch_files import load as load_file
from asymswap.fileformats.torch_files import load_object


def load(data: bytes, kind: FileKind = FileKind.TORCH, trust: bool = False) -> Any:
    Path("x.pt").write_bytes(data)
    return load_object(Path("x.pt"), kind, trust, "x.pt")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def saved(value: Any, legacy: bool = False) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


def with_attribute() -> nn.Parameter:
    parameter = nn.Parameter(torch.ones(2))
    parameter.about = 3  # type: ignore[attr-defined]
    return parameter


# Whatever torch.save writes of tensors must come through; what else checkpoints hold is in test_torch_files.py.
TENSORS: dict[str, Callable[[], Tensor]] = {
    "plain": lambda: torch.arange(6.0).reshape(2, 3),
    "parameter": lambda: nn.Parameter(torch.ones(2)),
    "parameter with an attribute": with_attribute,
    "part of another": lambda: torch.arange(10.0)[3:9:2],
    "transposed": lambda: torch.arange(6.0).reshape(2, 3).t(),
    "expanded": lambda: torch.ones(1).expand(3, 4),
    "empty": lambda: torch.empty(0, 5),
    "scalar": lambda: torch.tensor(3),
    "half": lambda: torch.ones(2, dtype=torch.bfloat16),
    "unsigned": lambda: torch.ones(2, dtype=torch.uint16),
    "complex": lambda: torch.ones(2, dtype=torch.complex64).conj(),
    "meta": lambda: torch.ones(2, device="meta"),
    "sparse": lambda: torch.eye(2).to_sparse(),
    "sparse in rows": lambda: torch.eye(2).to_sparse_csr(),
    "sparse in blocks": lambda: torch.eye(4).to_sparse_bsr((2, 2)),
    "quantised": lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
    "by channel": lambda: torch.quantize_per_channel(torch.ones(2, 2), torch.ones(2), torch.zeros(2), 0, torch.qint8),
}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", TENSORS)
def test_every_tensor_that_is_saved_can_be_read(name: str, legacy: bool) -> None:
    if legacy and name == "unsigned":
        pytest.skip("torch cannot read its own file")
    with warnings.catch_warnings():
        # torch's own, of quantised and of sparse tensors.
        warnings.simplefilter("ignore")
        tensor = TENSORS[name]()
        again = load(saved({"t": tensor}, legacy), FileKind.LEGACY if legacy else FileKind.TORCH)["t"]
        sparse = tensor.layout is not torch.strided
        assert (again.shape, again.dtype, again.is_quantized) == (tensor.shape, tensor.dtype, tensor.is_quantized)
        assert again.is_sparse if sparse else again.stride() == tensor.stride()
        # Of what is refused as a weight nothing but its kind and size is read.
        assert again.is_meta == (tensor.is_meta or sparse or tensor.is_quantized)
        assert again.is_meta or torch.equal(again, tensor)


@given(
    sizes=st.lists(st.integers(0, 4), max_size=4),
    strides=st.lists(st.integers(0, 9), min_size=4, max_size=4),
    offset=st.integers(0, 9),
)
def test_a_tensor_fits_exactly_where_torch_says_so(sizes: list[int], strides: list[int], offset: int) -> None:
    held = 24
    try:
        torch.as_strided(torch.empty(held), sizes, strides[: len(sizes)], offset)
        fits = True
    except RuntimeError:
        fits = False
    ref = described_tensor(
        "_rebuild_tensor", (StorageRef("0", torch.float32, held), offset, tuple(sizes), tuple(strides[: len(sizes)]))
    )
    assert ref is not None
    try:
        Builder(lambda _: pytest.fail("not asked for"), 4 * held, "x", foreign=False).check(ref, torch.float32)
        allowed = True
    except Odd:
        allowed = False
    # An empty tensor's offset is of no consequence; torch minds it all the same.
    assert allowed == fits or 0 in sizes


CLAIMS = {name: content for name, content in hostile._trap_pickles() if name in {claim[0] for claim in hostile._CLAIMS}}


@pytest.mark.parametrize("name", CLAIMS)
def test_claims_of_more_than_the_file_holds_are_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("torch must not see it"))
    with pytest.raises(
        SourceError, match=r"x\.pt .*, which torch\.save never writes; nothing of it was executed; save"
    ):
        load(hostile._in_zip(CLAIMS[name]))
    with pytest.raises(SourceError, match=r"which torch\.save never writes|is cut off or damaged"):
        load(hostile._in_old(CLAIMS[name].replace(b"tQ", b"NtQ")), FileKind.LEGACY)


def test_a_storage_in_a_pickle_is_all_there() -> None:
    """As `pickle.dump` writes it: a file of the old form in the pickle."""
    held = io.BytesIO()
    torch.save(torch.ones(4).untyped_storage(), held, _use_new_zipfile_serialization=False)

    class Holder:
        def __init__(self, data: bytes) -> None:
            self.data = data

        def __reduce__(self) -> Any:
            return torch.storage._load_from_bytes, (self.data,)

    whole = load(pickle.dumps({"x": Holder(held.getvalue())}), FileKind.PICKLE)["x"]
    assert torch.equal(whole.view(torch.float32), torch.ones(4))
    for missing in (1, 8, 16, 24):
        with pytest.raises(SourceError, match=r"x\.pt is cut off or damaged: its "):
            load(pickle.dumps({"x": Holder(held.getvalue()[:-missing])}), FileKind.PICKLE)


def module(**attributes: Any) -> nn.Module:
    made = nn.Sequential(nn.Conv2d(3, 4, 3))
    vars(made).update(attributes)
    return made


def named(name: str) -> nn.Module:
    made = nn.Sequential()
    made._modules[name] = nn.ReLU()
    return made


def deep(levels: int) -> nn.Module:
    made: nn.Module = nn.ReLU()
    for _ in range(levels):
        made = nn.Sequential(made)
    return made


ODD: dict[str, tuple[Callable[[], Any], str]] = {
    "another forward": (lambda: module(forward=nn.ReLU()), r"puts another forward into a torch\.nn.*\.Sequential"),
    "another method": (lambda: module(_call_impl=nn.ReLU), "puts another _call_impl into a"),
    "compiled": (lambda: compiled(), "puts another _compiled_call_impl into a"),
    "dunder": (lambda: module(__deepcopy__=nn.ReLU), r"fills a torch\.nn.*Sequential in another way"),
    "overloads": (lambda: module(__overloads__={"forward": ["f"]}), r"fills a torch\.nn.*Sequential in another way"),
    "hook": (lambda: module(_forward_hooks=OrderedDict({1: nn.ReLU()})), "has hooks on a"),
    "hook of the weights": (lambda: module(_state_dict_hooks=OrderedDict({1: nn.ReLU})), "has hooks on a"),
    "class for a child": (lambda: module(_modules={"0": nn.ReLU}), "has other things than such in the _modules of"),
    "number for a weight": (lambda: module(_parameters={"0": 3}), "has other things than such in the _parameters of"),
    "code for a name": (lambda: named('0"), print("x'), r"has .* for a name in the _modules of"),
    "path for a name": (lambda: named("a.b"), r"has .* for a name in the _modules of"),
    "method for a name": (lambda: named("__deepcopy__"), r"has .* for a name in the _modules of"),
    "control for a name": (lambda: named("\x1b[2J"), r"has .* for a name in the _modules of"),
    "partial of numbers": (lambda: module(norm=functools.partial(nn.ReLU, True)), "calls functools.partial in"),
    "partial of layers": (lambda: module(n=functools.partial(nn.ReLU, x=[nn.ReLU()])), "calls functools.partial"),
    "partial of a function": (lambda: functools.partial(torch._utils._rebuild_tensor), r"calls functools\.partial in"),
    "function": (lambda: {"f": torch._utils._rebuild_tensor}, r"keeps torch\._utils\._rebuild_tensor itself as a"),
    "deep module": (lambda: deep(DEEPEST), f"is nested more than {DEEPEST} levels deep"),
    "tensor's data": (lambda: tensor_with("data"), "fills a tensor with attributes that it has itself"),
}  # fmt: skip


def compiled() -> bytes:
    """A ReLU that keeps what a module leaves out of its state."""
    relu = b"ctorch.nn.modules.activation\nReLU\n"
    return hostile._in_zip(b"\x80\x02" + relu + b")\x81}" + hostile._text("_compiled_call_impl") + relu + b"sb.")


def tensor_with(attribute: str) -> Tensor:
    class Holder:
        def __reduce__(self) -> Any:
            args = (torch._utils._rebuild_tensor_v2, torch.Tensor, torch.ones(1).__reduce_ex__(2)[1], {attribute: None})
            return torch._tensor._rebuild_from_type_v2, args

    held: Any = Holder()
    tensor: Tensor = held
    return tensor


@pytest.mark.parametrize("name", ODD)
def test_modules_of_another_making_are_refused(name: str) -> None:
    make, expected = ODD[name]
    with pytest.raises(SourceError, match=rf"x\.pt {expected}.*which torch\.save never writes"):
        load(made if isinstance(made := make(), bytes) else saved(made))


@pytest.mark.parametrize("build", [models.vit_b_16, models.maxvit_t, models.efficientnet_b0, models.swin_v2_t])
def test_whole_models_come_through(build: Callable[..., nn.Module]) -> None:
    with torch.device("meta"):
        model = build()
    assert repr(load(saved(model))) == repr(model)


@pytest.mark.filterwarnings(
    "ignore:.torch.jit.script. is:FutureWarning", "ignore:.torch.jit.script. is:DeprecationWarning"
)
def test_a_module_that_has_been_scripted_before_comes_through() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3)).eval()
    torch.jit.script(model)
    assert vars(model)["__overloads__"] == {}, "then this test is of no use"
    assert repr(load(saved(model))) == repr(model)


def test_nesting_up_to_the_limit_is_read() -> None:
    assert repr(load(saved(deep(40)))) == repr(deep(40))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (np.array(["cat", None], object), r"needs numpy data of the type 'O8', outside of the allowlist"),
        (np.zeros(1, [("a", "i4")]), r"needs numpy data of the type 'V4', outside of the allowlist"),
    ],
)
def test_arrays_of_anything_but_numbers_are_refused(value: Any, expected: str) -> None:
    with pytest.raises(SourceError, match=expected):
        load(saved({"x": value}))


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("code", ["f4", "i2", "c16", "U3", "?"])
def test_arrays_keep_values_order_and_shape(code: str, order: str) -> None:
    array = np.array([[0, 1], [1, 1]]).astype(np.dtype(code).newbyteorder(order), order="F")
    again = load(saved({"x": array, "one": array[0, 1]}))
    # numpy itself brings numbers into this machine's order where it reads them.
    assert again["x"].dtype == pickle.loads(pickle.dumps(array)).dtype
    np.testing.assert_array_equal(again["x"], array)
    assert again["one"] == array[0, 1]


def test_an_archive_that_unpacks_to_far_more_is_refused() -> None:
    with zipfile.ZipFile("x.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", bytes(65 * 2**20))
    with pytest.raises(SourceError, match=r"is an archive of [\d,]+ bytes that would unpack to 68,157,440, which"):
        load_object(Path("x.pt"), FileKind.TORCH, False, "x.pt")


def test_a_pickle_larger_than_any_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_files, "LARGEST_PICKLE", 100)
    entries = [("x/data.pkl", b"\x80\x02" + hostile._text("x" * 20_000) + b".")]
    with pytest.raises(SourceError, match=r"holds [\d,]+ bytes beside its tensors, more than 100, which"):
        load(hostile._zipped(entries, zipfile.ZIP_DEFLATED))


def test_a_pickle_of_too_many_operations_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickle_reader, "MOST_OPERATIONS", 100)
    with pytest.raises(SourceError, match=r"has more than 100 operations, which"):
        load(saved(list(range(200))))
    # What is not on the allowlist is counted no longer than what is.
    with pytest.raises(SourceError, match=r"has more than 100 operations, which"):
        load(saved([Hidden(), *range(200)]))


class Hidden:
    """A class of the user's own."""


def test_an_archive_that_two_readers_read_in_two_ways_is_refused() -> None:
    data = saved({"a": 1})
    # Python looks for the list of entries from the end, torch where the end says it is.
    with pytest.raises(SourceError, match=r"cut off or damaged|in two ways"):
        load(b"#!/bin/sh\n" + data)


@pytest.mark.parametrize("names", [("x/data.pkl", "x/DATA.pkl"), ("x/data.pkl", "y/data.pkl")])
def test_two_pickles_in_one_archive_are_refused(names: tuple[str, str]) -> None:
    entries = [(name, b"\x80\x02}.") for name in names]
    with pytest.raises(SourceError, match=r"is an archive with (several roots|two entries of one name), which"):
        load(hostile._zipped(entries))


def test_what_is_refused_can_be_trusted_and_is_told_of() -> None:
    Path("x.pt").write_bytes(saved(module(_forward_hooks=OrderedDict({1: nn.ReLU()}))))
    loaded = load_file(Path("x.pt"), FileKind.TORCH, True, "x.pt")
    assert loaded.executed
    assert isinstance(loaded.value, nn.Sequential)
    Path("x.pt").write_bytes(saved(module()))
    assert not load_file(Path("x.pt"), FileKind.TORCH, True, "x.pt").executed


@pytest.mark.parametrize(
    ("name", "safe"),
    [
        *(("conv1", True), ("0", True), ("a b-c/d", True), ("größe", True)),
        *(('a"b', False), ("a'b", False), ("a\\b", False), ("a.b", False), ("a\nb", False), ("\x07", False)),
        ("__deepcopy__", False),
    ],
)
def test_names_of_modules(name: str, safe: bool) -> None:
    assert is_safe_name(name) is safe


def test_the_limits_leave_room_for_real_checkpoints() -> None:
    with torch.device("meta"):
        model = models.resnet152()
    optimizer = torch.optim.Adam(model.parameters())
    for parameter in model.parameters():
        optimizer.state[parameter] = {"step": torch.tensor(1.0), "exp_avg": parameter, "exp_avg_sq": parameter}
    data = saved({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        content = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
    operations = sum(1 for _ in pickletools.genops(content))
    assert operations < pickle_reader.MOST_OPERATIONS / 7
    assert len(content) < torch_files.LARGEST_PICKLE / 20


def get(index: int) -> bytes:
    return b"j" + index.to_bytes(4, "little")


def put(index: int) -> bytes:
    return b"r" + index.to_bytes(4, "little")


_STORAGE = b"(" + hostile._text("storage") + b"ctorch\nFloatStorage\n" + hostile._text("0") + hostile._text("cpu")
_WHOLE = _STORAGE + hostile._number(4) + b"tQ" + put(0)
_TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n(" + get(0) + b"K\x00K\x04\x85K\x01\x85\x89}tR"


def pairs(count: int) -> bytes:
    return b"(" + b"".join(hostile._number(n) + b"K\x00\x86" for n in range(count)) + b"e"


GROWING: dict[str, tuple[bytes, str]] = {
    "one text encoded again and again": (
        hostile._text("a" * 20_000) + put(0) + b"0" + hostile._text("latin1") + put(1) + b"0]("
        + (b"c_codecs\nencode\n" + get(0) + get(1) + b"\x86R") * 20_000 + b"e", "makes far more bytes than it has",
    ),
    "one list for many dicts": (
        b"]" + pairs(5000) + put(0) + b"0](" + (b"ccollections\nOrderedDict\n" + get(0) + b"\x85R") * 5000 + b"e",
        "has more than 400,000 operations",
    ),
    "numbers of one hash": (
        b"}(" + b"".join(hostile._number(n * (2**61 - 1)) + b"N" for n in range(1, 9)) + b"u",
        "has a key that is neither text nor a small number",
    ),
    "long keys": (hostile._text("a" * 5000) + put(0) + b"0}(" + get(0) + b"Nu", "has a key of 5,000 characters"),
    "shared dicts": (
        b"}(" + b"".join(hostile._text(str(n)) + b"N" for n in range(1000)) + b"u" + put(0)
        + b"0}(" + b"".join(hostile._text(str(n)) + get(0) for n in range(2000)) + b"u", "holds the same things again",
    ),
    "many dimensions": (
        _WHOLE + b"0(" + b"K\x01" * 65 + b"t" + put(1) + b"0ctorch._utils\n_rebuild_tensor_v2\n(" + get(0) + b"K\x00"
        + get(1) + get(1) + b"\x89}tR", r"calls torch\._utils\._rebuild_tensor_v2 in another way",
    ),
    "a sparse tensor of text": (
        b"ctorch._utils\n_rebuild_sparse_tensor\n(ctorch.serialization\n_get_layout\n"
        + hostile._text("torch.sparse_coo") + b"\x85R(" + hostile._text("a") + b"ttR",
        r"calls torch\._utils\._rebuild_sparse_tensor in another way",
    ),
    "a wide dtype again and again": (
        _WHOLE.replace(hostile._number(4), hostile._number(10**6)) + b"0"
        + _TENSOR.replace(b"K\x04\x85", hostile._number(10**6) + b"\x85") + put(1) + b"0]("
        + (b"ctorch._utils\n_rebuild_device_tensor_from_cpu_tensor\n(" + get(1) + b"ctorch\ncomplex128\n"
           + hostile._text("cpu") + b"\x89tR") * 100 + b"e", "makes far more bytes than it has",
    ),
    "memo of one hash": (
        b"]" + b"".join(b"p%d\n" % (number * (2**61 - 1)) for number in range(20)),
        "has a key that is neither text nor a small number",
    ),
    "bytes as text": (b"U\x02\xff\xfe", "holds bytes as text, as Python 2 wrote them"),
    "an object filled twice": (b"cuser.net\nNet\n)\x81}b}b", r"fills a user\.net\.Net twice"),
}  # fmt: skip


@pytest.mark.parametrize("name", GROWING)
def test_what_a_small_file_makes_grow_is_refused(name: str) -> None:
    content, expected = GROWING[name]
    entries = [("x/data.pkl", b"\x80\x02" + content + b"."), ("x/data/0", bytes(4 * 10**6)), ("x/version", b"3\n")]
    with pytest.raises(SourceError, match=rf"x\.pt {expected}.*, which torch\.save never writes"):
        load(hostile._zipped(entries))


def test_a_key_of_safetensors_is_as_long_as_any(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"module." * 1000 + "weight": torch.zeros(1)}, path)
    with pytest.raises(SourceError, match=r"has a key of 7,006 characters"):
        read_raw(path, trust_pickle=False)


def test_numbers_in_a_module_are_not_counted_up_to() -> None:
    """torch's own `__setstate__` would make names for as many layers as the file says."""
    model = nn.LSTM(3, 4)
    vars(model).update(num_layers=10**10, _all_weights=[[1]])
    found = load(saved(model))
    assert found.num_layers == 10**10
    assert all(map(torch.equal, found._flat_weights, model.parameters()))
