from __future__ import annotations

import torch
from torch import Tensor

from asymswap.factorize.statistics import SiteStatistics


def statistics(cov_GDD: Tensor, weight_GOO: Tensor | None = None, outputs: int = 2) -> SiteStatistics:
    groups, length = cov_GDD.shape[:2]
    kernel = torch.ones(groups, outputs, length, dtype=torch.float64)
    return SiteStatistics(torch.zeros(groups, length), cov_GDD, kernel, torch.zeros(groups, outputs), weight_GOO, 10)


def test_the_ridge_is_a_thousandth_of_the_mean_variance_of_each_group() -> None:
    cov = torch.tensor([[[1.0, 0.5], [0.5, 3.0]], [[0.0, 0.0], [0.0, 0.0]]], dtype=torch.float64)
    ridged = torch.tensor([[[1.002, 0.5], [0.5, 3.002]], [[1.0, 0.0], [0.0, 1.0]]], dtype=torch.float64)
    for unit in (1.0, 1e-4):
        # A group that never varied has no unit.
        units = torch.tensor([unit, 1.0], dtype=torch.float64)
        found = statistics(unit * cov)
        expected = units[:, None] * torch.tensor([[0.002], [1.0]], dtype=torch.float64)
        assert torch.allclose(found.ridge(), expected, rtol=1e-9, atol=0)
        assert torch.allclose(found.ridged(), units[:, None, None] * ridged, rtol=1e-9, atol=0)


def test_no_output_weighs_less_than_a_twentieth_of_the_mean() -> None:
    cov = torch.eye(3, dtype=torch.float64).repeat(2, 1, 1)
    weight = torch.tensor([[[6.0, 1.0], [1.0, 2.0]], [[0.0, 0.0], [0.0, 0.0]]], dtype=torch.float64)
    expected = torch.tensor([[[6.2, 1.0], [1.0, 2.2]], [[1.0, 0.0], [0.0, 1.0]]], dtype=torch.float64)
    for unit in (1.0, 1e-4):
        found = statistics(cov, unit * weight).output_weight()
        units = torch.tensor([unit, 1.0], dtype=torch.float64)[:, None, None]
        assert torch.allclose(found, units * expected, rtol=1e-9, atol=0)
    none = statistics(cov).output_weight()
    assert none.dtype == torch.float64
    assert torch.equal(none, torch.eye(2, dtype=torch.float64).expand(2, 2, 2))
