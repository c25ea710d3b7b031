"""Random numbers of a training run, all of them functions of its seed and of the place in the run.

So a checkpoint need not save any random state, and nothing depends on how many workers read images, in which order they
come, or how often the run was interrupted.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from asymswap.utils.tensors import number_for


def seed_(*words: object) -> None:
    """Seed Python's, NumPy's and torch's global generators, on all devices, by the words."""
    number = number_for(*words)
    random.seed(number)
    np.random.seed(number % 2**32)
    torch.manual_seed(number)


@contextmanager
def drawn_from(*words: object) -> Iterator[None]:
    """Let torch's CPU generator, which augmentations use, depend on the words alone while the block lasts."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(number_for(*words))
        yield


@contextmanager
def kept() -> Iterator[None]:
    """Restore the caller's global random states at the end of the block."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
