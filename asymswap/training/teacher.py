"""The teacher of a training: by default the original network, found from the checkpoint's provenance."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from asymswap.checkpoint import Header, read_checkpoint
from asymswap.errors import AsymswapError, SourceError
from asymswap.fileformats.detect import sha256
from asymswap.models import builders, timm_models
from asymswap.models.opened import OpenedModel
from asymswap.models.opening import open_model
from asymswap.models.references import FILE_SUFFIXES
from asymswap.results.records import read_history
from asymswap.training.distillation import Teacher
from asymswap.types import Swap

ORIGINAL = "original"
_GIVE = "give the teacher: --distill REF"


def find_teacher(header: Header, reference: str, student: nn.Module, folder: Path | None = None) -> Teacher:
    """Return the teacher that a model reference or `original` names, in eval mode.

    No path in a checkpoint is followed: the file of the original is looked for beside the checkpoint, in `folder`, by
    its name and its SHA-256. Nothing is downloaded for `original` either.

    Raises SourceError where it is not available, or where a file is no longer what it was when it was converted.
    """
    opened = _open_original(header, folder) if reference == ORIGINAL else _open_named(reference)
    swaps = [swap for plan in header.plans for swap in plan.swaps]
    teacher = opened.model.eval().requires_grad_(False)
    return Teacher(teacher, opened.reference, blocks_around(swaps, student, teacher))


def blocks_around(swaps: Iterable[Swap], student: nn.Module, teacher: nn.Module) -> dict[str, str]:
    """Return the innermost blocks that hold swapped layers, each with the teacher's block of the same output.

    A residual block's sum is what the next one gets, while the outputs of single convs are scaled and shifted first. A
    layer that only lists of layers hold counts as its own block; where it has folded the batch norm behind it, its
    output is that of the teacher's batch norm.
    """

    def is_block(model: nn.Module, name: str) -> bool:
        try:
            return not isinstance(model.get_submodule(name), nn.Sequential | nn.ModuleList | nn.ModuleDict)
        except AttributeError:
            return False

    found: dict[str, str] = {}
    for swap in swaps:
        parents = (swap.site.rsplit(".", depth)[0] for depth in range(1, swap.site.count(".") + 1))
        pairs = [*((parent, parent) for parent in parents), (swap.site, swap.absorbs or swap.site)]
        for own, theirs in pairs:
            if is_block(student, own) and is_block(teacher, theirs):
                found[own] = theirs
                break
    return found


_LISTS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def _open_named(reference: str) -> OpenedModel:
    try:
        return open_model(reference)
    except AsymswapError as error:
        raise SourceError(f"the teacher {reference} cannot be used: {error}") from None


def _open_original(header: Header, folder: Path | None) -> OpenedModel:
    reference, options = _recorded(header, folder)
    try:
        with _offline():
            return open_model(reference, **options)
    except AsymswapError as error:
        raise SourceError(f"the original {reference} cannot be fetched ({error}); {_GIVE}") from None


def _recorded(header: Header, folder: Path | None) -> tuple[str, dict[str, Any]]:
    """How the original was opened when it was converted, and so can be opened again."""
    report = read_history(header.provenance, "the checkpoint").report
    reference, weights = report.model.reference, report.model.weights
    if not reference or weights in ("", "as given"):
        raise SourceError(f"the checkpoint does not tell which model it was made of; {_GIVE}")
    origin, arguments = header.origin.reference, dict(header.origin.arguments)
    whole = origin.startswith(("skeleton:", "class:"))
    if not whole and builders.canonical(origin) is None:
        # Code that a file names is not run; what the user names is.
        raise SourceError(f"the original was built by {origin}, which is code of yours; {_GIVE}")
    recorded = None
    if report.model.sha256:
        recorded = (report.files[0].path if report.files else None) or reference
    if whole and (recorded is None or reference != recorded):
        # The class of a module that stood in a file whole: by itself it names nothing to open.
        raise SourceError(f"the checkpoint does not tell which file it was made of; {_GIVE}")
    if recorded is not None:
        path = _same_file(recorded, str(report.model.sha256), folder)
        if reference != recorded:
            return origin, {"weights": str(path), "arguments": arguments}
        return str(path), {} if whole or _is_ours(path) else {"arch": origin, "arguments": arguments}
    if any(mark in weights for mark in "/\\") or Path(weights).suffix in FILE_SUFFIXES:
        raise SourceError(f"the checkpoint names the weights {weights!r}, a path, which is not followed; {_GIVE}")
    if weights == "random":
        raise SourceError(f"the original {reference} had random weights, which are not kept; {_GIVE}")
    return origin, {"weights": weights, "arguments": arguments} if origin.startswith("torchvision:") else {}


def _same_file(recorded: str, expected: str, folder: Path | None) -> Path:
    """Return the file of that name beside the checkpoint; raise SourceError where there is none, or it has changed."""
    name = re.split(r"[/\\]", recorded)[-1]
    path = None if folder is None or name in ("", ".", "..") else folder / name
    if path is None or not path.is_file():
        where = "" if folder is None else f" in {folder}"
        raise SourceError(f"the original {name} is not beside the checkpoint{where}; put it there, or {_GIVE}")
    if sha256(path) != expected:
        raise SourceError(f"{path} is not the file any more that was converted (its SHA-256 differs); {_GIVE}")
    return path


@contextmanager
def _offline() -> Iterator[None]:
    """Do not fetch weights that are not in the cache of torch.hub or of the Hugging Face hub while the block lasts."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError("nothing is downloaded on a checkpoint's word")

    before = torch.hub.download_url_to_file, timm_models.find_hub
    torch.hub.download_url_to_file, timm_models.find_hub = refuse, refuse
    try:
        yield
    finally:
        torch.hub.download_url_to_file, timm_models.find_hub = before


def _is_ours(path: Path) -> bool:
    """Whether a file is an asymswap checkpoint, which tells its architecture itself."""
    try:
        read_checkpoint(path)
    except AsymswapError:
        return False
    return True
