"""The report of a conversion: what was planned and measured, and the checks on it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import nn

import asymswap
from asymswap import replacements
from asymswap.api.session import Converted, Session
from asymswap.errors import AsymswapError
from asymswap.measure.fidelity import Fidelity, compared_parts, measure_fidelity
from asymswap.measure.macs import Costs
from asymswap.reporting import format as fmt
from asymswap.results.convert import CalibrationRow, FileRow, ModelRow, OutputChange, Report, SiteRow
from asymswap.types import Cost, Keep, Site, Swap
from asymswap.utils.inputs import Inputs, portions, probe
from asymswap.utils.tensors import eval_mode, list_tensors


def make_report(session: Session, converted: Converted, recipe: str, budget: str | None, seed: int) -> Report:
    """Measure what has changed, on held-back images where there are some, else on random ones by the seed.

    Raises AsymswapError where the converted model's output is not finite.
    """
    opened, traced, plan, before = session.opened, session.traced, converted.plan, session.costs
    gathered = session.gathered
    if gathered is not None and gathered.held_back is not None:
        inputs: Inputs = (gathered.held_back.to(opened.dtype()),)
        probed = f"{len(gathered.held_back)} images of {gathered.summary.data}"
    else:
        inputs = probe(opened.preprocessing, opened.dtype(), seed=seed)
        probed = f"{len(inputs[0])} random images (seed {seed})"
    parts = compared_parts(traced)
    if not traced.on_meta:
        probed += f", compared at the outputs of {len(parts)} parts"
    fidelity = measure_fidelity(opened.model, converted.model, plan, inputs, parts)
    if not math.isfinite(fidelity.output.largest):
        with eval_mode(opened.model), torch.no_grad():
            outputs = [tensor for portion in portions(inputs) for tensor in list_tensors(opened.model(*portion))]
        if all(bool(tensor.isfinite().all()) for tensor in outputs):
            raise AsymswapError(
                "the converted model's output is not finite, where the original's is, so nothing is written; give it "
                "a larger budget, or another dtype than half precision"
            )
    decided: list[Swap | Keep] = [*plan.keeps, *plan.swaps]
    entries = {one.site: one for one in decided}
    after = converted.costs.by_name
    rows = tuple(_row(site, entries[site.name], before, after[site.name], fidelity) for site in traced.sites)
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
        after=converted.costs.total,
        output=OutputChange(fidelity.output.relative, fidelity.output.largest, probed),
        warnings=tuple(_surprises(rows, fidelity)),
        multiplier=plan.multiplier,
        weights_bytes=(state_bytes(opened.model), state_bytes(converted.model)),
        files=() if opened.file is None else (FileRow(str(opened.file), opened.file.stat().st_size),),
    )


def calibration_row(session: Session, converted: Converted, evaluated_on: str | None) -> CalibrationRow | None:
    """Return what the conversion was calibrated on; `evaluated_on` describes the images of its accuracy."""
    gathered, polished = session.gathered, converted.polished
    if gathered is None:
        return None
    notes = list(gathered.notes)
    if polished is not None:
        notes.append(
            f"polished for {polished.steps} steps on {polished.images} images: difference of the outputs on held-back "
            f"ones {polished.before:.3g} -> {polished.after:.3g} (the weights of step {polished.kept_step})"
        )
    if evaluated_on is not None and evaluated_on == gathered.description:
        notes.append(SAME_IMAGES)
    summary = gathered.summary
    return CalibrationRow(
        summary.data, summary.images, summary.sha256, summary.seed, converted.sequential, tuple(notes)
    )


SAME_IMAGES = "calibrated and evaluated on the same images: the accuracy is too good to be trusted"


_PROMISED = 1e-4
"""Relative change of an output up to which it counts as preserved, or 8 steps of a coarser dtype."""


def check_promises(report: Report, dtype: torch.dtype) -> None:
    """Raise AsymswapError where a kind, or all of them together, have not preserved what they promise."""
    allowed = max(_PROMISED, 8 * torch.finfo(dtype).eps)
    for row in report.swapped:
        if row.exact and row.output_error is not None and not row.output_error <= allowed:
            raise AsymswapError(
                f"{row.kind} promises to preserve {row.site}, but its output has changed by {row.output_error:.1e} "
                f"(allowed {allowed:.0e}); keep it by a rule, or give `allow_drift=True`"
            )
    if report.swapped and all(row.exact for row in report.swapped) and not report.output.relative <= 10 * allowed:
        raise AsymswapError(
            f"every swap promises to preserve the function, but the model's output has changed by "
            f"{report.output.relative:.1e}; `allow_drift=True` allows that"
        )


_SURPRISE = 5.0
"""An error of more than this many times the predicted one has another cause."""


def _surprises(rows: Sequence[SiteRow], fidelity: Fidelity) -> Iterator[str]:
    """Warn where the error of a layer, or of the whole output, is far above the predicted one."""
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
    """Return the bytes of all tensors of the state dict."""
    tensors = [value for value in model.state_dict().values() if isinstance(value, torch.Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _row(site: Site, entry: Swap | Keep, before: Costs, after: Cost, fidelity: Fidelity) -> SiteRow:
    row = SiteRow(
        site=site.name,
        conv=site.conv.describe(),
        feature_map=site.feature_map,
        calls=len(site.calls),
        reason=entry.reason,
        before=before.by_name[site.name],
        after=after,
    )
    if isinstance(entry, Keep):
        return row
    error = fidelity.site_outputs.get(site.name)
    kind, settings = replacements.load_swap(entry)
    fields = kind.settings.model_fields
    unusual = {key: value for key, value in entry.settings.items() if value != fields[key].default}
    return replace(
        row,
        action="swap",
        kind=entry.kind,
        becomes=fmt.settings(unusual if unusual.keys() - {"bias"} else {entry.kind: True, **unusual}),
        settings=dict(entry.settings),
        # The absorbed batch norm's cost stays with the rest of the model, so that the sums come out right.
        after=after if entry.absorbs is None else after - before.by_name[entry.absorbs],
        predicted_error=entry.predicted,
        kernel_error=fidelity.kernels.get(site.name),
        output_error=error.relative if error else None,
        output_largest=error.largest if error else None,
        exact=kind.preserves(site.conv, settings),
        absorbs=entry.absorbs,
    )
