"""`offset` with a learned factor for each tap, the same for all channels, which starts at one.

The weights could express the factors too. They are for training few parameters: with the conv's weights frozen, 3 *
kh*kw numbers a conv say where each tap looks and how much it counts.
"""

from asymswap.replacements.offset import Offset


class WeightedOffset(Offset):
    PRESERVES = "exact: every offset starts at zero, every tap's factor at one"
    weighted = True
