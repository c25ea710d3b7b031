"""My data, inputs, metric and loss for asymswap: `--task my_task.py`. Remove what you do not need; the file is run.

This example is a denoiser of grey images, which are made up here.
"""

import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset


def _pairs(images, seed, shuffle=False):  # names of helpers begin with _
    random = torch.Generator().manual_seed(seed)
    clean = F.interpolate(torch.rand(images, 1, 4, 4, generator=random), size=64, mode="bilinear")
    noisy = clean + torch.randn(clean.shape, generator=random) * 25 / 255
    return DataLoader(TensorDataset(noisy, clean), batch_size=16, shuffle=shuffle)


def calibration():  # batches; labels are not needed
    return _pairs(256, seed=0)


def inputs(batch):  # what the forward gets; two tensors: `batch[0], batch[1]`; by name: `{"x": batch[0]}`
    return batch[0]


def evaluate(model):  # a number, or several by name, of which the first decides
    device = next(model.parameters()).device
    with torch.no_grad():
        errors = [(model(x.to(device)) - y.to(device)).square().mean((1, 2, 3)) for x, y in _pairs(64, seed=1)]
    error = torch.cat(errors)
    return {"psnr": float(-10 * error.log10().mean()), "mse": float(error.mean())}


LOWER_IS_BETTER = ("mse",)  # of the names above; of the others, higher is better


def training():  # batches for `asymswap finetune`
    return _pairs(1024, seed=2, shuffle=True)


def loss(outputs, batch):  # a scalar tensor; for a classifier: `F.cross_entropy(outputs, batch[1])`
    return F.mse_loss(outputs, batch[1])
