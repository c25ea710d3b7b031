"""Files that are damaged or hostile, and what asymswap makes of them: for tests/test_hostile.py and benchmarks/fuzz.py.

A sound file of every kind is made first; a case is a mutation of one (bytes, entries of archives, operations of
pickles, values of JSON, words of TOML), or something that hypothesis has made up, or a trap written by hand, with the
command that reads it. Cases are run in worker processes, which are replaced when they die; `verdict` says how it ended.
"""

from __future__ import annotations

import contextlib
import fnmatch
import io
import json
import multiprocessing
import os
import pickle
import pickletools
import random
import re
import resource
import shutil
import struct
import sys
import tempfile
import time
import traceback
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

HANG_SECONDS = 10.0
"""Of processor time; a machine that others keep busy must not make a case a hang."""

_KILLED_AFTER = 600.0
"""Seconds that a worker is given even where the machine is too busy to let it compute."""

_ADDRESS_SPACE = 3 * 2**30
"""Bytes that a worker may take on top of what it has to begin with."""

MOST_MB = 1024.0
"""Of memory that a case may take on top of what the process has to begin with."""

SPRUNG = "sprung"
"""The file that every trap would make."""

ACCEPTED, REFUSED, MEMORY = "accepted", "refused", "refused, out of memory"
BAD = ("traceback", "files left behind", "code executed", "crash", "hang", "more than 1 GiB")
VERDICTS = (ACCEPTED, REFUSED, MEMORY, *BAD)


@dataclass(frozen=True)
class Case:
    """One command, and the files in the folder that it is run in; `kind` is the kind of file, `name` what was done.

    `may_leave` are patterns of what a command that did its work may leave beside the output of -o.
    """

    kind: str
    name: str
    arguments: tuple[str, ...]
    files: Mapping[str, bytes] = field(repr=False)
    may_leave: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if ONE_CONV in self.arguments:
            object.__setattr__(self, "files", {ONE_CONV: _ONE_CONV, **self.files})


@dataclass(frozen=True)
class Ending:
    """How a command ended: exit code (None for a worker that died or was killed), output, and what it left and did."""

    code: int | None
    out: str = ""
    err: str = ""
    left: tuple[str, ...] = ()
    deeds: tuple[str, ...] = ()
    seconds: float = 0.0
    grown_mb: float = 0.0


def verdict(case: Case, ending: Ending, patience: float = HANG_SECONDS) -> str:
    """One of VERDICTS; `patience` is how many seconds of processor time are a hang."""
    if ending.code is None:
        return "hang" if ending.seconds >= patience else "crash"
    if ending.deeds or SPRUNG in ending.left:
        return "code executed"
    if ending.seconds >= patience:
        return "hang"
    if ending.grown_mb > MOST_MB:
        return "more than 1 GiB"
    if ending.code == 0:
        output = case.arguments[case.arguments.index("-o") + 1] if "-o" in case.arguments else None
        expected = set() if output is None or output in case.files else {output}
        left = {name for name in ending.left if not any(fnmatch.fnmatch(name, each) for each in case.may_leave)}
        return ACCEPTED if left == expected else "files left behind"
    one_line = ending.err.startswith("error: ") and ending.err.count("\n") == 1 and not ending.out
    if ending.code != 1 or not one_line or "this is a bug" in ending.err:
        return "traceback"
    if ending.left:
        return "files left behind"
    return MEMORY if "not enough memory" in ending.err else REFUSED


# ---- sound files


def sound_files() -> dict[str, bytes]:
    """A small real file of every kind that asymswap reads, by the kind's name."""
    import argparse
    import warnings

    import numpy as np
    import torch
    from safetensors.torch import save
    from torch import nn
    from torchvision.models import ShuffleNetV2

    import asymswap
    from asymswap.models.networks import DIGITS_WEIGHTS, digits_resnet
    from asymswap.planning.plan import plan_text
    from asymswap.planning.shipped import shipped_folder

    torch.manual_seed(0)
    net = digits_resnet()
    with safetensors_open(DIGITS_WEIGHTS) as file:
        net.load_state_dict({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118
    state = net.eval().state_dict()
    small = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3)).eval()
    shuffle = ShuffleNetV2([1, 1, 1], [8, 16, 32, 64, 32], num_classes=4).eval()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    training = {
        "epoch": 3,
        "state_dict": state,
        "optimizer": optimizer.state_dict(),
        "args": argparse.Namespace(lr=0.1, name="net"),
        "best": np.float64(0.9),
        "curve": np.arange(4.0),
    }
    old = {"best_prec1": 90.0, "state_dict": {f"module.{key}": tensor for key, tensor in state.items()}}
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = Path(name)
        torch.jit.save(torch.jit.trace(net, torch.zeros(1, 1, 8, 8)), folder / "script.pt")
        torch.export.save(torch.export.export(net, (torch.zeros(1, 1, 8, 8),)), folder / "export.pt2")
        conversion = asymswap.convert("digits-resnet", "3x3-only")
        asymswap.save(conversion, folder / "pairs.pt")
        asymswap.save(conversion, folder / "pairs.safetensors")
        asymswap.save(
            asymswap.convert(asymswap.open_model(small, input_size=(3, 8, 8)), "acnet-branch-bn"),
            folder / "skeleton.pt",
        )
        with contextlib.chdir(folder):
            data = _data(folder)
            sweep, begun = _sweep_state(), _training_state()
            statistics = asymswap.Calibration(data="digits", images=16, cache=folder / "seen.safetensors")
            asymswap.convert("digits-resnet", "half-macs", calibration=statistics)
        shutil.rmtree(folder / "run")
        written = {path.name: path.read_bytes() for path in folder.iterdir()}
    return {
        "state_dict": _saved(state),
        "training checkpoint": _saved(training),
        "old torch.save": _saved(old, _use_new_zipfile_serialization=False),
        "pickled module": _saved(small),
        "pickled torchvision module": _saved(shuffle),
        "safetensors": save(state),
        "asymswap .pt": written["pairs.pt"],
        "asymswap .pt with a structure": written["skeleton.pt"],
        "asymswap .safetensors": written["pairs.safetensors"],
        "TorchScript": written["script.pt"],
        "torch.export .pt2": written["export.pt2"],
        "recipe": (shipped_folder() / "3x3-only.toml").read_bytes(),
        "plan": plan_text(conversion.plan).encode(),
        **data,
        "training state": begun,
        "sweep state": sweep,
        "statistics": written["seen.safetensors"],
    }


