"""Accuracy: counted right, without a trace left on the model or the random state."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from asymswap.data.datasets import LabelledImages, from_memory
from asymswap.data.metrics import predict
from asymswap.errors import SourceError
from asymswap.types import Preprocessing


def labelled(images: Tensor, labels: list[int], classes: int) -> LabelledImages:
    names = tuple(f"class {i}" for i in range(classes))
    known = Preprocessing(1, (3, 3), (0.0,), (1.0,))
    return LabelledImages(labels, from_memory(images, 1), names, "a test set", known)


class Lookup(nn.Module):
    """Scores that stand in the image itself, its first row: the class of each image is known beforehand."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, 0, 0]


class Returns(nn.Module):
    def __init__(self, value: object) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: Tensor) -> object:
        return self.value


@pytest.fixture
def five() -> LabelledImages:
    """Five images whose first row points to classes 0, 1, 2, 0, 1; the labels agree with all but the last."""
    rows = torch.eye(3)[[0, 1, 2, 0, 1]]
    return labelled(rows[:, None, None, :].expand(-1, 1, 3, 3), [0, 1, 2, 0, 2], 3)


@pytest.mark.parametrize("batch_size", [1, 2, 5, 256])
def test_accuracy_does_not_depend_on_the_batch_size(five: LabelledImages, batch_size: int) -> None:
    progress: list[tuple[int, int]] = []
    accuracy = predict(Lookup(), five, batch_size=batch_size, progress=lambda *done: progress.append(done))
    assert (accuracy.correct, len(accuracy), accuracy.top1) == (4, 5, 0.8)
    assert accuracy.seconds > 0
    assert len(progress) == math.ceil(5 / batch_size)
    assert progress[-1] == (5, 5)


def test_every_module_returns_to_its_own_mode(five: LabelledImages) -> None:
    norm = nn.BatchNorm2d(1)
    model = nn.Sequential(norm, nn.Dropout(0.5), Lookup())
    norm.eval()
    model[1].train()
    modes = [module.training for module in model.modules()]
    seen: list[bool] = []
    model[1].register_forward_hook(lambda module, *_: seen.append(module.training))
    predict(model, five)
    assert seen == [False]
    assert [module.training for module in model.modules()] == modes == [True, False, True, True]
    assert norm.num_batches_tracked == 0


def test_mode_returns_after_an_error_too(five: LabelledImages) -> None:
    model = Returns(None).train()
    with pytest.raises(SourceError, match="the model returns a NoneType, not images x class scores"):
        predict(model, five)
    assert model.training


def test_no_gradient_is_recorded_and_the_random_state_stays(five: LabelledImages) -> None:
    model = nn.Sequential(nn.Conv2d(1, 1, 1), Lookup())
    outputs: list[Tensor] = []
    model.register_forward_hook(lambda _, __, output: outputs.append(output))
    before = torch.get_rng_state()
    predict(model, five)
    assert torch.equal(torch.get_rng_state(), before)
    assert not outputs[0].requires_grad


def test_images_follow_the_precision_of_the_model(five: LabelledImages) -> None:
    conv = nn.Conv2d(1, 1, 1)
    nn.init.ones_(conv.weight)
    model = nn.Sequential(conv, Lookup()).double()
    assert predict(model, five).correct == 4


def test_more_scores_than_classes_are_allowed(five: LabelledImages) -> None:
    wider = nn.Sequential(Lookup(), nn.ConstantPad1d((0, 5), -1.0))
    assert predict(wider, five).correct == 4


@pytest.mark.parametrize(
    ("output", "text"),
    [
        ({"out": torch.zeros(5, 3)}, "the model returns a dict, not images x class scores; give a classifier"),
        (torch.zeros(5, 3, 2, 2), "the model returns 5x3x2x2, not images x class scores; give a classifier"),
        (
            torch.zeros(5, 2),
            r"the model scores 2 classes, but the data has 3 \(a test set\); give data with the model's",
        ),
    ],
)
def test_models_that_do_not_classify_the_data(five: LabelledImages, output: object, text: str) -> None:
    with pytest.raises(SourceError, match=text):
        predict(Returns(output), five)


def test_no_images() -> None:
    with pytest.raises(SourceError, match="no image can be read of a test set"):
        predict(Lookup(), labelled(torch.zeros(0, 1, 3, 3), [], 3))
