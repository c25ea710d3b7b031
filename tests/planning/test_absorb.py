"""Batch norms that a replacement takes over: which, and what becomes of plan, report and file."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import asymswap
from asymswap import replacements
from asymswap.errors import AsymswapError, PlanError
from asymswap.measure.fidelity import compare_outputs
from asymswap.measure.macs import count_costs
from asymswap.planning.plan import plan_text

RECIPE = "[[rules]]\nmatch = { kernel = '3x3' }\nswap = { kind = 'acb', bn = 'branch' }\n"


class Net(nn.Module):
    """Convs whose batch norms can be taken over, and convs whose cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.plain, self.shared1, self.shared2, self.branched, self.functional, self.last = (
            nn.Conv2d(6, 6, 3, padding=1, bias=False) for _ in range(6)
        )
        self.n1, self.n2, self.n3 = (nn.BatchNorm2d(6) for _ in range(3))
        self.norm_of_no_conv = nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.n1(self.plain(x)))
        x = self.n2(self.shared1(x)) + self.n2(self.shared2(x))
        y = self.branched(x)
        x = self.n3(y) + y
        norm = self.norm_of_no_conv
        x = F.batch_norm(self.functional(x), norm.running_mean, norm.running_var)
        return self.last(x)


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    model = Net()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
                module.weight.normal_()
    return model.eval()


@pytest.fixture
def conversion(net: nn.Module, tmp_path: Path) -> asymswap.Conversion:
    (tmp_path / "r.toml").write_text(RECIPE)
    return asymswap.convert(asymswap.open_model(net, input_size=(6, 10, 10)), tmp_path / "r.toml")


def test_only_a_batch_norm_that_sees_this_conv_alone_is_taken_over(
    net: nn.Module, conversion: asymswap.Conversion
) -> None:
    assert {swap.site: swap.absorbs for swap in conversion.plan.swaps} == {
        "plain": "n1",
        "shared1": None,
        "shared2": None,
        "branched": None,
        "functional": None,
        "last": None,
    }
    assert type(conversion.model.n1) is nn.Identity
    assert type(conversion.model.n2) is nn.BatchNorm2d
    x = torch.randn(3, 6, 10, 10)
    assert compare_outputs(net, conversion.model, (x,)).relative < 1e-5


def test_the_sums_of_the_report_come_out_right(net: nn.Module, conversion: asymswap.Conversion) -> None:
    report = conversion.report
    assert report.before == sum((row.before for row in report.sites), start=report.rest)
    assert report.after == sum((row.after for row in report.sites), start=report.rest)
    assert report.after == count_costs(conversion.model, (torch.empty(1, 6, 10, 10),)).total
    row = report.sites[0]
    assert (row.absorbs, row.exact, row.kernel_error) == ("n1", True, None)
    assert row.output_error is not None
    assert row.output_error < 1e-5


def test_the_plan_can_be_replayed_and_the_file_loads(
    net: nn.Module, conversion: asymswap.Conversion, tmp_path: Path
) -> None:
    again = asymswap.convert(asymswap.open_model(net, input_size=(6, 10, 10)), plan=plan_text(conversion.plan))
    assert again.plan == dataclasses.replace(conversion.plan)
    x = torch.randn(3, 6, 10, 10)
    assert compare_outputs(conversion.model, again.model, (x,)).largest == 0
    asymswap.save(conversion, tmp_path / "c.pt")
    loaded = asymswap.load(tmp_path / "c.pt", model=Net())
    assert compare_outputs(conversion.model, loaded, (x,)).largest == 0


@pytest.mark.parametrize(("site", "norm"), [("shared1", "n2"), ("plain", "n3"), ("last", "nowhere")])
def test_a_plan_that_takes_over_what_cannot_be(
    net: nn.Module, conversion: asymswap.Conversion, site: str, norm: str
) -> None:
    data = json.loads(plan_text(conversion.plan))
    next(swap for swap in data["swaps"] if swap["site"] == site)["absorbs"] = norm
    with pytest.raises(PlanError, match=f"the plan cannot swap '{site}' by 'acb': it says absorbs = '{norm}', where "):
        asymswap.convert(asymswap.open_model(net, input_size=(6, 10, 10)), plan=data)


def test_its_mode_and_trainability_are_those_of_the_batch_norm(net: nn.Module, tmp_path: Path) -> None:
    net.train()
    net.n1.requires_grad_(False)
    (tmp_path / "r.toml").write_text(RECIPE)
    block = asymswap.convert(asymswap.open_model(net, input_size=(6, 10, 10)), tmp_path / "r.toml").model.plain
    assert block.square.conv.training
    assert block.square.conv.weight.requires_grad
    assert block.square.norm.training
    assert not block.square.norm.weight.requires_grad


def test_a_promise_that_is_broken_is_an_error_unless_drift_is_allowed(
    net: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "r.toml").write_text(RECIPE)
    kind = type(replacements.load("acb"))
    honest = kind.init_

    def init_(self: replacements.Replacement, module: nn.Module, *args: object) -> None:
        honest(self, module, *args)  # type: ignore[arg-type]
        with torch.no_grad():
            module.square.conv.weight.mul_(1.01)

    monkeypatch.setattr(kind, "init_", init_)
    with pytest.raises(AsymswapError, match=r"acb promises to preserve plain, but .* has changed by \d\.\de-03"):
        asymswap.convert(asymswap.open_model(net, input_size=(6, 10, 10)), tmp_path / "r.toml")
    drifted = asymswap.convert(asymswap.open_model(net, input_size=(6, 10, 10)), tmp_path / "r.toml", allow_drift=True)
    assert drifted.report.sites[0].exact
    assert drifted.report.sites[0].output_error == pytest.approx(0.003, rel=0.5)
