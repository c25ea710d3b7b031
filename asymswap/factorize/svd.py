"""Truncated singular value decomposition of a convolution kernel into two one-dimensional kernels.

Shapes, G groups, C inputs and O outputs of one group, R the rank (of one group):

    w_OIHW     (G*O, C, kh, kw)     the original kernel
    m_GAB      (G, A, B)            the same numbers as one matrix a group
    energy_GK  (G, K)               squared singular values, descending, K = min(A, B)
    a_GAR, b_GRB                    the two factors, a @ b close to m

With `vertical` first, A = C*kh and B = O*kw: m[(c, i), (o, j)] = w[o, c, i, j]. With the horizontal conv first, A =
C*kw and B = O*kh. A product of rank R is a (kh x 1, C -> R) conv followed by a (1 x kw, R -> O) conv, and the
truncated SVD is the best one in the Frobenius norm (Eckart and Young, 1936; for convolutions Jaderberg, Vedaldi and
Zisserman, BMVC 2014, scheme 2; Tai et al., ICLR 2016, theorem 1).

Everything is done in float64 through the eigenvalues of the smaller Gram matrix: half the time of an SVD. Squaring
costs half of the digits of the *small* singular values only, and float64 has them to spare for float32 weights; the
factors are projections of the matrix itself, so a full-rank product is exact.
"""

import torch
from torch import Tensor

from asymswap.utils.tensors import on_threads


def as_matrix(w_OIHW: Tensor, groups: int, vertical_first: bool) -> Tensor:
    """Arrange a kernel as one float64 matrix m_GAB a group, whose rank-R products are separable pairs."""
    w_GOIHW: Tensor = w_OIHW.detach().reshape(groups, -1, *w_OIHW.shape[1:])
    along_across = (3, 1, 4) if vertical_first else (4, 1, 3)
    # Arranged and widened in one step: large kernels need no second copy in float64.
    arranged = w_GOIHW.permute(0, 2, *along_across).to(torch.float64, memory_format=torch.contiguous_format)
    return arranged.flatten(3).flatten(1, 2)


def eigenvalues(gram_GKK: Tensor) -> Tensor:
    """Eigenvalues (G, K) of positive semidefinite matrices, in descending order."""
    with on_threads(1):
        rising_GK: Tensor = torch.linalg.eigvalsh(gram_GKK)
    return rising_GK.flip(-1).clamp_min(0.0)


def factors(m_GAB: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Best factors a_GAR and b_GRB of the given rank, with the singular values shared evenly between the two.

    Even sharing gives both convs weights of one scale, which is what an optimiser wants to find when it trains on.
    """
    gram_GKK = gram(m_GAB)
    with on_threads(1):
        energy_GK, basis = torch.linalg.eigh(gram_GKK)
    energy_GR = energy_GK.flip(-1)[:, :rank].clamp_min(0.0)
    basis = basis.flip(-1)[..., :rank]
    # Directions without energy keep their unit vector on one side: dividing by their square root would be noise.
    floor = energy_GK[:, -1:].clamp_min(0.0) * 1e-14
    scale_GR = torch.where(energy_GR > floor, energy_GR, torch.ones_like(energy_GR)).pow(0.25)
    if m_GAB.shape[1] <= m_GAB.shape[2]:
        return basis * scale_GR[:, None, :], (basis.mT @ m_GAB) / scale_GR[:, :, None]
    return (m_GAB @ basis) / scale_GR[:, None, :], basis.mT * scale_GR[:, :, None]


def as_kernels(a_GAR: Tensor, b_GRB: Tensor, kernel: tuple[int, int], vertical_first: bool) -> tuple[Tensor, Tensor]:
    """Arrange the factors as conv weights: (G*R, C, kh, 1) and (G*O, R, 1, kw), or the other axes, in run order."""
    column, row = (kernel[0], 1), (1, kernel[1])
    along, across = (column, row) if vertical_first else (row, column)
    groups, _, rank = a_GAR.shape
    second = b_GRB.reshape(groups, rank, -1, *across).transpose(1, 2).flatten(0, 1)
    return a_GAR.mT.reshape(groups * rank, -1, *along), second


def compose(first: Tensor, second: Tensor, groups: int) -> Tensor:
    """Return the kernel w_OIHW that equals a pair of conv weights, each along one axis, with nothing between."""
    pair = (weight.unflatten(0, (groups, -1)) for weight in (first, second))
    return torch.einsum("gmihw,gomhw->goihw", *pair).flatten(0, 1)


def carried(shift_GR: Tensor, second_ORHW: Tensor) -> Tensor:
    """Return the change (G*O) of the second conv's output for a constant added to its inputs, away from padding."""
    weight_GORx = second_ORHW.detach().flatten(2).unflatten(0, (len(shift_GR), -1))
    return torch.einsum("gorx,gr->go", weight_GORx.to(shift_GR), shift_GR).flatten()


def gram(m_GAB: Tensor) -> Tensor:
    """Return the smaller Gram matrix (G, K, K) of each group, whose eigenvalues are the energies."""
    return m_GAB @ m_GAB.mT if m_GAB.shape[1] <= m_GAB.shape[2] else m_GAB.mT @ m_GAB
