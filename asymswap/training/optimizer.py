"""The trained parameters, their weight decay and learning rates, and the schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from asymswap.errors import AsymswapError
from asymswap.replacements.predicted_offset import PredictorConv2d
from asymswap.training.config import Training


def choose_trained_(model: nn.Module, what: str, replacements: Iterable[str]) -> None:
    """Freeze, in place, what is not trained; `replacements` are the new layers. AsymswapError if nothing is left."""
    if what == "all":
        return
    new = tuple(replacements)
    for name, module in model.named_modules():
        chosen = isinstance(module, _BatchNorm) if what == "bn" else _within(name, new)
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad_(chosen)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        lacking = "batch norm" if what == "bn" else "replaced layer"
        raise AsymswapError(f"`train={what}` has nothing to train: the model has no {lacking}; use `train=all`")


def frozen_norms(model: nn.Module, settings: Training, replacements: Iterable[str]) -> list[nn.Module]:
    """Return the batch norms whose statistics must not change either."""
    new = tuple(replacements)
    return [
        module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm)
        and (settings.freeze_bn or (settings.train == "new" and not _within(name, new)))
    ]


def _within(name: str, roots: tuple[str, ...]) -> bool:
    return any(name == root or name.startswith(f"{root}.") for root in roots)


def make_optimizer(model: nn.Module, settings: Training) -> torch.optim.Optimizer:
    """Return the optimizer over the trained parameters, in groups with their highest learning rate as `initial_lr`.

    Biases, offsets and the parameters of normalisations do not decay.
    """
    groups: dict[str, list[nn.Parameter]] = {"decayed": [], "plain": [], "offsets": []}
    seen = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            if "offset" in name or isinstance(module, PredictorConv2d):
                groups["offsets"].append(parameter)
            else:
                groups["decayed" if parameter.ndim > 1 else "plain"].append(parameter)
    options: list[dict[str, object]] = []
    for name, parameters in groups.items():
        rate = settings.base_lr * (settings.offset_lr_scale if name == "offsets" else 1)
        decay = settings.decay if name == "decayed" else 0.0
        if parameters:
            options.append({"params": parameters, "name": name, "lr": rate, "initial_lr": rate, "weight_decay": decay})
    if settings.optimizer == "sgd":
        nesterov = settings.momentum > 0
        return torch.optim.SGD(options, lr=settings.base_lr, momentum=settings.momentum, nesterov=nesterov)
    return torch.optim.AdamW(options, lr=settings.base_lr)


def rate_at(step: int, steps: int, settings: Training) -> float:
    """Return the learning rate at a step (counted from 0) of `steps`, as a fraction of the highest."""
    warm = round(settings.warmup * steps)
    if step < warm:
        return (step + 1) / (warm + 1)
    if settings.schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def set_rate_(optimizer: torch.optim.Optimizer, factor: float) -> float:
    """Set every group's learning rate to this fraction of its highest; return the largest."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor
    return float(max(group["lr"] for group in optimizer.param_groups))