def _data(folder: Path) -> dict[str, bytes]:
    """The first digits, in each form of a data file."""
    import numpy as np
    import torch
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    pixels = (images[:40].reshape(-1, 1, 8, 8) * 15.9).astype("uint8")
    classes = [f"digit {number}" for number in range(10)]
    np.save(folder / "x.npy", pixels)
    np.savez(folder / "x.npz", images=pixels, labels=labels[:40])
    found = {"data .npy": (folder / "x.npy").read_bytes(), "data .npz": (folder / "x.npz").read_bytes()}
    tensors = {"images": torch.from_numpy(pixels), "labels": torch.from_numpy(labels[:40]), "classes": classes}
    return {"data .pt": _saved(tensors), **found}


def _sweep_state() -> bytes:
    """A sweep of one budget."""
    _call("sweep", "digits-resnet", *_SWEEP, "-o", "x.json", "-q")
    return Path("x.json").read_bytes()


def _training_state() -> bytes:
    """What a run that is going to be killed has saved after its first step."""
    from asymswap.training.run_folder import RunFolder

    states: list[bytes] = []
    save = RunFolder.save_state

    def recording(self: RunFolder, payload: Mapping[str, Any]) -> None:
        save(self, payload)
        states.append(self.state.read_bytes())

    RunFolder.save_state = recording  # type: ignore[method-assign]
    try:
        shutil.copyfile("pairs.pt", "c.pt")
        _call("finetune", "c.pt", *_TRAIN, "-o", "y.pt", "-q")
    finally:
        RunFolder.save_state = save  # type: ignore[method-assign]
    return states[0]


ONE_CONV = "one.toml"
"""A recipe for one conv; a case that names it has it beside its files."""
_ONE_CONV = b'[[rules]]\nmatch = { names = "layer1.0.conv1" }\nswap = { kind = "separable", rank = 4 }\n'
_SWEEP = ("--recipe", "half-macs", "--evaluate", "digits", "--macs", "0.6")
_TRAIN = ("--data", "digits", "--steps", "2", "--save-every", "1", "--workers", "0", "--device", "cpu", "--run", "run")


def _call(*arguments: str) -> None:
    """Run the command line in this process."""
    from asymswap.cli.main import main

    before, sys.argv = sys.argv, ["asymswap", *arguments]
    try:
        main()
    except SystemExit as stop:
        if stop.code:
            raise RuntimeError(f"{arguments} ended with {stop.code}") from None
    finally:
        sys.argv = before


def safetensors_open(path: Path) -> Any:
    """A safetensors file, for reading."""
    import safetensors

    return safetensors.safe_open(path, framework="pt")


def _saved(value: Any, **options: Any) -> bytes:
    import torch

    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


_SUFFIX = {"safetensors": ".safetensors", "asymswap .safetensors": ".safetensors", "recipe": ".toml", "plan": ".json"}
_SUFFIX |= {"torch.export .pt2": ".pt2", "statistics": ".safetensors", "sweep state": ".json"}
_SUFFIX |= {"data .npy": ".npy", "data .npz": ".npz"}
_PATH = {"training state": "run/state.pt"}
_STATES = ("state_dict", "training checkpoint", "old torch.save", "safetensors", "TorchScript", "torch.export .pt2")


def path_of(kind: str) -> str:
    """The name of a kind's file in the folder of a case."""
    return _PATH.get(kind, "x" + _SUFFIX.get(kind, ".pt"))


