"""How a conversion was made, beside what it did: kept in the checkpoint, and read back from it with the report."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeVar

from asymswap.errors import CheckpointError
from asymswap.results.convert import Report
from asymswap.results.provenance import Making

T = TypeVar("T")


def read_making(provenance: Mapping[str, Any], label: str) -> Making:
    """What a checkpoint's provenance tells of how it was made; raises CheckpointError where it is damaged."""
    fused = provenance.get("fused")
    known = {
        key: provenance[key] for key in ("recipe", "overrides", "seed", "command", "versions") if key in provenance
    }
    if isinstance(fused, Mapping):
        known["fused"] = fused.get("sites", [])
    return _checked(Making, known, label)


def read_report(provenance: Mapping[str, Any], label: str) -> Report:
    """The report in a checkpoint's provenance; raises CheckpointError where there is none, or it is damaged."""
    if "report" not in provenance:
        raise CheckpointError(f"{label} holds no report; convert the model again to have one")
    return _checked(Report, _with_numbers(provenance["report"]), label)


def _with_numbers(report: Any) -> Any:
    """The report with a number for what JSON has none for, in the change of the output, which has no None."""
    output = report.get("output") if isinstance(report, Mapping) else None
    if not isinstance(output, Mapping):
        return report
    missing = {key: math.nan for key in ("relative", "largest") if output.get(key, 0) is None}
    return {**report, "output": {**output, **missing}}


def _checked(form: type[T], data: Any, label: str) -> T:
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(form).validate_python(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise CheckpointError(f"{label} has a damaged {form.__name__.lower()}: {where}: {first['msg']}") from None
