"""A 2D U-Net for grey images; a step on its own Dice loss."""

import torch
from monai.losses import DiceLoss
from monai.networks.nets import UNet

NETWORK, INPUT = "UNet, 2D", (1, 64, 64)


def build():
    return UNet(spatial_dims=2, in_channels=1, out_channels=2, channels=(16, 32, 64), strides=(2, 2), num_res_units=2)


def step(model, x):
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    masks = torch.randint(0, 2, (len(x), 1, *x.shape[2:]))
    DiceLoss(to_onehot_y=True, softmax=True)(model(x), masks).backward()
    optimizer.step()