def commands(kind: str) -> list[tuple[str, ...]]:
    """The commands that read a file of a kind, by the name of `path_of`."""
    path = path_of(kind)
    if kind.startswith("data "):
        calibrate = ("--calibrate", path, "--calibration-images", "16", "--no-sequential", "-o", "y.pt")
        # What is seen of the data reaches the solver in one conv as well as in eight.
        evaluate = [("evaluate", "digits-resnet", "--data", path)] * (kind != "data .npy")
        return [*evaluate, ("convert", "digits-resnet", "--recipe", ONE_CONV, *calibrate)]
    if kind == "training state":
        return [("finetune", "c.pt", *_TRAIN, "-o", "y.pt", "--resume")]
    if kind == "sweep state":
        return [("sweep", "digits-resnet", *_SWEEP, "-o", path)]
    if kind == "statistics":
        return [("convert", "digits-resnet", "--recipe", "half-macs", "--calibration-cache", path, "-o", "y.pt")]
    convert = ("--recipe", "3x3-only", "-o", "y.pt")
    if kind == "recipe":
        return [
            ("convert", "digits-resnet", "--recipe", path, "-o", "y.pt"),
            ("candidates", "digits-resnet", "--recipe", path),
            ("recipes", path),
        ]
    if kind == "plan":
        return [("convert", "digits-resnet", "--plan", path, "-o", "y.pt")]
    if kind in _STATES:
        return [
            ("convert", path, "--arch", "digits-resnet", *convert),
            ("candidates", path, "--arch", "digits-resnet"),
            ("convert", "digits-resnet", "--weights", path, *convert),
            ("candidates", path),
            ("show", path),
        ]
    size = ("--input", "3x16x16") if "module" in kind else ()
    if "module" in kind or "structure" in kind:
        return [("convert", path, *size, "--recipe", "acnet", "-o", "y.pt"), ("candidates", path, *size)]
    return [("convert", path, *convert), ("candidates", path), ("show", path), ("fuse", path, "-o", "y.pt")]


# ---- mutations of bytes


def cut(data: bytes, rng: random.Random) -> bytes:
    """Only the beginning."""
    return data[: rng.randrange(len(data))]


def flip_bits(data: bytes, rng: random.Random) -> bytes:
    """One to eight bits turned, half of the time near the beginning or the end, where most of what is not data is."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 8)):
        place = rng.randrange(len(data)) if rng.random() < 0.5 else rng.choice([1, -1]) * rng.randrange(_near(data))
        changed[place] ^= 1 << rng.randrange(8)
    return bytes(changed)


def overwrite(data: bytes, rng: random.Random) -> bytes:
    """A stretch of zeros, ones or noise."""
    start, length = rng.randrange(len(data)), rng.randint(1, 64)
    fill = rng.choice([b"\0" * length, b"\xff" * length, rng.randbytes(length)])
    return data[:start] + fill + data[start + length :]


def move(data: bytes, rng: random.Random) -> bytes:
    """A stretch left out, doubled, or put elsewhere."""
    start, length, to = rng.randrange(len(data)), rng.randint(1, 256), rng.randrange(len(data))
    part, rest = data[start : start + length], data[:start] + data[start + length :]
    return rng.choice([rest, data[:start] + part + data[start:], rest[:to] + part + rest[to:]])


_EXTREMES = (0, 1, 2**7, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**64 - 1)


def wrong_length(data: bytes, rng: random.Random) -> bytes:
    """A number of two, four or eight bytes set to an extreme one, where lengths are: near the beginning or the end."""
    form, bits = rng.choice([("<H", 16), ("<I", 32), ("<Q", 64)])
    number = rng.choice(_EXTREMES) % 2**bits
    place = rng.choice([0, rng.randrange(_near(data)), len(data) - 1 - rng.randrange(_near(data))])
    changed = bytearray(data)
    changed[place : place + bits // 8] = struct.pack(form, number)
    return bytes(changed)


def _near(data: bytes) -> int:
    return min(len(data), 2048)


BYTES: tuple[Callable[[bytes, random.Random], bytes], ...] = (cut, flip_bits, overwrite, move, wrong_length)


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """One mutation of bytes, sometimes two."""
    for _ in range(rng.choice([1, 1, 2])):
        data = rng.choice(BYTES)(data, rng) if data else data
    return data


# ---- mutations of archives


def mutate_zip(data: bytes, rng: random.Random) -> bytes:
    """An archive sound as such, with other entries: swapped, renamed, doubled, left out, compressed, changed inside."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = [(info.filename, archive.read(info)) for info in archive.infolist()]
    pickles = [n for n, (name, _) in enumerate(entries) if name.endswith(".pkl")]
    one, other = rng.randrange(len(entries)), rng.randrange(len(entries))
    name, content = entries[one]
    compression = zipfile.ZIP_STORED
    what = rng.randrange(9)
    if what == 0:
        entries[one], entries[other] = (name, entries[other][1]), (entries[other][0], content)
    elif what == 1:
        entries[one] = (rng.choice([name.upper(), f"../{name}", f"/{name}", f"{name}x", entries[other][0]]), content)
    elif what == 2:
        entries.insert(other, (name, mutate_bytes(content, rng)))
    elif what == 3:
        del entries[one]
    elif what == 4:
        compression = zipfile.ZIP_DEFLATED
        entries[one] = (name, content + bytes(rng.choice([1, 2**12, 2**27])))
    elif what == 5:
        entries[one] = (name, mutate_bytes(content, rng))
    else:
        number = rng.choice(pickles or [one])
        change = mutate_bytes if what == 6 else mutate_pickle
        entries[number] = (entries[number][0], change(entries[number][1], rng))
    return _zipped(entries, compression)


def _zipped(entries: Sequence[tuple[str, bytes]], compression: int = zipfile.ZIP_STORED) -> bytes:
    import warnings

    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive, warnings.catch_warnings():
        # Two entries of one name are meant.
        warnings.simplefilter("ignore")
        for name, content in entries:
            archive.writestr(name, content)
    return buffer.getvalue()


