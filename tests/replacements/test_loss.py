from __future__ import annotations

import math

import pytest

from asymswap.replacements.base import loss


def test_small_errors_count_as_they_are_and_a_spoilt_layer_counts_without_end() -> None:
    assert loss(0.0) == 0.0
    assert loss(1e-4) == pytest.approx(1e-4, rel=1e-3)
    assert loss(0.9) == pytest.approx(math.log(10))
    assert 25 < loss(1.0) < 30


def test_layers_multiply_what_they_keep() -> None:
    assert loss(0.3) + loss(0.2) == pytest.approx(loss(1 - 0.7 * 0.8))


def test_divergence_enters_by_the_geometric_mean() -> None:
    assert loss(0.3, 4.0) == pytest.approx(2 * math.sqrt(loss(0.3)))
    assert loss(0.0, 4.0) == 0.0
