"""Settings and callbacks of a training run: `Training` checks its values, and the command line is made from it."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from asymswap.errors import AsymswapError, check_choice
from asymswap.results.finetune import EpochRow, RunStart, StepRow
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
_FREE = ("workers", "save_every", "channels_last", "deterministic")  # they change the speed of a run, not its result
EPOCHS = 10  # by default
_LEARNING_RATES, _WEIGHT_DECAYS = {"adamw": 1e-3, "sgd": 0.02}, {"adamw": 0.01, "sgd": 5e-4}

_HOW, _IMAGES, _TEACHER, _RESULT = "How long, and how", "Images", "Distillation", "Result"


# No `from __future__ import annotations` here: the command line needs the types of the fields.
@dataclass(frozen=True)
class Training:
    """How to train; the help text of each field is beside it. Raises AsymswapError for values that make no sense.

    - weights of batch norms, biases and offsets do not decay;
    - `train`: what is not trained does not change, running statistics included; `freeze_bn` freezes the running
      statistics alone, while the weights of batch norms are trained as `train` says;
    - `distill`: `original`, or a model reference. Its part of the loss, `distill_weight`, is the divergence (`kl`) of
      the class probabilities at `temperature`, or the squared difference (`mse`) of the class scores, relative to the
      teacher's; `distill_features` weighs the error of the outputs of blocks, relative to the teacher's variance;
    - `ema`: the moving average is validated and kept.

    Several processes share the statistics of batch norms on GPUs; without GPUs each keeps its own.
    """

    epochs: int | None = option(None, "Number of epochs.", _HOW, shown="10")
    steps: int | None = option(None, "Number of steps, instead of epochs.", _HOW)
    batch_size: int | None = option(None, "Images per forward pass and process.", _HOW, shown="128")
    accumulate: int = option(1, "Forward passes per step.", _HOW)
    optimizer: str = option("adamw", "Optimizer: adamw or sgd.", _HOW)
    lr: float | None = option(None, "The highest learning rate.", _HOW, shown="0.001 (adamw), 0.02 (sgd)")
    momentum: float = option(0.9, "SGD momentum.", _HOW)
    weight_decay: float | None = option(
        None, "Weight decay, except of batch norms, biases and offsets.", _HOW, shown="0.01 (adamw), 0.0005 (sgd)"
    )
    offset_lr_scale: float = option(0.1, "Learning rate of offsets, relative to the others.", _HOW)
    schedule: str = option("cosine", "Learning rate schedule: cosine or constant.", _HOW)
    warmup: float = option(0.05, "Fraction of the steps in which the learning rate rises.", _HOW)
    clip: float | None = option(None, "Maximum norm of the gradient.", _HOW)
    label_smoothing: float = option(0.0, "Label smoothing; 0.1 is usual.", _HOW)
    precision: str = option("fp32", "Precision: fp32, bf16 or fp16.", _HOW)
    ema: float | None = option(None, "Decay of a moving average of the weights, which is kept.", _HOW)
    train: str = option("all", "What to train: all, new (what a conversion has added) or bn (the batch norms).", _HOW)
    freeze_bn: bool = option(False, "Freeze the running statistics of batch norms.", _HOW)
    patience: int | None = option(None, "Stop after this number of epochs without improvement.", _HOW)
    seed: int = option(0, "Random seed.", _HOW)
    augment: tuple[str, ...] | None = option(
        None,
        "Augmentation: none, flip, crop, flip-crop or randaugment; add ,mixup or ,cutmix for whole batches.",
        _IMAGES,
        shown="what suits the data",
        text=True,
    )
    validation: str | None = option(
        None, "Validate on a fraction (0.1), test, none or other data.", _IMAGES, shown="the folder val, else 0.1"
    )
    workers: int | None = option(None, "Processes that read images.", _IMAGES, shown="by the cores")
    strict: bool = option(False, "Fail on an unreadable image instead of skipping it.", _IMAGES)
    distill: str | None = option(
        None, "Teacher: a model reference, or nothing for the converted model's original.", _TEACHER, metavar="[REF]"
    )
    distill_weight: float = option(0.9, "The teacher's weight in the loss.", _TEACHER)
    distill_loss: str = option("kl", "kl, of class probabilities, or mse, of the scores before the softmax.", _TEACHER)
    temperature: float = option(4.0, "Temperature: class scores are divided by it.", _TEACHER)
    distill_features: float = option(0.0, "Weight of the error of outputs of blocks with swapped layers.", _TEACHER)
    save_every: int | None = option(None, "Save after every this many steps, not only epochs.", _RESULT)
    channels_last: bool = True
    deterministic: bool = True

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            check_choice(f"`{name}=…`", getattr(self, name), choices)
        for name in _ABOVE_ZERO + _NOT_BELOW_ZERO + _FRACTIONS:
            value = getattr(self, name)
            if value is None:
                continue
            if not math.isfinite(value) or value < 0 or (name in _ABOVE_ZERO and value == 0):
                least = "above" if name in _ABOVE_ZERO else "at least"
                raise AsymswapError(f"`{name}={value:g}` must be {least} 0")
            if name in _FRACTIONS and value >= 1 and not (name == "distill_weight" and value == 1):
                raise AsymswapError(f"`{name}={value:g}` must be below 1")
        if self.epochs is not None and self.steps is not None:
            raise AsymswapError("give either `epochs=…` or `steps=…`")
        if self.patience is not None and self.validation in ("none", "0"):
            raise AsymswapError(f"`patience={self.patience}` needs images to validate on; leave out `validation=none`")
        if self.distill is None and self.distill_features:
            raise AsymswapError(f"`distill_features={self.distill_features:g}` needs a teacher: add `distill=…`")

    @property
    def batch(self) -> int:
        return 128 if self.batch_size is None else self.batch_size

    @property
    def base_lr(self) -> float:
        return _LEARNING_RATES[self.optimizer] if self.lr is None else self.lr

    @property
    def decay(self) -> float:
        return _WEIGHT_DECAYS[self.optimizer] if self.weight_decay is None else self.weight_decay

    def identity(self) -> dict[str, Any]:
        """Return the settings on which the result depends, with their defaults."""
        plain = {key: value for key, value in dataclasses.asdict(self).items() if key not in _FREE}
        plain["epochs"] = self.epochs if self.steps else self.epochs or EPOCHS
        return plain | {"lr": self.base_lr, "weight_decay": self.decay, "batch_size": self.batch}


def check_same(given: Mapping[str, Any], stored: Mapping[str, Any], folder: object) -> None:
    """Raise AsymswapError, naming each difference, for a run that is resumed with other settings."""
    # Earlier versions had these options; for one process `sync_bn` made no difference.
    dropped = {"cpu"} | ({"sync_bn"} if stored.get("processes") == 1 else set())
    names = [name for name in {**stored, **given} if name not in dropped]
    differing = [name for name in names if given.get(name) != stored.get(name)]
    if differing:
        listed = ", ".join(f"`{name}={given.get(name)}` (was {stored.get(name)})" for name in differing)
        what = f"{folder} was begun with other settings: {listed}"
        raise AsymswapError(f"{what}; resume it with the same ones, or `force=True`")


class Callback:
    """Follows a training run; override what you need. In a team only the first process calls `step` and `epoch`."""

    def begin(self, start: RunStart) -> None:
        """Called before the next step of a run, new or resumed."""

    def step(self, row: StepRow) -> None:
        """Called after a step."""

    def epoch(self, row: EpochRow) -> None:
        """Called after an epoch and its validation."""
