"""Small files written by hand that would cost much time or memory, or reach further than data may.

Each is read in every place where such files are read: as a state dict, a whole module, data, the state of a training
run. Most of them keep to a limit on each operation, and need one on all of them together.
"""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from hostile import Case, _in_old, _in_zip, _number, _saved, _text, case_of, commands

MANY = 60_000
MEBI = 2**20


def made_by_hand(files: Mapping[str, bytes]) -> Iterator[Case]:
    """All of them, with the commands that read them; `files` are the sound ones."""
    for name, content in pickles():
        for form, data in (("zip", _in_zip(content)), ("plain", content), ("old form", _in_old(content))):
            for command in (commands("state_dict")[0], ("show", "x.pt"), commands("data .pt")[0]):
                yield Case("pickles by hand", f"{name}, {form}", command, {"x.pt": data})
        case = case_of(files, "training state", name, commands("training state")[0], _in_zip(content))
        yield replace(case, kind="pickles by hand", name=f"{name}, training state")
    for name, value in _tensors():
        for command in (commands("state_dict")[0], *commands("data .pt"), ("candidates", "x.pt")):
            yield Case("tensors by hand", name, command, {"x.pt": value})
    for name, path, value in _arrays():
        for command in commands("data " + path[1:]):
            yield Case("arrays by hand", name, command, {path: value})


# ---- pickles


def pickles() -> Iterator[tuple[str, bytes]]:
    """Name and content of each, small to write and dear to read for one who is careless."""
    for name, make in _PICKLES.items():
        yield name, b"\x80\x02" + make() + b"."


def _put(at: int) -> bytes:
    return b"r" + struct.pack("<I", at)


def _get(at: int) -> bytes:
    return b"j" + struct.pack("<I", at)


_ORDERED = b"ccollections\nOrderedDict\n"


def _entry(value: bytes, name: str = "conv1.weight") -> bytes:
    """A dict of one entry."""
    return b"}" + _text(name) + value + b"s"


def _shared(levels: int, level: Callable[[bytes], bytes]) -> bytes:
    """A value whose every level holds the one below twice: without end for one who walks it as a tree."""
    made = b"N" + _put(0)
    for at in range(levels):
        made += b"0" + level(_get(at)) + _put(at + 1)
    return made


def _shared_dicts() -> bytes:
    return _shared(50, lambda below: b"}(" + _text("a") + below + _text("b") + below + b"u")


def _shared_ordered() -> bytes:
    return _shared(50, lambda below: _ORDERED + b")R(" + _text("a") + below + _text("b") + below + b"u")


def _shared_keys() -> bytes:
    """A tuple of tuples as a key: hashed anew at every level."""
    return b"}" + _shared(40, lambda below: below * 2 + b"\x86") + b"Ns"


def _shared_modules() -> bytes:
    """A Sequential of the same Sequential twice, and so on: few objects, and paths without number."""
    made = _RELU + _put(0)
    for at in range(40):
        children = b"}(" + _text("0") + _get(at) + _text("1") + _get(at) + b"u"
        made += b"0" + _SEQUENTIAL + b")\x81}" + _modules(children) + b"b" + _put(at + 1)
    return made


_SEQUENTIAL = b"ctorch.nn.modules.container\nSequential\n"
_RELU = b"ctorch.nn.modules.activation\nReLU\n)\x81}(" + _text("training") + b"\x89" + _text("inplace") + b"\x89ub"


def _modules(children: bytes) -> bytes:
    names = ("_parameters", "_buffers", "_non_persistent_buffers_set")
    return (
        b"("
        + _text("training")
        + b"\x89"
        + b"".join(_text(name) + b"}" for name in names[:2])
        + (_text("_modules") + children + b"u")
    )


def _module_in_itself() -> bytes:
    return _SEQUENTIAL + b")\x81" + _put(0) + b"}" + _modules(b"}" + _text("0") + _get(0) + b"s") + b"b"


