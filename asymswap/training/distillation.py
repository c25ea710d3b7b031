"""The teacher of a distillation, by default the original network, and its blocks that can be compared."""

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from asymswap.checkpoint import Header, read_checkpoint
from asymswap.errors import AsymswapError, SourceError
from asymswap.fileformats.detect import is_file_name, sha256
from asymswap.models import builders, timm_models
from asymswap.models.factories import names_python_file
from asymswap.models.opened import GIVEN, OpenedModel
from asymswap.models.opening import Model, open_model
from asymswap.results.records import read_provenance
from asymswap.types import Swap
from asymswap.utils.tensors import deep_copy

ORIGINAL = "original"
_GIVE = "give the teacher, `distill=…` (in Python also a module, `teacher=…`)"
_LISTS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclass(frozen=True)
class Teacher:
    """A network to learn from; `blocks` maps blocks of the student to the teacher's blocks with the same output."""

    model: nn.Module
    description: str
    blocks: Mapping[str, str]


def given_original(opened: OpenedModel) -> nn.Module | None:
    """Return the original network of a conversion in memory, if it was a module that the user gave."""
    if opened.base is None or opened.file is not None or len(opened.plans) != 1:
        return None  # beside a file the base may have any weights
    made_of = read_provenance(opened.provenance, opened.reference).report.model
    return opened.base if made_of.weights == GIVEN else None


def find_teacher(header: Header, reference: Model, student: nn.Module, folder: Path | None = None) -> Teacher:
    """Return the teacher that a model reference or `original` names, or that is given itself, in eval mode.

    For `original` nothing is downloaded, and no path in a checkpoint is followed: the file is looked for in `folder`,
    beside the checkpoint, by its name and SHA-256. Raises SourceError if it is not available or has changed.
    """
    original = reference == ORIGINAL
    named, options = _recorded(header, folder) if original else (reference, {})
    try:
        with _offline() if original else nullcontext():
            opened = open_model(named, **options)
    except AsymswapError as error:
        what = f"the original {named} cannot be fetched ({error}); {_GIVE}"
        raise SourceError(what if original else f"the teacher {named} cannot be used: {error}") from None
    swaps = [swap for plan in header.plans for swap in plan.swaps]
    # What was given stays the caller's, and may be the network that is trained.
    teacher = (opened.model if isinstance(reference, str) else deep_copy(opened.model)).eval().requires_grad_(False)
    return Teacher(teacher, opened.reference, blocks_around(swaps, student, teacher))


def blocks_around(swaps: Iterable[Swap], student: nn.Module, teacher: nn.Module) -> dict[str, str]:
    """Return the innermost blocks that hold swapped layers, each with the teacher's block of the same output.

    A residual block's sum is the next one's input, while the outputs of single convs are scaled and shifted first. A
    layer that only lists of layers hold is its own block; if it has folded the batch norm behind it, its output is
    compared with the teacher's batch norm.
    """
    blocks, theirs = (
        {name for name, module in model.named_modules(remove_duplicate=False) if not isinstance(module, _LISTS)}
        for model in (student, teacher)
    )
    found: dict[str, str] = {}
    for swap in swaps:
        parents = (swap.site.rsplit(".", depth)[0] for depth in range(1, swap.site.count(".") + 1))
        pairs = [*((parent, parent) for parent in parents), (swap.site, swap.absorbs or swap.site)]
        found.update([(own, other) for own, other in pairs if own in blocks and other in theirs][:1])
    return found


def _recorded(header: Header, folder: Path | None) -> tuple[str, dict[str, Any]]:
    """Return the reference and options with which the original was opened for the conversion."""
    report = read_provenance(header.provenance, "the checkpoint").report
    reference, weights = report.model.reference, report.model.weights
    if not reference or weights in ("", GIVEN):
        raise SourceError(f"the checkpoint does not say which model it was made from; {_GIVE}")
    origin, arguments = header.origin.reference, dict(header.origin.arguments)
    whole = origin.startswith(("skeleton:", "class:"))
    if not whole and builders.canonical(origin, arguments) is None:
        # What a file names is neither run nor read; what the user names is.
        raise SourceError(f"the original was built by {origin}, which is code or a file of yours; {_GIVE}")
    recorded = ((report.files and report.files[0].path) or reference) if report.model.sha256 else None
    if whole and reference != recorded:
        # The class of a module that was saved as a whole: by itself it names nothing to open.
        raise SourceError(f"the checkpoint does not say which file it was made from; {_GIVE}")
    if recorded is not None:
        path = _same_file(recorded, str(report.model.sha256), folder)
        if reference != recorded:
            return origin, {"weights": str(path), "arguments": arguments}
        if not whole:
            try:
                read_checkpoint(path)
            except AsymswapError:
                return str(path), {"arch": origin, "arguments": arguments}
        return str(path), {}  # an asymswap checkpoint, or a whole module, names its architecture itself
    if is_file_name(weights) or "\\" in weights:
        raise SourceError(f"the checkpoint names the weights {weights!r}, a path, which is not followed; {_GIVE}")
    if weights.startswith("random"):
        raise SourceError(f"the original {reference} had random weights, which are not kept; {_GIVE}")
    return origin, {"weights": weights, "arguments": arguments} if ":" in origin else {}  # else it has one set


def _same_file(recorded: str, expected: str, folder: Path | None) -> Path:
    """Return the file of that name beside the checkpoint; raise SourceError if it is missing or has changed."""
    name = re.split(r"[/\\]", recorded)[-1]
    # As a reference, the name of a Python file would run it.
    path = None if folder is None or name in ("", ".", "..") or names_python_file(name) else folder / name
    if path is None or not path.is_file():
        where = "" if folder is None else f" in {folder}"
        raise SourceError(f"the original {name} is not beside the checkpoint{where}; put it there, or {_GIVE}")
    if sha256(path) != expected:
        raise SourceError(f"{path} is no longer the file that was converted (its SHA-256 differs); {_GIVE}")
    return path


@contextmanager
def _offline() -> Iterator[None]:
    """Use only weights in the cache of torch.hub or of the Hugging Face hub while the block lasts."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError("nothing is downloaded on a checkpoint's word")

    before = torch.hub.download_url_to_file, timm_models.find_hub
    torch.hub.download_url_to_file, timm_models.find_hub = refuse, refuse
    try:
        yield
    finally:
        torch.hub.download_url_to_file, timm_models.find_hub = before
