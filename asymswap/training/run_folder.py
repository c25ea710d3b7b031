"""The folder of a training run: what is needed to go on with it after it was killed at any moment, and what it told.

state.pt       everything that the next step depends on, in one file: written beside itself and renamed, so that
               there is always a whole one; read as any file is
best.pt        the checkpoint of the best epoch so far
last.pt        the checkpoint of the last epoch
metrics.jsonl  one line of JSON for every step and every epoch
tensorboard/   the same, where TensorBoard is installed
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from asymswap.errors import AsymswapError, CheckpointError, OutputError, SourceError
from asymswap.fileformats.detect import sniff
from asymswap.fileformats.torch_files import load_object
from asymswap.results.finetune import EpochRow, StepRow
from asymswap.utils.files import real_cause, whole_file, write_text
from asymswap.utils.tensors import list_tensors, tensors_hash

STATE_FORMAT = 1
_STATE = {"identity", "progress", "model", "average", "optimizer", "scaler"}
"""What a state holds beside its format."""


class RunFolder:
    """The files of one run; nothing is written before `begin`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.state, self.best, self.last = (folder / name for name in ("state.pt", "best.pt", "last.pt"))
        self.metrics = folder / "metrics.jsonl"
        self._board: Any = None

    @property
    def exists(self) -> bool:
        """Whether there is a run in it, of whatever age, that can be gone on with or has come to something."""
        return any(path.exists() for path in (self.state, self.best, self.last))

    def clear(self) -> None:
        """Remove what a former run has left."""
        if not self.exists:
            return
        # TensorBoard's are first: a run of which the others are left is still one.
        for path in (self.folder / "tensorboard").glob("events.out.tfevents.*"):
            path.unlink(missing_ok=True)
        for path in (self.state, self.best, self.last, self.metrics):
            path.unlink(missing_ok=True)

    def begin(self, step: int, identity: Mapping[str, Any]) -> None:
        """Make the folder, or drop what was told of steps after this one, which will be done again.

        At step 0 nothing was saved to go on with: what was told then is another run's.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            told = self.metrics.read_text(encoding="utf-8").splitlines() if self.metrics.exists() else []
        except OSError as error:
            raise OutputError(f"cannot write to the run's folder {self.folder}: {error.strerror or error}") from None
        lines = [line for line in told if _step_of(line) <= step] if step else []
        if not lines:
            lines = [json.dumps({"event": "start", "step": 0, "settings": identity})]
        write_text(self.metrics, "".join(f"{line}\n" for line in lines))
        self._board = _tensorboard(self.folder / "tensorboard", step)

    def tell(self, row: StepRow | EpochRow) -> None:
        """Add a line to the metrics."""
        event = "epoch" if isinstance(row, EpochRow) else "step"
        try:
            with self.metrics.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"event": event, **asdict(row)}) + "\n")
        except OSError as error:
            raise OutputError(f"cannot write {self.metrics}: {error.strerror or error}") from None
        if self._board is not None:
            for name, value in _scalars(row, event):
                self._board.add_scalar(name, value, row.step)

    def save_state(self, payload: Mapping[str, Any]) -> None:
        """Replace the state at once; where that fails the former one stays."""
        assert payload.keys() == _STATE
        with whole_file(self.state) as draft, draft.open("wb") as file:
            try:
                torch.save({"asymswap_training": STATE_FORMAT, "sha256": _hash(payload), **payload}, file)
            except RuntimeError as error:
                raise real_cause(error) from error

    def read_state(self) -> dict[str, Any] | None:
        """The state, or None where no step was saved yet; raises CheckpointError where the file is something else."""
        if not self.state.exists():
            return None
        try:
            found = load_object(self.state, sniff(self.state), False, "it", "no run leaves such a file")
        except SourceError as error:
            raise CheckpointError(f"the run's state {self.state} is damaged ({error}); begin anew: --force") from None
        if not isinstance(found, dict) or found.get("asymswap_training") != STATE_FORMAT or not found.keys() >= _STATE:
            raise CheckpointError(f"{self.state} is not the state of a run of this version; begin anew: --force")
        # Runs of earlier versions have no hash.
        if "sha256" in found and found["sha256"] != _hash(found):
            raise CheckpointError(f"the run's state {self.state} is damaged (its numbers changed); begin anew: --force")
        return found

    def close(self) -> None:
        """Write out what TensorBoard still holds back."""
        if self._board is not None:
            with suppress(OSError):
                self._board.close()


def check_folder(folder: RunFolder, resume: bool, force: bool) -> None:
    """Raise AsymswapError where a run is there already, and nobody said what is to become of it."""
    if folder.folder.exists() and not folder.folder.is_dir():
        raise OutputError(f"{folder.folder} is a file; the run needs a folder of that name, give another with --run")
    if folder.exists and not resume and not force:
        raise AsymswapError(
            f"there is a run in {folder.folder} already; --resume continues it, --force begins anew, "
            "--run names another"
        )


def _hash(state: Mapping[str, Any]) -> str:
    """SHA-256 over all numbers of a state."""
    parts = list_tensors({key: state[key] for key in sorted(_STATE)})
    return tensors_hash({str(number): tensor for number, tensor in enumerate(parts)})


def _step_of(line: str) -> float:
    """The step that a line speaks of; infinite for one that was cut off."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


def _scalars(row: StepRow | EpochRow, event: str) -> list[tuple[str, float]]:
    values = [(f"{event}/loss", row.train.loss), (f"{event}/top1", row.train.top1), (f"{event}/lr", row.lr)]
    if isinstance(row, EpochRow) and row.validation is not None:
        values += [("validation/loss", row.validation.loss), ("validation/top1", row.validation.top1)]
    return values


def _tensorboard(folder: Path, step: int) -> Any:
    """A writer of TensorBoard's files, or None where it is not installed."""
    if importlib.util.find_spec("tensorboard") is None:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=step + 1)
