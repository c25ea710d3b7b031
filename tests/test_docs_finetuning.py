"""The loop that docs/finetuning.md shows, run as it stands there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

import asymswap
from asymswap.sources.networks import DIGITS_PREPROCESSING
from asymswap.training.data import open_data
from asymswap.training.evaluate import evaluate

PAGE = Path(__file__).parents[1] / "docs" / "finetuning.md"


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.usefixtures("one_thread")
def test_the_ten_line_loop_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    conversion = asymswap.convert("digits-resnet", "half-macs", overrides={"budget.macs": 0.25})
    asymswap.save(conversion, "model.asym.pt")
    test = open_data("digits", DIGITS_PREPROCESSING, "test")
    before = evaluate(conversion.model, test).top1
    (loop,) = [block for block in blocks() if "for images, labels in loader" in block]
    torch.manual_seed(0)
    train = open_data("digits", DIGITS_PREPROCESSING, "train")
    scope: dict[str, Any] = {"loader": DataLoader(train.images, 128, shuffle=True)}
    exec(compile(loop, str(PAGE), "exec"), scope)
    tuned = asymswap.load("model.asym.pt")
    tuned.load_state_dict(torch.load("tuned.pt", weights_only=True))
    after = evaluate(tuned, test).top1
    assert before < 0.7
    assert after > 0.9


def test_every_example_is_python() -> None:
    assert len(blocks()) == 4
    for block in blocks():
        compile(block, str(PAGE), "exec")
