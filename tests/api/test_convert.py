"""The public verbs: what they promise about the model, the plan, the report, and equal runs."""

from __future__ import annotations

import copy
import json
import math
import random
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pairs import pair_cost
from PIL import Image
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision import models

import asymswap
from asymswap.errors import AsymswapError
from asymswap.graph.trace import read_conv, trace
from asymswap.models.networks import BUILDERS
from asymswap.models.opening import open_model
from asymswap.planning.plan import plan_text
from asymswap.reporting.convert import to_html
from asymswap.reporting.tables import view
from asymswap.results.convert import Report
from asymswap.results.records import Provenance, to_json
from asymswap.types import Call, Cost, Plan, Site

REPORT_KEYS = {
    "drop",
    "schema",
    "asymswap",
    "model",
    "recipe",
    "budget",
    "preserves",
    "sites",
    "rest",
    "before",
    "after",
    "output",
    "fed",
    "warnings",
    "multiplier",
    "latency",
    "untimed",
    "accuracy",
    "agreement",
    "calibration",
    "weights_bytes",
    "files",
    "seconds",
}
MODEL_KEYS = {"reference", "origin", "weights", "traced_by", "input", "sha256", "notes"}
SITE_KEYS = {
    "site",
    "conv",
    "feature_map",
    "calls",
    "action",
    "kind",
    "settings",
    "reason",
    "before",
    "after",
    "predicted_error",
    "kernel_error",
    "output_error",
    "output_largest",
    "becomes",
    "exact",
    "absorbs",
}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """With models as small as these, threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Net(nn.Module):
    """A class of the user's: a stride, groups, one conv that runs twice, a frozen one, a hook, and a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 5, stride=2, padding=2)
        self.body = nn.Conv2d(16, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.grouped = nn.Conv2d(16, 32, 3, groups=2)
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = self.norm(self.body(self.body(x))).relu()
        scores: Tensor = self.head(self.grouped(x).mean((2, 3)))
        return scores


SIZE = (3, 20, 28)
RANK = {"rank": 3}


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


@pytest.fixture(scope="module")
def digits() -> asymswap.Conversion:
    return asymswap.convert("digits-resnet", "3x3-only")


def convert(model: nn.Module, preprocessing: Any = None, **options: Any) -> asymswap.Conversion:
    opened = asymswap.open_model(model, input_size=SIZE, preprocessing=preprocessing)
    return asymswap.convert(opened, "all-spatial", overrides=RANK, **options)


def same_state(one: nn.Module, other: nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(tensor, b[key]) for key, tensor in a.items())


def test_the_given_model_stays_as_it_was(net: Net) -> None:
    seen: list[str] = []
    net.grouped.register_forward_hook(lambda *_: seen.append("run"))
    net.train()
    net.norm.eval()
    net.stem.weight.requires_grad_(False)
    before, parts = copy.deepcopy(net.state_dict()), list(net.modules())
    facts = [(module.training, len(module._forward_hooks), type(module)) for module in parts]
    trainable = [parameter.requires_grad for parameter in net.parameters()]
    convert(net)
    assert all(torch.equal(tensor, before[key]) for key, tensor in net.state_dict().items())
    assert list(net.modules()) == parts
    assert [(module.training, len(module._forward_hooks), type(module)) for module in net.modules()] == facts
    assert [parameter.requires_grad for parameter in net.parameters()] == trainable
    assert all(parameter.grad is None for parameter in net.parameters())


def test_nothing_random_is_drawn(net: Net) -> None:
    states = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
    convert(net)
    asymswap.candidates(asymswap.open_model(net, input_size=SIZE))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), str(np.random.get_state())) == states[1:]


def test_the_number_of_threads_stays(net: Net) -> None:
    torch.set_num_threads(2)
    convert(net)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)


def test_the_result_shares_no_memory_with_the_given_model(net: Net) -> None:
    converted = convert(net).model
    with torch.no_grad():
        for tensor in converted.state_dict().values():
            tensor.zero_()
    torch.manual_seed(0)
    assert same_state(net, Net())


