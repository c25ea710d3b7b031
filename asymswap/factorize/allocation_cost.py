"""What a layer's error costs the network: the number by which a budget compares layers, sizes and kinds."""

from __future__ import annotations

import math


def loss(error: float, divergence: float | None = None) -> float:
    """What the relative squared error of a layer costs, or its geometric mean with the divergence (in nats), if known.

    The relative error counts as the logarithm of the energy that is kept, without its sign. Summed over layers that is
    the product of what each keeps, as in Zhang, Zou, He and Sun, 2015, section 3.4. For small errors it is the error
    itself; but no budget may save by spoiling one layer altogether, as sums of errors would.

    The divergence is K-FAC's estimate: half the error as `SiteStatistics.output_weight` weights it. The geometric mean
    ranks layers better than either does (docs/results/calibration-experiments.md).
    """
    spoilt = -math.log1p(-min(error, 1 - 1e-12))
    return spoilt if divergence is None else math.sqrt(spoilt * divergence)
