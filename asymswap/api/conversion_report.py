"""The report of a conversion, put together from what was planned and measured."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn

import asymswap
from asymswap import replacements
from asymswap.errors import AsymswapError
from asymswap.graph.trace import Trace
from asymswap.measure.fidelity import Fidelity
from asymswap.measure.macs import Costs
from asymswap.models.opened import OpenedModel
from asymswap.reporting import format as fmt
from asymswap.results.convert import FileRow, ModelRow, OutputChange, Report, SiteRow
from asymswap.types import Cost, Keep, Plan, Site, Swap
from asymswap.utils.inputs import Inputs, portions
from asymswap.utils.tensors import eval_mode, first_not_finite, list_tensors


def make_report(
    opened: OpenedModel,
    traced: Trace,
    plan: Plan,
    recipe: str,
    budget: str | None,
    costs: tuple[Costs, Costs],
    fidelity: Fidelity,
    probe_text: str,
    weights_bytes: tuple[int, int],
) -> Report:
    """Rows of all sites, the rest of the model, and totals; costs are those counted before and after."""
    before, after = costs
    entries: dict[str, Swap | Keep] = {keep.site: keep for keep in plan.keeps}
    entries |= {swap.site: swap for swap in plan.swaps}
    rows = tuple(_row(site, entries[site.name], before, after.by_name[site.name], fidelity) for site in traced.sites)
    files = () if opened.file is None else (FileRow(str(opened.file), opened.file.stat().st_size),)
    return Report(
        asymswap=asymswap.__version__,
        model=ModelRow(
            reference=opened.reference,
            origin=opened.origin.reference,
            weights=opened.weights,
            traced_by=traced.by,
            input=opened.preprocessing.describe(),
            sha256=opened.sha256,
            notes=opened.notes + traced.notes + before.notes(),
        ),
        recipe=recipe,
        budget=budget,
        preserves={swap.kind: replacements.load(swap.kind).PRESERVES for swap in plan.swaps},
        sites=rows,
        rest=before.total - sum((row.before for row in rows), start=Cost(0, 0)),
        before=before.total,
        after=after.total,
        output=OutputChange(fidelity.output.relative, fidelity.output.largest, probe_text),
        warnings=tuple(_surprises(rows, fidelity)),
        multiplier=plan.multiplier,
        weights_bytes=weights_bytes,
        files=files,
    )


_PROMISED = 1e-4
"""Relative change of an output up to which it counts as preserved; where the dtype is coarser, its own steps count."""


def check_promises(report: Report, dtype: torch.dtype) -> None:
    """Raise AsymswapError where a kind has not kept what it promises, or all of them together have not."""
    allowed = max(_PROMISED, 8 * torch.finfo(dtype).eps)
    for row in report.swapped:
        if row.exact and row.output_error is not None and not row.output_error <= allowed:
            raise AsymswapError(
                f"{row.kind} promises to preserve {row.site}, but its output has changed by {row.output_error:.1e} "
                f"(allowed {allowed:.0e}); keep it by a rule, or say --allow-drift"
            )
    if report.swapped and all(row.exact for row in report.swapped) and not report.output.relative <= 10 * allowed:
        raise AsymswapError(
            f"every swap promises to preserve the function, but the model's output has changed by "
            f"{report.output.relative:.1e}; say --allow-drift to have it nevertheless"
        )


def check_finite(original: nn.Module, converted: nn.Module) -> None:
    """Raise AsymswapError where a weight of the converted model is not finite, which all of the original's are."""
    found = first_not_finite(converted)
    if found is not None and first_not_finite(original) is None:
        raise AsymswapError(
            f"the converted model's {found[0]!r} holds {found[1]}, so nothing is written; keep that conv by a rule "
            "with keep = true, and report it as a bug"
        )


