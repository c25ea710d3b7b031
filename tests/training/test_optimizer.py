"""What is trained, with which weight decay and learning rate."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

import asymswap
from asymswap import replacements
from asymswap.errors import AsymswapError
from asymswap.training.config import Training
from asymswap.training.trainer import (
    choose_trained_,
    make_optimizer,
    set_rate_,
)

RULE = "[[rules]]\nmatch = {{ names = ['layer1.*'], kernel = '3x3' }}\nswap = {{ kind = '{}'{} }}\n"
MORE = {"separable": ", rank = 4, between = 'bn-relu'", "acb": ", bn = 'branch'", "resized": ", kernel = '5x5'"}


def converted(kind: str, tmp_path: Any) -> Any:
    path = tmp_path / "recipe.toml"
    if kind == "low-rank":  # the digits' network has no 1x1 conv
        path.write_text("[[rules]]\nmatch = { kernel = '1x1' }\nswap = { kind = 'low-rank', rank = 2 }\n")
        return asymswap.convert(nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)), path, input_size=(8, 4, 4))
    path.write_text(RULE.format(kind, MORE.get(kind, "")))
    return asymswap.convert("digits-resnet", path)


@pytest.mark.parametrize("kind", replacements.names())
def test_only_weights_decay_and_offsets_learn_slowly(kind: str, tmp_path: Any) -> None:
    """An oracle by name and shape, over every kind that there is."""
    model = converted(kind, tmp_path).model
    groups = make_optimizer(model, Training(lr=0.5, weight_decay=0.25, offset_lr_scale=0.1)).param_groups
    found = {id(p): group for group in groups for p in group["params"]}  # type: ignore[attr-defined]
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))  # type: ignore[arg-type]
    offsets = 0
    for name, parameter in model.named_parameters():
        group, moved = found[id(parameter)], "offset" in name or "predictor" in name
        offsets += moved
        assert group["lr"] == pytest.approx(0.05 if moved else 0.5), name
        decays = not moved and parameter.ndim > 1
        assert group["weight_decay"] == (0.25 if decays else 0.0), name
    assert (offsets > 0) == ("offset" in kind)


def test_new_layers_alone(tmp_path: Any) -> None:
    conversion = converted("acb", tmp_path)
    model, sites = conversion.model, [swap.site for swap in conversion.plan.swaps]
    still = choose_trained_(model, Training(train="new"), sites)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == any(name.startswith(f"{site}.") for site in sites), name
    norms = dict(model.named_modules())
    assert norms["layer2.0.bn1"] in still
    assert not any(module in still for name, module in norms.items() if name.startswith(sites[0]))


def test_batch_norms_alone(tmp_path: Any) -> None:
    model = converted("separable", tmp_path).model
    assert choose_trained_(model, Training(train="bn"), []) == []
    norms = {id(p) for module in model.modules() if isinstance(module, nn.BatchNorm2d) for p in module.parameters()}
    assert norms
    assert all(parameter.requires_grad == (id(parameter) in norms) for parameter in model.parameters())
    all_norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert choose_trained_(model, Training(freeze_bn=True), []) == all_norms


def test_nothing_to_train() -> None:
    model = nn.Sequential(nn.Conv2d(1, 1, 1))
    for what, lacks in (("new", "replaced layer"), ("bn", "batch norm")):
        with pytest.raises(AsymswapError, match=f"`train={what}` has nothing to train: the model has no {lacks}"):
            choose_trained_(model, Training(train=what), [])


def test_the_rate_rises_and_falls_as_a_cosine() -> None:
    settings = Training(warmup=0.1, lr=1.0)
    one = torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(1))], "initial_lr": 1.0}], lr=1.0)
    rates = [set_rate_(one, step, 100, settings) for step in range(100)]
    assert rates[:10] == pytest.approx([(step + 1) / 11 for step in range(10)])
    assert rates[10] == 1.0
    assert rates[55] == pytest.approx(0.5)
    assert rates[99] == pytest.approx(0.5 * (1 + math.cos(math.pi * 89 / 90)))
    assert 0 < rates[99] < 0.001
    assert set_rate_(one, 99, 100, Training(schedule="constant")) == 1.0


def test_every_group_follows_the_schedule(tmp_path: Any) -> None:
    settings = Training(optimizer="sgd", lr=0.2, warmup=0.1)
    optimizer = make_optimizer(converted("offset", tmp_path).model, settings)
    assert isinstance(optimizer, torch.optim.SGD)
    assert set_rate_(optimizer, 55, 100, settings) == pytest.approx(0.1)
    assert {round(group["lr"], 9) for group in optimizer.param_groups} == {0.1, 0.01}


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"optimizer": "adamv"}, "`optimizer=…` 'adamv' is unknown; did you mean adamw"),
        ({"precision": "int4"}, "`precision=…` 'int4' is unknown; choose fp32, bf16, fp16"),
        ({"epochs": 0}, "`epochs=0` must be above 0"),
        ({"lr": float("nan")}, "`lr=nan` must be above 0"),
        ({"weight_decay": -1.0}, "`weight_decay=-1` must be at least 0"),
        ({"ema": 1.0}, "`ema=1` must be below 1"),
        ({"epochs": 1, "steps": 1}, "give either `epochs=…` or `steps=…`"),
        ({"patience": 2, "validation": "none"}, "`patience=2` needs images to validate on"),
        ({"distill_features": 0.5}, "`distill_features=0.5` needs a teacher: add `distill=…`"),
    ],
)
def test_settings_that_make_no_sense(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(AsymswapError, match=said):
        Training(**fields)
