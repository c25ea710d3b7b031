"""The settings of a training run: one dataclass that checks its values, and from which the command line is made."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from asymswap.errors import AsymswapError, check_choice
from asymswap.utils.options import option

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
_FREE = ("workers", "save_every", "channels_last", "deterministic")
"""Settings that change the speed of a run, but not its result."""
_LEARNING_RATES = {"adamw": 1e-3, "sgd": 0.02}
_WEIGHT_DECAYS = {"adamw": 0.01, "sgd": 5e-4}

_LENGTH, _IMAGES, _TEACHER, _RESULT = "How long, and how", "Images", "Distillation", "Result"


# No `from __future__ import annotations` here: the command line needs the types of the fields.
@dataclass(frozen=True)
class Training:
    """How to train. `asymswap finetune --help` describes every field that is an option.

    - without `epochs` and `steps` it is 10 epochs;
    - weights of batch norms, biases and offsets do not decay; offsets learn at `offset_lr_scale` of the others' rate;
    - `train`: what is not trained does not change, running statistics included; `freeze_bn` freezes the running
      statistics alone: their weights are trained as `train` says;
    - `augment`: presets of `asymswap.data.augmentation`; None for what suits the data;
    - `distill`: `original`, or a model reference. Its part of the loss, `distill_weight`, is the divergence (`kl`) of
      the class probabilities at `temperature`, or the squared difference (`mse`) of the class scores, relative to the
      teacher's. `distill_features` adds that times the error of the outputs of the blocks with swapped layers, relative
      to the teacher's variance;
    - `ema`: the moving average is what is validated and kept;
    - `validation`: see `asymswap.data.splits.open_parts`.

    Several processes share the statistics of batch norms on GPUs; without GPUs each keeps its own.

    Raises AsymswapError for values that make no sense.
    """

    epochs: int | None = option(None, "So many epochs.", _LENGTH, shown="10")
    steps: int | None = option(None, "Or so many steps.", _LENGTH)
    batch_size: int = option(128, "Images in one forward pass of each process.", _LENGTH)
    accumulate: int = option(1, "Forward passes that make one step.", _LENGTH)
    optimizer: str = option("adamw", "adamw or sgd.", _LENGTH)
    lr: float | None = option(None, "The highest learning rate.", _LENGTH, shown="0.001 (adamw), 0.02 (sgd)")
    momentum: float = option(0.9, "Of sgd.", _LENGTH)
    weight_decay: float | None = option(
        None, "Not on batch norms, biases and offsets.", _LENGTH, shown="0.01 (adamw), 0.0005 (sgd)"
    )
    offset_lr_scale: float = option(0.1, "The learning rate of offsets is so much of the others'.", _LENGTH)
    schedule: str = option("cosine", "cosine or constant.", _LENGTH)
    warmup: float = option(0.05, "The part of all steps in which the learning rate rises.", _LENGTH)
    clip: float | None = option(None, "Cut the gradient's norm to this.", _LENGTH)
    label_smoothing: float = option(0.0, "0.1 is usual.", _LENGTH)
    precision: str = option("fp32", "fp32, bf16 or fp16.", _LENGTH)
    ema: float | None = option(None, "Keep a moving average of the weights with this decay.", _LENGTH)
    train: str = option("all", "all, new (the replaced layers) or bn (the batch norms).", _LENGTH)
    freeze_bn: bool = option(False, "Batch norms keep and use their statistics.", _LENGTH)
    patience: int | None = option(None, "Stop after so many epochs without a better one.", _LENGTH)
    seed: int = option(0, "Seed of all that is random.", _LENGTH)
    augment: tuple[str, ...] | None = option(
        None,
        "none, flip, crop, flip-crop or randaugment; with ,mixup or ,cutmix for whole batches.",
        _IMAGES,
        shown="what suits the data",
        text=True,
    )
    validation: str | None = option(
        None,
        "What is validated on: a part of the images (0.1), test, none, or other data.",
        _IMAGES,
        shown="the folder val, else 0.1",
    )
    workers: int | None = option(None, "Processes that read images.", _IMAGES, shown="by the cores")
    strict: bool = option(False, "An image that cannot be read is an error, and not skipped.", _IMAGES)
    distill: str | None = option(
        None,
        "Learn from another model too: a reference, or nothing for the original that was converted.",
        _TEACHER,
        metavar="[REF]",
    )
    distill_weight: float = option(0.9, "The teacher's part of the loss.", _TEACHER)
    distill_loss: str = option("kl", "kl, of class probabilities, or mse, of the scores before the softmax.", _TEACHER)
    temperature: float = option(4.0, "Class scores are divided by this.", _TEACHER)
    distill_features: float = option(
        0.0, "Add so much times the error of the outputs of blocks with swapped layers.", _TEACHER
    )
    save_every: int | None = option(None, "Save after so many steps, not only epochs.", _RESULT)
    cpu: bool = option(False, "Use no GPU.", None)
    channels_last: bool = True
    deterministic: bool = True

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            check_choice(_option(name), getattr(self, name), choices)
        for name in _ABOVE_ZERO + _NOT_BELOW_ZERO + _FRACTIONS:
            value = getattr(self, name)
            if value is None:
                continue
            if not math.isfinite(value) or value < 0 or (name in _ABOVE_ZERO and value == 0):
                least = "above" if name in _ABOVE_ZERO else "at least"
                raise AsymswapError(f"{_option(name)} {value:g} must be {least} 0")
            if name in _FRACTIONS and value >= 1 and not (name == "distill_weight" and value == 1):
                raise AsymswapError(f"{_option(name)} {value:g} must be below 1")
        if self.epochs is not None and self.steps is not None:
            raise AsymswapError("give either --epochs or --steps")
        if self.patience is not None and self.validation in ("none", "0"):
            raise AsymswapError("--patience needs images to validate on; leave out --validation none")
        if self.distill is None and self.distill_features:
            raise AsymswapError("--distill-features needs a teacher: add --distill")

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
        """The weight decay of the parameters that decay."""
        return _WEIGHT_DECAYS[self.optimizer] if self.weight_decay is None else self.weight_decay

    def identity(self) -> dict[str, Any]:
        """Return the settings on which the result depends, as plain data."""
        plain = {key: value for key, value in dataclasses.asdict(self).items() if key not in _FREE}
        plain["epochs"], plain["steps"] = self.length
        plain["lr"], plain["weight_decay"] = self.base_lr, self.decay
        return plain | {"augment": None if self.augment is None else list(self.augment)}


def check_same(given: Mapping[str, Any], stored: Mapping[str, Any], folder: object) -> None:
    """Raise AsymswapError, naming each difference, where a run is resumed with other settings than it began with."""
    # Earlier versions had this option; for one process it made no difference.
    names = [name for name in {**stored, **given} if name != "sync_bn" or stored.get("processes") != 1]
    differing = [name for name in names if given.get(name) != stored.get(name)]
    if differing:
        listed = ", ".join(f"{_option(name)} {given.get(name)} (was {stored.get(name)})" for name in differing)
        raise AsymswapError(
            f"the run in {folder} was begun with other settings: {listed}; resume it with the same ones, or begin anew "
            "with --force"
        )


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