def test_each_module_keeps_its_mode(net: Net) -> None:
    net.train()
    net.norm.eval()
    net.grouped.eval()
    converted: Any = convert(net).model
    assert converted.training
    assert not converted.norm.training
    assert all(module.training for module in converted.stem.modules())
    assert not any(module.training for module in converted.grouped.modules())


def test_frozen_convs_stay_frozen(net: Net) -> None:
    net.stem.requires_grad_(False)
    net.head.requires_grad_(False)
    frozen = {name for name, parameter in convert(net).model.named_parameters() if not parameter.requires_grad}
    assert {name.split(".")[0] for name in frozen} == {"stem", "head"}
    assert {"stem.vertical.weight", "stem.horizontal.weight"} <= frozen


def test_loading_gives_eval_mode(net: Net, tmp_path: Path) -> None:
    conversion = convert(net.train())
    asymswap.save(conversion, tmp_path / "net.pt")
    loaded = asymswap.load(tmp_path / "net.pt", model=Net())
    assert type(loaded) is Net
    assert not any(module.training for module in loaded.modules())
    assert same_state(loaded, conversion.model)


def test_hooks_outside_of_swapped_convs_survive(net: Net) -> None:
    seen: list[str] = []
    net.norm.register_forward_hook(lambda *_: seen.append("run"))
    converted = convert(net).model
    seen.clear()
    converted(torch.randn(1, *SIZE))
    assert seen == ["run"]


def test_a_conv_with_a_hook_is_kept(net: Net) -> None:
    net.stem.register_forward_hook(lambda *_: None)
    (keep,) = convert(net).plan.keeps
    assert keep.site == "stem"
    assert (
        keep.reason
        == "rule 1, but has hooks (weight_norm, spectral_norm, pruning or your own), which a swap would drop"
    )


def test_a_module_of_known_classes_with_a_hook_of_ones_own_can_be_saved(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
    model[1].register_forward_hook(lambda *_: None)
    conversion = asymswap.convert(asymswap.open_model(model, input_size=SIZE), "all-spatial", overrides=RANK)
    asymswap.save(conversion, tmp_path / "hooked.pt")
    plain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
    assert same_state(asymswap.load(tmp_path / "hooked.pt", model=plain), conversion.model)


class TestEqualRuns:
    def test_weights_plan_and_header_are_equal(self, net: Net) -> None:
        one, other = convert(net), convert(net)
        assert same_state(one.model, other.model)
        assert one.plan == other.plan
        assert one.header == other.header

    def test_the_seed_changes_the_probe_alone(self, net: Net) -> None:
        one, other, again = (convert(net, seed=seed) for seed in (1, 2, 1))
        assert same_state(one.model, other.model)
        assert one.report.output.relative != other.report.output.relative
        assert one.report.output == again.report.output
        assert one.report.output.probe == "2 random images (seed 1)"
        assert one.header.provenance["seed"] == 1


class TestReplay:
    @pytest.mark.parametrize("form", ["object", "text", "bytes", "mapping"])
    def test_a_plan_gives_the_same_weights_again(self, form: str, digits: asymswap.Conversion) -> None:
        text = plan_text(digits.plan)
        plan: Any = {"object": digits.plan, "text": text, "bytes": text.encode(), "mapping": json.loads(text)}[form]
        again = asymswap.convert("digits-resnet", plan=plan)
        assert again.plan == digits.plan
        assert same_state(again.model, digits.model)

    def test_plan_decides_what_convert_does(self, digits: asymswap.Conversion) -> None:
        assert asymswap.plan("digits-resnet", "3x3-only") == digits.plan

    def test_plan_takes_overrides(self) -> None:
        plan = asymswap.plan("digits-resnet", "3x3-only", overrides={"rank": 5, "order": "vertical-first"})
        assert [dict(swap.settings) for swap in plan.swaps] == 8 * [{"rank": 5, "order": "vertical-first"}]

    def test_an_edited_plan_is_settled_anew(self, digits: asymswap.Conversion) -> None:
        swaps = [{"site": "layer1.0.conv1", "kind": "separable", "settings": {"ratio": 0.5}}]
        plan = asymswap.convert("digits-resnet", plan={"swaps": swaps}).plan
        assert plan.swaps[0].settings.keys() == {"rank", "order"}
        assert {keep.reason for keep in plan.keeps} == {"not in the plan"}
        assert len(plan.keeps) == len(digits.report.sites) - 1


@pytest.mark.parametrize("arguments", [{}, {"recipe": "3x3-only", "plan": Plan(())}], ids=["neither", "both"])
def test_convert_takes_either_a_recipe_or_a_plan(arguments: dict[str, Any]) -> None:
    with pytest.raises(asymswap.AsymswapError, match=r"^give (either )?`recipe=…` or `plan=…`"):
        asymswap.convert("digits-resnet", **arguments)


@pytest.mark.parametrize("measure", ["macs", "params"])
def test_a_budget_is_a_keyword(measure: str) -> None:
    said: dict[str, Any] = {measure: 0.6}
    conversion = asymswap.convert("digits-resnet", "half-macs", **said)
    report = conversion.report
    left = getattr(report.after, measure) / getattr(report.before, measure)
    assert 0.5 < left <= 0.6
    assert conversion.header.provenance["overrides"] == {f"budget.{measure}": 0.6}
    assert asymswap.plan("digits-resnet", "half-macs", **said) == conversion.plan
    assert asymswap.plan("digits-resnet", "half-macs", overrides={f"budget.{measure}": 0.6}) == conversion.plan


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"macs": 0.5, "params": 0.4}, r"one budget, and `macs=0\.5` and `params=0\.4` are two; give one of them$"),
        ({"macs": 0.5, "overrides": {"budget.macs": 0.4}}, r"`macs=0\.4` and `macs=0\.5` are two"),
        ({"latency": 0.5, "overrides": {"budget.max_drop": 0.4}}, r"`latency=0\.5` and `max_drop=0\.4` are two"),
        ({"overrides": {"budget.macs": 0.5, "budget.params": 0.4}}, r"`macs=0\.5` and `params=0\.4` are two"),
        ({"macs": 1.5}, r"macs.*1\.5"),
    ],
)
def test_two_budgets_contradict_each_other(options: dict[str, Any], expected: str) -> None:
    for verb in (asymswap.convert, asymswap.plan):
        with pytest.raises(AsymswapError, match=expected):
            verb("digits-resnet", "half-macs", **options)


