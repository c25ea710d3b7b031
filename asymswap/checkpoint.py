"""The asymswap checkpoint: a converted model in one file that loads again without executing anything in it.

A `.pt` file is what torch.save makes of {"asymswap": header, "state_dict": …}; a `.safetensors` file has the header
in its metadata. The header is JSON text:

    format         1, or 2 with extra state; a reader refuses a higher number
    origin         how the unconverted model is built: a model reference and its arguments
    skeleton       its structure (zlib, base64), where no reference can build it; see fileformats.torch_files
    plans          every conversion that the model went through, in order, fully settled; none once all is fused
    preprocessing  how an image becomes its input
    aliases        keys of the state dict that are the same tensor as another key (safetensors only)
    extra_state    what modules keep beside tensors, as JSON text; its tensors are in the state dict
    provenance     source file and its SHA-256, recipe text, versions, report

Loading builds the unconverted model, carries out the plans without initialising anything, and loads the state dict
strictly: all tried on the meta device first, so that no memory is taken for sizes that the state dict does not have.
"""

import base64
import json
import math
import zlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from asymswap.errors import CONTROL, CheckpointError, OutputError, PlanError, validation_text
from asymswap.fileformats import detect, extra_state
from asymswap.fileformats.model_file import modules_in, read_raw, states_of_modules
from asymswap.fileformats.state_dict import State, stored_tensors
from asymswap.fileformats.torch_files import RawFile
from asymswap.planning.plan import plan_from_json
from asymswap.types import Origin, Plan, Preprocessing, Strict
from asymswap.utils.files import real_cause, whole_file

FORMAT = 2
SUFFIXES = (".pt", ".pth", ".safetensors")
MODULE_HEADER = "asymswap"
"""The attribute of a module in another program's file that holds the header, where that program kept the swaps."""
_LARGEST_HEADER, _LARGEST_SKELETON = 16 * 2**20, 64 * 2**20
_LARGEST_INPUT = 2**27  # numbers: 11,000 x 4,000 pixels of three channels, half a gigabyte


@dataclass(frozen=True)
class Header:
    """Everything in a checkpoint except its tensors."""

    origin: Origin
    plans: tuple[Plan, ...]
    preprocessing: Preprocessing
    provenance: Mapping[str, Any] = field(default_factory=dict)
    skeleton: bytes | None = None


@dataclass(frozen=True)
class Stored:
    """A checkpoint as it was read."""

    header: Header
    state: State
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _FileHeader(Strict):
    """The header as written in the file; plans have a check of their own."""

    format: Literal[1, 2]
    origin: Origin
    plans: Annotated[list[dict[str, Any]], Field(max_length=100)]
    preprocessing: Preprocessing
    provenance: dict[str, Any]
    skeleton: str | None = None
    aliases: dict[str, str] = field(default_factory=dict)
    extra_state: str = ""


def check_suffix(path: Path) -> None:
    """Raise OutputError unless the file name ends as a checkpoint does."""
    if path.suffix not in SUFFIXES:
        raise OutputError(f"{path.name} must end in {', '.join(SUFFIXES)}: the ending chooses the form")


def write_checkpoint(path: Path, model: nn.Module, header: Header, check: Callable[[Stored], None]) -> None:
    """Write a converted model in the form of the suffix, or raise OutputError; `check` gets what a reader would get."""
    check_suffix(path)
    tensors, extra = what_is_stored(model)
    extra_text, inside = extra_state.to_text(extra)
    packed = None if header.skeleton is None else base64.b64encode(zlib.compress(header.skeleton, 9)).decode()
    data = header_to_json(header) | {"skeleton": packed, "aliases": {}}
    if extra:
        # Earlier versions know by the number of the format that they cannot read this, and read all else.
        data |= {"format": FORMAT, "extra_state": extra_text}
    stored = stored_in(RawFile({"asymswap": json.dumps(data), "state_dict": tensors | inside}), str(path))
    assert stored is not None
    check(stored)
    _write(path, tensors | inside, data)


def what_is_stored(model: nn.Module) -> tuple[State, dict[str, Any]]:
    """Return the tensors and the extra state that a file of the model holds; raise SourceError if it would not load."""
    extra = extra_state.read(model)
    return stored_tensors(model), extra


def save_state(path: Path, model: nn.Module) -> None:
    """Write a plain state dict, which loads without asymswap; the suffix chooses the form."""
    check_suffix(path)
    tensors, extra = what_is_stored(model)
    if path.suffix == ".safetensors" and not all(isinstance(value, Tensor) for value in extra.values()):
        raise OutputError(f"{path.name} cannot hold the model's extra state ({next(iter(extra))}); write a .pt file")
    _write(path, tensors | extra)


