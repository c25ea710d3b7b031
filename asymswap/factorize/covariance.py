"""The separable pair that errs least on the data: a k x k kernel against the covariance of its input patches.

Shapes, all with G groups in front: O outputs, K taps across (those of the second conv), M = C * taps along (the
inputs of the first conv), R the rank, D = K*M.

    w_GOKM      the kernel, tap by tap of the second conv
    s_GKMKM     covariance of the patches in the same order
    p_GOO       weight of the outputs' errors
    v_GRM       the first conv, h_GOKR the second

With the vertical conv first, K = kw and M = C*kh. The expected squared error of a pair,

    trace(P (W - H (I (x) V)) S (W - H (I (x) V))'),

depends on the data through S alone. For given V the best H is that of ordinary least squares, whatever P, so that the
error is a smooth function of V alone, with the gradient that it has for that H held fixed (variable projection: Golub
and Pereyra, 1973). It is minimised by L-BFGS (Liu and Nocedal, 1989), from a start by eigenvectors: the kernel whitened
by the average of S over the taps. What the Hessian would be if all taps had this average covariance and nothing in
common preconditions it: (sum_k H_k' P H_k) V S_mean.
(Covariance instead of weights alone: Zhang, Zou, He and Sun, 2015, section 3.1, for 1 x 1 factors; this is its form
for two kernels.) With a single tap, K = 1, the start is the solution: the average of S is S itself.
"""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property, reduce
from itertools import islice
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from asymswap.factorize import svd
from asymswap.factorize.statistics import SiteStatistics
from asymswap.utils.tensors import on_threads

_ITERATIONS = 150  # at most; 15 to 40 are usual
_GAIN = 1e-3  # iterations end once the last `_WINDOW` of them have lowered the error by less than this share
_WINDOW = 5
_MEMORY = 8  # pairs of steps and changes of the gradient that L-BFGS remembers
_TRIALS = 6  # lengths that a step is tried with before it is given up
_NOTHING = 1e-11  # an error of this share of the output's energy is none: the shift of the least squares adds a tenth

_LOW_RANK = 16  # up to here minima differ by several percent, above it by a tenth of that
_RANDOM = 16  # random starts at most: of 140 random problems the worst is then 2 % above the best found, else 9 %
_RANDOM_SIZE = 2_000_000  # numbers in the covariances of all random starts together
_LARGE = 2000  # rows of a covariance from which on more threads pay, even where another program keeps a core busy
_LARGE_ITERATIONS = 10  # of one so large: they come within half a percent of many (benchmarks/solver.py)


@dataclass(frozen=True)
class Problem:
    """One conv, one order of the two convs, arranged for the solution."""

    w_GOKM: Tensor
    s_GKMKM: Tensor
    p_GOO: Tensor

    @cached_property
    def moved_kernel(self) -> Tensor:
        """The kernel times the covariance, W S."""
        return torch.einsum("gokm,gkmln->goln", self.w_GOKM, self.s_GKMKM)

    @cached_property
    def tap_factor(self) -> Tensor:
        """L with L L' the covariance of one tap's inputs, averaged over the taps."""
        return _cholesky(torch.einsum("gkmkn->gmn", self.s_GKMKM) / self.w_GOKM.shape[2])

    def rows_of(self, white_GMR: Tensor) -> Tensor:
        """Rows v_GRM of a first conv that are these columns once they are whitened by `tap_factor`."""
        return cast(Tensor, torch.linalg.solve_triangular(self.tap_factor.mT, white_GMR, upper=True)).mT

    def weighted(self, kernel_GOKM: Tensor) -> Tensor:
        """C' times a kernel as one matrix (G, O*K, M), with C C' the weight of the outputs' errors."""
        return torch.einsum("gpo,gpkm->gokm", _cholesky(self.p_GOO), kernel_GOKM).flatten(1, 2)

    def whitened(self) -> Tensor:
        """The weighted kernel times L, with L L' the covariance of a tap; its singular values squared are energies."""
        return self.weighted(self.w_GOKM) @ self.tap_factor

    @cached_property
    def output_energy(self) -> Tensor:
        """The weighted energy of the output itself, for each group: what an error is relative to."""
        return torch.einsum("goa,gop,gpa->g", self.w_GOKM.flatten(2), self.p_GOO, self.moved_kernel.flatten(2))


