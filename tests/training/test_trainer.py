"""Training as a whole: what is learned and kept, and that an interrupted run is the run that it would have been."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from processes import forked
from sklearn.datasets import load_digits
from torch import nn

import asymswap
from asymswap.checkpoint import read_checkpoint
from asymswap.errors import AsymswapError, CheckpointError, OutputError
from asymswap.results.finetune import EpochRow, RunStart, StepRow
from asymswap.training import trainer as loop
from asymswap.training.config import Callback, Training
from asymswap.training.run_folder import RunFolder, _hash

pytestmark = pytest.mark.usefixtures("one_thread")

# Dropout and a moving average are there so that there is more to be restored than weights.
SHORT = Training(
    epochs=3, batch_size=32, lr=5e-3, ema=0.8, augment=("randaugment", "mixup"), save_every=2, validation="0.2"
)
STEPS = 6
"""So many make an epoch."""


class Net(nn.Module):
    """A network for the digits that a test trains in a blink; it draws random numbers of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.2),
            nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AvgPool2d(4), nn.Flatten(),
        )  # fmt: skip
        self.head = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A few of the digits in a file: 24 of each."""
    found = load_digits()
    chosen = [index for digit in range(10) for index in (found.target == digit).nonzero()[0][:24]]
    path = tmp_path_factory.mktemp("data") / "digits.pt"
    images = torch.from_numpy(found.images[chosen]).float() / 16
    torch.save({"images": images, "labels": torch.from_numpy(found.target[chosen])}, path)
    return str(path)


HALF = asymswap.PreprocessingOptions(normalize="half")

RULE = "[[rules]]\nmatch = { names = ['body.4'] }\nswap = { kind = 'weighted-offset' }\n"


@dataclass(frozen=True)
class Start:
    """A converted checkpoint with an offset layer in it, and images to train it on."""

    path: Path
    digits: str

    def train(self, name: str, settings: Training = SHORT, **options: Any) -> Any:
        return asymswap.finetune(
            asymswap.open_model(self.path, arch=Net()), self.digits, settings, output=self / name, **options
        )

    def __truediv__(self, name: str) -> Path:
        return self.path.with_name(name)


def make_start(folder: Path, digits: str) -> Start:
    torch.manual_seed(0)
    (folder / "r.toml").write_text(RULE)
    asymswap.save(
        asymswap.convert(
            asymswap.open_model(Net().eval(), input_size=(1, 8, 8), preprocessing=HALF), folder / "r.toml"
        ),
        folder / "x.asym.pt",
    )
    return Start(folder / "x.asym.pt", digits)


@pytest.fixture
def start(tmp_path: Path, digits: str) -> Start:
    return make_start(tmp_path, digits)


def weights(path: Path) -> dict[str, torch.Tensor]:
    return dict(read_checkpoint(path).state)


def test_frozen_batch_norms_keep_their_statistics_and_nothing_else(start: Start) -> None:
    before = weights(start.path)
    start.train("free.pt")
    start.train("frozen.pt", dataclasses.replace(SHORT, freeze_bn=True))
    statistics = [key for key in before if "running_" in key]
    assert statistics
    free, frozen = weights(start / "free.pt"), weights(start / "frozen.pt")
    assert all(torch.equal(before[key], frozen[key]) for key in statistics)
    assert not any(torch.equal(before[key], free[key]) for key in statistics)
    assert not any(torch.equal(before[key], frozen[key]) for key in ("body.0.weight", "body.1.weight", "head.weight"))


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[key]) for key, tensor in one.items())


DOOMED = """
import importlib.util, pathlib, sys

