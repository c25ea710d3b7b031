"""`load`: a converted model from its file."""

from pathlib import Path

from torch import nn

from asymswap.checkpoint import read_checkpoint
from asymswap.errors import AsymswapError
from asymswap.models.converted import restore


def load(path: str | Path, model: nn.Module | None = None) -> nn.Module:
    """Load a converted model: a plain trainable `nn.Module` of the original class with the swaps in it, in eval mode.

    `model` is the unconverted model, with any weights, where its class is known only to you; it is not changed.
    Nothing in the file is executed.
    """
    path = Path(path)
    if model is not None and not isinstance(model, nn.Module):
        raise AsymswapError(f"model= takes a module, such as Net(), not {model!r}")
    return restore(read_checkpoint(path), str(path), model)
