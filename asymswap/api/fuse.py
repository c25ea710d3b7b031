"""`fuse` and `offsets`: merge replacements back into ordinary convs, and see where the taps of others have moved."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from asymswap import replacements
from asymswap.api.progress import Shows, shows_progress
from asymswap.calibration.calibrate import some_inputs
from asymswap.checkpoint import save_state
from asymswap.data.normalization import settle
from asymswap.errors import AsymswapError
from asymswap.graph.trace import trace
from asymswap.measure.fidelity import compare_outputs, compared_parts
from asymswap.measure.macs import count_costs
from asymswap.models.converted import base_of, original_of, save_checkpoint
from asymswap.models.opened import input_warnings
from asymswap.models.opening import Made, Model, open_for_verb
from asymswap.models.preprocessing import PreprocessingOptions
from asymswap.planning.fuse import fuse_model, read_taps
from asymswap.results.convert import FileRow, FusionReport, OffsetReport, OffsetRow
from asymswap.results.records import plain
from asymswap.types import Plan, Swap
from asymswap.utils.files import check_output
from asymswap.utils.inputs import Inputs


@dataclass
class Fusion(Made):
    """A model whose replacements have been fused, and the report; `save_fused` writes it."""

    report: FusionReport


@shows_progress
def fuse(
    model: Model,
    *,
    separable: bool = False,
    max_offset: float | None = None,
    data: str | None = None,
    seed: int = 0,
    preprocessing: PreprocessingOptions | None = None,
    example_inputs: Any = None,
    progress: Shows = True,
) -> Fusion:
    """Merge the replacements of a converted model back into ordinary convs that compute the same in eval mode.

    By default it fuses branches and the static offset kinds, whose one conv costs no more as a rule. `separable` adds
    pairs and crosses. `max_offset` drops predicted offsets that stay below this many pixels on `data` (or random
    images), which changes the function; the report has the difference. Raises AsymswapError where nothing can be
    fused, the model is in train mode, or the fused model does not compute the same.
    """
    opened = open_for_verb(model, progress, preprocessing=preprocessing, example_inputs=example_inputs)
    converted, label = opened.model, opened.reference
    original = original_of(opened)
    if converted.training:
        raise AsymswapError("fusing needs the statistics of eval mode: call model.eval() before")
    if data is not None:
        opened = settle(opened, data, "test")
    inputs, about = some_inputs(data, opened, seed)
    options: dict[str, Any] = {"separable": separable, "max_offset": max_offset, "inputs": inputs}
    fused, plans, rows = fuse_model(converted, original, opened.plans, progress, **options)
    if all(row.outcome == "left" for row in rows):
        reasons = "; ".join(dict.fromkeys(f"{row.kind}: {row.reason}" for row in rows)) or "it holds no replacement"
        raise AsymswapError(f"{label} has nothing to fuse ({reasons})")
    one, dtype = opened.example(), opened.dtype()
    gap = compare_outputs(converted, fused, inputs, compared_parts(trace(converted, one)))
    if max_offset is None and not gap.relative <= max(1e-4, 8 * torch.finfo(dtype).eps):
        raise AsymswapError(f"the fused model's output has changed by {gap.relative:.1e}; this is a bug: report it")
    report = FusionReport(
        model=label,
        origin=opened.origin.reference,
        sites=rows,
        before=count_costs(converted, one).total,
        after=count_costs(fused, one).total,
        relative=gap.relative,
        largest=gap.largest,
        probe=about,
        as_original=not plans,
        fed=opened.fed,
        warnings=input_warnings(opened),
    )
    provenance = {**opened.provenance, "fused": plain(report)}
    return Fusion(fused, report, replace(opened.header(), plans=plans, provenance=provenance), base_of(opened))


def save_fused(fusion: Fusion, path: str | Path, *, as_original: bool = False, force: bool = False) -> FusionReport:
    """Write a fused model as an asymswap checkpoint, or as the plain state dict of the unconverted architecture."""
    path = Path(path)
    check_output(path, force)
    if as_original and not fusion.report.as_original:
        left = next(row for row in fusion.report.sites if row.outcome != "fused")
        raise AsymswapError(
            f"the state dict does not fit {fusion.report.origin}: {left.site} ({left.kind}) is {left.outcome}"
            + (f", {left.reason}" if left.reason else "")
        )
    if as_original:
        save_state(path, fusion.model)
    else:
        save_checkpoint(path, fusion.model, fusion.header)
    fusion.report = replace(fusion.report, files=(FileRow(str(path), path.stat().st_size),))
    return fusion.report


def offsets(
    model: Model, *, data: str | None = None, preprocessing: PreprocessingOptions | None = None, seed: int = 0
) -> OffsetReport:
    """Return where the taps of a converted model have moved, layer by layer.

    What is predicted from the input is read on 8 random images, or on up to 32 of a data reference. Raises
    AsymswapError where no layer has taps that move.
    """
    opened = open_for_verb(model, preprocessing=preprocessing)
    if data is not None:
        opened = settle(opened, data, "test")
    inputs, about = some_inputs(data, opened, seed)
    rows = read_offsets(opened.model, opened.plans, inputs)
    if not rows:
        kinds = {name: type(replacements.load(name)) for name in replacements.names()}
        moving = [name for name, kind in kinds.items() if kind.tap_offsets is not replacements.Replacement.tap_offsets]
        raise AsymswapError(
            f"{opened.reference} has no layer whose taps move; the kinds {', '.join(moving)} have such taps"
        )
    return OffsetReport(opened.reference, rows, about, opened.fed, input_warnings(opened))


def read_offsets(model: nn.Module, plans: Sequence[Plan], inputs: Inputs) -> tuple[OffsetRow, ...]:
    """Run the model and return the offsets of every layer whose kind moves taps, in the order of the plans.

    A layer that a later conversion has changed, that was fused, or that never runs is left out.
    """
    found: dict[str, OffsetRow] = {}

    def see(swap: Swap, module: Any, offsets_ST2: Tensor) -> None:
        double_ST2 = offsets_ST2.double()
        mean_T2, spread_T2 = double_ST2.mean(0), double_ST2.std(0, correction=0)
        limit = swap.settings.get("limit")
        found[swap.site] = OffsetRow(
            site=swap.site,
            kind=swap.kind,
            kernel=module.conv.kernel,
            dilation=module.conv.dilation,
            mean=tuple((down, right) for down, right in mean_T2.tolist()),
            spread=tuple((down, right) for down, right in spread_T2.tolist()),
            largest=float(torch.linalg.vector_norm(double_ST2, dim=-1).max()),
            limit=None if limit is None else float(limit),
        )

    read_taps(model, plans, inputs, see)
    return tuple(found[swap.site] for plan in plans for swap in plan.swaps if swap.site in found)