def _many_modules() -> bytes:
    children = b"}(" + b"".join(_text(str(n)) + _RELU for n in range(5_000)) + b"u"
    return _SEQUENTIAL + b")\x81}" + _modules(children) + b"b"


def _lstm() -> bytes:
    """Its __setstate__ runs a loop over a number of the file."""
    state = _text("num_layers") + _number(10**10) + _text("mode") + _text("LSTM") + _text("bidirectional") + b"\x89"
    state += _text("proj_size") + b"K\x00" + _text("bias") + b"\x88" + _text("_all_weights") + b"]"
    return b"ctorch.nn.modules.rnn\nLSTM\n)\x81}(" + state + b"ub"


def _tensor(sizes: bytes, strides: bytes, storage: int = 4) -> bytes:
    made = b"ctorch._utils\n_rebuild_tensor_v2\n((" + _text("storage") + b"ctorch\nFloatStorage\n" + _text("0")
    return made + _text("cpu") + _number(storage) + b"tQK\x00" + sizes + strides + b"\x89" + _ORDERED + b")RtR"


def _many_sizes() -> bytes:
    return _entry(_tensor(b"(" + b"K\x01" * 190_000 + b"t", b"(" + b"K\x01" * 190_000 + b"t"))


def _large_sizes() -> bytes:
    """A product of numbers that has a million digits."""
    return _entry(_tensor(b"(" + _number(2**62) * 50_000 + b"t", b"(" + b"K\x00" * 50_000 + b"t"))


def _expanded(count: int) -> Callable[[], bytes]:
    """Tensors of one number that are a GiB each once somebody copies them."""
    one = _tensor(_number(2**28) + b"\x85", b"K\x00\x85")
    return lambda: b"}(" + b"".join(_text(f"k{n}") + one for n in range(count)) + b"u"


def _to_complex() -> bytes:
    """The same, and the file says itself that it is to be copied: to numbers of 16 bytes."""
    name = b"ctorch._utils\n_rebuild_device_tensor_from_cpu_tensor\n("
    return _entry(
        name + _tensor(_number(2**28) + b"\x85", b"K\x00\x85") + b"ctorch\ncomplex128\n" + _text("cpu") + b"\x89tR"
    )


def _long_list_again() -> bytes:
    """One list of pairs, given to OrderedDict over and over."""
    pairs = (
        b"]("
        + b"".join(_text(f"k{n}") + b"N\x86" for n in range(2_000))
        + b"e"
        + _put(0)
        + b"0"
        + _ORDERED
        + _put(1)
        + b"0"
    )
    return b"](" + pairs + (_get(1) + _get(0) + b"\x85R") * MANY + b"e"


def _one_hash() -> bytes:
    """Whole numbers of one hash: the time of a dict grows with the square of their number."""
    return b"}(" + b"".join(_number(n * (2**61 - 1)) + b"N" for n in range(1, MANY)) + b"u"


def _one_hash_in_tuples() -> bytes:
    return b"}(" + b"".join(_number(n * (2**61 - 1)) + b"\x85N" for n in range(1, MANY)) + b"u"


def _one_hash_in_floats() -> bytes:
    """Powers of two repeat their hashes after 61."""
    keys = (2.0**n for n in range(0, 1000, 61))
    return b"}(" + b"".join(b"G" + struct.pack(">d", key) + b"N" for key in keys) * 2_000 + b"u"


def _encoded_again() -> bytes:
    """One text, made into bytes over and over."""
    name = (
        b"c_codecs\nencode\n" + _put(0) + b"0" + _text("x" * 30_000) + _put(1) + b"0" + _text("latin1") + _put(2) + b"0"
    )
    return b"](" + name + (_get(0) + _get(1) + _get(2) + b"\x86R") * 70_000 + b"e"


def _bytearrays() -> bytes:
    return b"](" + (b"cbuiltins\nbytearray\n" + _number(2**24) + b"\x85R") * 300 + b"e"


def _long_number() -> bytes:
    raw = b"\x7f" * MEBI
    return _entry(b"\x8b" + struct.pack("<I", len(raw)) + raw, "epoch")