def lie_in_zip(data: bytes, rng: random.Random) -> bytes:
    """A wrong size, checksum, offset, flag or method in one record of an archive's list of entries, or before it."""
    changed = bytearray(rng.choice([b"", b"", b"#!/bin/sh\n", data[:100]]) + data)
    records = [match.start() for match in re.finditer(rb"PK\x01\x02|PK\x03\x04|PK\x05\x06", changed)]
    place = rng.choice(records) + rng.choice([4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30, 42])
    form, bits = rng.choice([("<H", 16), ("<I", 32)])
    number = struct.pack(form, rng.choice([*_EXTREMES, rng.randrange(2**bits)]) % 2**bits)
    changed[place : place + len(number)] = number
    return bytes(changed)


# ---- mutations of pickles

_NAMES = (
    "posix system", "os system", "builtins exec", "builtins eval", "builtins getattr", "subprocess Popen",
    "sprung_module run", "torch load", "torch.hub load", "torch.fx.graph_module reduce_graph_module",
    "functools partial", "collections OrderedDict", "argparse Namespace", "pathlib PosixPath", "builtins bytearray",
    "_codecs encode", "torch Tensor", "torch FloatStorage", "torch.storage UntypedStorage",
    "torch.nn.parameter Parameter", "torch.nn.modules.conv Conv2d", "torch.nn.modules.linear Linear",
    "torch.nn.modules.container Sequential", "torch._tensor _rebuild_from_type_v2", "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_tensor_v3", "torch._utils _rebuild_parameter", "torch._utils _rebuild_wrapper_subclass",
    "torch._utils _rebuild_nested_tensor", "torch._utils _rebuild_sparse_tensor", "torch._utils _rebuild_qtensor",
    "numpy ndarray", "numpy dtype", "numpy._core.multiarray _reconstruct", "numpy._core.multiarray scalar",
)  # fmt: skip
_WORDS = (
    "forward", "_forward_hooks", "_modules", "__class__", "__deepcopy__", "_metadata", "x\x1b[2J", '0"); x("', "", "..",
)  # fmt: skip
_SNIPPETS = (
    b"R", b"\x81", b"b", b"(", b"t", b"]", b"}", b")", b"N", b"s", b"u", b"a", b"e", b"Q", b"0", b"2", b"\x93",
    b"\x85" * 400, b"\x85" * 40_000, b"h\x00", b"q\x00", b"r\xff\xff\xff\x7f", b"}q\xff}h\xffs", b"K\x05R",
)  # fmt: skip


def mutate_pickle(data: bytes, rng: random.Random) -> bytes:
    """Operations changed, left out, doubled, swapped or put in between; other names, numbers and words in them."""
    try:
        marks = [place for _, _, place in pickletools.genops(data)]
    except Exception:
        return mutate_bytes(data, rng)
    ends = [*marks[1:], marks[-1] + 1]
    rest = data[ends[-1] :]
    parts = [data[start:end] for start, end in zip(marks, ends, strict=True)]
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        if parts:
            _change_operation(parts, rng)
    return b"".join(parts) + rest


def _change_operation(parts: list[bytes], rng: random.Random) -> None:
    at, what = rng.randrange(len(parts)), rng.randrange(6)
    numbers = [n for n, part in enumerate(parts) if part[:1] in (b"K", b"M", b"J", b"\x8a")]
    names = [n for n, part in enumerate(parts) if part[:1] == b"c"]
    words = [n for n, part in enumerate(parts) if part[:1] == b"X"]
    if what == 0 and numbers:
        parts[rng.choice(numbers)] = _number(rng.choice([*_EXTREMES, -1, 3]))
    elif what == 1 and names:
        parts[rng.choice(names)] = b"c" + rng.choice(_NAMES).replace(" ", "\n").encode() + b"\n"
    elif what == 2 and words:
        text = rng.choice(_WORDS).encode() if rng.random() < 0.5 else parts[rng.choice(words)][5:]
        parts[rng.choice(words)] = b"X" + struct.pack("<I", len(text)) + text
    elif what == 3:
        parts.insert(at, rng.choice(_SNIPPETS))
    elif what == 4:
        parts.insert(at, parts[rng.randrange(len(parts))])
    else:
        del parts[at]


def _number(value: int) -> bytes:
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


# ---- mutations of JSON and TOML

_VALUES: tuple[Any, ...] = (
    None, True, 0, -1, 1.5, 1e308, 2**31, 10**9, 10**18, 10**400, float("nan"), float("inf"), "", "x", "3x3",
    "\x1b[2J", "é" * 200, "*a" * 200, "../../etc/passwd", [], {}, [[]], [0, 0], [1e9, 1e9], {"min": 10**9},
    {"kind": "separable", "rank": 10**9},
)  # fmt: skip


def mutate_value(value: Any, rng: random.Random) -> Any:
    """Nested lists and dicts with one part replaced, left out, doubled, renamed or nested deeply."""
    places = list(_places(value))
    owner, key = rng.choice(places) if places else ([value], 0)
    what = rng.randrange(6)
    if what == 0 and isinstance(owner, dict):
        owner[rng.choice(["", "x", "kind", "site", "rank", "format", *owner])] = owner.pop(key)
    elif what == 1:
        del owner[key]
    elif what == 2:
        owner[key] = [owner[key], owner[key]]
    elif what == 3:
        for _ in range(rng.choice([3, 300])):
            owner[key] = [owner[key]] if rng.random() < 0.5 else {"x": owner[key]}
    else:
        owner[key] = rng.choice(_VALUES)
    return value


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    keys: list[Any] = (
        list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    )
    for key in keys:
        yield value, key
        yield from _places(value[key])