def arrange(statistics: SiteStatistics, kernel: tuple[int, int], vertical_first: bool) -> Problem:
    """Return the statistics of a conv in the order of its taps, for one order of the two convs."""
    groups, outputs, length = statistics.target_GOD.shape
    places = torch.arange(length).reshape(-1, *kernel).movedim(2 if vertical_first else 1, 0)
    taps, flat = places.shape[0], places.reshape(-1)
    s_GDD = statistics.ridged()[:, flat[:, None], flat]
    return Problem(
        w_GOKM=statistics.target_GOD[:, :, flat].reshape(groups, outputs, taps, -1),
        s_GKMKM=s_GDD.reshape(groups, taps, length // taps, taps, length // taps),
        p_GOO=statistics.output_weight(),
    )


def energies(problem: Problem) -> Tensor:
    """Return the error energy_GK that each direction of the whitened kernel takes away, the most useful first.

    The sum of what is left out is a close upper bound of a rank's error, exact if S is alike for all taps and white.
    """
    return svd.eigenvalues(svd.gram(problem.whitened()))


class Point(NamedTuple):
    """A first conv, the second conv that suits it best, and the expected weighted squared error of the two."""

    v_GRM: Tensor
    h_GOKR: Tensor
    error_G: Tensor
    gradient_GRM: Tensor  # half the gradient of the error with respect to v
    curvature_GRR: Tensor  # sum_k H_k' P H_k


def factors(problem: Problem, rank: int) -> tuple[Tensor, Tensor]:
    """Return the best pair found, as a_GAR and b_GRB of `asymswap.factorize.svd`, the scale shared evenly.

    Never worse than the truncated SVD of the kernel, which is a start too. At low ranks L-BFGS ends in various minima,
    and it descends from three starts, and from random ones where the covariance is small; else, or with a large one,
    from the better one of two. For a single tap the first start is the best pair there is.
    """
    large = problem.w_GOKM.shape[2:].numel() > _LARGE
    with nullcontext() if large else on_threads(1):
        if problem.w_GOKM.shape[2] == 1:
            best = next(starts(problem, rank))
        elif large or rank > _LOW_RANK:
            start = reduce(_better, islice(starts(problem, rank), 2))
            best = descend(problem, start, _LARGE_ITERATIONS if large else _ITERATIONS)
        else:
            # All at once, each with its own copy of the groups: small matrices go faster together.
            points = list(starts(problem, rank))
            parts = (problem.w_GOKM, problem.s_GKMKM, problem.p_GOO)
            copies = Problem(*(part.repeat(len(points), *[1] * (part.dim() - 1)) for part in parts))
            ends = descend(copies, Point(*map(torch.cat, zip(*points, strict=True))))
            best = reduce(_better, map(Point, *(end.chunk(len(points)) for end in ends)))
    v, h = best.v_GRM, best.h_GOKR
    scale_GR = (h.square().sum((1, 2)).sqrt() / v.norm(dim=2).clamp_min(1e-300)).clamp_min(1e-150).sqrt()
    second = (h / scale_GR[:, None, None, :]).permute(0, 3, 1, 2).flatten(2)
    return (v * scale_GR[:, :, None]).mT, second


def starts(problem: Problem, rank: int) -> Iterator[Point]:
    """Yield pairs to begin with, the best first as a rule.

    By the leading directions of the whitened kernel, of the kernel itself, of the output; then by random first convs,
    always the same, as many as are cheap to descend from; none at full rank, where each is exact.
    """

    def leading(m_GAM: Tensor) -> Tensor:
        """Return right singular vectors, with zeros above the matrix's rank."""
        _, b_GRM = svd.factors(m_GAM, rank)
        return F.pad(b_GRM, (0, 0, 0, rank - b_GRM.shape[1])).mT

    factor = problem.tap_factor
    yield project(problem, _uncorrelated(problem, leading(problem.whitened())))
    yield project(problem, _uncorrelated(problem, factor.mT @ leading(problem.w_GOKM.flatten(1, 2))))
    moved_GAM = torch.linalg.solve_triangular(factor, problem.weighted(problem.moved_kernel).mT, upper=False).mT
    yield project(problem, _uncorrelated(problem, leading(moved_GAM)))
    random = torch.Generator().manual_seed(0)
    groups, outputs, taps, rows = problem.w_GOKM.shape
    cheap = min(_RANDOM, _RANDOM_SIZE // (groups * (taps * rows) ** 2))
    for _ in range(cheap if rank < min(rows, outputs * taps) else 0):
        drawn_GMR = torch.randn(groups, rows, rank, generator=random, dtype=torch.float64)
        yield project(problem, _uncorrelated(problem, drawn_GMR.to(problem.w_GOKM)))


def descend(problem: Problem, here: Point, iterations: int = _ITERATIONS) -> Point:
    """Lower the error by L-BFGS, until nothing is left in any group or the last iterations hardly lowered it."""
    # Steps, by how much each changed the gradient, and one over the product of the two, or zero.
    memory: list[tuple[Tensor, Tensor, Tensor]] = []
    errors = [here.error_G]
    while len(errors) <= iterations:
        left = errors[-1] - _NOTHING * problem.output_energy
        if len(errors) > _WINDOW:
            left = torch.minimum(left, errors[-1 - _WINDOW] - (1 + _GAIN) * errors[-1])
        if bool((left <= 0).all()):
            break
        there = _search(problem, here, _direction(problem, here, memory))
        moved, change = there.v_GRM - here.v_GRM, there.gradient_GRM - here.gradient_GRM
        product = _dot(moved, change)
        memory = [*memory[1 - _MEMORY :], (moved, change, torch.where(product > 0, 1 / product, 0.0))]
        here = there
        errors.append(here.error_G)
    return here


def project(problem: Problem, v_GRM: Tensor) -> Point:
    """The best second conv for a given first one: least squares, H = W S B' (B S B')^-1 with B = I (x) V."""
    groups, outputs, taps, _ = problem.w_GOKM.shape
    rank = v_GRM.shape[1]
    seen = torch.einsum("gkmln,grn->gkmlr", problem.s_GKMKM, v_GRM)
    gram = torch.einsum("gkmlr,gsm->gkslr", seen, v_GRM).reshape(groups, taps * rank, taps * rank)
    right_GOL = torch.einsum("golm,grm->golr", problem.moved_kernel, v_GRM).flatten(2)
    h_GOL = torch.cholesky_solve(right_GOL.mT, _cholesky(gram, 1e-12)).mT
    weighted_GOL = problem.p_GOO @ h_GOL
    h, weighted = (x.reshape(groups, outputs, taps, rank) for x in (h_GOL, weighted_GOL))
    excess = torch.einsum("golr,gkmlr->gokm", h, seen) - problem.moved_kernel
    return Point(
        v_GRM,
        h,
        problem.output_energy - (weighted_GOL * right_GOL).sum((1, 2)),
        gradient_GRM=torch.einsum("gokr,gokm->grm", weighted, excess),
        curvature_GRR=torch.einsum("gokr,goks->grs", weighted, h),
    )


def _direction(problem: Problem, here: Point, memory: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """Where to go from here: the two loops of L-BFGS around the preconditioner."""
    direction, shares = -here.gradient_GRM, list[Tensor]()
    for moved, change, inverse in reversed(memory):
        shares.append(inverse * _dot(moved, direction))
        direction = direction - shares[-1] * change
    direction = torch.cholesky_solve(direction, _cholesky(here.curvature_GRR))
    direction = torch.cholesky_solve(direction.mT, problem.tap_factor).mT
    for moved, change, inverse in memory:
        direction = direction + (shares.pop() - inverse * _dot(change, direction)) * moved
    return direction


def _search(problem: Problem, here: Point, step_GRM: Tensor) -> Point:
    """The point a step further, in each group; shorter steps where that does not lower the error enough, or none."""
    slope_G = 2 * _dot(here.gradient_GRM, step_GRM).flatten()
    length_G = torch.ones_like(slope_G)
    for _ in range(_TRIALS):
        there = project(problem, here.v_GRM + length_G[:, None, None] * step_GRM)
        rise_G = there.error_G - here.error_G
        good_G = rise_G <= 1e-4 * length_G * slope_G + 1e-3 * _NOTHING * problem.output_energy
        if bool(good_G.all()):
            return there
        # The minimum of the parabola through both errors and the slope, not too near to either end.
        parabola_G = -0.5 * slope_G * length_G.square() / (rise_G - slope_G * length_G)
        length_G = torch.where(good_G, length_G, parabola_G.clamp(0.1 * length_G, 0.5 * length_G))
    return project(problem, here.v_GRM + torch.where(good_G, length_G, 0.0)[:, None, None] * step_GRM)


def _better(one: Point, other: Point) -> Point:
    """In each group the point of the smaller error."""
    first_G = one.error_G <= other.error_G
    pairs = zip(one, other, strict=True)
    return Point(*(torch.where(first_G.reshape(-1, *[1] * (a.dim() - 1)), a, b) for a, b in pairs))


def _dot(a_GRM: Tensor, b_GRM: Tensor) -> Tensor:
    return (a_GRM * b_GRM).sum((1, 2), keepdim=True)


def _cholesky(a_GMM: Tensor, shift: float = 1e-10) -> Tensor:
    """The lower factor of a positive semidefinite matrix, made definite by a share of its mean diagonal."""
    mean_G1 = a_GMM.diagonal(dim1=1, dim2=2).mean(1, keepdim=True).clamp_min(1e-290)
    factor, failed = torch.linalg.cholesky_ex(a_GMM + torch.diag_embed((shift * mean_G1).expand(-1, a_GMM.shape[1])))
    return factor if shift > 1 or not bool(failed.any()) else _cholesky(a_GMM, 100 * shift)


def _uncorrelated(problem: Problem, white_GMR: Tensor) -> Tensor:
    """The same span by rows whose outputs are uncorrelated: rows alike would make the least squares ill-conditioned."""
    return problem.rows_of(torch.linalg.qr(white_GMR).Q)