def check_output_finite(original: nn.Module, fidelity: Fidelity, inputs: Inputs) -> None:
    """Raise AsymswapError where the converted model's output holds NaN or infinity, and the original's does not."""
    if math.isfinite(fidelity.output.largest):
        return
    with eval_mode(original), torch.no_grad():
        outputs = [tensor for portion in portions(inputs) for tensor in list_tensors(original(*portion))]
    if all(bool(tensor.isfinite().all()) for tensor in outputs):
        raise AsymswapError(
            "the converted model's output is not finite, where the original's is, so nothing is written; give it a "
            "larger budget, or another dtype than half precision"
        )


def _in_short(swap: Swap) -> str:
    """The settings that are not what the kind has by itself, or its name where there are none."""
    fields = replacements.load(swap.kind).Settings.model_fields
    told = {key: value for key, value in swap.settings.items() if value != fields[key].default}
    return fmt.settings(told if told.keys() - {"bias"} else {swap.kind: True, **told})


def promises(site: Site, swap: Swap) -> bool:
    """Whether the swap's kind promises that nothing changes at this site."""
    return replacements.load(swap.kind).preserves(site.conv, replacements.parse_settings(swap.kind, swap.settings))


_SURPRISE = 5.0
"""An error that is this many times the predicted one means that something else went wrong than was predicted."""


def _surprises(rows: Sequence[SiteRow], fidelity: Fidelity) -> Iterator[str]:
    """Warn where measured errors are far above the predicted ones: of single layers, and of the whole output."""
    errors = [(row, row.predicted_error, row.output_error) for row in rows if row.action == "swap"]
    far = [
        f"{row.site} {fmt.error(measured)} instead of {fmt.error(predicted)}"
        for row, predicted, measured in errors
        if predicted is not None and measured is not None and not measured <= max(_SURPRISE * predicted, _PROMISED)
    ]
    if far:
        more = f" and {len(far) - 3} more" if len(far) > 3 else ""
        yield f"the output error is far above the predicted one: {', '.join(far[:3])}{more}; check these layers"
    if not errors or any(predicted is None for _, predicted, _ in errors):
        return
    # The layers' errors add up like this where the network does not dampen them, which it usually does.
    expected = math.sqrt(sum(predicted**2 for _, predicted, _ in errors if predicted is not None))
    if not fidelity.output.relative <= max(_SURPRISE * expected, _PROMISED):
        yield (
            f"the model's output changed by {fmt.error(fidelity.output.relative)}, where the errors of its layers "
            f"predict about {fmt.error(expected)}: its code may treat a replaced layer in another way than a Conv2d"
        )


def state_bytes(model: nn.Module) -> int:
    """Bytes of all tensors of the state dict."""
    state: Mapping[str, object] = model.state_dict()
    return sum(getattr(t, "numel", int)() * getattr(t, "element_size", int)() for t in state.values())


def _row(site: Site, entry: Swap | Keep, before: Costs, after: Cost, fidelity: Fidelity) -> SiteRow:
    swap = entry if isinstance(entry, Swap) else None
    error = fidelity.site_outputs.get(site.name)
    if swap is not None and swap.absorbs is not None:
        # What the batch norm cost stays with the rest of the model, so that the sums come out right.
        after -= before.by_name[swap.absorbs]
    return SiteRow(
        site=site.name,
        conv=site.conv.describe(),
        feature_map=site.feature_map,
        calls=len(site.calls),
        action="swap" if swap else "keep",
        kind=swap.kind if swap else None,
        becomes="" if swap is None else _in_short(swap),
        settings=dict(swap.settings) if swap else {},
        reason=entry.reason,
        before=before.by_name[site.name],
        after=after,
        predicted_error=swap.predicted if swap else None,
        kernel_error=fidelity.kernels.get(site.name),
        output_error=error.relative if error else None,
        output_largest=error.largest if error else None,
        exact=None if swap is None else promises(site, swap),
        absorbs=None if swap is None else swap.absorbs,
    )