def mutate_json(data: bytes, rng: random.Random) -> bytes:
    """JSON text with another value in it."""
    value = json.loads(data)
    for _ in range(rng.choice([1, 1, 3])):
        value = mutate_value(value, rng)
    return json.dumps(value).encode()


def mutate_text(data: bytes, rng: random.Random) -> bytes:
    """Words of a text left out, doubled, swapped, or replaced by other values."""
    words = re.findall(r"\w+|\s+|.", data.decode(errors="replace"))
    for _ in range(rng.choice([1, 1, 2, 5])):
        at, other, what = rng.randrange(len(words)), rng.randrange(len(words)), rng.randrange(5)
        if what == 0 and len(words) > 1:
            del words[at]
        elif what == 1:
            words.insert(at, words[other])
        elif what == 2:
            words[at], words[other] = words[other], words[at]
        elif what == 3:
            words[at] = json.dumps(rng.choice(_VALUES))
        else:
            words[at] = rng.choice(["[" * 2000, "'" * 3, '"""', "= ", "[[rules]]", "9" * 5000, "a." * 500, "\0", "#"])
    return "".join(words).encode(errors="replace")


def mutate_safetensors(data: bytes, rng: random.Random) -> bytes:
    """The header with another value in it, its length said rightly or not."""
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    told = header.get("__metadata__", {})
    if "asymswap" in told and rng.random() < 0.6:
        told["asymswap"] = json.dumps(mutate_value(json.loads(told["asymswap"]), rng))
    else:
        header = mutate_value(header, rng)
    text = json.dumps(header).encode()
    said = len(text) + (rng.choice([-1, 1, 8, 10**6, 2**40]) if rng.random() < 0.2 else 0)
    return said.to_bytes(8, "little") + text + body


def mutate_header(data: bytes, rng: random.Random) -> bytes:
    """An asymswap .pt file whose header has another value in it."""
    import torch

    stored = torch.load(io.BytesIO(data), weights_only=True)
    header = json.loads(stored["asymswap"])
    if header.get("skeleton") and rng.random() < 0.5:
        header["skeleton"] = _repacked(header["skeleton"], rng)
    else:
        header = mutate_value(header, rng)
    return _saved({**stored, "asymswap": json.dumps(header)})


def _repacked(text: str, rng: random.Random) -> str:
    import base64
    import zlib

    structure = mutate_zip(zlib.decompress(base64.b64decode(text)), rng)
    return base64.b64encode(zlib.compress(structure)).decode()


def mutations(kind: str, data: bytes) -> list[Callable[[bytes, random.Random], bytes]]:
    """What may be done to a file of a kind."""
    found = [mutate_bytes]
    if data.startswith(b"PK"):
        found += [mutate_zip, mutate_zip, lie_in_zip]
    if kind == "old torch.save":
        found += [_mutate_old]
    if kind.startswith("asymswap .pt"):
        found += [mutate_header, mutate_header]
    if "safetensors" in kind or kind == "statistics":
        found += [mutate_safetensors, mutate_safetensors]
    if kind in ("plan", "sweep state"):
        found += [mutate_json, mutate_json, mutate_text]
    if kind == "recipe":
        found += [mutate_text, mutate_text]
    return found


def _mutate_old(data: bytes, rng: random.Random) -> bytes:
    """One of the five pickles at the beginning of a file of torch.save's old form, mostly the one with the object."""
    stream, ends = io.BytesIO(data), [0]
    for _ in range(5):
        for _op in pickletools.genops(stream):
            pass
        ends.append(stream.tell())
    number = rng.choice([3, 3, 3, 1, 2, 4])
    start, end = ends[number : number + 2]
    return data[:start] + mutate_pickle(data[start:end], rng) + data[end:]


def mutated(files: Mapping[str, bytes], kind: str, count: int, seed: int) -> Iterator[Case]:
    """So many mutations of the sound file of one kind, the same for a seed."""
    rng = random.Random(f"{kind}/{seed}")
    for _ in range(count):
        change = rng.choice(mutations(kind, files[kind]))
        arguments = rng.choice(commands(kind))
        yield case_of(files, kind, change.__name__.strip("_"), arguments, change(files[kind], rng))


def case_of(files: Mapping[str, bytes], kind: str, name: str, arguments: tuple[str, ...], content: bytes) -> Case:
    """A case with a file of a kind, and with what else the command reads."""
    if kind == "training state":
        beside = {"c.pt": files["asymswap .pt"]}
        return Case(kind, name, arguments, {**beside, path_of(kind): content}, may_leave=("run/*",))
    return Case(kind, name, arguments, {path_of(kind): content})


# ---- traps


def traps() -> Iterator[Case]:
    """Pickles that would run code, in every kind of file that holds a pickle, and claims that are too large."""
    for number, (name, content) in enumerate(_trap_pickles()):
        # Storages of the old form may be parts of others.
        old = _in_old(content.replace(b"tQ", b"NtQ"))
        forms = {"zip": _in_zip(content), "old form": old, "plain": content, "structure": _in_header(content)}
        for form, data in forms.items():
            files = {"x.pt": data, "sprung_module.py": b"open('sprung', 'w').close()\ndef run(*_): pass\n"}
            arguments = commands("state_dict" if number % 2 else "pickled module")
            for command in (arguments[0], ("show", "x.pt")):
                yield Case("traps", f"{name}, {form}", command, files)


