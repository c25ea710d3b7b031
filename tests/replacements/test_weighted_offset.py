"""What `weighted-offset` has beyond `offset`; what both share is tested in `test_offset.py`."""

from __future__ import annotations

import torch
from conv_cases import Case, cases
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from asymswap.replacements import Original, load, offset, parse_settings

KIND, PLAIN = load("weighted-offset"), load("offset")


def converted(case: Case) -> tuple[offset.OffsetConv2d, offset.Settings]:
    settled = offset.Settings()
    module = KIND.build(case.site.conv, settled)
    KIND.init_(module, Original(case.conv), settled)
    return module, settled


@given(case=cases(dtype=torch.float64), seed=st.integers(0, 2**16))
def test_factors_are_those_of_the_original_taps(case: Case, seed: int) -> None:
    """At zero offset: the conv whose kernel is multiplied tap by tap."""
    case.conv.padding_mode = "zeros"
    module, settled = converted(case)
    factors = torch.randn(module.raw_offsets.shape[0], generator=torch.Generator().manual_seed(seed)).double()
    assert module.tap_weights is not None
    with torch.no_grad():
        module.tap_weights.copy_(factors)
        fused = KIND.fuse(module, case.site.conv, settled)
        torch.testing.assert_close(fused.weight, case.conv.weight * factors.reshape(case.site.conv.kernel))
        case.conv.weight *= factors.reshape(case.site.conv.kernel)
        torch.testing.assert_close(module(case.x), case.conv(case.x))


def test_factors_start_at_one_and_learn() -> None:
    torch.manual_seed(0)
    case = Case(nn.Conv2d(3, 4, 3, padding=1), torch.randn(1, 3, 6, 6))
    module, _ = converted(case)
    assert module.tap_weights is not None
    assert torch.equal(module.tap_weights, torch.ones(9))
    module(case.x).square().sum().backward()
    assert module.tap_weights.grad is not None
    assert bool((module.tap_weights.grad != 0).all())


def test_a_factor_of_zero_does_not_change_the_size_of_the_fused_conv() -> None:
    torch.manual_seed(0)
    case = Case(nn.Conv2d(3, 4, 3, padding=1), torch.randn(1, 3, 6, 6))
    module, settled = converted(case)
    assert module.tap_weights is not None
    with torch.no_grad():
        module.tap_weights[:3] = 0
    assert KIND.fuse(module, case.site.conv, settled).kernel_size == (3, 3)


def test_the_cost_is_that_of_offset_and_a_parameter_a_tap() -> None:
    case = Case(nn.Conv2d(3, 4, (3, 5)), torch.randn(1, 3, 9, 9))
    plain = PLAIN.cost(case.site, offset.Settings())
    weighted = KIND.cost(case.site, offset.Settings())
    assert (weighted.macs, weighted.params) == (plain.macs, plain.params + 15)


def test_only_weighted_offset_has_factors() -> None:
    settled = parse_settings("offset", {})
    assert isinstance(settled, offset.Settings)
    case = Case(nn.Conv2d(3, 4, 3), torch.randn(1, 3, 9, 9))
    assert PLAIN.build(case.site.conv, settled).tap_weights is None
