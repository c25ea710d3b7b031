"""The contract that every kind must keep; the example of docs/guide/adding-a-kind.md is tested too."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import torch
from conv_cases import Case, cases
from hypothesis import HealthCheck, assume, given, reject, settings
from hypothesis import strategies as st
from patch_statistics import see_all
from pydantic import ValidationError
from torch import nn

import asymswap
from asymswap import replacements
from asymswap.errors import RecipeError
from asymswap.graph.trace import read_conv
from asymswap.measure.macs import count_costs
from asymswap.replacements import KindSettings
from asymswap.types import Cost, Option, Swap

Run = Callable[..., Any]

GUIDE = Path(__file__).parents[2] / "docs" / "guide" / "adding-a-kind.md"
EXAMPLE = "bottleneck"
KINDS = [*replacements.names(), EXAMPLE]


def example(language: str) -> str:
    """The code of the guide in that language."""
    return GUIDE.read_text(encoding="utf-8").split(f"```{language}\n")[1].split("```")[0]


@pytest.fixture(scope="module", autouse=True)
def _documented(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The guide's example as one more file in the folder of kinds, as far as Python can tell."""
    folder = tmp_path_factory.mktemp("kinds")
    (folder / f"{EXAMPLE}.py").write_text(example("python"), encoding="utf-8")
    replacements.__path__.append(str(folder))
    importlib.invalidate_caches()
    yield
    replacements.__path__.remove(str(folder))
    sys.modules.pop(f"{replacements.__name__}.{EXAMPLE}", None)
    vars(replacements).pop(EXAMPLE, None)


@pytest.mark.parametrize("name", KINDS)
def test_what_python_cannot_check_of_a_kind(name: str) -> None:
    kind = replacements.load(name)
    assert kind.settings() is not None, "every setting has a default"
    for size in kind.SIZES:
        assert kind.settings.model_fields[size].default is None, "without a size a budget chooses"
    if kind.settled is not None:
        assert kind.settled.model_fields.keys() <= kind.settings.model_fields.keys(), "settled settings are a wish too"
        assert any(field.is_required() for field in kind.settled.model_fields.values())
    assert kind.PRESERVES, "a few words that follow '<kind> preserves'"
    assert not kind.PRESERVES.endswith(".")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must define one subclass of Replacement; it defines 0"),
        ("class A(Replacement): ...\nclass B(A): ...", "must define one subclass of Replacement; it defines 2"),
        ("class A(Replacement): ...", "abstract class A .*build.*cost"),
    ],
)
def test_its_author_is_told_what_is_missing(text: str, message: str, tmp_path: Path) -> None:
    name = "half_done"
    (tmp_path / f"{name}.py").write_text(f"from asymswap.replacements import Replacement\n{text}\n")
    replacements.__path__.append(str(tmp_path))
    importlib.invalidate_caches()
    try:
        with pytest.raises(TypeError, match=message):
            replacements.load("half-done")
    finally:
        replacements.__path__.remove(str(tmp_path))
        sys.modules.pop(f"{replacements.__name__}.{name}", None)
        vars(replacements).pop(name, None)


def choices(annotation: Any) -> set[Any]:
    """The few values that a setting of this type may have, as far as its type names them."""
    if annotation is bool:
        return {False, True}
    if get_origin(annotation) is Literal:
        return set(get_args(annotation))
    return {value for part in get_args(annotation) for value in choices(part)}


def variants(name: str) -> list[KindSettings]:
    """The settings by default, and those that differ in one choice; numbers are for the kind's own tests."""
    own = replacements.load(name).settings
    found = [own()]
    for key, field in own.model_fields.items():
        for value in sorted(choices(field.annotation) - {field.default}, key=str):
            try:
                found.append(own.model_validate({key: value}))
            except ValidationError:
                continue  # a choice that goes with others only
    return found


# Large kernels have many sizes: small ones are as telling, and most kinds accept them.
CASES = {
    dtype: st.one_of(cases(dtype=dtype, sides=(3,)), cases(dtype=dtype, sides=(1,)), cases(dtype=dtype))
    for dtype in (torch.float32, torch.float64)
}


