"""What a checkpoint tells of itself, as a view for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from asymswap.models.preprocessing import fed, size_warning
from asymswap.reporting import format as fmt
from asymswap.reporting.terminal import table, written
from asymswap.types import Preprocessing


def show_view(path: str, header: Mapping[str, Any]) -> RenderableType:
    """Origin, preprocessing, versions, headline figures, and the swaps of every conversion, from the header's JSON."""
    provenance, origin, pre = header["provenance"], header["origin"], header["preprocessing"]
    report = provenance.get("report", {})
    arguments = ", ".join(f"{key}={value}" for key, value in origin["arguments"].items())
    preprocessing = Preprocessing(**pre)
    facts = [
        ("built from", origin["reference"] + (f" ({arguments})" if arguments else "")),
        ("input", fmt.fed(fed(preprocessing))),
        *_facts(report),
        ("versions", ", ".join(f"{name} {version}" for name, version in provenance.get("versions", {}).items())),
    ]
    parts: list[RenderableType] = [written(path, style="bold")]
    parts += [*(written(fmt.sentence(line), style="yellow") for line in size_warning(preprocessing)), Text("")]
    parts.append(table([("", "left"), ("", "fold")], [(name, value) for name, value in facts if value]))
    for number, plan in enumerate(header["plans"], start=1):
        swaps = plan["swaps"]
        parts += [Text(""), written(f"Conversion {number}: {len(swaps)} convs swapped, {len(plan['keeps'])} kept")]
        rows = [(swap["site"], swap["kind"], fmt.settings(swap["settings"])) for swap in swaps]
        if rows:
            parts += [Text(""), table([("Layer", "fold"), ("Kind", "left"), ("Settings", "left")], rows)]
    fused = provenance.get("fused")
    if isinstance(fused, Mapping):
        rows = [(row["site"], row["kind"], row["outcome"]) for row in fused["sites"]]
        done = sum(outcome != "left" for _, _, outcome in rows)
        parts += [Text(""), written(f"Fused: {done} of {len(rows)} replacements"), Text("")]
        parts.append(table([("Layer", "fold"), ("Was", "left"), ("Became", "left")], rows))
    for number, record in enumerate(provenance.get("training", []), start=1):
        parts += [Text(""), written(f"Training {number}: {_training(record)}")]
    return Group(*parts)


def _training(record: Mapping[str, Any]) -> str:
    """One fine-tuning in a sentence."""
    epochs, steps = record["epochs"], record["steps"]
    text = f"{epochs} epoch{'s' * (epochs != 1)} ({steps} step{'s' * (steps != 1)}) on {record['data']}"
    if record.get("teacher"):
        text += f", taught by {record['teacher']}"
    before, best = record["scores"]["before"], record["scores"]["best"]
    if before and best:
        text += f"; validation top-1 {before['top1']:.2%} -> {best['top1']:.2%} (epoch {record['best_epoch']})"
    return text


def _facts(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    if not isinstance(report, Mapping) or not {"model", "before", "after", "output"} <= report.keys():
        return []
    model, before, after = report["model"], report["before"], report["after"]
    facts = [
        ("converted from", model["reference"]),
        ("weights", model["weights"]),
        ("source SHA-256", model["sha256"] or ""),
        ("recipe", report["recipe"] + (f", budget {report['budget']}" if report["budget"] else "")),
        ("MACs", _change(before["macs"], after["macs"])),
        ("parameters", _change(before["params"], after["params"])),
        ("output change", f"{fmt.error(report['output']['relative'])} on {report['output']['probe']}"),
    ]
    accuracy = report.get("accuracy")
    if accuracy:
        facts.append(("top-1", f"{accuracy['before']:.2%} -> {accuracy['after']:.2%} on {accuracy['data']}"))
    return facts


def _change(before: int, after: int) -> str:
    return f"{fmt.count(before)} -> {fmt.count(after)} ({fmt.share(after, before)})"