def test_a_plan_has_no_budget(digits: asymswap.Conversion) -> None:
    for options in ({"macs": 0.5}, {"overrides": {"rank": 1}}):
        with pytest.raises(AsymswapError, match="a plan is settled: `overrides=…` and budgets go with a recipe"):
            asymswap.convert("digits-resnet", plan=digits.plan, **options)  # type: ignore[arg-type]


def test_weights_that_are_not_numbers_are_refused(net: Net) -> None:
    with torch.no_grad():
        net.body.weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(asymswap.AsymswapError, match=r"Net cannot be converted: 'body\.weight' holds NaN"):
        convert(net)


def test_an_existing_file_is_replaced_only_by_force(digits: asymswap.Conversion, tmp_path: Path) -> None:
    path = tmp_path / "out.pt"
    path.write_text("mine")
    with pytest.raises(asymswap.AsymswapError, match=r"out\.pt exists already"):
        asymswap.save(digits, path)
    assert path.read_text() == "mine"
    asymswap.save(copy.copy(digits), path, force=True)
    assert same_state(asymswap.load(path), digits.model)


def test_progress_is_told_in_order(net: Net) -> None:
    told: list[tuple[str, int, int]] = []
    convert(net, progress=lambda *step: told.append(step))
    assert ("converting", 3, 3) in told
    assert all(0 <= done <= total for _, done, total in told)


def plan_sites(model: nn.Module, size: tuple[int, int, int]) -> dict[str, Site]:
    return {site.name: site for site in trace(model, (torch.empty(1, *size, device="meta"),)).sites}