def _long_decimal() -> bytes:
    return _entry(b"L" + b"9" * (2 * MEBI) + b"L\n", "epoch")


def _claimed_bytes(operation: bytes, form: str) -> Callable[[], bytes]:
    return lambda: _entry(operation + struct.pack(form, 2 ** (30 if form == "<I" else 40)), "x")


def _not_ascii() -> bytes:
    return _entry(b"U\x02\xff\xfe", "x")


def _many_keys() -> bytes:
    return b"}(" + b"".join(_text(f"layer{n}.weight") + b"N" for n in range(100_000)) + b"u"


def _many_prefixes() -> bytes:
    """Keys with many dots, each of which could be a prefix."""
    one = "a." * 400
    return b"}(" + b"".join(_text(f"{one}{n}") + _tensor(b"K\x01\x85", b"K\x01\x85") for n in range(300)) + b"u"


def _state_of_dict(count: int) -> Callable[[], bytes]:
    """A long list put into a dict's state, over and over."""
    return lambda: (
        b"}" + _put(0) + (b"0" + _get(0) + b"}(" + b"".join(_text(f"{n}") + b"N" for n in range(50)) + b"ub") * count
    )


def _sets() -> bytes:
    return b"\x8f(" + b"".join(_number(n * (2**61 - 1)) for n in range(1, MANY)) + b"\x90"


def _popped() -> bytes:
    """Work whose result nobody keeps."""
    return b"N" + b"(" * 10 + (b"(" + b"K\x01" * 1000 + b"t0") * 20_000 + b"1" * 10


def _memo() -> bytes:
    return b"N" + b"".join(b"r" + struct.pack("<I", at * 70_001) for at in range(MANY))


def _dunders(name: str, value: bytes) -> Callable[[], bytes]:
    """A tensor with an attribute that only Python itself, or numpy, should set."""

    def make() -> bytes:
        rebuild = b"ctorch._tensor\n_rebuild_from_type_v2\n(ctorch._utils\n_rebuild_tensor_v2\nctorch\nTensor\n"
        plain = _tensor(b"K\x04\x85", b"K\x01\x85").partition(b"_rebuild_tensor_v2\n")[2].removesuffix(b"R")
        tensor = rebuild + plain + b"}" + _text(name) + value + b"stR"
        return b"}(" + _text("classes") + tensor + _text("images") + _IMAGES + _text("labels") + _LABELS + b"u"

    return make


_IMAGES = _tensor(b"(K\x04K\x01K\x08K\x08t", b"(K\x00K\x00K\x00K\x00t")
_LABELS = b"](K\x00K\x01K\x02K\x03e"
_ADDRESS = (
    b"}(" + _text("shape") + b"K\x10\x85" + _text("typestr") + _text("|u1") + _text("version") + b"K\x03"
    + _text("data") + _number(4096) + b"\x89\x86u"
)  # fmt: skip

