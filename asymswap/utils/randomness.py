"""Random numbers of a training run, all of them functions of its seed and of where in the run they are drawn.

Nothing is left to be saved with a checkpoint then, and nothing depends on how many workers read images, in which order
they come, or how often the run was interrupted.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from asymswap.utils.tensors import number_for


def seed_(*words: object) -> None:
    """Seed Python's, NumPy's and torch's global generators, those of all devices too, by the words."""
    number = number_for(*words)
    random.seed(number)
    np.random.seed(number % 2**32)
    torch.manual_seed(number)


@contextmanager
def drawn_from(*words: object) -> Iterator[None]:
    """Let torch's CPU generator, from which augmentations draw, depend on the words alone for a while."""
    before = torch.default_generator.get_state()
    torch.default_generator.manual_seed(number_for(*words))
    try:
        yield
    finally:
        torch.default_generator.set_state(before)


@contextmanager
def kept() -> Iterator[None]:
    """Give the program that calls us its own random numbers back at the end."""
    python, numpy = random.getstate(), np.random.get_state()
    cpu = torch.get_rng_state()
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if gpus:
            torch.cuda.set_rng_state_all(gpus)
