from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from asymswap.factorize import covariance, svd
from asymswap.factorize.evidence import Evidence


def make(
    seed: int, groups: int = 1, inputs: int = 3, outputs: int = 4, kernel: tuple[int, int] = (3, 3), patches: int = 200
) -> tuple[Evidence, Tensor]:
    """Evidence of correlated random patches, and the patches themselves (G, N, D), centred."""
    g = torch.Generator().manual_seed(seed)
    length = inputs * kernel[0] * kernel[1]
    mix = torch.randn(groups, length, length, generator=g, dtype=torch.float64) * torch.logspace(0, -2, length)
    x = torch.randn(groups, patches, length, generator=g, dtype=torch.float64) @ mix
    x = x - x.mean(1, keepdim=True)
    w = torch.randn(groups, outputs, length, generator=g, dtype=torch.float64)
    slopes = torch.randn(groups, 50, outputs, generator=g, dtype=torch.float64)
    mean = torch.zeros(groups, length, dtype=torch.float64)
    evidence = Evidence(mean, x.mT @ x / patches, w, torch.zeros(groups, outputs), slopes.mT @ slopes / 50, patches)
    return evidence, x


def kernel_of(a: Tensor, b: Tensor, kernel: tuple[int, int], vertical_first: bool) -> Tensor:
    return svd.compose(*svd.as_kernels(a, b, kernel, vertical_first), len(a), vertical_first)


def measured(evidence: Evidence, x: Tensor, kernel_OIHW: Tensor) -> float:
    """The mean weighted squared error of the outputs on the patches themselves: no covariance is used."""
    groups = len(x)
    gap = kernel_OIHW.flatten(1).unflatten(0, (groups, -1)) - evidence.target_GOD
    errors = x @ gap.mT
    return float(torch.einsum("gno,gop,gnp->", errors, evidence.output_weight(), errors)) / x.shape[1]


cases = st.tuples(
    st.integers(0, 1000), st.integers(1, 2), st.integers(1, 3), st.integers(1, 4), st.booleans(), st.integers(1, 9)
)


@settings(deadline=None, max_examples=60)
@given(case=cases, patches=st.sampled_from([5, 40, 400]))
def test_never_worse_on_the_data_than_the_svd_of_the_weights(
    case: tuple[int, int, int, int, bool, int], patches: int
) -> None:
    seed, groups, inputs, outputs, vertical_first, rank = case
    kernel = (3, 2)
    evidence, x = make(seed, groups, inputs, outputs, kernel, patches)
    problem = covariance.arrange(evidence, kernel, vertical_first)
    rank = min(rank, problem.w_GOKM.shape[3])
    fitted = kernel_of(*covariance.factors(problem, rank), kernel, vertical_first)
    weights = evidence.target_GOD.flatten(0, 1).reshape(groups * outputs, inputs, *kernel)
    matrix = svd.as_matrix(weights, groups, vertical_first)
    plain = kernel_of(*svd.factors(matrix, min(rank, *matrix.shape[1:])), kernel, vertical_first)
    floor = 2e-3 * measured(evidence, x, torch.zeros_like(plain))
    assert measured(evidence, x, fitted) <= measured(evidence, x, plain) + floor


@settings(deadline=None, max_examples=40)
@given(case=cases)
def test_error_falls_with_every_half_step(case: tuple[int, int, int, int, bool, int]) -> None:
    seed, groups, inputs, outputs, vertical_first, rank = case
    evidence, _ = make(seed, groups, inputs, outputs)
    problem = covariance.arrange(evidence, (3, 3), vertical_first)
    rank = min(rank, problem.w_GOKM.shape[3])
    v = covariance.spectrum(problem)[0][:, :rank]
    h = covariance.solve_second(problem, v)
    errors = [covariance.error(problem, v, h).sum()]
    for _ in range(4):
        v = covariance.improve_first(problem, v, h)
        errors.append(covariance.error(problem, v, h).sum())
        h = covariance.solve_second(problem, v)
        errors.append(covariance.error(problem, v, h).sum())
    slack = 1e-9 * float(covariance.total(problem).sum())
    for before, after in itertools.pairwise(errors):
        assert float(after) <= float(before) + slack