_PICKLES: dict[str, Callable[[], bytes]] = {
    "shared dicts": _shared_dicts,
    "shared dicts in a state dict": lambda: _entry(_shared_dicts(), "state_dict"),
    "shared OrderedDicts": _shared_ordered,
    "shared lists as data": lambda: _entry(_shared(50, lambda below: b"](" + below * 2 + b"e"), "labels"),
    "shared lists as names of classes": lambda: (
        b"}("
        + _text("images")
        + _IMAGES
        + _text("labels")
        + _LABELS
        + _text("classes")
        + _shared(50, lambda below: b"](" + below * 2 + b"e")
        + b"u"
    ),
    "shared tuples as a key": _shared_keys,
    "shared modules": _shared_modules,
    "a module in itself": _module_in_itself,
    "many modules": _many_modules,
    "a loop by number: LSTM": _lstm,
    "many sizes": _many_sizes,
    "sizes of a million digits": _large_sizes,
    "an expanded tensor": _expanded(1),
    "many expanded tensors": _expanded(40),
    "an expanded tensor to complex": _to_complex,
    "a long list again and again": _long_list_again,
    "keys of one hash": _one_hash,
    "keys of one hash in tuples": _one_hash_in_tuples,
    "keys of one hash: floats": _one_hash_in_floats,
    "a set of one hash": _sets,
    "a text encoded again and again": _encoded_again,
    "many bytearrays": _bytearrays,
    "a number of a million bytes": _long_number,
    "a number of two million digits": _long_decimal,
    "a text that claims a GiB": _claimed_bytes(b"X", "<I"),
    "a text that claims a TiB": _claimed_bytes(b"\x8d", "<Q"),
    "bytes that claim a TiB": _claimed_bytes(b"\x8e", "<Q"),
    "a bytearray that claims a TiB": _claimed_bytes(b"\x96", "<Q"),
    "a frame that claims a TiB": _claimed_bytes(b"\x95", "<Q"),
    "a string that is not ASCII": _not_ascii,
    "many keys": _many_keys,
    "many prefixes": _many_prefixes,
    "states of a dict": _state_of_dict(2_000),
    "much that is dropped": _popped,
    "a large memo": _memo,
    "an address for numpy": _dunders("__array_interface__", _ADDRESS),
    "an array struct for numpy": _dunders("__array_struct__", _number(4096)),
    "another class": _dunders("__class__", b"cbuiltins\nlist\n"),
    "another length": _dunders("__len__", _number(3)),
    "another dict": _dunders("__dict__", _shared_dicts()),
}


# ---- tensors that are none of the usual ones


