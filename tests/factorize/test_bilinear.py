from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from asymswap.factorize import bilinear

SIZES = st.tuples(st.integers(1, 4), st.integers(1, 4))
DILATIONS = st.tuples(st.integers(1, 3), st.integers(1, 3))


def random_offsets(kernel: tuple[int, int], reach: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.rand(math.prod(kernel), 2, generator=generator, dtype=torch.float64) - 1) * reach


@given(kernel=SIZES, dilation=DILATIONS, reach=st.integers(1, 3), seed=st.integers(0, 2**16))
def test_every_tap_is_shared_among_the_cells_around_it(
    kernel: tuple[int, int], dilation: tuple[int, int], reach: int, seed: int
) -> None:
    """Shares are positive and sum to one, and their centre of mass is where the tap is."""
    offset = random_offsets(kernel, reach, seed)
    share = bilinear.spread(offset, kernel, dilation, reach)
    assert share.shape == (math.prod(kernel), *bilinear.grid_size(kernel, dilation, reach))
    assert bool((share >= 0).all())
    assert int((share > 0).sum((1, 2)).max()) <= 4
    torch.testing.assert_close(share.sum((1, 2)), torch.ones(len(offset), dtype=torch.float64))
    rows, columns = (torch.arange(size, dtype=torch.float64) for size in share.shape[1:])
    for tap, (down, right) in enumerate(offset.tolist()):
        row, column = divmod(tap, kernel[1])
        assert float((share[tap].sum(1) * rows).sum()) == pytest.approx(reach + dilation[0] * row + down)
        assert float((share[tap].sum(0) * columns).sum()) == pytest.approx(reach + dilation[1] * column + right)


@given(kernel=SIZES, dilation=DILATIONS, reach=st.integers(1, 3), seed=st.integers(0, 2**16))
def test_whole_offsets_move_each_weight_to_one_cell(
    kernel: tuple[int, int], dilation: tuple[int, int], reach: int, seed: int
) -> None:
    offset = random_offsets(kernel, reach, seed).round()
    w = torch.randn(3, 2, *kernel, generator=torch.Generator().manual_seed(seed))
    expected = torch.zeros(3, 2, *bilinear.grid_size(kernel, dilation, reach))
    for tap, (down, right) in enumerate(offset.int().tolist()):
        row, column = divmod(tap, kernel[1])
        expected[:, :, reach + dilation[0] * row + down, reach + dilation[1] * column + right] += w[:, :, row, column]
    share = bilinear.spread(offset.float(), kernel, dilation, reach)
    torch.testing.assert_close(bilinear.grow(w, share), expected)
    if not offset.any():
        assert torch.equal(bilinear.grow(w, share), expected)


@given(kernel=SIZES, dilation=DILATIONS, reach=st.integers(1, 3), seed=st.integers(0, 2**16))
def test_no_offset_is_the_dilated_kernel_bit_by_bit(
    kernel: tuple[int, int], dilation: tuple[int, int], reach: int, seed: int
) -> None:
    w = torch.randn(2, 3, *kernel, generator=torch.Generator().manual_seed(seed))
    share = bilinear.spread(torch.zeros(math.prod(kernel), 2), kernel, dilation, reach)
    grown = bilinear.grow(w, share)
    inner = F.pad(grown, (-reach,) * 4)
    assert torch.equal(inner[:, :, :: dilation[0], :: dilation[1]], w)
    assert float(grown.abs().sum()) == pytest.approx(float(w.abs().sum()), rel=1e-6)


@pytest.mark.parametrize(
    ("distance", "share", "slope"),
    [
        (0.0, 1.0, 0.0),
        (1.0, 0.0, -0.5),
        (-1.0, 0.0, 0.5),
        (0.25, 0.75, -1.0),
        (-0.25, 0.75, 1.0),
        (1.5, 0.0, 0.0),
        (-7.0, 0.0, 0.0),
    ],
)
def test_hat_takes_the_mean_of_both_slopes_at_its_kinks(distance: float, share: float, slope: float) -> None:
    at = torch.tensor(distance, requires_grad=True)
    value = bilinear.hat(at)
    value.backward()  # type: ignore[no-untyped-call]
    assert value.item() == share
    assert at.grad is not None
    assert at.grad.item() == slope


@given(kernel=SIZES, dilation=DILATIONS, reach=st.integers(1, 2), seed=st.integers(0, 2**16))
def test_gradients_between_the_pixels(
    kernel: tuple[int, int], dilation: tuple[int, int], reach: int, seed: int
) -> None:
    offset = random_offsets(kernel, reach, seed)
    offset = offset.floor() + (offset - offset.floor()).clamp(0.01, 0.99)
    w = torch.randn(2, 2, *kernel, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    def grown(w: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
        return bilinear.grow(w, bilinear.spread(offset, kernel, dilation, reach))

    assert torch.autograd.gradcheck(grown, (w.requires_grad_(), offset.requires_grad_()))


WINDOWS = [
    # offsets of the three taps, dilation, shrink, and what is wanted: start, step, count, growth
    pytest.param([0, 0, 0], 1, None, (2, 1, 3, 0), id="nothing moved"),
    pytest.param([0, 0, 0], 2, 0, (2, 2, 3, 0), id="nothing moved, dilated"),
    pytest.param([-0.5, 0, 0], 1, None, (1, 1, 5, 1), id="one side moved, both grow"),
    pytest.param([0, 0, 1.5], 1, None, (0, 1, 7, 2), id="between whole pixels"),
    pytest.param([0, 0.5, 0], 2, 0, (2, 1, 5, 0), id="no longer on the dilated grid"),
    pytest.param([-2, 0, 0], 2, None, (0, 2, 5, 2), id="moved along the dilated grid"),
    pytest.param([-1, 0, 1], 2, None, (1, 1, 7, 1), id="off the dilated grid by whole pixels"),
    pytest.param([1, 0, -1], 1, None, (3, 1, 1, -1), id="all on the middle"),
    pytest.param([1, 0, -1], 1, 0, (2, 1, 3, 0), id="no padding to take back"),
    pytest.param([2, 0, -2], 2, 1, (2, 2, 3, 0), id="a whole step of padding or none"),
    pytest.param([2, 0, -2], 2, 3, (4, 2, 1, -2), id="a step of padding"),
    pytest.param([3, 0, -3], 3, 1, (2, 3, 3, 0), id="a third of a step of padding is none"),
]


@pytest.mark.parametrize(("moved", "dilation", "shrink", "wanted"), WINDOWS)
@pytest.mark.parametrize("vertical", [True, False])
def test_windows(
    moved: list[float], dilation: int, shrink: int | None, wanted: tuple[int, int, int, int], vertical: bool
) -> None:
    along = torch.tensor(moved)
    still = torch.zeros(3)
    kernel = (3, 1) if vertical else (1, 3)
    offset = torch.stack([along, still] if vertical else [still, along], dim=1)
    dilations = (dilation, 5) if vertical else (5, dilation)
    limits = None if shrink is None else (shrink, shrink)
    found = bilinear.windows(bilinear.spread(offset, kernel, dilations, 2), kernel, dilations, 2, limits)
    one, other = found if vertical else found[::-1]
    assert (one.start, one.step, len(one), 2 - one.start) == wanted
    assert (other.start, other.step, len(other)) == (2, 5, 1)