@settings(deadline=None, max_examples=30)
@given(case=cases)
def test_full_rank_is_exact(case: tuple[int, int, int, int, bool, int]) -> None:
    seed, groups, inputs, outputs, vertical_first, _ = case
    evidence, x = make(seed, groups, inputs, outputs)
    problem = covariance.arrange(evidence, (3, 3), vertical_first)
    fitted = kernel_of(*covariance.factors(problem, problem.w_GOKM.shape[3]), (3, 3), vertical_first)
    assert measured(evidence, x, fitted) <= 1e-9 * measured(evidence, x, torch.zeros_like(fitted))


def test_second_conv_is_ordinary_least_squares() -> None:
    """Against torch.linalg.lstsq on the patches themselves, the first conv being given."""
    evidence, x = make(3, inputs=2, outputs=3, patches=500)
    problem = covariance.arrange(evidence, (3, 3), vertical_first=True)
    v = torch.randn(1, 2, 6, dtype=torch.float64)
    h = covariance.solve_second(problem, v)[0]
    columns = x[0].reshape(-1, 2, 3, 3).permute(0, 3, 1, 2).reshape(-1, 3, 6)  # (N, kw, C*kh)
    seen = torch.einsum("nkm,rm->nkr", columns, v[0]).flatten(1)
    ridge = (evidence.ridged() - evidence.cov_GDD)[0, 0, 0]
    root = ridge.sqrt() * len(seen) ** 0.5
    # The ridge is as if each single pixel had been seen once more on its own.
    alone = torch.eye(18, dtype=torch.float64).reshape(18, 3, 6) * root
    extra = torch.einsum("nkm,rm->nkr", alone, v[0]).flatten(1)
    wanted = torch.cat([x[0] @ evidence.target_GOD[0].mT, _in_order(alone) @ evidence.target_GOD[0].mT])
    expected = torch.linalg.lstsq(torch.cat([seen, extra]), wanted).solution.mT
    assert torch.allclose(h.flatten(1), expected, rtol=1e-6, atol=1e-9)


def _in_order(columns_NKM: Tensor) -> Tensor:
    """From tap by tap of the second conv back to the order of a kernel (c, i, j)."""
    return columns_NKM.reshape(-1, 3, 2, 3).permute(0, 2, 3, 1).flatten(1)


@pytest.mark.parametrize("vertical_first", [True, False])
def test_the_spectrum_estimates_the_error_from_above(vertical_first: bool) -> None:
    evidence, _ = make(5, inputs=4, outputs=8)
    problem = covariance.arrange(evidence, (3, 3), vertical_first)
    vectors, energy = covariance.spectrum(problem)
    for rank in range(1, 12):
        v = vectors[:, :rank]
        error = float(covariance.error(problem, v, covariance.solve_second(problem, v)).sum())
        assert error <= 3 * float(energy[:, rank:].sum()) + 1e-9


def test_dead_inputs_keep_the_kernel_finite() -> None:
    evidence, _ = make(7)
    cov = evidence.cov_GDD.clone()
    cov[:, :9], cov[:, :, :9] = 0.0, 0.0
    dead = Evidence(evidence.mean_GD, cov, evidence.target_GOD, evidence.target_mean_GO, None, 10)
    a, b = covariance.factors(covariance.arrange(dead, (3, 3), True), 3)
    assert bool(torch.isfinite(a).all() and torch.isfinite(b).all())
    nothing = Evidence(evidence.mean_GD, 0 * cov, evidence.target_GOD, evidence.target_mean_GO, None, 10)
    a, b = covariance.factors(covariance.arrange(nothing, (3, 3), True), 3)
    assert bool(torch.isfinite(a).all() and torch.isfinite(b).all())
