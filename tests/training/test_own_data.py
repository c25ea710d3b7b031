"""Training on what the user brings: data, inputs, loss and validation of their own, and a teacher without labels."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import asymswap
from asymswap.checkpoint import read_checkpoint
from asymswap.errors import AsymswapError
from asymswap.reporting.screens import epoch_line, step_words
from asymswap.results.finetune import EpochRow, StepRow
from asymswap.training.config import Callback, Training
from asymswap.training.objective import output_error

pytestmark = pytest.mark.usefixtures("one_thread")

TWO = Training(epochs=2, lr=5e-3)


class Denoiser(nn.Module):
    """From an image to an image; it draws random numbers of its own, and has running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.1))
        self.tail = nn.Conv2d(6, 1, 3, padding=1)

    def forward(self, noisy: Tensor, scale: float = 1.0) -> Tensor:
        return self.tail(self.body(noisy)) * scale  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def net() -> asymswap.Conversion:
    torch.manual_seed(0)
    return asymswap.convert(asymswap.open_model(Denoiser().eval(), input_size=(1, 8, 8)), "acnet")


CLEAN = torch.rand(44, 1, 8, 8, generator=torch.Generator().manual_seed(1))
NOISY = CLEAN + 0.1 * torch.randn(44, 1, 8, 8, generator=torch.Generator().manual_seed(2))
PAIRS = TensorDataset(NOISY, CLEAN)


class Augmented(Dataset[tuple[Tensor, Tensor]]):
    """The pairs with noise that is drawn when they are read."""

    def __len__(self) -> int:
        return len(CLEAN)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return CLEAN[index] + 0.1 * torch.randn(1, 8, 8), CLEAN[index]


def squares(outputs: Tensor, batch: Any) -> Tensor:
    return (outputs - batch[1]).square().mean()


def quality(model: nn.Module) -> dict[str, float]:
    assert not model.training
    error = float((model(NOISY) - CLEAN).square().mean())
    return {"psnr": -10 * torch.log10(torch.tensor(error)).item(), "error": error}


QUALITY = asymswap.Metric(quality, lower_is_better=("error",))


def drawn() -> Iterator[dict[str, Tensor]]:
    """Five batches that a generator draws, with an entry that the network does not take."""
    for _ in range(5):
        yield {"noisy": torch.randn(4, 1, 8, 8), "name": torch.zeros(4)}


def same(one: nn.Module, other: nn.Module) -> bool:
    states = one.state_dict(), other.state_dict()
    return all(torch.equal(tensor, states[1][key]) for key, tensor in states[0].items())


def test_a_loss_and_a_validation_of_the_users(net: asymswap.Conversion, tmp_path: Path) -> None:
    rows: list[EpochRow] = []

    class Seen(Callback):
        def epoch(self, row: EpochRow) -> None:
            rows.append(row)

    tuned = asymswap.finetune(
        net,
        DataLoader(PAIRS, 8, shuffle=True),
        Training(epochs=6, lr=1e-2),
        loss=squares,
        evaluate=QUALITY,
        output=tmp_path / "d.pt",
        callback=Seen(),
    )
    report = tuned.report
    assert report.before is not None
    assert report.best is not None
    assert report.best["psnr"] > report.before["psnr"] + 3
    # What is kept is what the validation found to be the best, by its first name.
    validated = [row.validation for row in rows if row.validation is not None]
    assert report.best["psnr"] == max(scores["psnr"] for scores in validated)
    with torch.no_grad():
        assert quality(tuned.model) == pytest.approx(report.best, rel=1e-5)
    assert report.data == "6 batches of a DataLoader"
    assert report.validation == "quality(model)"
    assert rows[0].train.keys() == {"loss"}
    (record,) = read_checkpoint(tmp_path / "d.pt").header.provenance["training"]
    assert record["scores"]["best"] == report.best
    assert (record["settings"]["loss"], record["settings"]["batch_size"]) == ("squares", None)
    line = json.loads((tmp_path / "d.run/metrics.jsonl").read_text().splitlines()[-1])
    assert (line["unit"], line["validation"]) == ("batches", validated[-1])


def test_less_is_better_of_some_scores(net: asymswap.Conversion) -> None:
    """A validation that falls and rises: of an error its least value is the best epoch, of a score its highest."""

    def kept(lower: tuple[str, ...] | str = ()) -> int:
        values = iter([9.0, 5.0, 2.0, 7.0])

        def error(model: nn.Module) -> float:
            return next(values)

        metric = asymswap.Metric(error, lower_is_better=lower)
        return asymswap.finetune(net, [NOISY], Training(epochs=3), teacher=net.model, evaluate=metric).report.best_epoch

    assert kept() == 3
    assert kept(("error",)) == kept("error") == 2


