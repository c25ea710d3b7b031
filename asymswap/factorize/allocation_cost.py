"""What a layer's error costs the network: the number by which a budget compares layers, sizes and kinds."""

from __future__ import annotations

import math


def loss(error: float, divergence: float | None = None) -> float:
    """Return the cost of a relative squared error, or its geometric mean with the divergence (in nats), if known.

    The relative error counts as minus the logarithm of the energy that is kept. Summed over layers that is the product
    of what each keeps (Zhang, Zou, He and Sun, 2015, section 3.4); small errors count as they are, but no single layer
    is ruined to save cost, as sums of errors would allow. The divergence is K-FAC's estimate: half the error as
    `SiteStatistics.output_weight` weights it. The geometric mean ranks layers better than either does
    (docs/results/calibration-experiments.md).
    """
    lost = -math.log1p(-min(error, 1 - 1e-12))
    return lost if divergence is None else math.sqrt(lost * divergence)