def settled(name: str, option: Option) -> KindSettings:
    """The settled settings of an option, as a plan that is applied has them."""
    return replacements.load_swap(Swap("conv", name, option.settings))[1]


class Made:
    """A conv, and how some kind would replace it by one of the sizes that it offers."""

    def __init__(
        self, name: str, case: Case, data: st.DataObject, calibrated: bool = False, only_exact: bool = False
    ) -> None:
        self.kind, self.case = replacements.load(name), case
        assume(self.kind.unsupported(read_conv(case.conv)) is None)
        self.site = case.site
        self.statistics = see_all(case).statistics if calibrated else None
        wish = data.draw(st.sampled_from(variants(name)), label="settings")
        try:
            options = list(self.kind.options(self.site, replacements.Original(case.conv, self.statistics), wish))
        except RecipeError:
            assert wish != self.kind.settings(), "the settings by default suit every conv that is not refused"
            reject()
        assert options, "a conv that is not refused has at least one option"
        if only_exact:
            spec = self.site.conv
            exact = [option for option in options if self.kind.preserves(spec, settled(name, option))]
            options = exact or options
        self.option = data.draw(st.sampled_from(options), label="option")
        self.settings = settled(name, self.option)

    def module(self) -> nn.Module:
        """The replacement, in eval mode."""
        module = self.kind.build(self.site.conv, self.settings)
        self.kind.init_(module, replacements.Original(self.case.conv, self.statistics), self.settings)
        return module.eval()


def property_test(dtype: torch.dtype) -> Any:
    """Runs a test for every kind, on convs of every form that it does not refuse."""

    def decorate(test: Any) -> Any:
        given_all = given(case=CASES[dtype], data=st.data())(test)
        # Some kinds refuse most forms; where one refused all of them hypothesis would say so.
        half = settings.default.max_examples // 2  # for each of the kinds
        quiet = settings(max_examples=half, suppress_health_check=[HealthCheck.filter_too_much])
        return pytest.mark.parametrize("name", KINDS)(quiet(given_all))

    return decorate


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).detach().norm() / b.detach().norm().clamp_min(1e-6))


@property_test(torch.float32)
def test_settled_settings_survive_json_and_settling_again(name: str, case: Case, data: st.DataObject) -> None:
    made = Made(name, case, data)
    stored = json.loads(json.dumps(dict(made.option.settings)))
    assert stored == made.option.settings
    again = made.kind.resolve(made.site, replacements.Original(case.conv), replacements.parse_settings(name, stored))
    assert again.settings == made.option.settings
    assert again.cost == made.option.cost


@property_test(torch.float64)
def test_building_draws_no_random_numbers_and_keeps_the_dtype(name: str, case: Case, data: st.DataObject) -> None:
    made = Made(name, case, data)
    before = torch.get_rng_state()
    module = made.kind.build(made.site.conv, made.settings)
    assert torch.equal(torch.get_rng_state(), before)
    assert {tensor.dtype for tensor in module.state_dict().values() if tensor.is_floating_point()} == {torch.float64}
    assert all(parameter.requires_grad for parameter in module.parameters())


@property_test(torch.float32)
def test_costs_by_formula_are_those_counted_on_the_module(name: str, case: Case, data: st.DataObject) -> None:
    made = Made(name, case, data, calibrated=data.draw(st.booleans(), label="calibrated"))
    counted = count_costs(made.kind.build(made.site.conv, made.settings), (case.x[:1],)).total
    assert made.kind.cost(made.site, made.settings) == counted
    assert made.option.cost == counted


@property_test(torch.float32)
def test_every_call_of_a_conv_is_paid_for(name: str, case: Case, data: st.DataObject) -> None:
    made = Made(name, case, data)
    once = made.kind.cost(made.site, made.settings)
    twice = made.kind.cost(type(made.site)("conv", made.site.conv, made.site.calls * 2), made.settings)
    assert twice == Cost(2 * once.macs, once.params)


