"""What is trained, and how each parameter is: its weight decay, its learning rate, and the schedule of both."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from asymswap.errors import AsymswapError
from asymswap.replacements.predicted_offset import PredictorConv2d
from asymswap.training.config import Training


def choose_trained_(model: nn.Module, what: str, replacements: Iterable[str]) -> None:
    """Freeze, in place, what is not to be trained; `replacements` are the names of the new layers.

    Raises AsymswapError where nothing would be left.
    """
    if what == "all":
        return
    new = tuple(replacements)
    for name, module in model.named_modules():
        chosen = isinstance(module, _BatchNorm) if what == "bn" else _within(name, new)
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad_(chosen)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        lacking = "batch norm" if what == "bn" else "replaced layer"
        raise AsymswapError(f"--train {what} has nothing to train: the model has no {lacking}; use --train all")


def frozen_norms(model: nn.Module, settings: Training, replacements: Iterable[str]) -> list[nn.Module]:
    """The batch norms whose statistics must not change either."""
    new = tuple(replacements)
    norms = [(name, module) for name, module in model.named_modules() if isinstance(module, _BatchNorm)]
    return [
        module for name, module in norms if settings.freeze_bn or (settings.train == "new" and not _within(name, new))
    ]


def _within(name: str, roots: tuple[str, ...]) -> bool:
    return any(name == root or name.startswith(f"{root}.") for root in roots)


def parameter_groups(model: nn.Module, settings: Training) -> list[dict[str, object]]:
    """The trained parameters as torch's optimizers take them: weights that decay, all others, and offsets.

    Weights decay that are neither batch norms' or other normalisations', nor biases, nor offsets. Each group holds its
    highest learning rate as `initial_lr`.
    """
    groups: dict[str, list[nn.Parameter]] = {"decayed": [], "plain": [], "offsets": []}
    for name, parameter, owner in _trained(model):
        if "offset" in name or isinstance(owner, PredictorConv2d):
            groups["offsets"].append(parameter)
        else:
            groups["decayed" if parameter.ndim > 1 else "plain"].append(parameter)
    rates = {"offsets": settings.base_lr * settings.offset_lr_scale}
    return [
        {
            "params": parameters,
            "name": name,
            "lr": rates.get(name, settings.base_lr),
            "initial_lr": rates.get(name, settings.base_lr),
            "weight_decay": settings.decay if name == "decayed" else 0.0,
        }
        for name, parameters in groups.items()
        if parameters
    ]


def _trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, nn.Module]]:
    """Each trained parameter once, with its own name and the module that holds it."""
    seen = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                yield name, parameter, module


def make_optimizer(model: nn.Module, settings: Training) -> torch.optim.Optimizer:
    """The optimizer over the trained parameters."""
    groups = parameter_groups(model, settings)
    if settings.optimizer == "sgd":
        nesterov = settings.momentum > 0
        return torch.optim.SGD(groups, lr=settings.base_lr, momentum=settings.momentum, nesterov=nesterov)
    return torch.optim.AdamW(groups, lr=settings.base_lr)


def rate_at(step: int, steps: int, settings: Training) -> float:
    """The part of the highest learning rate at a step of so many, the first being 0."""
    warm = round(settings.warmup * steps)
    if step < warm:
        return (step + 1) / (warm + 1)
    if settings.schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def set_rate_(optimizer: torch.optim.Optimizer, factor: float) -> float:
    """Set every group's learning rate to this part of its highest; returns the largest."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor
    return float(max(group["lr"] for group in optimizer.param_groups))