def stored_in(raw: RawFile, label: str) -> Stored | None:
    """Return the asymswap checkpoint in a file that has been read; None if the file is of another kind."""
    text, state = raw.metadata.get("asymswap"), raw.value
    if text is None and isinstance(raw.value, Mapping) and "asymswap" in raw.value:
        text, state = raw.value["asymswap"], raw.value.get("state_dict")
    inside = next((one for one in modules_in(raw.value) if isinstance(one.state.get(MODULE_HEADER), str)), None)
    if text is None and inside is not None:
        text, state = inside.state[MODULE_HEADER], states_of_modules(inside, label)[0]
        # Where a program keeps halves of what it has trained in float32.
        state = {key: tensor.float() if tensor.is_floating_point() else tensor for key, tensor in state.items()}
    if text is None:
        return None
    if not isinstance(text, str) or not isinstance(state, Mapping):
        raise CheckpointError(f"{label} is damaged: its asymswap header or state_dict is not what it should be")
    data = _parse(text, label)
    skeleton, unpacker = None, zlib.decompressobj()
    try:
        plans = tuple(plan_from_json(plan, f"the plan in {label}") for plan in data.plans)
        if data.skeleton is not None:
            skeleton = unpacker.decompress(base64.b64decode(data.skeleton, validate=True), _LARGEST_SKELETON)
    except PlanError as error:
        raise CheckpointError(str(error)) from None
    except (ValueError, zlib.error) as error:
        raise CheckpointError(f"{label} has a damaged structure: {error}") from None
    if unpacker.unconsumed_tail:
        raise CheckpointError(f"{label} stores a structure of over {_LARGEST_SKELETON} bytes, which no model needs")
    tensors = {str(key): tensor for key, tensor in state.items() if isinstance(tensor, Tensor)}
    for alias, key in data.aliases.items():
        if key not in tensors:
            raise CheckpointError(f"{label} is damaged: {alias!r} is an alias of {key!r}, which it lacks")
        tensors[alias] = tensors[key]
    try:
        extra = extra_state.from_text(data.extra_state, tensors) if data.extra_state else {}
    except ValueError as error:
        raise CheckpointError(f"{label} is damaged: {error}") from None
    # Files of format 1 keep extra state that is a tensor among their tensors.
    extra |= {key: tensors.pop(key) for key in list(tensors) if extra_state.is_extra(key)}
    return Stored(Header(data.origin, plans, data.preprocessing, data.provenance, skeleton), tensors, extra)


def read_checkpoint(path: Path) -> Stored:
    """Read an asymswap checkpoint; raise CheckpointError if the file is missing or something else."""
    if not detect.exists(path):
        raise CheckpointError(f"no file {path}; give an asymswap checkpoint, as `asymswap convert` writes them")
    stored = stored_in(read_raw(path, trust_pickle=False), str(path))
    if stored is None:
        raise CheckpointError(f"{path} is not an asymswap checkpoint; `asymswap convert` writes them")
    return stored


def header_to_json(header: Header) -> dict[str, Any]:
    """Return the header as plain data, without the bytes of a stored structure."""
    data = {"format": 1, **asdict(header)}
    del data["skeleton"]
    return data


def _write(path: Path, state: Mapping[str, Any], header: Mapping[str, Any] | None = None) -> None:
    state = {key: value.detach() if isinstance(value, Tensor) else value for key, value in state.items()}
    with whole_file(path) as draft:
        try:
            if path.suffix == ".safetensors":
                # It stores each tensor once; the header says which other keys mean which first key.
                first: dict[Any, str] = {}
                aliases: dict[str, str] = {}
                for key, tensor in state.items():
                    identity = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
                    if (other := first.setdefault(identity if tensor.numel() else key, key)) != key:
                        aliases[key] = other
                unique = {key: tensor.contiguous() for key, tensor in state.items() if key not in aliases}
                # One entry only: safetensors writes several in random order, and equal models would make unequal files.
                text = None if header is None else {"asymswap": json.dumps({**header, "aliases": aliases})}
                save_file(unique, draft, metadata=text)
            else:
                content = state if header is None else {"asymswap": json.dumps(header), "state_dict": state}
                # Given a path, torch.save would write its name into the file: equal models would make unequal files.
                with draft.open("wb") as file:
                    torch.save(content, file)
        except (RuntimeError, ValueError, SafetensorError) as error:
            raise real_cause(error) from error


def _parse(text: str, label: str) -> _FileHeader:
    """Check the header of a file, except for its plans and structure; nothing in it is trusted."""
    try:
        if len(text) > _LARGEST_HEADER:
            raise ValueError(f"{len(text):,} characters, more than any has")
        written = json.loads(text)
        number = written.get("format") if isinstance(written, dict) else None
        if isinstance(number, int) and number > FORMAT:
            raise CheckpointError(f"{label} is of format {number}, newer than {FORMAT}; upgrade asymswap")
        if not _is_printable(written):
            raise ValueError("control characters, which a terminal would obey")
        data = TypeAdapter(_FileHeader).validate_json(text)
        pre = data.preprocessing
        height, width = pre.size
        numbers = pre.channels * pre.frames * height * width
        if min(pre.channels, pre.frames, height, width) < 1 or numbers > _LARGEST_INPUT:
            clip = f" in {pre.frames} frames" if pre.frames != 1 else ""
            raise ValueError(f"preprocessing: no image has {pre.channels} channels of {height}x{width} pixels{clip}")
        if not pre.channels == len(pre.mean) == len(pre.std):
            raise ValueError(f"preprocessing: a mean and a deviation are needed for each of {pre.channels} channels")
        if not all(map(math.isfinite, pre.mean)) or not all(0 < std < math.inf for std in pre.std):
            raise ValueError("preprocessing: means must be numbers, and deviations numbers above 0")
    except (ValueError, RecursionError) as error:
        reason = validation_text(error) if isinstance(error, ValidationError) else error
        raise CheckpointError(f"{label} has a damaged header: {reason}") from None
    return data


def _is_printable(value: Any) -> bool:
    """Return whether no text in plain data would move the cursor or change how a terminal shows what follows."""
    if isinstance(value, dict | list):
        return all(map(_is_printable, [*value, *value.values()] if isinstance(value, dict) else value))
    return not isinstance(value, str) or CONTROL.search(value) is None
