"""tensorly-torch: Tucker decomposition of 1x1 and 3x3 convs over both channel modes, at one fraction of the ranks.

`implementation="factorized"` is set, for the default multiplies the factors out again and saves nothing; the two
spatial modes keep their full rank. No data is used, but for the variant with batch norm re-estimated on the calibration
images.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence

from common import Clock, Task, count_macs, reestimate_batch_norm_, smallest_that_fits, start
from tltorch import FactorizedConv
from torch import nn


def square_convs(model: nn.Module) -> list[str]:
    """The convs that asymswap's recipe swaps as well: dense, 1x1 or 3x3, 16 inputs or more; tltorch has one stride."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d)
        and module.kernel_size in ((1, 1), (3, 3))
        and module.groups == 1
        and module.in_channels >= 16
        and module.stride[0] == module.stride[1]
    ]


def decomposed(model: nn.Module, ranks: Mapping[str, Sequence[int]], decompose: bool) -> nn.Module:
    """A copy with every such conv decomposed at its ranks (of output and input channels), or only shaped so."""
    model = copy.deepcopy(model)
    for name, chosen in ranks.items():
        conv = model.get_submodule(name)
        model.set_submodule(
            name,
            FactorizedConv.from_conv(
                conv,
                rank=(*chosen, *conv.kernel_size),
                factorization="tucker",
                implementation="factorized",
                decompose_weights=decompose,
            ),
        )
    return model


def ranks_at(model: nn.Module, fraction: float) -> dict[str, list[int]]:
    """This fraction of both channel modes of every conv."""
    convs = {name: model.get_submodule(name) for name in square_convs(model)}
    return {
        name: [max(1, math.floor(fraction * n)) for n in (conv.out_channels, conv.in_channels)]
        for name, conv in convs.items()
    }


def widest(task: Task) -> tuple[float, dict[str, list[int]]]:
    """The largest fraction of the ranks that keeps the budget; what is left over then goes to single ranks."""
    most = task.budget * count_macs(task.model, task.image)

    def fits(ranks: Mapping[str, Sequence[int]]) -> bool:
        return count_macs(decomposed(task.model, ranks, decompose=False), task.image) <= most

    fraction = 1 - smallest_that_fits(lambda left: fits(ranks_at(task.model, 1 - left)), 0.0, 1.0, steps=10)
    ranks = ranks_at(task.model, fraction)
    for name, chosen in ranks.items():
        for mode in (0, 1):
            more = [rank + (mode == number) for number, rank in enumerate(chosen)]
            full = task.model.get_submodule(name).weight.shape[mode]
            if more[mode] <= full and fits({**ranks, name: more}):
                ranks[name] = chosen = more
    return fraction, ranks


def main() -> None:
    task, results = start(__doc__, ["tensorly", "tensorly-torch"])
    clock = Clock()
    with clock.measure():
        fraction, ranks = widest(task)
        model = decomposed(task.model, ranks, decompose=True)
    note = f"{fraction:.3f} of the channel ranks"
    results.add("", model, clock, note)
    with clock.measure():
        reestimate_batch_norm_(model, task.calibration[0])
    results.add("+ BN re-estimation", model, clock, note)


if __name__ == "__main__":
    main()
