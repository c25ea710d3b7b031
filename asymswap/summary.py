"""The report of a conversion, put together from what was planned and measured."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

import asymswap
from asymswap import kinds
from asymswap.graph.trace import Trace
from asymswap.measure.cost import Costs
from asymswap.measure.fidelity import Fidelity
from asymswap.opening import Opened
from asymswap.planning.plan import combined_error
from asymswap.reporting.report import FileRow, ModelRow, OutputChange, Report, SiteRow
from asymswap.spec import Cost, Keep, Plan, Site, Swap


def make_report(
    opened: Opened,
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
    rows = tuple(
        _row(site, entries[site.name], before.by_name[site.name], after.by_name[site.name], fidelity)
        for site in traced.sites
    )
    source = opened.source
    files = () if source.file is None else (FileRow(str(source.file), source.file.stat().st_size),)
    return Report(
        asymswap=asymswap.__version__,
        model=ModelRow(
            reference=opened.reference,
            origin=source.origin.reference,
            weights=source.weights,
            traced_by=traced.by,
            input="x".join(map(str, (source.preprocessing.channels, *source.preprocessing.size))),
            sha256=source.sha256,
            notes=source.notes,
        ),
        recipe=recipe,
        budget=budget,
        preserves={swap.kind: kinds.load(swap.kind).PRESERVES for swap in plan.swaps},
        sites=rows,
        rest=before.total - sum((row.before for row in rows), start=Cost(0, 0)),
        before=before.total,
        after=after.total,
        output=OutputChange(fidelity.output.relative, fidelity.output.largest, probe_text),
        predicted_error=_predicted(plan),
        multiplier=plan.multiplier,
        weights_bytes=weights_bytes,
        files=files,
    )


def _predicted(plan: Plan) -> float | None:
    errors = [swap.predicted for swap in plan.swaps if swap.predicted is not None]
    return combined_error(errors) if errors and len(errors) == len(plan.swaps) else None


def state_bytes(model: nn.Module) -> int:
    """Bytes of all tensors of the state dict."""
    state: Mapping[str, object] = model.state_dict()
    return sum(getattr(t, "numel", int)() * getattr(t, "element_size", int)() for t in state.values())


def _row(site: Site, entry: Swap | Keep, before: Cost, after: Cost, fidelity: Fidelity) -> SiteRow:
    swap = entry if isinstance(entry, Swap) else None
    error = fidelity.site_outputs.get(site.name)
    return SiteRow(
        site=site.name,
        conv=site.conv.describe(),
        feature_map=site.feature_map,
        calls=len(site.calls),
        action="swap" if swap else "keep",
        kind=swap.kind if swap else None,
        settings=dict(swap.settings) if swap else {},
        reason=entry.reason,
        before=before,
        after=after,
        predicted_error=swap.predicted if swap else None,
        kernel_error=fidelity.kernels.get(site.name),
        output_error=error.relative if error else None,
        output_largest=error.largest if error else None,
    )
