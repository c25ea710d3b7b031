from __future__ import annotations

import torch
from torch import Tensor

from asymswap.factorize.evidence import Evidence


def evidence(cov_GDD: Tensor, weight_GOO: Tensor | None = None, outputs: int = 2) -> Evidence:
    groups, length = cov_GDD.shape[:2]
    kernel = torch.ones(groups, outputs, length, dtype=torch.float64)
    return Evidence(torch.zeros(groups, length), cov_GDD, kernel, torch.zeros(groups, outputs), weight_GOO, 10)


def test_the_ridge_is_a_thousandth_of_the_mean_variance_of_each_group() -> None:
    cov = torch.tensor([[[1.0, 0.5], [0.5, 3.0]], [[0.0, 0.0], [0.0, 0.0]]], dtype=torch.float64)
    found = evidence(cov)
    assert torch.allclose(found.ridge(), torch.tensor([[0.002], [1.0]], dtype=torch.float64))
    ridged = torch.tensor([[[1.002, 0.5], [0.5, 3.002]], [[1.0, 0.0], [0.0, 1.0]]], dtype=torch.float64)
    assert torch.allclose(found.ridged(), ridged)


def test_no_output_weighs_less_than_a_twentieth_of_the_mean() -> None:
    cov = torch.eye(3, dtype=torch.float64).repeat(2, 1, 1)
    weight = torch.tensor([[[6.0, 1.0], [1.0, 2.0]], [[0.0, 0.0], [0.0, 0.0]]], dtype=torch.float64)
    expected = torch.tensor([[[6.2, 1.0], [1.0, 2.2]], [[1.0, 0.0], [0.0, 1.0]]], dtype=torch.float64)
    assert torch.allclose(evidence(cov, weight).output_weight(), expected)
    assert torch.equal(evidence(cov).output_weight(), torch.eye(2, dtype=torch.float64).expand(2, 2, 2))
