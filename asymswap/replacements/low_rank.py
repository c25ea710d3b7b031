"""A 1 x 1 conv as two: C -> R, then R -> O, with nothing between them.

The first conv carries stride, padding and dilation: it has no bias, so what it pads is what the conv pads, in every
padding mode, and the second one walks over less. It is `separable` with a single tap, for which the best pair is found
in closed form: the truncated SVD of the kernel, whitened by the covariance of calibration data (Zhang, Zou, He and Sun,
2015, section 3.1; without data Denton et al., 2014). Groups are solved one by one, and R is the rank of one.
"""

from dataclasses import replace

from asymswap.replacements._pairs import Pair, PairSettings, SettledPair
from asymswap.types import ConvSpec


class LowRank(Pair):
    settings = PairSettings
    settled = SettledPair
    PRESERVES = "approximate (exact at full rank)"

    def unsupported(self, conv: ConvSpec) -> str | None:
        if conv.kernel != (1, 1):
            return f"a {'x'.join(map(str, conv.kernel))} kernel is not 1x1"
        if conv.grouping == "depthwise":
            return "a depthwise 1x1 conv has only one weight for each output, nothing to factorise"
        return super().unsupported(conv)

    def halves(self, conv: ConvSpec, settings: SettledPair) -> dict[str, ConvSpec]:
        """Return the convs `reduce` and `expand`."""
        channels, bias = conv.groups * settings.rank, conv.bias or settings.bias
        expand = ConvSpec(channels, conv.out_channels, (1, 1), groups=conv.groups, bias=bias, dtype=conv.dtype)
        return {"reduce": replace(conv, out_channels=channels, bias=False), "expand": expand}
