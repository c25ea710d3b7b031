"""Settings that a resumed run must share."""

from __future__ import annotations

import pytest

from asymswap.errors import AsymswapError
from asymswap.training.config import Training, check_same


def test_differences_are_named() -> None:
    given, stored = Training(lr=0.1).identity(), Training(epochs=3).identity()
    with pytest.raises(AsymswapError, match=r"`lr=0\.1` \(was 0\.001\).*resume it with the same ones") as error:
        check_same(given, stored, "x.run")
    assert "`epochs=10` (was 3)" in str(error.value)
    check_same(given, dict(given), "x.run")


def test_what_only_changes_the_speed_may_differ() -> None:
    check_same(Training(workers=3, save_every=2).identity(), Training().identity(), "x.run")
