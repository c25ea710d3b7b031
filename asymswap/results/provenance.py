"""How a file came to be, as it is written into it, and read back from it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from asymswap.errors import CheckpointError
from asymswap.results.convert import FileRow, ModelRow, Report
from asymswap.results.finetune import TrainingRecord
from asymswap.results.fuse import FusionRow

T = TypeVar("T")


@dataclass(frozen=True)
class Making:
    """The recipe's text, what was changed of it, the command line and versions; what was fused since, if anything.

    `command` is empty where the conversion was asked for from Python.
    """

    recipe: str = ""
    overrides: Mapping[str, Any] = field(default_factory=dict)
    seed: int | None = None
    command: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    fused: tuple[FusionRow, ...] = ()


@dataclass(frozen=True)
class Source:
    """Which model was converted, and from which files."""

    model: ModelRow = field(default_factory=ModelRow)
    files: tuple[FileRow, ...] = ()


@dataclass(frozen=True)
class History:
    """What later commands need of a provenance; what an older file does not tell has its default."""

    report: Source = field(default_factory=Source)
    training: tuple[TrainingRecord, ...] = ()


def read_history(provenance: Mapping[str, Any], label: str) -> History:
    """The history in a checkpoint's provenance; raises CheckpointError where it is damaged."""
    return _checked(History, dict(provenance), f"{label} has a damaged provenance")


def read_making(provenance: Mapping[str, Any], label: str) -> Making:
    """What a checkpoint's provenance tells of how it was made; raises CheckpointError where it is damaged."""
    names = ("recipe", "overrides", "seed", "command", "versions")
    known = {name: provenance[name] for name in names if name in provenance}
    fused = provenance.get("fused")
    if isinstance(fused, Mapping):
        known["fused"] = fused.get("sites", [])
    return _checked(Making, known, f"{label} has a damaged making")


def read_report(provenance: Mapping[str, Any], label: str) -> Report:
    """The report in a checkpoint's provenance; raises CheckpointError where there is none, or it is damaged."""
    if "report" not in provenance:
        raise CheckpointError(f"{label} holds no report; convert the model again to have one")
    report = provenance["report"]
    output = report.get("output") if isinstance(report, Mapping) else None
    if isinstance(output, Mapping):
        # JSON has no word for the numbers that these may be.
        missing = {key: math.nan for key in ("relative", "largest") if output.get(key, 0) is None}
        report = {**report, "output": {**output, **missing}}
    return _checked(Report, report, f"{label} has a damaged report")


def _checked(form: type[T], data: Any, what: str) -> T:
    try:
        return TypeAdapter(form).validate_python(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise CheckpointError(f"{what}: {where}: {first['msg']}") from None
