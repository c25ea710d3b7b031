"""What a training run is told: one dataclass, checked when it is made, and what of it a resumed run must share."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from asymswap.errors import AsymswapError, check_choice

_CHOICES = {
    "optimizer": ("adamw", "sgd"),
    "schedule": ("cosine", "constant"),
    "precision": ("fp32", "bf16", "fp16"),
    "train": ("all", "new", "bn"),
    "distill_loss": ("kl", "mse"),
}
_ABOVE_ZERO = ("epochs", "steps", "batch_size", "accumulate", "lr", "clip", "temperature", "patience", "save_every")
_NOT_BELOW_ZERO = ("momentum", "weight_decay", "offset_lr_scale", "warmup", "distill_features", "workers")
_FRACTIONS = ("label_smoothing", "ema", "distill_weight", "warmup", "momentum")
# These change how fast a run is, and not what comes of it.
_FREE = ("workers", "save_every", "channels_last", "deterministic")
_LEARNING_RATES = {"adamw": 1e-3, "sgd": 0.02}
_WEIGHT_DECAYS = {"adamw": 0.01, "sgd": 5e-4}


@dataclass(frozen=True)
class Training:
    """How to train.

    - `epochs` or `steps`: how long; 10 epochs where neither is given;
    - `batch_size` images a process and forward pass, `accumulate` of which make one step;
    - `lr` and `weight_decay`: by default what suits the optimizer; no decay on batch norms, biases and offsets, whose
      learning rate is `offset_lr_scale` of the others';
    - `schedule`: `cosine` or `constant`, after a linear warm-up over the part `warmup` of all steps;
    - `train`: `all`, the `new` layers only, or `bn`, the batch norms only; what is not trained does not change;
    - `freeze_bn`: batch norms use the running statistics that they have, and keep them: what a converted network was
      fitted to, where there are few epochs; their weights are trained as `train` says;
    - `augment`: presets of `asymswap.data.augmentation`; None for what suits the data;
    - `distill`: `original`, or a model reference; it has the part `distill_weight` of the loss: by `distill_loss` the
      divergence (`kl`) of the class probabilities at `temperature`, or the squared difference (`mse`) of the class
      scores, relative to the teacher's; `distill_features` adds that times the error of the outputs of the blocks with
      swapped layers, relative to the teacher's variance;
    - `ema`: the decay of a moving average of the weights, which is then what is validated and kept;
    - `validation`: see `asymswap.data.splits.open_parts`; `patience`: so many epochs without a better one end it;
    - `sync_bn`: processes share the statistics of batch norms, so that several give what one does;
    - `save_every`: so many steps between savings, beside those at the end of each epoch.

    Raises AsymswapError for values that make no sense.
    """

    epochs: int | None = None
    steps: int | None = None
    batch_size: int = 128
    accumulate: int = 1
    optimizer: str = "adamw"
    lr: float | None = None
    momentum: float = 0.9
    weight_decay: float | None = None
    offset_lr_scale: float = 0.1
    schedule: str = "cosine"
    warmup: float = 0.05
    clip: float | None = None
    label_smoothing: float = 0.0
    precision: str = "fp32"
    ema: float | None = None
    train: str = "all"
    freeze_bn: bool = False
    augment: tuple[str, ...] | None = None
    distill: str | None = None
    distill_weight: float = 0.9
    distill_loss: str = "kl"
    temperature: float = 4.0
    distill_features: float = 0.0
    validation: str | None = None
    patience: int | None = None
    sync_bn: bool = True
    seed: int = 0
    strict: bool = False
    cpu: bool = False
    workers: int | None = None
    save_every: int | None = None
    channels_last: bool = True
    deterministic: bool = True

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            check_choice(_option(name), getattr(self, name), choices)
        for name in _ABOVE_ZERO + _NOT_BELOW_ZERO + _FRACTIONS:
            self._check_number(name)
        if self.epochs is not None and self.steps is not None:
            raise AsymswapError("give either --epochs or --steps")
        if self.patience is not None and self.validation in ("none", "0"):
            raise AsymswapError("--patience needs images to validate on; leave out --validation none")
        if self.distill is None and self.distill_features:
            raise AsymswapError("--distill-features needs a teacher: add --distill")

    def _check_number(self, name: str) -> None:
        value = getattr(self, name)
        if value is None:
            return
        if not math.isfinite(value) or value < 0 or (name in _ABOVE_ZERO and value == 0):
            raise AsymswapError(f"{_option(name)} {value:g} must be {'above' if name in _ABOVE_ZERO else 'at least'} 0")
        if name in _FRACTIONS and value >= 1 and not (name == "distill_weight" and value == 1):
            raise AsymswapError(f"{_option(name)} {value:g} must be below 1")

    @property
    def length(self) -> tuple[int | None, int | None]:
        """Epochs and steps, one of which is a number."""
        return (10, None) if self.epochs is None and self.steps is None else (self.epochs, self.steps)

    @property
    def base_lr(self) -> float:
        """The highest learning rate."""
        return _LEARNING_RATES[self.optimizer] if self.lr is None else self.lr

    @property
    def decay(self) -> float:
        """The weight decay of what decays."""
        return _WEIGHT_DECAYS[self.optimizer] if self.weight_decay is None else self.weight_decay

    def identity(self) -> dict[str, Any]:
        """What makes a run the run that it is, as plain data."""
        plain = {key: value for key, value in dataclasses.asdict(self).items() if key not in _FREE}
        plain["epochs"], plain["steps"] = self.length
        plain["lr"], plain["weight_decay"] = self.base_lr, self.decay
        return plain | {"augment": None if self.augment is None else list(self.augment)}


def check_same(given: dict[str, Any], stored: dict[str, Any], folder: object) -> None:
    """Raise AsymswapError, naming each difference, where a run is resumed with other settings than it began with."""
    names = [name for name in {**stored, **given} if given.get(name) != stored.get(name)]
    if names:
        told = ", ".join(f"{_option(name)} {given.get(name)} (was {stored.get(name)})" for name in names)
        raise AsymswapError(
            f"the run in {folder} was begun with other settings: {told}; resume it with the same ones, or begin anew "
            "with --force"
        )


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