def _trap_pickles() -> Iterator[tuple[str, bytes]]:
    touch = b"X\x0c\x00\x00\x00touch sprung"
    code = _text("open('sprung', 'w').close()")
    calls = {
        "os.system": b"cposix\nsystem\n" + touch,
        "os.system by its other name": b"cos\nsystem\n" + touch,
        "builtins.exec": b"cbuiltins\nexec\n" + code,
        "builtins.eval": b"cbuiltins\neval\n" + code,
        "__builtin__.eval": b"c__builtin__\neval\n" + code,
        "subprocess": b"csubprocess\ngetoutput\n" + touch,
        "an import": b"csprung_module\nrun\n" + touch,
        "runpy": b"crunpy\nrun_path\n" + _text("sprung_module.py"),
        "a GraphModule": b"ctorch.fx.graph_module\nreduce_graph_module\n" + code,
        "torch.load": b"ctorch.serialization\nload\n" + _text("x.pt"),
        "torch.hub": b"ctorch.hub\nload\n" + _text("."),
        "timeit": b"ctimeit\ntimeit\n" + code,
        "numpy's loader": b"cnumpy.testing._private.utils\nrunstring\n" + code,
        "a partial": b"cfunctools\npartial\ncposix\nsystem\n",
        "getattr": b"cbuiltins\ngetattr\n" + code,
    }
    for name, call in calls.items():
        yield name, b"\x80\x02}" + _text("x") + call + b"\x85Rs."
        yield f"{name} in a state dict", b"\x80\x02}" + _text("conv1.weight") + call + b"\x85Rs."
    yield "an INST", b"\x80\x02(X\x0c\x00\x00\x00touch sprungiposix\nsystem\n."
    yield "protocol 4", b"\x80\x04\x8c\x05posix\x8c\x06system\x93" + touch + b"\x85R."
    yield "an OBJ", b"\x80\x02(cposix\nsystem\n" + touch + b"o."
    nested = {
        "tuples in tuples": b")" + b"\x85" * 200_000 + b"Ns",
        "lists in lists": _text("model") + b"](" * 50_000 + b"e" * 50_000 + b"s",
        "itself": _text("model") + b"h\x00s",
    }
    for name, items in nested.items():
        yield name, b"\x80\x02}q\x00" + items + b"."
        # A class of the user's own, whose weights are read all the same.
        yield f"{name}, beside a class", b"\x80\x02}q\x00" + _text("x") + b"cuser.net\nNet\n)\x81s" + items + b"."
    laughs = b"".join(b"]q" + bytes([n + 1]) + b"(" + (b"h" + bytes([n])) * 9 + b"e" for n in range(60))
    yield "a billion laughs", b"\x80\x02]q\x00" + laughs + b"."
    nest = b"".join(
        b"}q"
        + bytes([n + 1])
        + b"("
        + b"".join(_text(key) + b"h" + bytes([n]) for key in ("model", "net", "ema"))
        + b"u"
        for n in range(60)
    )
    yield "nests in nests", b"\x80\x02}q\x00" + nest + b"."
    yield "nests in nests, beside a class", b"\x80\x02}q\x00" + nest + _text("x") + b"cuser.net\nNet\n)\x81s."
    yield (
        "a name that is code",
        _module_named('0"), getattr(__import__("os"), "system")("touch sprung"), getattr(self, "0'),
    )
    yield "a name for the terminal", _module_named("\x1b[2J")
    yield "a layer of a terabyte", b"\x80\x02ctorch.nn.modules.linear\nLinear\n" + _number(10**6) * 2 + b"\x86R."
    yield "bytes without end", b"\x80\x02cbuiltins\nbytearray\n" + _number(10**12) + b"\x85R."
    yield "an array of addresses", pickle.dumps({"x": _Addresses()}, protocol=2)
    for name, count, offset, size, stride in _CLAIMS:
        pid = b"(" + _text("storage") + b"ctorch\nFloatStorage\n" + _text("0") + _text("cpu") + _number(count) + b"tQ"
        shape = [b"(" + b"".join(map(_number, numbers)) + b"t" for numbers in (size, stride)]
        tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + pid + _number(offset) + b"".join(shape)
        tensor += b"\x89ccollections\nOrderedDict\n)RtR"
        yield name, b"\x80\x02}" + _text("conv1.weight") + tensor + b"s."


_CLAIMS = (
    ("a storage of terabytes", 2**40, 0, (2**40,), (1,)),
    ("a storage beyond its bytes", 2**20, 0, (2**20,), (1,)),
    ("a tensor beyond its storage", 4, 0, (2**34,), (1,)),
    ("a stride beyond its storage", 4, 0, (2, 2), (2**40, 1)),
    ("an offset beyond its storage", 4, 2**40, (1,), (1,)),
    ("a number as large as the world", 4, 0, (10**6, 10**6, 10**6), (0, 0, 0)),
    ("sizes below zero", 4, 0, (-1,), (1,)),
    ("strides below zero", 4, 3, (4,), (-1,)),
    ("a storage below zero", -4, 0, (4,), (1,)),
)


class _Addresses:
    """Pickled, a numpy array whose dtype says of eight bytes that they are the address of an object."""

    def __reduce__(self) -> Any:
        import numpy as np

        rebuild = np.zeros(0).__reduce__()[0]
        return rebuild, (np.ndarray, (0,), b"b"), (1, (1,), _LyingDType(), False, b"A" * 8)


