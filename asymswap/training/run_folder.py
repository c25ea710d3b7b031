"""The folder of a training run: its metrics, and all that is needed to continue after it was killed at any moment.

state.pt       everything that the next step depends on, in one file: replaced as a whole; read like any other file
best.pt        the checkpoint of the best epoch so far
last.pt        the checkpoint of the last epoch
metrics.jsonl  a line of JSON for every step and epoch
tensorboard/   the same, where TensorBoard is installed
"""

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
from asymswap.utils.files import real_cause, whole_file, write_file
from asymswap.utils.tensors import list_tensors, tensors_hash

STATE_FORMAT = 1
_STATE = {"identity", "progress", "model", "average", "optimizer", "scaler"}  # what is kept besides the format
_AGAIN = "start again with `force=True`"


class RunFolder:
    """The files of one run; nothing is written before `begin`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.state, self.best, self.last = (folder / name for name in ("state.pt", "best.pt", "last.pt"))
        self.metrics = folder / "metrics.jsonl"
        self._board: Any = None

    @property
    def exists(self) -> bool:
        """True if the folder holds a run, of any version, that can be continued or has written a checkpoint."""
        return any(path.exists() for path in (self.state, self.best, self.last))

    def clear(self) -> None:
        """Remove the files of a former run."""
        if not self.exists:
            return
        # TensorBoard's go first: while the other files are left, `exists` still finds the run.
        events = (self.folder / "tensorboard").glob("events.out.tfevents.*")
        for path in (*events, self.state, self.best, self.last, self.metrics):
            path.unlink(missing_ok=True)

    def begin(self, step: int, identity: Mapping[str, Any]) -> None:
        """Make the folder, and drop the metrics of steps after this one, which will be repeated; at step 0 all."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            rows = self.metrics.read_text(encoding="utf-8").splitlines() if self.metrics.exists() else []
        except OSError as error:
            raise OutputError(f"cannot write to the run's folder {self.folder}: {error.strerror or error}") from None
        start = json.dumps({"event": "start", "step": 0, "settings": identity})
        kept = [line for line in rows if _step_of(line) <= step] if step else []
        write_file(self.metrics, "".join(f"{line}\n" for line in kept or [start]))
        if importlib.util.find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=step + 1)

    def add(self, row: StepRow) -> None:
        """Add a line to the metrics."""
        event = "epoch" if isinstance(row, EpochRow) else "step"
        try:
            with self.metrics.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"event": event, **asdict(row)}) + "\n")
        except OSError as error:
            raise OutputError(f"cannot write {self.metrics}: {error.strerror or error}") from None
        if self._board is None:
            return
        scalars = {f"{event}/{name}": value for name, value in {**row.train, "lr": row.lr}.items()}
        if isinstance(row, EpochRow) and row.validation is not None:
            scalars |= {f"validation/{name}": value for name, value in row.validation.items()}
        for name, value in scalars.items():
            self._board.add_scalar(name, value, row.step)

    def save_state(self, payload: Mapping[str, Any]) -> None:
        """Replace the state, completely or not at all."""
        assert payload.keys() == _STATE
        with whole_file(self.state) as draft, draft.open("wb") as file:
            try:
                torch.save({"asymswap_training": STATE_FORMAT, "sha256": _hash(payload), **payload}, file)
            except RuntimeError as error:
                raise real_cause(error) from error

    def read_state(self) -> dict[str, Any] | None:
        """Return the state, None if no step was saved yet; raise CheckpointError for any other file."""
        if not self.state.exists():
            return None
        try:
            found = load_object(self.state, sniff(self.state), False, "it", "no run leaves such a file")
        except SourceError as error:
            raise CheckpointError(f"the run's state {self.state} is damaged ({error}); {_AGAIN}") from None
        if not isinstance(found, dict) or found.get("asymswap_training") != STATE_FORMAT or not found.keys() >= _STATE:
            raise CheckpointError(f"{self.state} is not the state of a run of this version; {_AGAIN}")
        # Runs of earlier versions have no hash.
        if "sha256" in found and found["sha256"] != _hash(found):
            raise CheckpointError(f"the run's state {self.state} is damaged (its numbers changed); {_AGAIN}")
        return found

    def close(self) -> None:
        """Let TensorBoard write what it still buffers."""
        if self._board is not None:
            with suppress(OSError):
                self._board.close()


def check_folder(folder: RunFolder, resume: bool, force: bool) -> None:
    """Raise AsymswapError for an existing run that is to be neither resumed nor replaced."""
    if folder.folder.exists() and not folder.folder.is_dir():
        raise OutputError(f"{folder.folder} is a file; the run needs a folder of that name, give another as `run=…`")
    if folder.exists and not resume and not force:
        advice = f"continue it with `resume=True`, {_AGAIN}, or give another"
        raise AsymswapError(f"there is a run in {folder.folder} already; {advice}")


def _hash(state: Mapping[str, Any]) -> str:
    """Return the SHA-256 over all numbers of a state."""
    parts = list_tensors({key: state[key] for key in sorted(_STATE)})
    return tensors_hash({str(number): tensor for number, tensor in enumerate(parts)})


def _step_of(line: str) -> float:
    """Return the step of a line of metrics, infinity for a truncated line."""
    with suppress(ValueError, KeyError, TypeError):
        return float(json.loads(line)["step"])
    return float("inf")
