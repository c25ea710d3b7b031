"""Results as plain data, and the provenance that a checkpoint holds."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from asymswap.errors import CheckpointError
from asymswap.results.convert import FileRow, FusionRow, ModelRow, Report
from asymswap.results.finetune import TrainingRecord

T = TypeVar("T")


def to_json(report: Any) -> dict[str, Any]:
    """Return a result as plain data, by its own `to_plain` where it has one, with the number of the schema."""
    return {"schema": 1, **(report.to_plain() if hasattr(report, "to_plain") else plain(report))}


def plain(value: Any) -> Any:
    """Return dataclasses, mappings and sequences as plain data, with the properties that `derived` of a class names.

    A number that is not finite, such as a change relative to zeros, is None, since JSON has none.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = (*(item.name for item in dataclasses.fields(value)), *getattr(value, "derived", ()))
        return {name: plain(getattr(value, name)) for name in names}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True)
class Source:
    """Which model was converted, and from which files."""

    model: ModelRow = field(default_factory=ModelRow)
    files: tuple[FileRow, ...] = ()


@dataclass(frozen=True)
class Provenance:
    """How a file was made, with defaults for what older files do not say."""

    recipe: str = ""
    overrides: Mapping[str, Any] = field(default_factory=dict)  # changes to the recipe
    seed: int | None = None
    command: str = ""  # empty in Python
    versions: Mapping[str, str] = field(default_factory=dict)
    fused: tuple[FusionRow, ...] = ()
    report: Source = field(default_factory=Source)
    training: tuple[TrainingRecord, ...] = ()


def read_provenance(stored: Mapping[str, Any], label: str) -> Provenance:
    """Return how the file that `label` names was made; raises CheckpointError where the provenance is damaged."""
    fused = stored.get("fused")
    known = {**stored, "fused": fused.get("sites", []) if isinstance(fused, Mapping) else []}
    return _checked(Provenance, known, f"{label} has a damaged provenance")


def read_report(stored: Mapping[str, Any], label: str) -> Report:
    """Return the report in a provenance; raises CheckpointError where there is none, or it is damaged."""
    if "report" not in stored:
        raise CheckpointError(f"{label} holds no report; convert the model again to have one")
    report = stored["report"]
    output, accuracy = (report.get(key) if isinstance(report, Mapping) else None for key in ("output", "accuracy"))
    if isinstance(output, Mapping):
        # These fields are never None: null stands for a number that is not finite.
        undefined = {key: math.nan for key in ("relative", "largest") if output.get(key, 0) is None}
        report = {**report, "output": {**output, **undefined}}
    if isinstance(accuracy, Mapping) and "scores" not in accuracy:
        # Written when top-1 was all that could be measured.
        report = {**report, "accuracy": {**accuracy, "scores": [{"name": "top-1", "unit": "%", **accuracy}]}}
    return _checked(Report, report, f"{label} has a damaged report")


def _checked(form: type[T], data: Any, what: str) -> T:
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(form).validate_python(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise CheckpointError(f"{what}: {where}: {first['msg']}") from None