def measured(model: nn.Module, size: tuple[int, int, int]) -> Cost:
    """The cost of a model by torch's own counter."""
    meta = copy.deepcopy(model).to("meta").eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        meta(torch.empty(1, *size, device="meta"))
    return Cost(counter.get_total_flops() // 2, sum(parameter.numel() for parameter in model.parameters()))


def total(rows: list[Cost]) -> Cost:
    return sum(rows, start=Cost(0, 0))


def mobilenet() -> nn.Module:
    """With one block of each sort: depthwise convs with and without a stride, expanded and not."""
    return models.MobileNetV2(num_classes=3, inverted_residual_setting=[[1, 16, 1, 1], [6, 24, 2, 2]])


MODELS = {
    "user's class": (Net, SIZE, "all-spatial", RANK),
    "resnet20": (BUILDERS["resnet20"], (3, 32, 32), "3x3-only", {}),
    "densenet": (BUILDERS["densenet"], (3, 32, 32), "half-macs", {"budget.macs": 0.7}),
    "mobilenet": (mobilenet, (3, 64, 64), "all-spatial", {"rank": 1}),
    "googlenet": (lambda: models.googlenet(init_weights=False), (3, 64, 64), "large-kernels", {"rank": 2}),
}


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=[pytest.mark.nightly] * (name == "googlenet")) for name in MODELS]
)
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, tuple[int, int, int], asymswap.Conversion]:
    """A model, the size of its input, and its conversion."""
    make, size, recipe, overrides = MODELS[request.param]
    torch.manual_seed(0)
    model = make()
    conversion = asymswap.convert(asymswap.open_model(model, input_size=size), recipe, overrides=overrides)
    assert conversion.report.swapped
    return model, size, conversion


class TestReport:
    def test_totals_are_the_sums_of_the_rows(self, case: Any) -> None:
        report: Report = case[2].report
        assert total([row.before for row in report.sites]) + report.rest == report.before
        assert total([row.after for row in report.sites]) + report.rest == report.after

    def test_totals_are_what_torch_counts(self, case: Any) -> None:
        model, size, conversion = case
        assert conversion.report.before == measured(model, size)
        assert conversion.report.after == measured(conversion.model, size)

    def test_a_row_costs_what_the_formula_says(self, case: Any) -> None:
        model, size, conversion = case
        sites = plan_sites(model, size)
        for row in conversion.report.sites:
            assert row.before == sites[row.site].cost
            if row.kind == "low-rank":
                conv, rank = sites[row.site].conv, row.settings["rank"]
                (call,) = sites[row.site].calls
                assert (conv.groups, conv.bias, call.input) == (1, False, call.output)
                params = rank * (conv.in_channels + conv.out_channels)
                assert row.after == Cost(call.batch * math.prod(call.output) * params, params)
            elif row.action == "swap":
                assert row.after == pair_cost(sites[row.site], row.settings["rank"], row.settings["order"])
            else:
                assert row.after == row.before

    def test_a_row_costs_what_its_two_convs_do(self, case: Any) -> None:
        _, size, conversion = case
        halves = plan_sites(conversion.model, size)
        for row in conversion.report.swapped:
            names = ("vertical", "horizontal") if row.kind == "separable" else ("reduce", "expand")
            pair = [halves[f"{row.site}.{name}"].cost for name in names]
            assert row.after == total(pair)

    def test_every_conv_has_one_row_in_the_order_of_the_plan(self, case: Any) -> None:
        model, size, conversion = case
        assert [row.site for row in conversion.report.sites] == list(plan_sites(model, size))
        swaps, keeps = conversion.plan.swaps, conversion.plan.keeps
        assert {row.site for row in conversion.report.swapped} == {swap.site for swap in swaps}
        assert len(swaps) + len(keeps) == len(conversion.report.sites)

    def test_something_is_saved(self, case: Any) -> None:
        report: Report = case[2].report
        assert report.after.macs < report.before.macs
        assert report.after.params < report.before.params


def test_the_budget_over_the_model_is_met() -> None:
    report = asymswap.convert("digits-resnet", "half-macs", overrides={"budget.macs": 0.6}).report
    assert 0.59 < report.after.macs / report.before.macs <= 0.6


