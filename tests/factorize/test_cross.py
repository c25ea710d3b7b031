from __future__ import annotations

import numpy as np
import pytest
import torch
from conv_cases import Case, cases
from hypothesis import given
from patch_statistics import see_all
from torch import Tensor, nn

from asymswap.factorize import cross

ODD = (3, 5)


def centred(patches_DN: Tensor) -> np.ndarray:
    """Patches without their mean, scaled so that their Gram matrix is the covariance, and after them what the ridge
    stands for: each pixel once more on its own."""
    patches = patches_DN.numpy()
    patches = (patches - patches.mean(1, keepdims=True)) / np.sqrt(patches.shape[1])
    ridge = 1e-3 * np.square(patches).sum() / len(patches)
    return np.concatenate([patches, np.sqrt(ridge) * np.eye(len(patches))], axis=1)


@given(case=cases(dtype=torch.float64, sides=ODD))
def test_is_the_least_squares_solution_on_the_patches(case: Case) -> None:
    """Against numpy's lstsq on the patches themselves: no covariance is used."""
    seen = see_all(case)
    statistics, spec = seen.statistics, case.site.conv
    on_cross = cross.places(spec.group_in, spec.kernel)
    found = cross.fit(statistics.target_GOD, on_cross, statistics.ridged())
    error = whole = 0.0
    for group in range(spec.groups):
        patches, kernel = centred(seen.patches_GDN[group]), statistics.target_GOD[group].numpy()
        taps = on_cross.numpy()
        expected = np.zeros_like(kernel)
        expected[:, taps] = np.linalg.lstsq(patches[taps].T, (kernel @ patches).T, rcond=None)[0].T
        np.testing.assert_allclose(found[group].numpy(), expected, rtol=1e-6, atol=1e-8)
        error += np.square((kernel - expected) @ patches).sum()
        whole += np.square(kernel @ patches).sum()
    measured = cross.relative_error(statistics.target_GOD, found, statistics.ridged())
    assert measured == pytest.approx(error / whole, abs=1e-9)


@given(case=cases(dtype=torch.float64, sides=ODD))
def test_white_inputs_keep_the_centre_row_and_column(case: Case) -> None:
    spec = case.site.conv
    planes = case.conv.weight.detach().flatten(2).flatten(0, 1)[None]
    white = cross.smooth(spec.kernel, spec.dilation, 0.0)
    assert torch.equal(white, torch.eye(len(white)).double())
    found = cross.fit(planes, cross.places(1, spec.kernel), 2.0 * white[None])
    left = found.reshape(case.conv.weight.shape)
    up, aside = spec.kernel[0] // 2, spec.kernel[1] // 2
    for i in range(spec.kernel[0]):
        for j in range(spec.kernel[1]):
            wanted = case.conv.weight[:, :, i, j] if up == i or aside == j else torch.zeros(())
            assert bool((left[:, :, i, j] == wanted).all())
    error = cross.relative_error(planes, found)
    assert error == pytest.approx(float((planes - found).square().sum() / planes.square().sum()))
    assert cross.relative_error(planes, found, 2.0 * white[None]) == pytest.approx(error)


def test_smooth_inputs_are_those_of_an_autoregressive_process() -> None:
    """Against a simulation: each row and column of noise is smeared by the recursion x[n] = r x[n-1] + noise."""
    g = torch.Generator().manual_seed(0)
    field = torch.randn(4000, 40, 40, generator=g, dtype=torch.float64)
    for axis in (1, 2):
        lines = field.movedim(axis, 0)
        for n in range(1, 40):
            lines[n] += 0.6 * lines[n - 1]
    taps = field[:, 30:39:2, 30:37:3].flatten(1)
    expected = torch.corrcoef(taps.T)
    assert torch.allclose(cross.smooth((5, 3), (2, 3), 0.6), expected, atol=0.05)


def test_inputs_that_hardly_change_keep_their_sum() -> None:
    """On an image of one colour a kernel is its sum, which a cross can keep."""
    planes = torch.randn(1, 8, 25, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = cross.fit(planes, cross.places(1, (5, 5)), cross.smooth((5, 5), (1, 1), 0.9999)[None])
    assert torch.allclose(found.sum(2), planes.sum(2), atol=1e-2)


def test_divergence_weights_the_outputs_errors() -> None:
    torch.manual_seed(0)
    case = Case(nn.Conv2d(6, 8, 3, groups=2, dtype=torch.float64), torch.randn(3, 6, 9, 9, dtype=torch.float64))
    seen = see_all(case, weighted=True)
    statistics = seen.statistics
    found = cross.fit(statistics.target_GOD, cross.places(3, (3, 3)), statistics.ridged())
    expected = 0.0
    for group in range(2):
        errors = (statistics.target_GOD - found)[group].numpy() @ centred(seen.patches_GDN[group])
        expected += 0.5 * np.einsum("on,op,pn->", errors, statistics.output_weight()[group].numpy(), errors)
    assert cross.divergence(statistics, found) == pytest.approx(expected)


def test_a_kernel_that_is_a_cross_is_kept_to_the_last_bit() -> None:
    torch.manual_seed(0)
    case = Case(nn.Conv2d(2, 3, 5, dtype=torch.float64), torch.randn(2, 2, 12, 12, dtype=torch.float64))
    statistics = see_all(case).statistics
    on_cross = cross.places(2, (5, 5))
    kernel = statistics.target_GOD * on_cross
    assert torch.equal(cross.fit(kernel, on_cross, statistics.ridged()), kernel)
    assert cross.relative_error(kernel, kernel, statistics.ridged()) == 0.0
    assert cross.relative_error(0 * kernel, 0 * kernel) == 0.0
