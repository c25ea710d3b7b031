"""Report files of conversions, and of the checkpoints that hold them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from asymswap.api.convert import Conversion
from asymswap.checkpoint import Header, read_checkpoint
from asymswap.errors import CheckpointError
from asymswap.reporting.convert import check_suffix, report_text
from asymswap.results.convert import FileRow
from asymswap.results.records import read_provenance, read_report
from asymswap.utils.files import check_output, write_text


def write_report(of: Conversion | str | Path, path: str | Path, *, force: bool = False) -> None:
    """Write the report of a conversion, or of the one that a checkpoint holds, to a .html, .json or .md file.

    An existing file is replaced only with `force`. Raises OutputError where the file cannot be written, and
    CheckpointError where the checkpoint holds no report, or a damaged one.
    """
    path = Path(path)
    check_output(path, force)
    check_suffix(path)
    if isinstance(of, Conversion):
        text = report_text(of.report, read_provenance(of.header.provenance, "the conversion"), path)
    else:
        text = stored_report_text(read_checkpoint(Path(of)).header, Path(of), path)
    write_text(path, text)


def stored_report_text(header: Header, checkpoint: Path, path: Path) -> str:
    """Return the report in the header of a checkpoint, in the form of the ending of `path`."""
    report = read_report(header.provenance, str(checkpoint))
    report = replace(report, files=(*report.files, FileRow(str(checkpoint), checkpoint.stat().st_size)))
    provenance = read_provenance(header.provenance, str(checkpoint))
    try:
        return report_text(report, provenance, path)
    except (ArithmeticError, ValueError) as error:
        # The file's numbers can be anything.
        raise CheckpointError(f"{checkpoint} has a damaged report: {error}") from None
