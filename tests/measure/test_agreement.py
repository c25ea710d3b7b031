"""Agreement of two networks, output by output, against figures by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from asymswap.measure.fidelity import measure_agreement, named_outputs
from asymswap.measure.statistics import wilson_interval

X = torch.randn(40, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Made(nn.Module):
    def __init__(self, make: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.make = make

    def forward(self, x: Tensor) -> Any:
        return self.make(x)


def agreement(one: Callable[[Tensor], Any], other: Callable[[Tensor], Any], scores: bool = False) -> Any:
    return measure_agreement(Made(one), Made(other), [((one,), (one,)) for one in (X[:25], X[25:])], scores)


def test_scores_agree_where_the_first_class_is_the_same() -> None:
    def one(x: Tensor) -> Tensor:
        return x.flatten(1)[:, :5]

    def other(x: Tensor) -> Tensor:
        return x.flatten(1)[:, :5] + 0.5 * x.flatten(1)[:, 7:12]

    (found,) = agreement(one, other, scores=True)
    same = int((one(X).argmax(1) == other(X).argmax(1)).sum())
    assert 0 < same < 40
    assert (found.output, found.measure, found.value) == ("", "top-1", same / 40)
    assert found.interval == wilson_interval(same, 40)


def test_embeddings_by_their_angles() -> None:
    (found,) = agreement(lambda x: x.flatten(1)[:, :6], lambda x: x.flatten(1)[:, :6].roll(1, 1))
    one, other = X.flatten(1)[:, :6].double(), X.flatten(1)[:, :6].roll(1, 1).double()
    expected = ((one * other).sum(1) / (one.norm(dim=1) * other.norm(dim=1))).mean()
    assert found.measure == "cosine"
    assert found.value == pytest.approx(float(expected), rel=1e-9)


@pytest.mark.parametrize("peak", [1.0, 255.0])
def test_images_in_decibels(peak: float) -> None:
    one, gap = X.sigmoid() * peak, 0.01 * peak
    (found,) = agreement(lambda x: x.sigmoid() * peak, lambda x: x.sigmoid() * peak + gap)
    assert (found.measure, found.peak) == ("PSNR", peak)
    assert one.max() <= peak
    assert found.value == pytest.approx(40.0, abs=1e-3)
    # A few pixels far beyond the peak do not make it another one.
    (far,) = agreement(lambda x: x.sigmoid() + (x > 3) * 5, lambda x: x.sigmoid() + (x > 3) * 5 + 0.01)
    assert (far.measure, far.peak) == ("PSNR", 1.0)
    (same,) = agreement(torch.sigmoid, torch.sigmoid)
    assert same.value == math.inf


def test_other_values_by_their_relative_error() -> None:
    (found,) = agreement(lambda x: x[:, :2], lambda x: 1.1 * x[:, :2])
    assert found.measure == "relative error"
    assert found.value == pytest.approx(0.1, rel=1e-5)


class Pair(NamedTuple):
    boxes: Tensor
    scores: list[Tensor]


def test_outputs_go_by_their_names() -> None:
    assert [name for name, _ in named_outputs({"a": X, "b": (X, [X])})] == ["a", "b.0", "b.1"]
    assert [name for name, _ in named_outputs(Pair(X, [X, X]))] == ["boxes", "scores.0", "scores.1"]
    assert [name for name, _ in named_outputs([X])] == [""]
    found = agreement(lambda x: Pair(1e3 * x, [x[:, 0]]), lambda x: Pair(1e3 * x, [2 * x[:, 0]]))
    # Pixels of boxes do not hide the scores.
    assert {one.output: round(one.value, 6) for one in found} == {"boxes": 0.0, "scores": 1.0}


def test_outputs_stay_in_the_order_of_the_network() -> None:
    """The first decides what a sweep advises: of a segmenter its output, not its auxiliary one."""
    found = agreement(lambda x: {"out": x, "aux": x[:, :1]}, lambda x: {"out": x, "aux": x[:, :1]})
    assert [one.output for one in found] == ["out", "aux"]


def test_outputs_of_other_sizes_are_left_out() -> None:
    found = agreement(lambda x: {"a": x, "b": x[:, :1]}, lambda x: {"a": x[:3], "b": x[:, :1]})
    assert [one.output for one in found] == ["b"]