spec = importlib.util.spec_from_file_location("doomed", {file!r})
module = sys.modules["doomed"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
module.KILLS[{kill!r}]()
module.Start(pathlib.Path({path!r}), {digits!r}).train("broken.pt")
"""


def run_to_its_death(start: Start, kill: str) -> int:
    """Train in a new process that dies as arranged; its exit code."""
    code = DOOMED.format(file=__file__, kill=kill, path=str(start.path), digits=start.digits)
    return forked(code, cwd=start.path.parent).returncode


def die(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at_step(step: int) -> Callable[[], None]:
    """Die in the middle of this step, its gradients computed and nothing updated."""

    def arrange() -> None:
        learn = loop.Trainer._learn

        def _learn(self: Any, *arguments: Any) -> None:
            learn(self, *arguments)
            if self.progress.step == step:
                die()

        loop.Trainer._learn = _learn  # type: ignore[method-assign]

    return arrange


def while_saving(count: int) -> Callable[[], None]:
    """Die with half a state written."""

    def arrange() -> None:
        calls = []
        save = torch.save

        def half(value: Any, file: Any) -> None:
            if isinstance(value, dict) and "asymswap_training" in value:
                calls.append(1)
                if len(calls) == count:
                    file.write(b"half a state")
                    file.flush()
                    die()
            save(value, file)

        torch.save = half  # type: ignore[assignment]

    return arrange


def between_checkpoints_and_state() -> None:
    """Die when the second epoch's checkpoints are written, and the state is still that of before."""
    save = RunFolder.save_state

    def save_state(self: RunFolder, payload: Any) -> None:
        if payload["progress"]["epoch"] == 2:
            die()
        save(self, payload)

    RunFolder.save_state = save_state  # type: ignore[method-assign]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, digits: str) -> Start:
    """A run that nothing has interrupted, on one thread like those beside it: sums depend on the number of threads."""
    start = make_start(tmp_path_factory.mktemp("whole"), digits)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    start.train("whole.pt")
    torch.set_num_threads(before)
    return start


KILLS: dict[str, Callable[[], None]] = {
    "before anything was saved": at_step(1),
    "in the middle of an epoch": at_step(5),
    "right after a saving": at_step(4),
    "in the second epoch": at_step(13),
    "while the state is written": while_saving(3),
    "between the checkpoints and the state": between_checkpoints_and_state,
}
KILLED_IN_SHORT = ("in the middle of an epoch", "between the checkpoints and the state")
"""What `make test` tries."""


@pytest.mark.parametrize(
    "kill",
    [pytest.param(kill, marks=() if kill in KILLED_IN_SHORT else pytest.mark.nightly) for kill in KILLS],
)
def test_a_killed_run_that_is_resumed_is_the_unbroken_one(start: Start, whole: Start, kill: str) -> None:
    assert run_to_its_death(start, kill) == -signal.SIGKILL
    assert not (start / "broken.pt").exists()
    # What was drawn before must not matter.
    torch.manual_seed(len(kill))
    start.train("broken.pt", resume=True)
    assert same(weights(start / "broken.pt"), weights(whole / "whole.pt"))
    runs = [whole / "whole.run", start / "broken.run"]
    assert same(weights(runs[0] / "last.pt"), weights(runs[1] / "last.pt"))
    # Every step and epoch is told once, and of each the same.
    told = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in runs]
    for one, other in zip(*told, strict=True):
        for row in (one, other):
            for key in ("images_per_second", "seconds", "settings"):
                row.pop(key, None)
        assert one == other
    # Nor is half a file left.
    assert not list((start / "broken.run").glob(".*"))


def test_all_state_matters(start: Start, whole: Start) -> None:
    """The test above can fail: a run that forgets its optimizer's state comes to another end."""
    assert run_to_its_death(start, "in the middle of an epoch") == -signal.SIGKILL
    state = torch.load((start / "broken.run") / "state.pt", weights_only=True)
    for entry in state["optimizer"]["state"].values():
        entry["exp_avg"].zero_()
    state["sha256"] = _hash(state)
    torch.save(state, (start / "broken.run") / "state.pt")
    start.train("broken.pt", resume=True)
    assert not same(weights(start / "broken.pt"), weights(whole / "whole.pt"))


class Seen(Callback):
    def __init__(self) -> None:
        self.start: RunStart | None = None
        self.steps: list[StepRow] = []
        self.epochs: list[EpochRow] = []

    def begin(self, start: RunStart) -> None:
        self.start = start

    def step(self, row: StepRow) -> None:
        self.steps.append(row)

    def epoch(self, row: EpochRow) -> None:
        self.epochs.append(row)


def test_it_learns_and_tells_and_keeps_the_best(start: Start) -> None:
    seen = Seen()
    tuned = start.train("out.pt", dataclasses.replace(SHORT, epochs=4, ema=None, augment=("none",)), callback=seen)
    report = tuned.report
    assert report.before["top1"] < 0.3 < report.best["top1"]
    assert report.best["loss"] < report.before["loss"]
    tops = [row.validation["top1"] for row in seen.epochs if row.validation is not None]
    assert report.best["top1"] == max(tops)
    assert report.best_epoch == next(row.epoch for row in reversed(seen.epochs) if row.best)
    assert seen.start == RunStart(4, 4 * STEPS, 0, report.before)
    assert [row.step for row in seen.steps] == list(range(1, 4 * STEPS + 1))
    assert seen.epochs[-1].train["loss"] < seen.epochs[0].train["loss"]
    # What is returned, what is written and what is told are one.
    assert same(dict(tuned.model.state_dict()), weights(start / "out.pt"))
    again = asymswap.evaluate(
        [asymswap.open_model(tuned.model, input_size=(1, 8, 8), preprocessing=HALF)],
        start.digits,
        part="validation",
        validation="0.2",
    ).models[0]
    assert again.scores[0].value == report.best["top1"]
    assert again.classifier is not None
    assert again.classifier.loss == pytest.approx(report.best["loss"], rel=1e-5)


