"""The separable pair that errs least on the data: a k x k kernel against the covariance of its input patches.

Shapes, all with G groups in front: O outputs, K taps across (those of the second conv), M = C * taps along (the
inputs of the first conv), R the rank, D = K*M.

    w_GOKM      the kernel, tap by tap of the second conv
    s_GKMKM     covariance of the patches in the same order
    p_GOO       weight of the outputs' errors
    v_GRM       the first conv, h_GOKR the second

With the vertical conv first, K = kw and M = C*kh. The expected squared error of a pair,

    trace(P (W - H (I (x) V)) S (W - H (I (x) V))'),

depends on the data through S alone. For given V the best H is that of ordinary least squares, whatever P; for given H
the best V solves a linear system, done by a few steps of conjugate gradients. Both steps can only lower the error,
and they are taken in turn from a start by eigenvectors: the kernel whitened by the average of S over the taps.
(Covariance instead of weights alone: Zhang, Zou, He and Sun, 2015, section 3.1, for 1 x 1 factors; this is its form
for two kernels.)
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from asymswap.factorize import svd
from asymswap.factorize.evidence import Evidence
from asymswap.tensors import one_thread

_STEPS = 3
_ROUNDS = 3
_LARGE = 2000
"""Rows of a covariance from which on more than one thread pays, even where another program keeps a core busy."""

_LARGE_STEPS = 2
_LARGE_ROUNDS = 2
"""Enough for one so large: they come within one part in two hundred of the error of many."""


@dataclass(frozen=True)
class Problem:
    """One conv, one order of the two convs, arranged for the solution."""

    w_GOKM: Tensor
    s_GKMKM: Tensor
    p_GOO: Tensor

    @cached_property
    def tap_covariance(self) -> Tensor:
        """The covariance of one tap's inputs, averaged over the taps."""
        return torch.einsum("gkmkn->gmn", self.s_GKMKM) / self.w_GOKM.shape[2]

    @cached_property
    def moved_kernel(self) -> Tensor:
        """The kernel times the covariance, W S."""
        return torch.einsum("gokm,gkmln->goln", self.w_GOKM, self.s_GKMKM)