def test_a_conv_that_never_runs_costs_parameters_but_no_macs() -> None:
    class WithAux(Net):
        """A head that is run in training alone, as GoogLeNet's."""

        def __init__(self) -> None:
            super().__init__()
            self.aux = nn.Conv2d(16, 5, 3)

        def forward(self, x: Tensor) -> Any:
            scores = super().forward(x)
            return (scores, self.aux(self.stem(x)).mean((2, 3))) if self.training else scores

    (unused,) = (row for row in convert(WithAux().eval()).report.sites if row.site == "aux")
    assert (unused.calls, unused.before) == (0, Cost(0, 16 * 5 * 9 + 5))


def relative(one: Tensor, other: Tensor) -> float:
    return float((other - one).detach().double().norm() / one.detach().double().norm())


def test_the_errors_of_the_report_are_those_of_the_models(net: Net) -> None:
    conversion: Any = convert(net)
    x = torch.randn(2, *SIZE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before, after = net.eval()(x), conversion.model.eval()(x)
        stem = relative(net.stem(x), conversion.model.stem(x))
    report = conversion.report
    assert report.output.relative == pytest.approx(relative(before, after), rel=1e-4)
    assert report.output.largest == pytest.approx(float((after - before).abs().max()), rel=1e-4)
    assert report.sites[0].output_error == pytest.approx(stem, rel=1e-4)
    pair = conversion.model.stem
    kernel = torch.einsum("rcix,orxj->ocij", *(half.weight.double() for half in ordered(pair)))
    assert report.sites[0].kernel_error == pytest.approx(relative(net.stem.weight, kernel), rel=1e-4)


def ordered(pair: nn.Sequential) -> tuple[Any, Any]:
    """The pair as (vertical, horizontal)-shaped weights in run order; the test above expects the vertical one first."""
    first, second = pair
    assert read_conv(first).kernel == (5, 1)
    return first, second


def test_the_json_report_is_plain_and_its_keys_are_stable(digits: asymswap.Conversion) -> None:
    data = to_json(digits.report)
    assert json.loads(json.dumps(data)) == data
    assert data.keys() == REPORT_KEYS
    assert data["model"].keys() == MODEL_KEYS
    assert all(row.keys() == SITE_KEYS for row in data["sites"])
    assert data["output"].keys() == {"relative", "largest", "probe", "input"}
    for cost in (data["before"], data["after"], data["rest"], data["sites"][0]["before"]):
        assert cost.keys() == {"macs", "flops", "params"}
        assert cost["flops"] == 2 * cost["macs"]


def test_no_number_of_the_report_is_a_tensor(digits: asymswap.Conversion) -> None:
    def leaves(value: Any) -> list[Any]:
        if isinstance(value, Mapping):
            return [leaf for item in value.values() for leaf in leaves(item)]
        return [leaf for item in value for leaf in leaves(item)] if isinstance(value, list) else [value]

    assert {type(leaf) for leaf in leaves(to_json(digits.report))} <= {str, int, float, bool, type(None)}


def test_the_report_of_a_saved_conversion_names_its_files(tmp_path: Path) -> None:
    torch.save(BUILDERS["resnet20"]().state_dict(), tmp_path / "in.pt")
    conversion = asymswap.convert(asymswap.open_model(tmp_path / "in.pt", arch="cifar:resnet20"), "3x3-only")
    report = asymswap.save(conversion, tmp_path / "out.pt")
    sizes = {file.path: file.bytes for file in report.files}
    assert sizes == {str(path): path.stat().st_size for path in (tmp_path / "in.pt", tmp_path / "out.pt")}
    assert list(report.seconds) == ["load", "trace", "plan", "convert", "measure", "save"]
    assert report.weights_bytes[1] < report.weights_bytes[0]


def test_accuracy_is_measured_before_and_after_on_the_same_images() -> None:
    accuracy = asymswap.convert("digits-resnet", "3x3-only", evaluate="digits").report.accuracy
    assert accuracy is not None
    assert accuracy.images == 360
    assert [(one.name, one.unit) for one in accuracy.scores] == [("top-1", "%"), ("top-5", "%")]
    assert accuracy.scores[0].before >= 0.985
    assert accuracy.scores[0].after > 0.9


class TestCandidates:
    def test_what_they_hold_is_the_sum_of_their_rows(self, net: Net) -> None:
        found = asymswap.candidates(asymswap.open_model(net, input_size=SIZE))
        assert found.held == total([row.site.cost for row in found.rows if row.reason is None])
        assert found.total == measured(net, SIZE)
        assert found.traced_by == "torch.fx"

    def test_every_conv_is_listed_with_a_rank_or_a_reason(self) -> None:
        found = asymswap.candidates(asymswap.open_model("mobilenet_v2", weights="none"))
        assert len(found.rows) == sum(isinstance(module, nn.Conv2d) for module in models.mobilenet_v2().modules())
        assert all((row.reason is None) == (row.break_even is not None) for row in found.rows)

    def test_one_rank_more_than_the_break_even_saves_nothing(self, net: Net) -> None:
        for row in asymswap.candidates(asymswap.open_model(net, input_size=SIZE)).rows:
            assert row.break_even is not None
            rank, order = row.break_even.rank, row.break_even.order
            at, above = (pair_cost(row.site, rank + more, order) for more in (0, 1))  # type: ignore[arg-type]
            assert at == row.break_even.cost
            assert at.macs <= row.site.cost.macs
            assert at.params <= row.site.cost.params
            assert above == row.site.cost or above.macs > row.site.cost.macs or above.params > row.site.cost.params

    def test_a_recipe_narrows_them_down(self) -> None:
        found = asymswap.candidates("digits-resnet", recipe="3x3-only")
        assert {row.site.name: row.reason for row in found.rows if row.reason} == {"conv1": "no rule matches"}


def test_a_pair_at_stride_two_costs_what_its_walk_says() -> None:
    """By hand: 8 -> 16 channels, 3x3 at stride 2 on 10x12, rank 4, vertical first: 5x12 in between, then 5x6."""
    conv = read_conv(nn.Conv2d(8, 16, 3, stride=2, padding=1))
    site = Site("conv", conv, (Call((10, 12), (5, 6)),))
    macs = 4 * 8 * 3 * (5 * 12) + 16 * 4 * 3 * (5 * 6)
    assert pair_cost(site, 4, "vertical-first") == Cost(macs, 4 * 8 * 3 + 16 * 4 * 3 + 16)


def test_data_that_does_not_fit_is_told_before_the_work_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(11):
        (tmp_path / "photos" / str(number)).mkdir(parents=True)
        Image.new("L", (8, 8)).save(tmp_path / "photos" / str(number) / "x.png")
    monkeypatch.setattr("asymswap.api.convert.Session", lambda *_: pytest.fail("the conversion was begun"))
    with pytest.raises(AsymswapError, match=r"the model scores 10 classes, but the data has 11"):
        asymswap.convert("digits-resnet", "3x3-only", evaluate=str(tmp_path / "photos"))


def test_naming_the_architecture_of_a_converted_model_builds_it_as_it_was(tmp_path: Path) -> None:
    """Its number of classes is among the arguments that the checkpoint holds; `--arg` still overrides them."""
    conversion = asymswap.convert(
        asymswap.open_model("squeezenet1_1", weights="none", arguments={"num_classes": 7}, input_size=(3, 64, 64)),
        "3x3-only",
    )
    asymswap.save(conversion, tmp_path / "x.pt")
    opened = open_model(tmp_path / "x.pt", arch="squeezenet1_1")
    assert opened.model(torch.zeros(1, 3, 64, 64)).shape == (1, 7)
    with pytest.raises(AsymswapError, match="7x512"):
        open_model(tmp_path / "x.pt", arch="squeezenet1_1", arguments={"num_classes": 8})


class Asking(nn.Module):
    """Code that asks a conv for more than its output."""

    def __init__(self, traceable: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 32, 3, padding=1)
        self.more = nn.Conv2d(32, 32, 3, padding=1)
        self.traceable = traceable

    def forward(self, x: Tensor) -> Tensor:
        if not self.traceable and x.sum() > 1e9:
            return x
        return self.more(self.conv(x)) * self.more.out_channels


@pytest.mark.parametrize("traceable", [True, False])
@pytest.mark.parametrize("way", ["plain", "polished", "in time"])
def test_a_model_whose_code_asks_a_conv_for_its_fields(traceable: bool, way: str, tmp_path: Path) -> None:
    for number in range(9):
        Image.new("RGB", (16, 16), (20 * number, 100, 255 - 20 * number)).save(tmp_path / f"{number}.png")
    more: dict[str, Any] = {
        "plain": {},
        "polished": {
            "calibration": asymswap.Calibration(str(tmp_path), images=8, polish_steps=2),
        },
        "in time": {"latency": 0.9, "timing": asymswap.Timing(rounds=1)},
    }[way]
    said = r"more cannot be swapped: the model's code treats it unlike .* \(AttributeError: .*'out_channels'\); keep it"
    if way == "in time":
        said = r"the converted model does not run \(.*'out_channels'\): its code uses more of a replaced layer"
    prepare = asymswap.PreprocessingOptions(normalize="none")
    opened = asymswap.open_model(Asking(traceable), input_size=(3, 16, 16), preprocessing=prepare)
    with pytest.raises(AsymswapError, match=said):
        asymswap.convert(opened, "3x3-only", **more)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (
            lambda: asymswap.convert(asymswap.open_model("digits-resnet", input_size=(8, 8)), "3x3-only"),
            "`input_size=8x8` does not suit",
        ),
        (
            lambda: asymswap.convert(asymswap.open_model("digits-resnet", input_size=(1, -1, 8)), "3x3-only"),
            "`input_size=1x-1x8` does not suit",
        ),
        (lambda: asymswap.export("x.pt", "y.onnx", form="tflite"), "the form 'tflite' is unknown; choose onnx, pt2"),
        (
            lambda: asymswap.benchmark(["digits-resnet"], precision="fp8"),
            "the precision 'fp8' is unknown; choose fp32, bf16",
        ),
        (
            lambda: asymswap.sweep("digits-resnet", ["half-macs"], "digits", measure="flops"),
            "the measure 'flops' is unknown; choose macs, params, latency",
        ),
        (
            lambda: asymswap.convert("digits-resnet", "half-macs", calibration="digits"),
            r"`calibration=` takes asymswap.Calibration\(DATA\), not 'digits'",
        ),
        (lambda: asymswap.load("x.pt", model=nn.Conv2d), r"model= takes a module, such as Net\(\), not <class"),
        (lambda: asymswap.Timing(rounds=0), "batches of 1 in 0 rounds measure nothing"),
        (lambda: asymswap.Timing(memory_format="nchw"), "the memory format 'nchw' is unknown; choose channels-last"),
    ],
)
def test_arguments_that_no_option_would_take(call: Any, said: str) -> None:
    with pytest.raises(AsymswapError, match=said):
        call()