def test_the_checkpoint_tells_of_its_training(start: Start) -> None:
    start.train("out.pt", dataclasses.replace(SHORT, epochs=1))
    header = read_checkpoint(start / "out.pt").header
    (record,) = header.provenance["training"]
    assert record["classes"] == list("0123456789")
    assert (record["epochs"], record["steps"], record["best_epoch"]) == (1, STEPS, 1)
    assert record["settings"]["ema"] == 0.8
    assert record["settings"]["lr"] == 5e-3
    assert record["data"].startswith("190 of file ")
    assert header.provenance["report"]["model"]["reference"] == "Net"
    loaded = asymswap.load((start / "out.pt"), model=Net())
    assert not loaded.training
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    # Trained again, it tells of both.
    dataclasses.replace(start, path=start / "out.pt").train("more.pt", dataclasses.replace(SHORT, epochs=1))
    assert len(read_checkpoint(start / "more.pt").header.provenance["training"]) == 2


def test_equal_runs_write_equal_files_and_leave_the_caller_alone(start: Start) -> None:
    short, net = dataclasses.replace(SHORT, epochs=1), Net()
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()
    asymswap.finetune(asymswap.open_model(start.path, arch=net), start.digits, short, output=start / "a.pt")
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.array_equal(np.random.get_state()[1], before[2][1])  # type: ignore[arg-type]
    start.train("b.pt", short)
    assert (start / "a.pt").read_bytes() == (start / "b.pt").read_bytes()
    start.train("c.pt", dataclasses.replace(short, seed=1))
    assert not same(weights(start / "a.pt"), weights(start / "c.pt"))


def test_without_an_output_nothing_is_written_and_the_module_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, digits: str
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    net = Net()
    conversion = asymswap.convert(asymswap.open_model(net, input_size=(1, 8, 8), preprocessing=HALF), "offset")
    before = {key: value.clone() for key, value in conversion.model.state_dict().items()}
    tuned = asymswap.finetune(conversion, digits, Training(steps=3))
    assert tuned.report.steps == 3
    assert same(dict(conversion.model.state_dict()), before)
    assert not same(dict(tuned.model.state_dict()), before)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("what", ["new", "bn"])
def test_what_is_not_trained_does_not_change(start: Start, what: str) -> None:
    start.train("out.pt", Training(steps=3, train=what, lr=0.05))
    before, after = weights(start.path), weights(start / "out.pt")
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    norms = {key for key in before if key.startswith(("body.1.", "body.5."))}
    new = {key for key in before if key.startswith("body.4.")}
    assert changed == (new if what == "new" else norms)


def test_accumulated_batches_are_one_large_one(start: Start) -> None:
    """Without batch statistics, which differ; mean over all images of a step, whatever its size."""
    alike = Training(steps=4, train="new", augment=("none",), validation="none", optimizer="sgd", lr=0.1)
    class_ = nn.Dropout.forward
    nn.Dropout.forward = lambda self, x: x  # type: ignore[method-assign]
    try:
        start.train("one.pt", dataclasses.replace(alike, batch_size=60))
        start.train("three.pt", dataclasses.replace(alike, batch_size=20, accumulate=3))
    finally:
        nn.Dropout.forward = class_  # type: ignore[method-assign]
    one, three = (weights(start / name) for name in ("one.pt", "three.pt"))
    for key, tensor in one.items():
        # The batch norm of the frozen rest is still.
        torch.testing.assert_close(three[key], tensor, rtol=1e-4, atol=1e-6)
    assert not same(one, weights(start.path))


def test_patience_ends_it(start: Start) -> None:
    settings = Training(epochs=50, lr=1e-9, patience=2, train="new", ema=0.999, augment=("none",), batch_size=1024)
    report = start.train("out.pt", settings).report
    assert report.epochs < 50
    assert report.epochs - report.best_epoch == 2
    assert any(note.startswith("stopped early: no better epoch since") for note in report.notes)