class _LyingDType:
    def __reduce__(self) -> Any:
        import numpy as np

        return np.dtype, ("V8", False, True), (3, "|", None, ("a",), {"a": (np.dtype("O"), 0)}, 8, 1, 0)


def _text(text: str) -> bytes:
    raw = text.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def _module_named(name: str) -> bytes:
    """A Sequential of one ReLU by this name."""
    relu = b"ctorch.nn.modules.activation\nReLU\n)\x81}(" + _text("training") + b"\x89" + _text("inplace") + b"\x89ub"
    modules = b"}" + _text(name) + relu + b"s"
    return b"\x80\x02ctorch.nn.modules.container\nSequential\n)\x81}(" + _text("_modules") + modules + b"ub."


def _in_zip(content: bytes) -> bytes:
    entries = [("x/data.pkl", content), ("x/byteorder", b"little"), ("x/data/0", bytes(16)), ("x/version", b"3\n")]
    return _zipped(entries)


def _in_old(content: bytes) -> bytes:
    magic = bytes.fromhex("80028a0a6cfc9c46f9206aa850192e") + b"\x80\x02M\xe9\x03." + b"\x80\x02}."
    keys = b"\x80\x02](" + _text("0") + b"e."
    return magic + content + keys + (4).to_bytes(8, "little") + bytes(16)


def _in_header(content: bytes) -> bytes:
    """An asymswap checkpoint whose stored structure is this pickle."""
    import base64
    import zlib

    preprocessing = {"channels": 3, "size": [8, 8], "mean": [0.0] * 3, "std": [1.0] * 3}
    header = {"format": 1, "origin": {"reference": "skeleton:x"}, "plans": [], "preprocessing": preprocessing}
    header |= {"provenance": {}, "skeleton": base64.b64encode(zlib.compress(_in_zip(content))).decode()}
    return _saved({"asymswap": json.dumps(header), "state_dict": {}})


# ---- made up by hypothesis


_KEYS = (
    "rules", "match", "swap", "keep", "budget", "kind", "names", "kernel", "min", "max", "macs", "over", "rank",
    "swaps", "site", "settings", "keeps", "origin", "reference", "format", "plans", "preprocessing", "provenance",
    "size",
)  # fmt: skip


def made_up(count: int, seed: int) -> list[Case]:
    """Recipes, plans, headers and globs out of hypothesis' strategies, the same for a seed."""
    import hypothesis
    from hypothesis import strategies as st

    from asymswap import replacements

    words = st.sampled_from(_KEYS)
    text = st.one_of(words, st.sampled_from(replacements.names()), st.text(max_size=8), st.text("*a?[]!-", max_size=60))
    number = st.one_of(st.integers(), st.integers(-2, 70), st.floats(allow_nan=False, allow_infinity=False))
    leaf = st.one_of(st.none(), st.booleans(), number, text)
    value = st.recursive(
        leaf,
        lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(words, inner, max_size=4)),
        max_leaves=12,
    )
    names = st.lists(st.text("*?[]!-abc.0", max_size=200), max_size=3)
    match = st.fixed_dictionaries(
        {}, optional={"names": names, "exclude": names, "kernel": value, "in_channels": value}
    )
    swap = st.fixed_dictionaries(
        {"kind": st.sampled_from(replacements.names())}, optional={"rank": number, "ratio": number, "limit": number}
    )
    rule = st.fixed_dictionaries({"swap": swap}, optional={"match": match, "keep": value})
    budget = st.fixed_dictionaries({}, optional={"macs": number, "params": number, "max_drop": number, "over": text})
    recipe = st.fixed_dictionaries({"rules": st.lists(rule, min_size=1, max_size=3)}, optional={"budget": budget})
    sites = st.sampled_from(["conv1", "layer1.0.conv1", "layer2.0.conv2", "fc", ""])
    entry = st.fixed_dictionaries(
        {"site": sites, "kind": st.sampled_from(replacements.names()), "settings": st.one_of(swap, value)}
    )
    plan = st.fixed_dictionaries(
        {"swaps": st.lists(entry, max_size=3)}, optional={"keeps": value, "multiplier": number}
    )
    made: list[Case] = []

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=count,
        phases=[hypothesis.Phase.generate],
        database=None,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(
        st.one_of(
            recipe.map(lambda v: ("r", v)),
            plan.map(lambda v: ("p", v)),
            value.map(lambda v: ("r", v)),
            value.map(lambda v: ("p", v)),
        )
    )
    def collect(drawn: tuple[str, Any]) -> None:
        form, data = drawn
        kind = "recipe" if form == "r" else "plan"
        content = to_toml(data) if form == "r" else json.dumps(data)
        path = "x" + _SUFFIX[kind]
        command = commands(kind)[len(made) % len(commands(kind))]
        made.append(Case("made up by hypothesis", kind, command, {path: content.encode(errors="replace")}))

    collect()
    return made[:count]


def to_toml(value: Any) -> str:
    """A value as TOML text; what TOML cannot say comes out as something that is no TOML."""
    if isinstance(value, dict):
        return "".join(f"{json.dumps(key)} = {_inline(item)}\n" for key, item in value.items())
    return f"rules = {_inline(value)}\n"


def _inline(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{json.dumps(key)} = {_inline(item)}" for key, item in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(_inline, value)) + "]"
    return json.dumps(value)


# ---- running cases


