"""An embedder of faces; an epoch of its own training loop over one batch."""

import torch
from facenet_pytorch import InceptionResnetV1, training

NETWORK, INPUT = "InceptionResnetV1", (3, 80, 80)


def build():
    return InceptionResnetV1(classify=False, pretrained=None)


def step(model, x):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    embeddings = torch.nn.functional.normalize(torch.rand(len(x), 512))
    loader = [(x, embeddings)]
    model.train()
    training.pass_epoch(model, torch.nn.MSELoss(), loader, optimizer, batch_metrics={}, show_running=False)