def arrange(evidence: Evidence, kernel: tuple[int, int], vertical_first: bool) -> Problem:
    """Put the evidence of a conv into the order of its taps for one order of the two convs."""
    groups, outputs, length = evidence.target_GOD.shape
    inputs = length // (kernel[0] * kernel[1])
    places = torch.arange(length).reshape(inputs, *kernel)
    places = places.permute(2, 0, 1) if vertical_first else places.permute(1, 0, 2)
    taps, flat = places.shape[0], places.reshape(-1)
    s_GDD = evidence.ridged()[:, flat][:, :, flat]
    return Problem(
        w_GOKM=evidence.target_GOD[:, :, flat].reshape(groups, outputs, taps, -1),
        s_GKMKM=s_GDD.reshape(groups, taps, length // taps, taps, length // taps),
        p_GOO=evidence.output_weight(),
    )


def spectrum(problem: Problem) -> tuple[Tensor, Tensor]:
    """Start vectors v_GMM, the most useful first, and the error energy_GM that each takes away.

    The sum of what is left out estimates the error of a rank from above, and closely: it is exact where S is the same
    for all taps and has no correlation between them.
    """
    factor_GMM = _cholesky(problem.tap_covariance)
    with one_thread():
        energy, vectors = torch.linalg.eigh(_whitened(problem, factor_GMM))
    start_GMM = torch.linalg.solve_triangular(factor_GMM.mT, vectors.flip(-1), upper=True)
    return start_GMM.mT, energy.flip(-1).clamp_min(0.0)


def energies(problem: Problem) -> Tensor:
    """The energies of `spectrum` alone, which take a third of the time."""
    with one_thread():
        energy: Tensor = torch.linalg.eigvalsh(_whitened(problem, _cholesky(problem.tap_covariance)))
    return energy.flip(-1).clamp_min(0.0)


def _whitened(problem: Problem, factor_GMM: Tensor) -> Tensor:
    """L' (sum_k W_k' P W_k) L with L L' the covariance of one tap: its eigenvalues are the energies."""
    gram = torch.einsum("gokm,gop,gpkn->gmn", problem.w_GOKM, problem.p_GOO, problem.w_GOKM)
    white_GMM: Tensor = factor_GMM.mT @ gram @ factor_GMM
    return white_GMM


def error(problem: Problem, v_GRM: Tensor, h_GOKR: Tensor) -> Tensor:
    """The expected weighted squared error of a pair, for each group."""
    gap = problem.w_GOKM - torch.einsum("gokr,grm->gokm", h_GOKR, v_GRM)
    return _energy(problem, gap)


def total(problem: Problem) -> Tensor:
    """The weighted energy of the output itself, for each group: what the error is relative to."""
    return _energy(problem, problem.w_GOKM)


def _energy(problem: Problem, kernel_GOKM: Tensor) -> Tensor:
    flat = kernel_GOKM.flatten(2)
    s_GDD = problem.s_GKMKM.flatten(3).flatten(1, 2)
    return torch.einsum("goa,gab,gpb,gop->g", flat, s_GDD, flat, problem.p_GOO)


def factors(problem: Problem, rank: int) -> tuple[Tensor, Tensor]:
    """The best pair found, as a_GAR and b_GRB of `asymswap.factorize.svd`, the scale shared evenly between the two.

    Never worse than the truncated SVD of the kernel, which is tried too.
    """
    if problem.w_GOKM.shape[2:].numel() > _LARGE:
        return _factors(problem, rank, _LARGE_ROUNDS, _LARGE_STEPS)
    with one_thread():
        return _factors(problem, rank, _ROUNDS, _STEPS)


def _factors(problem: Problem, rank: int, rounds: int, steps: int) -> tuple[Tensor, Tensor]:
    starts = [spectrum(problem)[0][:, :rank], _svd_start(problem.w_GOKM, rank)]
    solved = [(v, solve_second(problem, v)) for v in starts]
    v, h = min(solved, key=lambda pair: float(error(problem, *pair).sum()))
    for _ in range(rounds):
        v = _orthonormal(improve_first(problem, v, h, steps))
        h = solve_second(problem, v)
    scale_GR = (h.square().sum((1, 2)).sqrt() / v.norm(dim=2).clamp_min(1e-300)).clamp_min(1e-150).sqrt()
    second = (h / scale_GR[:, None, None, :]).permute(0, 3, 1, 2).flatten(2)
    return (v * scale_GR[:, :, None]).mT, second


def solve_second(problem: Problem, v_GRM: Tensor) -> Tensor:
    """The best second conv h_GOKR for a given first one: least squares, H = W S B' (B S B')^-1 with B = I (x) V."""
    groups, outputs, taps, _ = problem.w_GOKM.shape
    rank = v_GRM.shape[1]
    seen = torch.einsum("gkmln,grn->gkmlr", problem.s_GKMKM, v_GRM)
    gram = torch.einsum("gkmlr,gsm->gkslr", seen, v_GRM).reshape(groups, taps * rank, taps * rank)
    gram = gram + 1e-12 * torch.diag_embed(gram.diagonal(dim1=1, dim2=2).mean(1, keepdim=True).expand(-1, taps * rank))
    right = torch.einsum("golm,grm->golr", problem.moved_kernel, v_GRM).flatten(2)
    h_GOL: Tensor = torch.linalg.solve(gram, right.mT).mT
    return h_GOL.reshape(groups, outputs, taps, rank)


def improve_first(problem: Problem, v_GRM: Tensor, h_GOKR: Tensor, steps: int = _STEPS) -> Tensor:
    """A better first conv for a given second one.

    Conjugate gradients on sum_kl H_k' P H_l V S_lk = sum_k H_k' P (W S)_k, preconditioned by what the operator would be
    if all taps had the average covariance and nothing in common: (sum_k H_k' P H_k) V S_mean.
    """
    weighted = torch.einsum("gop,gpkr->gokr", problem.p_GOO, h_GOKR)
    gram = torch.einsum("gokr,gols->gkrls", weighted, h_GOKR)
    right = torch.einsum("gokr,gokm->grm", weighted, problem.moved_kernel)
    left_GRR = _cholesky(torch.einsum("gkrks->grs", gram))
    right_GMM = _cholesky(problem.tap_covariance)

    def apply(v: Tensor) -> Tensor:
        moved = torch.einsum("gkrls,gsn->gkrln", gram, v)
        return torch.einsum("gkrln,glnkm->grm", moved, problem.s_GKMKM)

    def precondition(v: Tensor) -> Tensor:
        return torch.cholesky_solve(torch.cholesky_solve(v, left_GRR).mT, right_GMM).mT

    residual = right - apply(v_GRM)
    direction = precondition(residual)
    square = (residual * direction).sum((1, 2), keepdim=True)
    enough = 1e-20 * (right * precondition(right)).sum((1, 2), keepdim=True)
    for _ in range(steps):
        if bool((square <= enough).all()):
            break
        image = apply(direction)
        curvature = (direction * image).sum((1, 2), keepdim=True)
        step = torch.where(curvature > 0, square / curvature.clamp_min(1e-300), 0.0)
        v_GRM = v_GRM + step * direction
        residual = residual - step * image
        better = precondition(residual)
        new = (residual * better).sum((1, 2), keepdim=True)
        direction = better + torch.where(square > 0, new / square.clamp_min(1e-300), 0.0) * direction
        square = new
    return v_GRM


def _cholesky(a_GMM: Tensor) -> Tensor:
    """The lower factor of a positive semidefinite matrix, made definite by a little of its mean diagonal."""
    shift = 1e-10 * a_GMM.diagonal(dim1=1, dim2=2).mean(1, keepdim=True).clamp_min(1e-290)
    factor: Tensor = torch.linalg.cholesky(a_GMM + torch.diag_embed(shift.expand(-1, a_GMM.shape[1])))
    return factor


def _svd_start(w_GOKM: Tensor, rank: int) -> Tensor:
    """The first conv of the truncated SVD of the kernel, its matrix being M x (O*K)."""
    a_GMR, _ = svd.factors(w_GOKM.permute(0, 3, 1, 2).flatten(2), rank)
    return a_GMR.mT


def _orthonormal(v_GRM: Tensor) -> Tensor:
    """The same span by orthonormal rows: rows that grew alike would make the next least squares ill-conditioned."""
    q_GMR: Tensor = torch.linalg.qr(v_GRM.mT).Q
    return q_GMR.mT
