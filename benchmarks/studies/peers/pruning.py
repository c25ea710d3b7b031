"""Torch-Pruning: whole channels removed to the same MACs, globally ranked, then batch norm re-estimated.

Four variants are tried, and the one whose decisions on the calibration images agree best with the original network's is
kept, so no labels are needed: importance by group magnitude or by batch norm scale; all channels, or only those inside
of residual blocks (the convs whose output is added to a shortcut keep theirs).
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
import torch_pruning as tp
from common import Clock, Task, agreement, count_macs, reestimate_batch_norm_, smallest_that_fits, start
from torch import nn

IMPORTANCES = {"magnitude": tp.importance.GroupMagnitudeImportance, "BN scale": tp.importance.BNScaleImportance}


class PaddedConv(nn.Module):
    """The 1x1 conv that computes what a parameter-free shortcut does (pixels left out, channels padded with zeros).

    Torch-Pruning does not follow channels through padding.
    """

    def __init__(self, shortcut: Any, in_channels: int) -> None:
        super().__init__()
        out_channels = in_channels + shortcut.before + shortcut.after
        self.conv = nn.Conv2d(in_channels, out_channels, 1, stride=shortcut.stride, bias=False)
        with torch.no_grad():
            self.conv.weight.zero_()
            self.conv.weight[shortcut.before : shortcut.before + in_channels] = torch.eye(in_channels)[..., None, None]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)


def without_padding(model: nn.Module) -> nn.Module:
    """A copy in which channels can be followed everywhere."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if type(module).__name__ == "PadShortcut":
            block = model.get_submodule(name.rpartition(".")[0])
            model.set_submodule(name, PaddedConv(module, block.conv1.in_channels))
    return model


def outer_convs(model: nn.Module) -> list[nn.Module]:
    """The convs whose output channels are more than one conv's: those at residual sums."""
    last = [block.conv2 for block in model.modules() if hasattr(block, "conv2") and not hasattr(block, "conv3")]
    last += [block.conv3 for block in model.modules() if hasattr(block, "conv3")]
    inner = {id(getattr(block, "conv1", None)) for block in model.modules() if hasattr(block, "conv2")}
    inner |= {id(block.conv2) for block in model.modules() if hasattr(block, "conv3")}
    others = [module for module in model.modules() if isinstance(module, nn.Conv2d) and id(module) not in inner]
    return [*last, *others]


def pruned(model: nn.Module, task: Task, ratio: float, importance: str, inner_only: bool) -> nn.Module:
    """A copy with this fraction of the channels removed."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False  # Torch-Pruning does not follow channels through what is done in place
    ignored: list[nn.Module] = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if not ignored:  # the network makes images, of as many channels as before
        ignored += [module for module in model.modules() if isinstance(module, nn.Conv2d)][-1:]
    if inner_only:
        ignored += outer_convs(model)
    pruner = tp.pruner.BasePruner(
        model,
        task.image,
        importance=IMPORTANCES[importance](),
        global_pruning=True,
        pruning_ratio=ratio,
        max_pruning_ratio=0.9,
        ignored_layers=ignored,
    )
    pruner.step()
    return model


def main() -> None:
    warnings.filterwarnings("ignore")
    task, results = start(__doc__, ["torch-pruning"])
    most = task.budget * count_macs(task.model, task.image)
    clock = Clock()
    found = []
    failures = []
    with clock.measure():
        for inner_only in (True, False):
            base = task.model if inner_only else without_padding(task.model)
            for importance in IMPORTANCES:
                what = f"{importance}, {'channels inside of blocks' if inner_only else 'all channels'}"

                def make(ratio: float, base: nn.Module = base, i: str = importance, j: bool = inner_only) -> nn.Module:
                    return pruned(base, task, ratio, i, j)

                def fits(ratio: float, make: Any = make) -> bool:
                    return count_macs(make(ratio), task.image) <= most

                try:
                    model = make(smallest_that_fits(fits, 0.0, 1.0, steps=8))
                    if count_macs(model, task.image) > most:
                        raise ValueError("the budget is out of reach")
                    reestimate_batch_norm_(model, task.calibration[0])
                    found.append((agreement(model, task.model, task.calibration[0]), what, model))
                except Exception as error:
                    failures.append(f"{what}: {error}")
    if not found:
        raise SystemExit("; ".join(failures))
    _, what, model = max(found, key=lambda item: item[0])
    results.add("", model, clock, what)


if __name__ == "__main__":
    main()
