"""The verb `offsets`: where the taps of a converted model's layers are, read from the model itself."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from asymswap import replacements
from asymswap.calibration.calibrate import some_inputs
from asymswap.data.normalization import settle
from asymswap.errors import AsymswapError
from asymswap.models.opened import input_warnings
from asymswap.models.opening import Model, open_for_verb
from asymswap.models.preprocessing import PreprocessingOptions
from asymswap.planning.fuse import read_taps
from asymswap.results.offsets import OffsetReport, OffsetRow
from asymswap.types import Plan, Swap
from asymswap.utils.inputs import Inputs


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