SOURCES: dict[str, Callable[[], Any]] = {
    "a loader that shuffles": lambda: DataLoader(Augmented(), 8, shuffle=True),
    "a loader with a generator of its own": lambda: DataLoader(
        Augmented(), 8, shuffle=True, generator=torch.Generator()
    ),
    "a dataset": Augmented,
    "a generator function": lambda: drawn,
    "a function that returns a loader": lambda: lambda: DataLoader(PAIRS, 8, shuffle=True),
}


@pytest.mark.parametrize("source", SOURCES)
def test_an_interrupted_run_is_the_unbroken_one(net: asymswap.Conversion, tmp_path: Path, source: str) -> None:
    """The batches are drawn as they were, though the half of an epoch is read again."""

    class Killed(BaseException):
        pass

    class Kill(Callback):
        def step(self, row: StepRow) -> None:
            if row.step == 4:
                raise Killed

    settings = Training(steps=9, lr=5e-3, ema=0.8, accumulate=2, clip=1.0, save_every=1)
    if source == "a dataset":
        settings = dataclasses.replace(settings, batch_size=6)
    options: dict[str, Any] = {"teacher": net.model} if source == "a generator function" else {"loss": squares}
    whole = asymswap.finetune(net, SOURCES[source](), settings, output=tmp_path / "whole.pt", **options)
    with pytest.raises(Killed):
        asymswap.finetune(net, SOURCES[source](), settings, output=tmp_path / "b.pt", callback=Kill(), **options)
    torch.manual_seed(9)
    again = asymswap.finetune(net, SOURCES[source](), settings, output=tmp_path / "b.pt", resume=True, **options)
    assert same(whole.model, again.model)
    assert (tmp_path / "whole.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()
    assert not same(whole.model, net.model)


def test_a_loaders_generator_stays_as_it_was(net: asymswap.Conversion) -> None:
    generator = torch.Generator().manual_seed(5)
    before = generator.get_state()
    asymswap.finetune(net, DataLoader(PAIRS, 8, shuffle=True, generator=generator), Training(steps=2), loss=squares)
    assert torch.equal(generator.get_state(), before)


def test_a_teacher_alone_is_learned(net: asymswap.Conversion) -> None:
    """From random weights on, without labels: the outputs come near; part of a dataset is held back."""
    torch.manual_seed(3)
    student = Denoiser().eval()
    tuned = asymswap.finetune(student, NOISY, Training(epochs=30, lr=2e-2, batch_size=8), teacher=net.model)
    before, best = tuned.report.before, tuned.report.best
    assert before is not None
    assert best is not None
    assert best["loss"] < 0.3 * before["loss"]
    assert tuned.report.data == "40 of 44 samples of a Tensor (seed 0)"
    assert tuned.report.validation == "4 of 44 samples of a Tensor (seed 0)"
    assert tuned.report.teacher == "Denoiser"
    assert all(parameter.requires_grad for parameter in net.model.parameters())


def test_a_teacher_beside_a_loss_and_blocks_that_are_compared(tmp_path: Path) -> None:
    """What is minimised is 0.75 times the teacher's part, a quarter of the loss, and the part of the blocks."""
    torch.manual_seed(0)
    original = Denoiser().eval()
    recipe = tmp_path / "r.toml"
    recipe.write_text("[[rules]]\nmatch = { names = ['body.0'] }\nswap = { kind = 'cross' }\n")
    given = asymswap.open_model(original, input_size=(1, 8, 8))
    converted = asymswap.convert(given, recipe)
    losses: list[float] = []

    class Seen(Callback):
        def step(self, row: StepRow) -> None:
            losses.append(row.train["loss"])

    options: dict[str, Any] = {"teacher": original, "callback": Seen()}
    base = Training(steps=1, lr=1e-9, precision="bf16")
    runs = {
        "teacher": (base, {}),
        "both": (dataclasses.replace(base, distill="original", distill_weight=0.75), {"loss": one}),
        "blocks": (dataclasses.replace(base, distill="original", distill_features=2.0), {}),
    }
    for settings, more in runs.values():
        asymswap.finetune(converted, [NOISY], settings, **options, **more)
    alone, both, blocks = losses
    assert both == pytest.approx(0.75 * alone + 0.25, rel=1e-3)
    assert blocks > alone > 0


def one(outputs: Tensor, batch: Any) -> Tensor:
    """A loss of 1 that depends on the outputs."""
    return outputs.sum() * 0 + 1


def test_batches_without_a_validation_say_so(net: asymswap.Conversion) -> None:
    before = torch.get_rng_state()
    report = asymswap.finetune(net, drawn, Training(epochs=1), teacher=net.model).report
    # Nor has counting them drawn anything.
    assert torch.equal(torch.get_rng_state(), before)
    assert report.best is None
    assert (
        "the last weights are kept: to keep the best give `evaluate=…`, or a Dataset to hold back from" in report.notes
    )
    assert "the data has no length: its 5 batches were counted by reading it once" in report.notes


def test_a_gradient_is_the_mean_over_the_batches_of_a_step(net: asymswap.Conversion) -> None:
    """Two batches of a step are one of both, where nothing is random and batch norms are still."""
    settings = Training(steps=2, optimizer="sgd", momentum=0.0, lr=0.1, train="new", accumulate=2, warmup=0)
    halves = [(NOISY[:8], CLEAN[:8]), (NOISY[8:16], CLEAN[8:16])]
    plain = asymswap.convert(
        asymswap.open_model(nn.Sequential(nn.Conv2d(1, 1, 3, padding=1)).eval(), input_size=(1, 8, 8)),
        "acnet",
        overrides={"allow_growth": True},
    )
    one = asymswap.finetune(plain, halves, settings, loss=squares).model
    whole = [(NOISY[:16], CLEAN[:16])]
    other = asymswap.finetune(plain, whole, dataclasses.replace(settings, accumulate=1), loss=squares).model
    for key, tensor in one.state_dict().items():
        torch.testing.assert_close(other.state_dict()[key], tensor)
    assert not same(one, plain.model)


def test_inputs_say_what_the_network_gets(net: asymswap.Conversion) -> None:
    seen: list[float] = []

    class Scaled(Denoiser):
        def forward(self, noisy: Tensor, scale: float = 1.0) -> Tensor:
            seen.append(scale)
            return super().forward(noisy, scale)

    for given in ({"noisy": NOISY[:4], "scale": 2.0}, (NOISY[:4], 2.0)):
        asymswap.finetune(
            Scaled(),
            [(0, given)],
            Training(steps=1),
            inputs=lambda batch: batch[1],
            loss=lambda outputs, _: outputs.mean(),
        )
    assert set(seen) == {2.0}


class TwoModes(nn.Module):
    """Auxiliary outputs in train mode, one dict in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Any:
        out = self.norm(self.conv(x))
        return (out, out.mean()) if self.training else {"out": out, "more": [out.mean((2, 3)), "text"]}


class Detector(TwoModes):
    """Losses in train mode, boxes of which there are as many as scores say in eval mode."""

    def forward(self, x: Tensor) -> Any:
        assert not self.training, "targets are needed"
        return super().forward(x)["out"].flatten()[:10].sort().values.masked_select(x.flatten()[:10] > -9)


def test_a_student_learns_in_the_mode_in_which_it_returns_what_the_teacher_does() -> None:
    torch.manual_seed(0)
    tuned = asymswap.finetune(TwoModes(), [NOISY], Training(steps=3), teacher=TwoModes())
    assert any(note.startswith("trained in eval mode, without batch statistics") for note in tuned.report.notes)
    # Statistics stay, weights do not.
    assert torch.equal(tuned.model.norm.running_mean, torch.zeros(3))  # type: ignore[union-attr]
    with pytest.raises(
        AsymswapError,
        match=r"raised AssertionError: targets are needed .*; to learn from a teacher both must return the same",
    ):
        asymswap.finetune(Detector(), [NOISY], Training(steps=1), teacher=Detector())


def test_the_difference_of_outputs_is_the_mean_over_its_tensors() -> None:
    """Two tensors, of which one is off by half of its values and the other by all: (1/4 + 1) / 2."""
    one = {"a": torch.full((4,), 2.0), "b": [torch.tensor(3.0), torch.tensor(1)]}
    other = {"a": torch.full((4,), 3.0), "b": [torch.tensor(0.0), torch.tensor(5)]}
    with torch.no_grad():
        assert float(output_error(one, other)) == pytest.approx((0.25 + 1) / 2)
    with pytest.raises(AsymswapError, match="the teacher returns 4 and the trained network no tensor, which cannot be"):
        output_error(torch.ones(4), None)


def test_images_without_labels_and_a_loss_of_images_with_labels(tmp_path: Path) -> None:
    """A folder for a teacher; and a classifier's images for a loss of the user's, which gets the labels."""
    from PIL import Image

    for number in range(12):
        Image.new("L", (8, 8), 20 * number).save(tmp_path / f"{number}.png")
    options: dict[str, Any] = {"preprocessing": asymswap.PreprocessingOptions(normalize="none", size=(8, 8))}
    settings = Training(epochs=1, workers=0, validation="0.25")
    torch.manual_seed(0)
    model = asymswap.open_model(Denoiser().eval(), input_size=(1, 8, 8), **options)
    report = asymswap.finetune(model, str(tmp_path), settings, teacher=Denoiser()).report
    assert report.data == f"9 of folder {tmp_path}: 12 images (seed 0)"
    assert report.best is not None
    assert report.best.keys() == {"loss"}
    # The images alone are the batch.
    own = asymswap.finetune(
        model, str(tmp_path), settings, loss=lambda outputs, batch: (outputs - batch).square().mean()
    )
    assert own.report.best is not None
    labels: list[int] = []

    def loss(outputs: Tensor, batch: Any) -> Tensor:
        labels.extend(batch[1].tolist())
        return outputs.square().mean()

    asymswap.finetune(model, "digits", Training(steps=1, validation="none"), loss=loss)
    assert set(labels) == set(range(10))


def test_a_teacher_of_class_scores_is_learned_without_labels() -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(144, 3)).eval()
    tuned = asymswap.finetune(net, NOISY, Training(steps=2, validation="none"), teacher=net)
    assert tuned.report.before is None


@pytest.mark.parametrize("allowlisted", [False, True])
def test_the_original_is_the_module_that_was_converted(tmp_path: Path, allowlisted: bool) -> None:
    """In memory, with its own weights; the base beside a file may have any, and is no teacher."""
    torch.manual_seed(3)
    module = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 1, 3, padding=1)).eval()
    original: nn.Module = module if allowlisted else Denoiser().eval()
    conversion = asymswap.convert(asymswap.open_model(original, input_size=(1, 8, 8)), "acnet")
    steps = Training(steps=2, validation="none", distill="original")
    by_name = asymswap.finetune(conversion, NOISY, steps)
    given = asymswap.finetune(conversion, NOISY, steps, teacher=original)
    for one, other in zip(by_name.model.state_dict().values(), given.model.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    asymswap.save(conversion, tmp_path / "net.pt")
    again = asymswap.open_model(tmp_path / "net.pt", arch=None if allowlisted else Denoiser())
    with pytest.raises(AsymswapError, match="does not say which model"):
        asymswap.finetune(again, NOISY, steps)


def test_lines_of_a_run() -> None:
    row = EpochRow(1, 5, {"loss": 0.5}, 0.1, 12.4, "batches", {"psnr": 30.123, "loss": 0.25}, True, 1.0)
    assert epoch_line(row, 3) == "epoch 1/3: loss 0.5000; validation psnr 30.12, loss 0.2500 (best); 12 batches/s"
    assert step_words(StepRow(1, 1, {"loss": 0.5}, 0.1, 3.0, "samples")) == "loss 0.500  3 samples/s"


class Stream(IterableDataset[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        return iter(NOISY)


class Broken(Dataset[Tensor]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Tensor:
        return {}["no such key"]  # type: ignore[no-any-return]


def exhausted() -> Callable[[], Any]:
    once = iter([NOISY[:4], NOISY[4:8]])
    return lambda: once


def unpacks(outputs: Tensor, batch: Any) -> Tensor:
    _, target = batch
    return outputs - target  # type: ignore[no-any-return]


LOADER = DataLoader(PAIRS, 8)


@pytest.mark.parametrize(
    ("data", "options", "said"),
    [
        ([], {}, r"`data=…` gives no batch; give more, from an iterable that can be read again"),
        ((NOISY for _ in range(3)), {}, r"`data=…` is a generator, which can be read only once; give a function"),
        (exhausted(), {}, r"<lambda>\(\) gave 0 batches in epoch 1, not 2: .*give a function that returns a new one"),
        (7, {}, r"`data=…` gives a int, not batches; give a data reference, a DataLoader"),
        ({"a": NOISY}, {}, r"`data=…` gives a dict, not batches"),
        (Stream(), {}, r"`data=…` gives samples, not batches; give a DataLoader of the Stream"),
        (lambda: 1 / 0, {}, r"<lambda>\(\) raised ZeroDivisionError: division by zero \(test_own_data.py, line \d+\)"),
        (Broken(), {}, r"`data=…` raised KeyError: 'no such key' \(test_own_data.py, line \d+\)"),
        (DataLoader(Broken(), 4, num_workers=1), {}, r"`data=…` raised KeyError: 'no such key'"),
        ([NOISY, NOISY[:, :, :1, :0]], {}, r"the network, given 44x1x1x0, raised RuntimeError"),
        (LOADER, {"loss": lambda outputs, _: outputs.detach().mean()}, r"`loss=…` gave a number that does not depend"),
        (LOADER, {"loss": lambda *_: torch.zeros((), requires_grad=True)}, r"the loss does not depend on the trained"),
        (LOADER, {"loss": lambda outputs, _: outputs}, r"`loss=…` gave a Tensor of shape \(8, 1, 8, 8\); it must retu"),
        (LOADER, {"loss": lambda *_: 0.5}, r"`loss=…` gave a float; it must return one number as a tensor, such as a"),
        (LOADER, {"loss": lambda o, b: o / b["x"]}, r"`loss=…` raised TypeError: .* \(test_own_data.py, line \d+\)$"),
        (LOADER, {"loss": lambda o, _: o.mean() * float("nan")}, r"the loss is nan at step 1 .*: stopped; try a small"),
        ([NOISY], {"loss": unpacks}, r"`loss=…` raised ValueError.*; here a batch is one tensor, without labels$"),
        (LOADER, {"inputs": lambda b: {"noise": b[0]}}, r"what `inputs=…` returned does not fit forward\(noisy: .*, "
         r"scale: .* = 1.0\) -> .* of Denoiser: missing a required argument: 'noisy'; give as `inputs=…` a function"),
        (LOADER, {"inputs": lambda b: b[7]}, r"`inputs=…` raised IndexError: list index out of range \(test_own_data."),
        ([(NOISY, NOISY, NOISY)], {}, r"a batch holds 3 parts: give `inputs=…`, which says what the network gets"),
        ([{"y": NOISY}], {}, r"the batch \(dict\) does not fit forward\(noisy"),
        (LOADER, {"evaluate": lambda _: float("nan")}, r"the metric metric gave nan; return a finite number"),
        (LOADER, {"evaluate": lambda _: None}, r"the metric metric gave None; return a finite number"),
        (LOADER, {"evaluate": lambda _: {}}, r"the metric metric gave \{\}; return a finite number"),
        (LOADER, {"evaluate": lambda m: m.nothing}, r"the metric metric raised AttributeError: .*'nothing' \("),
        (LOADER, {"teacher": None}, r"nothing says what to learn from 6 batches of a DataLoader: give `loss=…`, a fun"),
        (LOADER, {"settings": Training(batch_size=8)}, r"`batch_size=8` changes nothing in data of your own: it is t"),
        (LOADER, {"settings": Training(augment=("flip",))}, r"`augment=\('flip',\)` changes nothing in data of"),
        (LOADER, {"settings": Training(validation="0.2")}, r"`validation=0.2` would hold back batches, which may shar"),
        (LOADER, {"settings": Training(patience=1)}, r"`patience=1` needs a validation: give `evaluate=…`"),
        (PAIRS, {"settings": Training(validation="test")}, r"`validation=test` goes with a data reference; give 0.1 o"),
        (PAIRS, {"settings": Training(validation="0.1"), "evaluate": QUALITY}, r"give either `evaluate=…` or `validat"),
        ("digits", {"settings": Training(augment=("flp",))}, r"`augment=…` 'flp' is unknown; did you mean flip"),
        ("digits", {"settings": Training(augment=("mixup",))}, r"`augment=mixup` mixes class labels, which are not le"),
    ],
)  # fmt: skip
def test_bad_input(net: asymswap.Conversion, data: Any, options: dict[str, Any], said: str) -> None:
    options = dict(options)
    settings = options.pop("settings", TWO)
    if "loss" not in options:
        options = {"teacher": net.model} | options
    model = asymswap.open_model(net, preprocessing=asymswap.PreprocessingOptions(normalize="none"))
    with pytest.raises(AsymswapError, match=said) as raised:
        asymswap.finetune(model, data, settings, **options)
    assert "\n" not in str(raised.value)
