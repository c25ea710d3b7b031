"""A model file of any form, read: tensors and plain data, before anything is made of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors

from asymswap.errors import SourceError
from asymswap.fileformats.archives import read_exported, read_torchscript
from asymswap.fileformats.detect import FileKind, sniff
from asymswap.fileformats.shards import read_shards
from asymswap.fileformats.torch_files import load, load_object, refusal


@dataclass(frozen=True)
class RawFile:
    """What a model file holds, before anything is made of it.

    `metadata` is that of a safetensors file; `notes` say what of the file was left unread; `refusal` is why modules in
    it could not be loaded, where they are there as records alone (see `fileformats.pickle_objects`). `executed`:
    something was unpickled without restriction, so that code in it was run.
    """

    value: Any
    metadata: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    refusal: SourceError | None = None
    executed: bool = False


def read_raw(path: Path, trust_pickle: bool) -> RawFile:
    """Read a model file; raises SourceError where it is none, is damaged, or would have to run code to be read."""
    kind = sniff(path)
    if kind is FileKind.SAFETENSORS:
        try:
            # Not mapped into memory: a file that is cut off while it is mapped ends the process by a signal.
            with safetensors.safe_open(path, framework="pt", backend="pread") as file:
                metadata = file.metadata() or {}
                return RawFile({key: file.get_tensor(key) for key in file.keys()}, metadata)  # noqa: SIM118
        except (safetensors.SafetensorError, OSError, ValueError) as error:
            raise SourceError(f"{path} is cut off or damaged: {error}") from None
    if kind is FileKind.TORCHSCRIPT:
        note = "weights taken out of a TorchScript archive, whose code was not executed"
        return RawFile(read_torchscript(path), notes=(note,))
    if kind is FileKind.EXPORTED:
        # Whether pickles are trusted or not, those in an archive are read in the restricted way.
        instead = "save the program's state_dict and give it with --arch"
        state = read_exported(path, lambda file, label: load_object(file, FileKind.TORCH, False, label, instead))
        return RawFile(state, notes=("weights taken out of a torch.export archive, whose graph was not read",))
    if kind is FileKind.SHARDS:
        parts: list[RawFile] = []

        def read_shard(shard: Path) -> Any:
            if sniff(shard) is FileKind.SHARDS:
                raise SourceError(f"{shard} is an index of shards that an index names; give that one")
            parts.append(read_raw(shard, trust_pickle))
            return parts[-1].value

        return RawFile(read_shards(path, read_shard), executed=any(part.executed for part in parts))
    loaded = load(path, kind, trust_pickle, str(path))
    if not loaded.unread:
        return RawFile(loaded.value, executed=loaded.executed)
    more = f" and {len(loaded.unread) - 3} more" if len(loaded.unread) > 3 else ""
    note = f"left unread, being outside of the allowlist: {', '.join(loaded.unread[:3])}{more}"
    return RawFile(loaded.value, notes=(note,), refusal=refusal(loaded.unread, str(path)))
