"""ESRGAN's RRDBNet, as BasicSR writes it and spandrel reads it, for twice the size; a step on an L1 loss."""

import torch
from spandrel.architectures.ESRGAN.__arch.RRDB import RRDBNet

NETWORK, INPUT = "ESRGAN, RRDBNet x2", (3, 24, 24)


def build():
    return RRDBNet(in_nc=3, out_nc=3, num_filters=16, num_blocks=2, scale=2)


def step(model, x):
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    torch.nn.functional.l1_loss(model(x), torch.rand(len(x), 3, 48, 48)).backward()
    optimizer.step()
