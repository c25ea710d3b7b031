"""The verb `evaluate`: numbers that can be counted by hand, of models whose answers stand in the images."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import asymswap
from asymswap.api.evaluate import evaluate
from asymswap.errors import AsymswapError
from asymswap.results.evaluate import ModelScores

HALF = asymswap.PreprocessingOptions(normalize="half")
CLASSES = ["ant", "bee", "cat", "dog", "eel", "fox", "gnu"]


class Reads(nn.Module):
    """Scores that stand in a row of the image."""

    def __init__(self, row: int) -> None:
        super().__init__()
        self.row = row
        self.conv = nn.Conv2d(1, 1, 1, bias=False)
        nn.init.ones_(self.conv.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)[:, 0, self.row]  # type: ignore[no-any-return]


def top1(model: ModelScores) -> float:
    return next(score.value for score in model.scores if score.name == "top-1")


LABELS = [0, 0, 1, 2, 3, 3]
ANSWERS = ([0, 1, 1, 1, 3, 3], [0, 0, 1, 1, 4, 4])
"""What the models of the first two rows say."""


@pytest.fixture
def data(tmp_path: Path) -> str:
    images = torch.zeros(6, 1, 7, 7)
    for row, answers in enumerate(ANSWERS):
        images[:, 0, row] = torch.eye(7)[answers]
    # The right class of the fourth image has the sixth score of the first model.
    images[3, 0, 0] = torch.tensor([0.9, 1.0, 0.1, 0.8, 0.7, 0.6, 0.0])
    torch.save({"images": images, "labels": torch.tensor(LABELS), "classes": CLASSES}, tmp_path / "d.pt")
    return str(tmp_path / "d.pt")


def test_every_number_by_hand(data: str) -> None:
    report = evaluate(
        [
            asymswap.open_model(Reads(0), input_size=(1, 7, 7), preprocessing=HALF),
            asymswap.open_model(Reads(1), input_size=(1, 7, 7), preprocessing=HALF),
        ],
        data,
        batch_size=4,
    )
    # The images come with mean 0 and deviation 1 as they are, but for what the default preprocessing does to them.
    first, second = report.models
    assert (report.images, report.unreadable) == (6, 0)
    one, other = first.classifier, second.classifier
    assert one is not None
    assert other is not None
    assert (one.right, other.right) == (4, 3)
    assert (top1(first), top1(second)) == (4 / 6, 3 / 6)
    assert [(score.name, score.unit) for score in first.scores] == [("top-1", "%"), ("top-5", "%")]
    assert first.scores[1].value == 5 / 6
    assert [(row.name, row.images, row.right) for row in one.classes] == [
        ("ant", 2, 1), ("bee", 1, 1), ("cat", 1, 0), ("dog", 2, 2), ("eel", 0, 0), ("fox", 0, 0), ("gnu", 0, 0),
    ]  # fmt: skip
    assert [(row.of, row.taken_for, row.images) for row in other.confusions] == [("dog", "eel", 2), ("cat", "bee", 1)]
    assert one.against_first is None
    against = other.against_first
    assert against is not None
    # Equal answers: images 0, 2, 3; the first alone is right of 4 and 5, the second alone of 1.
    assert (against.agreement, against.only_first, against.only_this) == (3 / 6, 2, 1)
    assert against.p == 1.0
    assert one.images_per_second > 0


def test_the_loss_is_cross_entropy(data: str) -> None:
    model = Reads(0)
    with torch.no_grad():
        model.conv.weight.zero_()
    scores = evaluate(asymswap.open_model(model, input_size=(1, 7, 7), preprocessing=HALF), data).models[0]
    about = scores.classifier
    assert about is not None
    assert about.loss == pytest.approx(float(torch.log(torch.tensor(7.0))))
    # Of equal scores one is taken: no image is both wrong and first.
    assert about.right == 2
    assert top1(scores) <= scores.scores[1].value


def test_top5_of_few_classes_says_nothing(tmp_path: Path) -> None:
    torch.save({"images": torch.rand(4, 1, 3, 3), "labels": torch.tensor([0, 1, 2, 2])}, tmp_path / "d.pt")
    opened = asymswap.open_model(Reads(0), input_size=(1, 3, 3), preprocessing=HALF)
    assert [score.name for score in evaluate(opened, str(tmp_path / "d.pt")).models[0].scores] == ["top-1"]


def test_wider_models_are_told_of_and_narrower_ones_refused(data: str, tmp_path: Path) -> None:
    torch.save({"images": torch.rand(2, 1, 7, 7), "labels": torch.tensor([0, 1])}, tmp_path / "few.pt")
    report = evaluate(asymswap.open_model(Reads(0), input_size=(1, 7, 7), preprocessing=HALF), str(tmp_path / "few.pt"))
    assert report.notes == ("the data has 2 classes, Reads scores 7: do they agree?",)
    with pytest.raises(AsymswapError, match=r"the model scores 3 classes, but the data has 7"):
        evaluate(asymswap.open_model(Reads(0), input_size=(1, 3, 3), preprocessing=HALF), data)
    with pytest.raises(AsymswapError, match=r"give at least one model to evaluate"):
        evaluate([], data)


def test_a_model_stays_as_it_is(data: str) -> None:
    model = Reads(0).train()
    before = torch.get_rng_state()
    evaluate(asymswap.open_model(model, input_size=(1, 7, 7), preprocessing=HALF), data)
    assert model.training
    assert torch.equal(torch.get_rng_state(), before)
    assert asymswap.evaluate is evaluate