def test_models_and_files_are_evaluated_together(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    from asymswap.models.networks import DIGITS_WEIGHTS

    torch.save(load_file(DIGITS_WEIGHTS), tmp_path / "x.pt")
    report = asymswap.evaluate(
        [
            "digits-resnet",
            asymswap.open_model(tmp_path / "x.pt", arch="digits-resnet"),
        ],
        "digits",
    )
    about = report.models[1].classifier
    assert about is not None
    assert about.against_first is not None
    assert about.against_first.agreement == 1.0


def test_without_images_the_number_of_threads_does_not_matter() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 48, 3), nn.ReLU(), nn.Conv2d(48, 64, 3))
    threads = torch.get_num_threads()
    states = []
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            states.append(
                asymswap.convert(asymswap.open_model(net, input_size=(3, 16, 16)), "half-macs").model.state_dict()
            )
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_size_and_preprocessing_may_be_given_to_the_verb_or_to_open_model(tmp_path: Path) -> None:
    """And to the calibration: all are the same model; where two of them contradict each other, it is an error."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 12, 3, padding=1), nn.AdaptiveAvgPool2d(1))
    torch.save({"images": torch.rand(8, 3, 12, 12)}, tmp_path / "images.pt")
    data, given = str(tmp_path / "images.pt"), asymswap.PreprocessingOptions(normalize="half")
    calibration = asymswap.Calibration(data, images=8)
    ways = [
        asymswap.convert(net, "half-macs", input_size=(3, 12, 12), preprocessing=given, calibration=calibration),
        asymswap.convert(
            asymswap.open_model(net, input_size=(3, 12, 12), preprocessing=given), "half-macs", calibration=calibration
        ),
        asymswap.convert(
            net,
            "half-macs",
            input_size=(3, 12, 12),
            calibration=asymswap.Calibration(data, images=8, preprocessing=given),
        ),
    ]
    for one in ways:
        assert one.header.preprocessing.mean == (0.5, 0.5, 0.5)
        assert one.report.fed == ways[0].report.fed
        assert all(map(torch.equal, one.model.state_dict().values(), ways[0].model.state_dict().values()))
    other = asymswap.Calibration(data, images=8, preprocessing=asymswap.PreprocessingOptions(normalize="none"))
    with pytest.raises(AsymswapError, match="contradict each other"):
        asymswap.convert(net, "half-macs", input_size=(3, 12, 12), preprocessing=given, calibration=other)


class TestTime:
    """Measured by a clock of its own; that real runtimes are is for tests of budgets of latency."""

    def conversion(self, monkeypatch: pytest.MonkeyPatch, factor: float, **options: Any) -> asymswap.Conversion:
        def turns(given: Any, *, rounds: int, **_: Any) -> Any:
            # Of each runtime the first network is the original.
            return {key: [[0.01 * (factor if key[0] else 1.0)] for _ in range(rounds)] for key in given}

        monkeypatch.setattr("asymswap.api.benchmark.take_turns", turns)
        return asymswap.convert("digits-resnet", "3x3-only", **options)

    def test_every_runtime_that_is_installed_is_timed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("asymswap.api.benchmark.installed", lambda names: [n for n in names if n != "openvino"])
        report = self.conversion(monkeypatch, 0.5, time=True).report
        assert report.latency is not None
        assert [row.runtime for row in report.latency.times] == ["torch", "onnxruntime"]
        for row in report.latency.times:
            assert row.ratio is not None
            assert (row.ratio.value, row.failure) == (0.5, None)
        text = str(report)
        assert "slower" not in text
        assert re.search(r"time, PyTorch +10.0 ms +5.00 ms +50.0 %", text)
        assert report.seconds["time"] > 0

    def test_the_first_line_says_where_it_is_slower(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("asymswap.api.benchmark.installed", lambda names: ["torch"])
        slower = self.conversion(monkeypatch, 1.25, time=True).report
        said = "Slower in PyTorch: it takes 1.25 of the time (1.25 to 1.25 with 95 % confidence)."
        assert str(slower).splitlines()[1].startswith("Slower in PyTorch: ")
        assert said in " ".join(str(slower).split())
        for form in (view(slower, None).markdown(), to_html(slower, Provenance())):
            assert "Slower in PyTorch" in form
        # Noise is no verdict.
        assert "Slower" not in str(self.conversion(monkeypatch, 1.01, time=True).report)

    def test_what_a_runtime_cannot_run_is_one_line_and_the_others_are_timed(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*_: Any) -> None:
            raise AsymswapError("no operator Bessel at layer1")

        monkeypatch.setattr("asymswap.api.benchmark.installed", lambda names: ["torch", "onnxruntime"])
        monkeypatch.setattr("asymswap.measure.runtimes.write_onnx", fail)
        report = self.conversion(monkeypatch, 0.5, time=True).report
        assert report.latency is not None
        assert [row.failure for row in report.latency.times] == [None, "no operator Bessel at layer1"]
        assert "ONNX Runtime: no operator Bessel at layer1." in " ".join(str(report).split())

    def test_without_it_the_report_says_how(self, run: Any) -> None:
        report = asymswap.convert("digits-resnet", "3x3-only").report
        assert report.latency is None
        assert "Time was not measured; give `time=True`." in str(report)
        printed = run("convert", "digits-resnet", "--recipe", "3x3-only", "--dry-run").out
        assert "Time was not measured; give --time." in printed

    def test_a_setting_that_times_nothing_is_refused(self) -> None:
        for options in ({"runtime": "openvino"}, {"timing": asymswap.Timing()}):
            with pytest.raises(
                AsymswapError, match=r"^options of time, such as `runtime=…`, go with `latency=…` or `time"
            ):
                asymswap.convert("digits-resnet", "3x3-only", **options)
