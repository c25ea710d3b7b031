"""AIMET's spatial SVD in auto mode: ranks by the greedy search over measured accuracies.

It needs labels: its evaluation callback is given the calibration images with theirs. The accuracies of each layer at
each of ten ratios do not depend on the budget; `--scores FILE` keeps them for further budgets, whose time then includes
the time that they took when they were measured.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from decimal import Decimal
from pathlib import Path
from typing import Any

from aimet_torch.common.defs import CompressionScheme, CostMetric, GreedySelectionParameters
from aimet_torch.compress import ModelCompressor
from aimet_torch.defs import SpatialSvdParameters
from common import Clock, quality, reestimate_batch_norm_, start
from torch import nn

WRITTEN = Path("data/greedy_selection_eval_scores_dict.pkl")
"""Where AIMET leaves the accuracies, in the working directory."""


def main() -> None:
    task, results = start(__doc__, ["aimet-torch"])
    task = task.__class__(**{**vars(task), "scores": task.scores and task.scores.resolve()})
    results.out = results.out.resolve()
    first = next(module for module in task.model.modules() if isinstance(module, nn.Conv2d))
    measured = task.scores is not None and task.scores.exists()
    greedy = GreedySelectionParameters(
        target_comp_ratio=Decimal(str(task.budget)),
        num_comp_ratio_candidates=10,
        saved_eval_scores_dict=str(task.scores) if measured else None,
    )
    auto = SpatialSvdParameters.AutoModeParams(greedy, modules_to_ignore=[first])

    def evaluate(model: nn.Module, *_: Any, **__: Any) -> float:
        return quality(model, [task.calibration])

    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        with clock.measure():
            compressed, _ = ModelCompressor.compress_model(
                task.model,
                evaluate,
                eval_iterations=None,
                input_shape=tuple(task.image.shape),
                compress_scheme=CompressionScheme.spatial_svd,
                cost_metric=CostMetric.mac,
                parameters=SpatialSvdParameters(SpatialSvdParameters.Mode.auto, auto),
            )
        note = "from scratch"
        if task.scores is not None:
            times = task.scores.with_suffix(".json")
            if measured:
                spent = json.loads(times.read_text(encoding="utf-8"))
                clock.seconds += spent["seconds"]
                clock.cpu_seconds += spent["cpu_seconds"]
                note = f"layers' accuracies reused; their {spent['seconds']:.0f} s are counted"
            else:
                shutil.copy(WRITTEN, task.scores)
                times.write_text(json.dumps(vars(clock)), encoding="utf-8")
        os.chdir("/")
    results.add("", compressed, clock, note)
    with clock.measure():
        reestimate_batch_norm_(compressed, task.calibration[0])
    results.add("+ BN re-estimation", compressed, clock, note)


if __name__ == "__main__":
    main()