@property_test(torch.float32)
def test_what_is_promised_to_be_preserved_is(name: str, case: Case, data: st.DataObject) -> None:
    made = Made(name, case, data, only_exact=True)
    if not made.kind.preserves(made.site.conv, made.settings):
        return
    with torch.no_grad():
        got, wanted = made.module()(case.x), case.conv(case.x)
    assert got.dtype == wanted.dtype
    assert relative(got, wanted) < 1e-5


@property_test(torch.float32)
def test_the_input_may_be_given_by_its_name(name: str, case: Case, data: st.DataObject) -> None:
    module = Made(name, case, data).module()
    with torch.no_grad():
        assert torch.equal(module(input=case.x), module(case.x))


@property_test(torch.float32)
def test_outputs_have_the_shape_and_are_finite(name: str, case: Case, data: st.DataObject) -> None:
    made = Made(name, case, data, calibrated=data.draw(st.booleans(), label="calibrated"))
    with torch.no_grad():
        got = made.module()(case.x)
    assert got.shape == case.conv(case.x).shape
    assert bool(torch.isfinite(got).all())
    assert 0 <= made.option.error <= 1
    assert made.option.loss >= 0


@property_test(torch.float64)
def test_a_fused_replacement_computes_the_same(name: str, case: Case, data: st.DataObject) -> None:
    made = Made(name, case, data)
    module = made.module()
    if data.draw(st.booleans(), label="trained"):
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    fused = made.kind.fuse(module, made.site.conv, made.settings)
    if fused is None:
        return
    assert type(fused) is nn.Conv2d
    with torch.no_grad():
        assert relative(fused.eval()(case.x), module(case.x)) < 1e-9
    assert read_conv(fused).dtype == "float64"


class TestTheExample:
    """One new file is a new kind wherever kinds are spoken of."""

    @pytest.fixture(autouse=True)
    def _recipes(self, tmp_path: Path) -> None:
        (tmp_path / "mine.toml").write_text(example("toml"))
        (tmp_path / "wrong.toml").write_text(example("toml").replace(EXAMPLE, "botleneck"))

    def test_recipes_may_ask_for_it(self, run: Run) -> None:
        assert run("recipes", "mine.toml").out.startswith("mine.toml is a valid recipe: 1 rule, budget 0.6 of")
        assert "unknown kind 'botleneck'; did you mean bottleneck" in run("recipes", "wrong.toml").err
        swaps = json.loads(run("recipes", "--schema").out)["$defs"]["Swap"]["oneOf"]
        own = next(swap for swap in swaps if swap["properties"]["kind"]["const"] == EXAMPLE)
        assert own["properties"].keys() == {"kind", "allow_growth", "rank"}

    def test_candidates_take_its_recipes(self, run: Run) -> None:
        sites = json.loads(run("candidates", "digits-resnet", "--recipe", "mine.toml", "--json").out)["sites"]
        assert [site["name"] for site in sites if site["reason"] == "no rule matches"] == ["conv1"]

    def test_what_it_converted_is_shown_and_loads_again(self, run: Run) -> None:
        done = run("convert", "digits-resnet", "--recipe", "mine.toml", "--json", "-o", "mine.pt")
        assert (done.code, done.err) == (0, "")
        swapped = [row for row in json.loads(done.out)["sites"] if row["action"] == "swap"]
        assert {row["kind"] for row in swapped} == {EXAMPLE}
        shown = run("show", "mine.pt").out
        assert all(row["site"] in shown and f"rank {row['settings']['rank']}" in shown for row in swapped)

        loaded = asymswap.load("mine.pt")
        direct = asymswap.convert("digits-resnet", "mine.toml").model
        first = loaded.get_submodule(swapped[0]["site"])
        assert [conv.kernel_size for conv in first.children()] == [(3, 3), (1, 1)]
        x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            assert torch.equal(loaded.eval()(x), direct.eval()(x))

    def test_its_plans_are_replayed(self, run: Run) -> None:
        run("convert", "digits-resnet", "--recipe", "mine.toml", "--dry-run", "--write-plan", "plan.json", "-q")
        assert EXAMPLE in Path("plan.json").read_text()
        assert run("convert", "digits-resnet", "--plan", "plan.json", "-o", "again.pt", "-q").code == 0