def _tensors() -> Iterator[tuple[str, bytes]]:
    import warnings

    import torch
    from torch import nn

    images, labels = torch.rand(4, 1, 8, 8), torch.arange(4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kinds: dict[str, Any] = {
            "sparse": images.to_sparse(),
            "sparse in rows": images[0, 0].to_sparse_csr(),
            "meta": images.to("meta"),
            "quantised": torch.quantize_per_tensor(images, 0.1, 0, torch.quint8),
            "float8": images.to(torch.float8_e4m3fn),
            "bfloat16": images.to(torch.bfloat16),
            "complex": images.to(torch.complex64),
            "bool": images > 0.5,
            "int64": images.to(torch.int64),
            "uint16": (images * 255).to(torch.uint16),
            "nan": images * float("nan"),
            "empty": images[:0],
            "without sizes": images.sum(),
            "of 64 dimensions": torch.zeros([1] * 64),
            "a parameter": nn.Parameter(images),
            "nested": torch.nested.nested_tensor([images[0], images[1]]),
            "conjugated": images.to(torch.complex64).conj(),
            "a list": images.tolist(),
            "a list of tensors": list(images),
            "a dict": {"a": images},
            "a number": 5,
            "none": None,
        }
        for name, value in kinds.items():
            yield f"images {name}", _saved({"images": value, "labels": labels})
            yield f"images alone {name}", _saved(value)
            yield f"labels {name}", _saved({"images": images, "labels": value})
            yield f"classes {name}", _saved({"images": images, "labels": labels, "classes": value})
            yield f"a weight {name}", _saved({"conv1.weight": value})
        labelled = {
            "labels with a gradient": {"labels": labels.float().requires_grad_()},
            "labels below zero": {"labels": labels - 9},
            "labels beyond": {"labels": labels + 2**62},
            "labels as floats": {"labels": labels.double()},
            "labels as text": {"labels": ["a", "b", "c", "d"]},
            "classes as nested lists": {"labels": labels, "classes": [["a"], ["b"], {"c": 1}, None]},
            "classes as text": {"labels": labels, "classes": "abcd"},
            "classes with control codes": {"labels": labels, "classes": ["\x1b[2J", "\n", "\0", "é" * 10_000]},
            "classes as bytes": {"labels": labels, "classes": b"abcd"},
            "a million classes": {"labels": labels + 999_000},
        }
        for name, entries in labelled.items():
            yield name, _saved({"images": images, **entries})


# ---- numpy's files


def _arrays() -> Iterator[tuple[str, str, bytes]]:
    for name, head, body in (
        ("terabytes", _npy("|u1", (2**40, 1, 8, 8)), b""),
        ("more than can be counted", _npy("|u1", (2**62, 2**62)), b""),
        ("sizes below zero", _npy("|u1", (-1, 1, 8, 8)), bytes(64)),
        ("objects", _npy("|O", (1,)), b"\x80\x02cposix\nsystem\n" + _text("touch sprung") + b"\x85R."),
        ("a record", _npy([("a", "<f4"), ("b", "|O")], (4,)), bytes(48)),
        ("wide elements", _npy("|V1000000000", (4,)), bytes(64)),
        ("dates", _npy("<M8[ns]", (4, 1, 8, 8)), bytes(2048)),
        ("text", _npy("<U9", (4, 1, 8, 8)), bytes(9216)),
        ("longdouble", _npy("<f16", (4, 1, 8, 8)), bytes(4096)),
        ("half", _npy("<f2", (4, 1, 8, 8)), bytes(512)),
        ("big endian", _npy(">f4", (4, 1, 8, 8)), bytes(1024)),
        ("column by column", _npy("<f4", (4, 1, 8, 8), order=True), bytes(1024)),
        ("nothing", _npy("|u1", (0, 1, 8, 8)), b""),
        ("33 dimensions", _npy("|u1", (1,) * 33), b"\0"),
        ("70 dimensions", _npy("|u1", (1,) * 70), b"\0"),
        ("a header that is code", _header(b"{'descr': __import__('os').system('touch sprung')}"), b""),
        ("a header nested deeply", _header(b"(" * 60_000), b""),
        ("a header without an end", _header(b"{'descr': '|u1', 'shape': (1,)" + b" " * 60_000), b""),
        ("a header that claims 4 GiB", b"\x93NUMPY\x02\x00\xff\xff\xff\xff", b"{}"),
        ("another version", b"\x93NUMPY\x09\x00\x10\x00", b"{}"),
    ):
        yield f"{name}, .npy", "x.npy", head + body
        yield f"{name}, .npz", "x.npz", _npz({"images": head + body})
        yield f"labels: {name}", "x.npz", _npz({"images": _PLAIN, "labels": head + body})
    yield "5 MB that unpack to 1 GiB", "x.npz", _npz({"images": _zeros(2**24)})
    many = {f"other{n}": _zeros(2**19) for n in range(40)}
    yield "many entries of 32 MiB", "x.npz", _npz({"images": _PLAIN, "labels": _LABELLED, **many})
    yield "many names", "x.npz", _npz({f"n{n}": b"" for n in range(MANY // 6)} | {"images": _PLAIN})
    yield "one name twice", "x.npz", _npz({"images": _PLAIN}) + _npz({"images": b""})
    yield "a path", "x.npz", _npz({"../../images": _PLAIN, "images": _PLAIN})
    yield "a pickle", "x.npy", b"\x80\x02cposix\nsystem\n" + _text("touch sprung") + b"\x85R."
    yield "a pickle in it", "x.npz", _npz({"images": b"\x80\x02cposix\nsystem\n" + _text("touch sprung") + b"\x85R."})


def _header(content: bytes) -> bytes:
    return b"\x93NUMPY\x02\x00" + struct.pack("<I", len(content)) + content


def _npy(dtype: Any, shape: tuple[int, ...], *, order: bool = False) -> bytes:
    return _header(repr({"descr": dtype, "fortran_order": order, "shape": shape}).encode() + b"\n")


def _zeros(images: int) -> bytes:
    return _npy("|u1", (images, 1, 8, 8)) + bytes(images * 64)


_PLAIN = _npy("|u1", (4, 1, 8, 8)) + bytes(256)
_LABELLED = _npy("|u1", (4,)) + bytes(range(4))


def _npz(entries: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, content in entries.items():
            archive.writestr(f"{name}.npy", content)
    return buffer.getvalue()
