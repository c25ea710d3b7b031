"""How a checkpoint is shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import itemgetter
from typing import Any

from rich.console import RenderableType

from asymswap.errors import visible
from asymswap.models.preprocessing import fed, size_warning
from asymswap.reporting import format as fmt
from asymswap.reporting.tables import Column, Table, facts, heading, layout, written
from asymswap.types import Preprocessing


def show_view(path: str, header: Mapping[str, Any]) -> RenderableType:
    """Return origin, preprocessing, versions, headline figures, and the swaps of every conversion, from JSON.

    Raises TypeError or another of Python's errors where a provenance, which is anybody's, is of another form.
    """
    provenance, origin = header["provenance"], header["origin"]
    arguments = ", ".join(f"{key}={value}" for key, value in origin["arguments"].items())
    preprocessing = Preprocessing(**header["preprocessing"])
    known = [
        ("built from", origin["reference"] + (f" ({arguments})" if arguments else "")),
        ("input", fmt.fed(fed(preprocessing))),
        *_conversion_facts(provenance.get("report", {})),
        ("versions", ", ".join(f"{name} {version}" for name, version in provenance.get("versions", {}).items())),
    ]
    blocks: list[Sequence[RenderableType]] = [heading(path, size_warning(preprocessing)), [facts(known).terminal()]]
    for number, plan in enumerate(header["plans"], start=1):
        swaps = plan["swaps"]
        blocks.append([written(f"Conversion {number}: {len(swaps)} convs swapped, {len(plan['keeps'])} kept")])
        columns = (
            Column("Layer", itemgetter("site"), visible, "fold"),
            Column("Kind", itemgetter("kind"), visible, "left"),
            Column("Settings", itemgetter("settings"), fmt.settings, side="left"),
        )
        blocks.append([Table(columns, swaps).terminal()] if swaps else [])
    fused = provenance.get("fused")
    if isinstance(fused, Mapping):
        rows = fused["sites"]
        done = sum(row["outcome"] != "left" for row in rows)
        columns = (
            Column("Layer", itemgetter("site"), visible, "fold"),
            Column("Was", itemgetter("kind"), visible, "left"),
            Column("Became", itemgetter("outcome"), visible, "left"),
        )
        blocks += [[written(f"Fused: {done} of {len(rows)} replacements")], [Table(columns, rows).terminal()]]
    for number, record in enumerate(provenance.get("training", []), start=1):
        blocks.append([written(f"Training {number}: {_training(record)}")])
    return layout(*blocks)


def _training(record: Mapping[str, Any]) -> str:
    """Return one fine-tuning as a sentence."""
    length = f"{fmt.plural(record['epochs'], 'epoch')} ({fmt.plural(record['steps'], 'step')})"
    teacher = f", taught by {record['teacher']}" if record.get("teacher") else ""
    text = f"{length} on {record['data']}{teacher}"
    before, best = record["scores"]["before"], record["scores"]["best"]
    if before and best:
        text += f"; validation top-1 {before['top1']:.2%} -> {best['top1']:.2%} (epoch {record['best_epoch']})"
    return text


def _conversion_facts(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    if not isinstance(report, Mapping) or not {"model", "before", "after", "output"} <= report.keys():
        return []
    model, before, after, accuracy = report["model"], report["before"], report["after"], report.get("accuracy")
    known = [
        ("converted from", model["reference"]),
        ("weights", model["weights"]),
        ("source SHA-256", model["sha256"] or ""),
        ("recipe", report["recipe"] + (f", budget {report['budget']}" if report["budget"] else "")),
    ]
    for name, key in (("MACs", "macs"), ("parameters", "params")):
        old, new = before[key], after[key]
        known.append((name, f"{fmt.count(old)} -> {fmt.count(new)} ({fmt.share(new, old)})"))
    known.append(("output change", f"{fmt.error(report['output']['relative'])} on {report['output']['probe']}"))
    if accuracy:
        known.append(("top-1", f"{accuracy['before']:.2%} -> {accuracy['after']:.2%} on {accuracy['data']}"))
    return known
