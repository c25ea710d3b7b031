"""A k x k conv with a k x 1 and a 1 x k conv beside it, the three outputs summed (asymmetric convolution block).

Ding, Guo, Ding and Han, ACNet, ICCV 2019: two of the branches of `asymswap.replacements.branches`, by their own name.
"""

from collections.abc import Sequence
from typing import Any

from asymswap.replacements import _convs
from asymswap.replacements.branches import Branches, NormSettings
from asymswap.types import ConvSpec


class AsymmetricConvBlock(Branches):
    settings = NormSettings
    PRESERVES = "exact in eval mode; fuses back to one k x k conv"

    def unsupported(self, conv: ConvSpec) -> str | None:
        return _convs.unsupported(conv) or super().unsupported(conv)

    def listed(self, settings: Any) -> Sequence[str]:
        return ("vertical", "horizontal")
