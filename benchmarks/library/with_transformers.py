"""A ResNet from a folder that `save_pretrained` has written; a step of transformers' own Trainer."""

import torch
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments

NETWORK, INPUT = "ResNetForImageClassification", (3, 64, 64)
REFERENCE = "saved"


def build():
    torch.manual_seed(0)
    network = ResNetForImageClassification(ResNetConfig(hidden_sizes=[64, 128], depths=[2, 2], num_labels=10))
    network.save_pretrained("saved")
    return network


def step(model, x):
    rows = [{"pixel_values": image, "labels": index % 10} for index, image in enumerate(x)]
    options = TrainingArguments("trainer", max_steps=1, report_to="none", save_strategy="no", use_cpu=True)
    Trainer(model, options, train_dataset=rows).train()