class Workers:
    """Processes that run one case after another; each is replaced when it dies, and killed after twice `patience`."""

    def __init__(self, count: int = 1, patience: float = HANG_SECONDS) -> None:
        self._workers = [_Worker(2 * patience) for _ in range(count)]

    def run(self, cases: Sequence[Case]) -> Iterator[tuple[Case, Ending]]:
        """How each case ended, in whatever order they do."""
        waiting = iter(cases)
        busy: dict[_Worker, Case] = {}
        idle = list(self._workers)
        while True:
            while idle and (case := next(waiting, None)) is not None:
                worker = idle.pop()
                worker.start(case)
                busy[worker] = case
            if not busy:
                return
            for worker in list(busy):
                ending = worker.ending(0.02)
                if ending is not None:
                    yield busy.pop(worker), ending
                    idle.append(worker)

    def close(self) -> None:
        """End all processes."""
        for worker in self._workers:
            worker.close()

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Worker:
    def __init__(self, most_seconds: float) -> None:
        self._most_seconds = most_seconds
        self._process: Any = None
        self._pipe: Any = None
        self._home = ""
        self._started = self._busy = 0.0

    def start(self, case: Case) -> None:
        if self._process is None:
            context = multiprocessing.get_context("spawn")
            self._pipe, theirs = context.Pipe()
            self._home = tempfile.mkdtemp(prefix="asymswap-fuzz-")
            self._process = context.Process(target=_serve, args=(theirs, Path(self._home)), daemon=True)
            self._process.start()
            theirs.close()
            # Loading torch is no part of the first case.
            self._pipe.recv()
        self._started, self._busy = time.monotonic(), _cpu_seconds(self._process.pid)
        self._pipe.send(case)

    def ending(self, wait: float) -> Ending | None:
        try:
            if self._pipe.poll(wait):
                ending: Ending = self._pipe.recv()
                return ending
        except (EOFError, OSError):
            self.close()
            return Ending(None, err="the worker died")
        busy, waited = _cpu_seconds(self._process.pid) - self._busy, time.monotonic() - self._started
        if busy < self._most_seconds and waited < _KILLED_AFTER:
            return None
        self.close()
        return Ending(None, err="the worker was killed", seconds=max(busy, waited))

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._pipe.close()
            shutil.rmtree(self._home, ignore_errors=True)
        self._process = None


def _cpu_seconds(pid: int) -> float:
    """Processor time that a process has taken, as Linux tells it; 0 once it has died."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _serve(pipe: Connection, home: Path) -> None:
    """Run cases in a folder, for as long as there are some."""
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.dont_write_bytecode = True
    import torch

    from asymswap.cli import main

    torch.set_num_threads(1)
    main.main  # noqa: B018 - imported for its cost
    os.chdir(home)
    # Where a file of the case could be imported from, if anything in it were looked up.
    sys.path.insert(0, str(home))
    _run(Case("", "", ("candidates", "digits-resnet"), {}), home, [])
    limit = _status("VmSize") * 2**20 + _ADDRESS_SPACE
    resource.setrlimit(resource.RLIMIT_AS, (int(limit), int(limit)))
    deeds: list[str] = []
    watching = [True]
    sys.addaudithook(lambda event, args: _watch(event, args, home, deeds) if watching[0] else None)
    try:
        pipe.send("ready")
        while True:
            case = pipe.recv()
            pipe.send(_run(case, home, deeds))
    except EOFError:
        watching[0] = False


_FORBIDDEN = (
    "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "pty.spawn", "subprocess.Popen",
    "socket.connect", "socket.getaddrinfo", "socket.bind", "urllib.Request",
)  # fmt: skip


def _watch(event: str, args: tuple[Any, ...], home: Path, deeds: list[str]) -> None:
    """Note what nothing that asymswap does with a file needs: other programs, the network, files elsewhere."""
    if event in _FORBIDDEN:
        deeds.append(f"{event} {args!r}"[:200])
    elif event == "import" and args[0] == "sprung_module":
        deeds.append("import of a module that the file names")
    elif (
        event == "open"
        and isinstance(args[0], str)
        and isinstance(args[2], int)
        and args[2] & (os.O_WRONLY | os.O_RDWR)
    ):
        path = Path(args[0])
        if path.is_absolute() and home not in path.parents and path.parts[1] not in ("dev", "proc"):
            deeds.append(f"opened {path} for writing")


def _run(case: Case, home: Path, deeds: list[str]) -> Ending:
    from asymswap.cli.main import main

    for path in home.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for name, content in case.files.items():
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_bytes(content)
    came = {*case.files, *(str(parent) for name in case.files for parent in Path(name).parents)}
    sys.modules.pop("sprung_module", None)
    deeds.clear()
    _forget_peak()
    before, start = _status("VmRSS"), time.process_time()
    out, err = io.StringIO(), io.StringIO()
    sys.argv = ["asymswap", *case.arguments]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 0
        except BaseException:
            code = 1
            err.write(traceback.format_exc())
    seconds, peak = time.process_time() - start, _status("VmHWM")
    left = tuple(sorted({str(path.relative_to(home)) for path in home.rglob("*")} - came))
    return Ending(code, out.getvalue()[-4000:], err.getvalue()[-4000:], left, tuple(deeds), seconds, peak - before)


def _status(field_name: str) -> float:
    """A number of megabytes that Linux tells of this process."""
    text = Path("/proc/self/status").read_text()
    match = re.search(rf"{field_name}:\s+(\d+) kB", text)
    return int(match[1]) / 1024 if match else 0.0


def _forget_peak() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
