"""BALF: activation-aware factorisation of all convs and linear layers, ranks by its own allocation, without training.

It is a repository (github.com/davidgonmar/BALF, MIT), not a package: `BALF` in the environment names a checkout. Its
calls to CUDA do nothing here, so that it computes on the processor; its assertions that tensors are on a GPU are left
out by running Python with -O. Of the ratios that it takes, the largest that keeps the budget by our count of MACs.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import sys
import tempfile
from typing import Any

import torch
from common import BATCH, Clock, count_macs, smallest_that_fits, start
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

LOAD = torch.load


def without_cuda() -> None:
    """Let what a GPU would be asked for do nothing."""
    patched: Any = torch
    patched.Tensor.cuda = lambda tensor: tensor
    patched.load = lambda path, **options: LOAD(path, **{**options, "map_location": "cpu"})
    patched.backends.cuda.preferred_linalg_library = lambda _: None
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        setattr(patched.cuda, name, lambda: None)
    patched.cuda.max_memory_allocated = lambda: 0


def main() -> None:
    checkout = os.environ.get("BALF")
    if not checkout:
        sys.exit("set BALF to a checkout of github.com/davidgonmar/BALF")
    if __debug__:
        os.execv(sys.executable, [sys.executable, "-O", *sys.argv])
    sys.path.insert(0, checkout)
    task, results = start(__doc__, ["numpy"])
    without_cuda()
    from lib.factorization.factorize import collect_activation_cache, to_low_rank_activation_aware_auto

    layers = [name for name, module in task.model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    clock, most = Clock(), task.budget * count_macs(task.model, task.image)
    with clock.measure(), tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        data: DataLoader[tuple[Tensor, ...]] = DataLoader(TensorDataset(*task.calibration), batch_size=BATCH)
        cache = collect_activation_cache(task.model, data, layers)

        @functools.cache
        def at(ratio: float) -> nn.Module:
            found: nn.Module = to_low_rank_activation_aware_auto(
                task.model, cache, layers, ratio, "flops", inplace=False, save_dir=folder
            )
            return found

        left = smallest_that_fits(lambda left: count_macs(at(1 - left), task.image) <= most, 0.0, 0.999, steps=8)
        model = at(1 - left)
    results.add("", model, clock, f"ratio {1 - left:.3f}")


if __name__ == "__main__":
    main()