def test_a_loss_that_is_no_number_stops_and_the_last_good_checkpoint_stays(start: Start) -> None:
    good: dict[str, Any] = {}
    epoch = loop.Trainer._end_epoch

    def poisoned(self: Any, *arguments: Any) -> None:
        epoch(self, *arguments)
        good.update(weights(self.folder.last))
        with torch.no_grad():
            self.raw.head.bias.fill_(float("nan"))

    loop.Trainer._end_epoch = poisoned  # type: ignore[method-assign]
    try:
        said = (
            r"the loss is nan at step 7 .epoch 2, `lr=0.005`.: stopped; the last good checkpoint is "
            r".*out.run/last.pt; try a smaller `lr=…`, `clip=1` or a longer `warmup=…`"
        )
        with pytest.raises(AsymswapError, match=said):
            start.train("out.pt")
    finally:
        loop.Trainer._end_epoch = epoch  # type: ignore[method-assign]
    assert not (start / "out.pt").exists()
    assert same(weights((start / "out.run") / "last.pt"), good)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in good.values())


def test_a_rate_that_is_far_too_high_ends_in_words(start: Start) -> None:
    with pytest.raises(AsymswapError, match=r"(loss is|holds) (nan|inf|NaN|infinity).*: stopped; try a smaller `lr=…`"):
        start.train("out.pt", Training(steps=30, optimizer="sgd", lr=1e12, augment=("none",)))


@pytest.mark.parametrize(
    "error", [RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), torch.OutOfMemoryError("CUDA")]
)
def test_no_memory_left(start: Start, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fails(*_: object) -> None:
        raise error

    monkeypatch.setattr(loop.Trainer, "_learn", fails)
    with pytest.raises(
        AsymswapError, match=r"not enough memory for `batch_size=32`; `batch_size=16` with `accumulate=2` gives"
    ):
        start.train("out.pt")


def test_batches_of_one_image(start: Start) -> None:
    class Normed(Net):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Sequential(nn.Linear(32, 10), nn.BatchNorm1d(10))  # type: ignore[assignment]

    with pytest.raises(AsymswapError, match=r"a batch norm got a single image, .* give a larger `batch_size=…`"):
        asymswap.finetune(
            asymswap.open_model(Normed(), input_size=(1, 8, 8), preprocessing=HALF),
            start.digits,
            Training(steps=1, batch_size=1),
        )


def test_a_full_disk_leaves_the_former_state_whole(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = torch.save
    count = []

    def full(value: Any, file: Any) -> None:
        if isinstance(value, dict) and "asymswap_training" in value:
            count.append(1)
            if len(count) == 3:
                file.write(b"half")
                raise OSError(28, "No space left on device")
        saved(value, file)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OutputError, match=r"cannot write .*out.run/state.pt: No space left on device"):
        start.train("out.pt")
    monkeypatch.undo()
    state = RunFolder(start / "out.run").read_state()
    assert state is not None
    assert state["progress"]["step"] == 4
    assert not list((start / "out.run").glob(".*"))
    start.train("out.pt", resume=True)
    start.train("whole.pt")
    assert same(weights(start / "out.pt"), weights(start / "whole.pt"))


def test_a_run_is_resumed_as_it_was_begun(start: Start) -> None:
    start.train("out.pt", Training(steps=2))
    with pytest.raises(AsymswapError, match=r"begun with other settings: `steps=4` \(was 2\), `lr=0.01` \(was 0.001\)"):
        start.train("out.pt", Training(steps=4, lr=0.01), resume=True)
    with pytest.raises(
        AsymswapError, match=r"there is a run in .*out.run already; continue it with `resume=True`, start again"
    ):
        start.train("y.pt", Training(steps=2), run=(start / "out.run"))
    # A finished run is finished; one that is forced begins anew.
    before = (start / "out.pt").read_bytes()
    (start / "out.pt").unlink()
    assert start.train("out.pt", Training(steps=2), resume=True).report.steps == 2
    assert (start / "out.pt").read_bytes() == before
    with pytest.raises(AsymswapError, match="no-such-data"):
        asymswap.finetune(
            asymswap.open_model(start.path, arch=Net()), "no-such-data", output=start / "out.pt", force=True
        )
    assert (start / "out.run" / "best.pt").exists()
    mine = start / "out.run" / "tensorboard" / "mine.txt"
    mine.parent.mkdir(exist_ok=True)
    mine.touch()
    start.train("out.pt", Training(steps=1), force=True)
    assert (start / "out.pt").read_bytes() != before
    assert mine.exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"nothing"])
