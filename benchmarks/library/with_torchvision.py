"""A detector: lists of images in, lists of boxes out; a step on the losses that it returns in training mode."""

import torch
from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_320_fpn

NETWORK, INPUT = "fasterrcnn_mobilenet_v3_large_320_fpn", (3, 96, 96)
REFERENCE = "fasterrcnn_mobilenet_v3_large_320_fpn"


def build():
    return fasterrcnn_mobilenet_v3_large_320_fpn(weights=None, weights_backbone=None)


def step(model, x):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    target = {"boxes": torch.tensor([[10.0, 10.0, 50.0, 60.0]]), "labels": torch.tensor([1])}
    sum(model([*x], [target] * len(x)).values()).backward()
    optimizer.step()
