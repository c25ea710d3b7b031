"""The network that a converted one learns from: by default the original, found by what the checkpoint tells of it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from torch import nn

from asymswap.checkpoint import Header, ToldReport, read_checkpoint, told
from asymswap.errors import AsymswapError, SourceError
from asymswap.opening import Opened, open_model
from asymswap.sources import builders
from asymswap.sources.files import sha256
from asymswap.sources.references import Request
from asymswap.spec import Swap
from asymswap.training.distill import Teacher

ORIGINAL = "original"
_GIVE = "give the teacher: --distill REF"


def find_teacher(header: Header, wanted: str, student: nn.Module) -> Teacher:
    """The teacher that `wanted` names, a model reference or `original`, in eval mode.

    Raises SourceError where it cannot be had, or where a file is no longer what it was when it was converted.
    """
    opened = _open_original(header) if wanted == ORIGINAL else _open_named(wanted)
    swaps = [swap for plan in header.plans for swap in plan.swaps]
    teacher = opened.model.eval().requires_grad_(False)
    return Teacher(teacher, opened.reference, blocks_around(swaps, student, teacher))


def blocks_around(swaps: Iterable[Swap], student: nn.Module, teacher: nn.Module) -> dict[str, str]:
    """The innermost blocks in which swapped layers stand, each with the teacher's that has the same output.

    A residual block's sum is what the next one sees, while the outputs of single convs are scaled and shifted before
    anybody sees them. A layer that stands in nothing but lists of layers counts as its own block; where it has taken
    over the batch norm behind it, its output is that of the teacher's batch norm.
    """
    found: dict[str, str] = {}
    for swap in swaps:
        parents = (swap.site.rsplit(".", depth)[0] for depth in range(1, swap.site.count(".") + 1))
        pairs = [*((parent, parent) for parent in parents), (swap.site, swap.absorbs or swap.site)]
        for mine, theirs in pairs:
            if _is_block(student, mine) and _is_block(teacher, theirs):
                found[mine] = theirs
                break
    return found


_LISTS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def _is_block(model: nn.Module, name: str) -> bool:
    try:
        return not isinstance(model.get_submodule(name), _LISTS)
    except AttributeError:
        return False


def _open_named(reference: str) -> Opened:
    try:
        return open_model(reference, Request())
    except AsymswapError as error:
        raise SourceError(f"the teacher {reference} cannot be used: {error}") from None


def _open_original(header: Header) -> Opened:
    reference, request = _recorded(header)
    try:
        return open_model(reference, request)
    except AsymswapError as error:
        raise SourceError(f"the original {reference} cannot be fetched ({error}); {_GIVE}") from None


def _recorded(header: Header) -> tuple[str, Request]:
    """How the original was opened when it was converted, and so can be opened again."""
    report = told(header.provenance, "the checkpoint").report
    reference, weights = report.model.reference, report.model.weights
    if not reference or weights in ("", "as given"):
        raise SourceError(f"the checkpoint does not tell which model it was made of; {_GIVE}")
    origin, arguments = header.origin.reference, dict(header.origin.arguments)
    whole = origin.startswith(("skeleton:", "class:"))
    if not whole and builders.canonical(origin) is None:
        # Code that a file names is not run; what the user names is.
        raise SourceError(f"the original was built by {origin}, which is code of yours; {_GIVE}")
    path = _same_file(report) if report.model.sha256 else None
    if whole and (path is None or reference != str(path)):
        # Such an origin is the class of a module that stood in a file whole: by itself it names nothing to open.
        raise SourceError(f"the checkpoint does not tell which file it was made of; {_GIVE}")
    if path is not None:
        if reference != str(path):
            return origin, Request(weights=str(path), arguments=arguments)
        return reference, Request() if whole or _is_ours(path) else Request(arch=origin, arguments=arguments)
    if weights == "random":
        raise SourceError(f"the original {reference} had random weights, which are not kept; {_GIVE}")
    return origin, Request(weights=weights, arguments=arguments) if origin.startswith("torchvision:") else Request()


def _same_file(report: ToldReport) -> Path:
    """The file that was converted; raises SourceError where it is gone or has changed."""
    path = Path((report.files[0].path if report.files else None) or report.model.reference)
    if not path.is_file():
        raise SourceError(f"the original {path} is not there any more; {_GIVE}")
    if sha256(path) != report.model.sha256:
        raise SourceError(f"{path} is not the file any more that was converted (its SHA-256 differs); {_GIVE}")
    return path


def _is_ours(path: Path) -> bool:
    """Whether a file is an asymswap checkpoint, which tells its architecture itself."""
    try:
        read_checkpoint(path)
    except AsymswapError:
        return False
    return True
