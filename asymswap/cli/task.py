"""`asymswap task`: a file to write one's own data, inputs, metric and loss into."""

from __future__ import annotations

import typer

TEMPLATE = '''\
"""A task for asymswap: your own data, inputs, metric and loss.

    asymswap convert model.pt --arch net.py:Net --recipe half-macs --task my_task.py
    asymswap finetune model.asym.pt --arch net.py:Net --task my_task.py

Every function is optional: remove what you do not need. The file is run, and may import what lies beside it.
This example is a denoiser of grey images. The images are made up here: put your own in their place.
"""

import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset


def _noisy_and_clean(images, seed):
    # Helpers begin with _: any other name close to those below is taken for a misspelt one.
    random = torch.Generator().manual_seed(seed)
    clean = F.interpolate(torch.rand(images, 1, 4, 4, generator=random), size=64, mode="bilinear")
    noisy = clean + 25 / 255 * torch.randn(clean.shape, generator=random)
    return TensorDataset(noisy, clean)


def calibration():
    """Batches to choose ranks and weights on; labels are not needed. Read more than once, so return a new loader."""
    return DataLoader(_noisy_and_clean(256, seed=0), batch_size=32)


def inputs(batch):
    """What the forward gets of a batch. Two tensors: `return batch[0], batch[1]`; by name: `return {"x": batch[0]}`."""
    noisy, _ = batch
    return noisy


def evaluate(model):
    """A number, or several by name; the first decides. The model is in eval mode, on the device to be used."""
    device = next(model.parameters()).device
    errors = []
    with torch.no_grad():
        for noisy, clean in DataLoader(_noisy_and_clean(64, seed=1), batch_size=32):
            errors.append((model(noisy.to(device)) - clean.to(device)).square().mean((1, 2, 3)))
    error = torch.cat(errors)
    return {"psnr": float(-10 * error.log10().mean()), "mse": float(error.mean())}


# Of the names that evaluate returns; of the others, higher is better.
LOWER_IS_BETTER = ("mse",)


def training():
    """Batches for `asymswap finetune`."""
    return DataLoader(_noisy_and_clean(1024, seed=2), batch_size=16, shuffle=True)


def loss(outputs, batch):
    """A scalar tensor, from the model's outputs and the batch. A classifier: `F.cross_entropy(outputs, batch[1])`."""
    _, clean = batch
    return F.mse_loss(outputs, clean)
'''


def task() -> None:
    """Print a commented Python file for --task: your own data, inputs, metric and loss.

    Example: asymswap task > my_task.py
    """
    typer.echo(TEMPLATE, nl=False)