def test_a_state_that_is_damaged(start: Start, content: bytes) -> None:
    folder = start / "out.run"
    folder.mkdir()
    (folder / "state.pt").write_bytes(content)
    with pytest.raises(
        CheckpointError, match=r"the run's state .*state.pt is damaged .*; start again with `force=True`"
    ):
        start.train("out.pt", resume=True)
    for value in ({"asymswap_training": 1, "nn": nn.Conv2d}, {"asymswap_training": 99}, [1]):
        torch.save(value, folder / "state.pt")
        with pytest.raises(
            CheckpointError, match=r"state.pt is not the state of a run of this version; start again with `force=True`"
        ):
            start.train("out.pt", resume=True)


def test_half_precision(start: Start) -> None:
    report = start.train("out.pt", Training(steps=20, precision="bf16", lr=3e-3, augment=("none",))).report
    assert report.best["loss"] < report.before["loss"]
    assert all(tensor.dtype != torch.bfloat16 for tensor in weights(start / "out.pt").values())
    with pytest.raises(AsymswapError, match=r"`precision=fp16` needs a GPU; use bf16 or fp32"):
        start.train("half.pt", Training(steps=1, precision="fp16"))


def test_weights_of_half_precision_are_trained_in_full_and_stored_as_they_were(tmp_path: Path, digits: str) -> None:
    torch.manual_seed(0)
    conversion = asymswap.convert(
        asymswap.open_model(Net().eval().bfloat16(), input_size=(1, 8, 8), preprocessing=HALF), "offset"
    )
    tuned = asymswap.finetune(conversion, digits, Training(steps=10), output=tmp_path / "o.pt")
    assert {p.dtype for p in tuned.model.parameters()} == {torch.bfloat16}
    assert {t.dtype for t in weights(tmp_path / "o.pt").values() if t.is_floating_point()} == {torch.bfloat16}


def test_classes_that_do_not_match(start: Start, tmp_path: Path) -> None:
    class Nine(Net):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(32, 9)

    with pytest.raises(AsymswapError, match=r"the model scores 9 classes, but the data has 10 .*; give data with the"):
        asymswap.finetune(
            asymswap.open_model(Nine(), input_size=(1, 8, 8), preprocessing=HALF), "digits", Training(steps=1)
        )
    Nine.__init__ = lambda self: (Net.__init__(self), setattr(self, "head", nn.Linear(32, 12)))[0]  # type: ignore[method-assign]
    with pytest.raises(
        AsymswapError, match=r"the model scores 12 classes, but the data has 10 .*; give data with the model's"
    ):
        asymswap.finetune(
            asymswap.open_model(Nine(), input_size=(1, 8, 8), preprocessing=HALF), "digits", Training(steps=1)
        )
    start.train("out.pt", Training(steps=1))
    torch.save(
        {"images": torch.rand(90, 1, 8, 8), "labels": torch.arange(90) % 10, "classes": [*"1234567890"]},
        tmp_path / "d.pt",
    )
    with pytest.raises(
        AsymswapError, match=r"class '1' is number 0 of the data and number 1 of the model .*; name the"
    ):
        asymswap.finetune(asymswap.open_model(start / "out.pt", arch=Net()), str(tmp_path / "d.pt"), Training(steps=1))


NET_FILE = """
from torch import nn

def make(channels):
    body = nn.Sequential(nn.Conv2d(1, channels, 3, padding=1), nn.ReLU(), nn.Conv2d(channels, 8, 3, padding=1))
    return nn.Sequential(body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))

class Net(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.body = make(channels)

    def forward(self, x):
        return self.body(x)
"""


def test_a_network_of_the_users_file_is_built_as_it_was_when_it_was_converted(tmp_path: Path, digits: str) -> None:
    (tmp_path / "net.py").write_text(NET_FILE)
    reference = f"{tmp_path / 'net.py'}:Net"
    conversion = asymswap.convert(
        asymswap.open_model(reference, arguments={"channels": 6}, input_size=(1, 8, 8), weights="none"),
        "acnet",
    )
    asymswap.save(conversion, tmp_path / "x.pt")
    # The number of channels is the checkpoint's to tell.
    tuned = asymswap.finetune(
        asymswap.open_model(tmp_path / "x.pt", arch=reference, preprocessing=HALF),
        digits,
        Training(steps=1),
    )
    assert [key for key, _ in tuned.model.named_parameters()] == [key for key, _ in conversion.model.named_parameters()]


def test_what_a_run_that_saved_nothing_told_is_not_the_next_ones(start: Start) -> None:
    folder = start / "out.run"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"event": "start", "step": 0, "settings": {"lr": 1e9}}\n')
    start.train("out.pt")
    first, *others = (json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())
    assert first["settings"]["lr"] != 1e9
    assert all(row["event"] != "start" for row in others)
