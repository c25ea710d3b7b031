from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from asymswap import replacements
from asymswap.errors import RecipeError
from asymswap.planning.plan import find_rule
from asymswap.planning.recipe import (
    Match,
    json_schema,
    parse_recipe,
    read_about,
)
from asymswap.planning.shipped import read_recipe_text, shipped_folder, shipped_names
from asymswap.types import Call, ConvSpec, Neighbour, Site, Swap

BASE = """
[[rules]]
match = { kernel = "3x3", groups = "dense" }
swap = { kind = "separable" }
[budget]
macs = 0.5
"""


def site(name: str = "layer1.conv", calls: tuple[Call, ...] = (Call((28, 30), (28, 30)),), **conv: Any) -> Site:
    fields = {"in_channels": 32, "out_channels": 64, "kernel": (3, 3)} | conv
    after = (Neighbour("batch_norm", "bn"), Neighbour("relu", "relu", direct=False))
    return Site(name, ConvSpec(**fields), calls, before=(Neighbour("max_pool", "pool"),), after=after)


@pytest.mark.parametrize(
    "glob", ["*a" * 300 + "b", "*?" * 300 + "b", "[a-z]*" * 150 + "!", "*" * 999 + "b", "*[!b]" * 199 + "b"]
)
def test_globs_do_not_go_back_over_what_they_have_taken(glob: str) -> None:
    """With backtracking, each of these would take longer than the universe has been there."""
    assert not Match(names=(glob,)).find([site("a" * 300)])


@pytest.mark.parametrize(
    ("names", "exclude", "found"),
    [
        (("*",), (), {"a", "a.b", "[x]"}),
        (("a",), (), {"a"}),
        (("a*", "none"), ("*b",), {"a"}),
        (("[[]x]",), (), {"[x]"}),
        (("[x]",), (), set()),
        ((), (), set()),
    ],
)
def test_globs_and_plain_names(names: tuple[str, ...], exclude: tuple[str, ...], found: set[str]) -> None:
    assert Match(names=names, exclude=exclude).find([site("a"), site("a.b"), site("[x]")]) == found


RULE = "[[rules]]\nswap = { kind = 'separable', rank = 1 }\n"
UNTRUSTED = {
    "long": (RULE + "#" * 2**20, r"r\.toml has 1,048,6\d\d characters, more than 1,048,576: is it a recipe\?"),
    "key": (RULE + ".".join("a" * 100_000) + " = 1", r"line 3 has a key of more than 100 parts"),
    "key of several lines": (
        RULE + '"\u2028".'.join(["a." * 90] * 200) + "a = 1",
        r"line 3 has a key of more than 100",
    ),
    "nested": ("rules = " + "[" * 100_000, r"not valid TOML: maximum recursion depth exceeded"),
    "digits": ("rules = " + "9" * 5000, r"not valid TOML: Exceeds the limit \(4300 digits\)"),
    "glob": (
        RULE + "match.names = '" + "*" * 1001 + "'",
        r"match\.names: String should have at most 1000 characters \(got '\*{59}… of 1,003 characters\)$",
    ),
    "globs": (RULE + f"match.names = {['a'] * 10_001}", r"match\.names: .* at most 10000 items"),
    "rules": (RULE * 1001, r"rules: .* at most 1000 items"),
}


@pytest.mark.parametrize("name", UNTRUSTED)
def test_recipes_that_would_take_forever_are_refused(name: str) -> None:
    text, expected = UNTRUSTED[name]
    with pytest.raises(RecipeError, match=expected):
        parse_recipe(text, "r.toml")


def test_dots_within_names_are_no_long_keys() -> None:
    names = [f"layer{n}.0.conv1" for n in range(200)]
    assert parse_recipe(RULE + f"match.names = {names}", "r").rules[0].match.names == tuple(names)


@pytest.mark.parametrize("name", shipped_names())
def test_shipped_recipes_are_valid_and_say_when_to_use_them(name: str) -> None:
    text, where = read_recipe_text(name)
    recipe = parse_recipe(text, where)
    assert 20 <= len(recipe.summary) <= 100
    assert recipe.group is not None
    assert recipe.preserves is not None
    assert read_about(name).model_dump() == recipe.model_dump(include={"summary", "group", "preserves"})
    assert text.startswith("# ")
    assert sum(line.startswith("#") for line in text.splitlines()) >= 3


def test_the_recipes_are_found_beside_the_package() -> None:
    assert {"3x3-only", "large-kernels", "inception-7x7", "all-spatial", "half-macs"} <= set(shipped_names())
    assert shipped_folder().name == "recipes"


@pytest.mark.parametrize(
    ("match", "holds"),
    [
        ({}, True),
        ({"names": "layer1.*"}, True),
        ({"names": ["x", "*.conv"]}, True),
        ({"names": "layer1"}, False),
        ({"names": "layer1.*", "exclude": "*conv"}, False),
        ({"kernel": "3x3"}, True),
        ({"kernel": 3}, True),
        ({"kernel": ["1x1", "5x5"]}, False),
        ({"kernel": {"min": "2x4"}}, False),
        ({"kernel": {"min": 2, "max": 3}}, True),
        ({"stride": 1}, True),
        ({"stride": [2]}, False),
        ({"dilation": {"min": 2}}, False),
        ({"groups": "dense"}, True),
        ({"groups": ["grouped", "depthwise"]}, False),
        ({"in_channels": {"min": 32, "max": 32}}, True),
        ({"in_channels": 31}, False),
        ({"out_channels": {"min": 65}}, False),
        ({"feature_map": {"min": 28}}, True),
        ({"feature_map": {"min": 29}}, False),
        ({"feature_map": {"max": "28x29"}}, False),
        ({"position": "inner"}, True),
        ({"position": ["first", "last"]}, False),
        ({"macs": {"min": 1e6}}, True),
        ({"params": {"max": 100}}, False),
        ({"followed_by": "batch_norm"}, True),
        ({"followed_by": "activation"}, True),
        ({"followed_by": ["add", "concat"]}, False),
        ({"preceded_by": "max_pool"}, True),
        ({"preceded_by": "input"}, False),
    ],
    ids=str,
)
def test_conditions(match: dict[str, Any], holds: bool) -> None:
    assert Match.model_validate(match).holds(site(), "inner") is holds


def test_a_glob_is_of_whole_names_and_layer_1_is_not_layer_10() -> None:
    match = Match.model_validate({"names": "layers.1.*"})
    assert match.holds(site("layers.1.conv"), "inner")
    assert not match.holds(site("layers.10.conv"), "inner")
    assert not match.holds(site("xlayers.1.conv"), "inner")


def staged(name: str, pixels: tuple[int, int], kernel: int = 3, runs: bool = True) -> Site:
    calls = (Call((9, 9), pixels), Call((9, 9), (1, 1)))
    return site(name, calls if runs else (), kernel=(kernel, kernel))


NETWORK = [
    staged("stem", (32, 16)),
    staged("body.a", (16, 8)),
    staged("body.squeeze", (1, 1), kernel=1),
    staged("body.turned", (8, 16)),
    staged("body.point", (8, 4), kernel=1),
    staged("body.b", (8, 4)),
    staged("head.up", (16, 8)),
    staged("head.aux", (1, 1), runs=False),
]


@pytest.mark.parametrize(
    ("match", "found"),
    [
        ({"stage": "first"}, {"stem"}),
        ({"stage": "inner"}, {"body.a", "body.turned", "head.up"}),
        ({"stage": "last"}, {"body.point", "body.b"}),
        ({"stage": "last", "kernel": "3x3"}, {"body.b"}),
        ({"stage": ["first", "last"], "kernel": 3}, {"stem", "body.b"}),
        ({"stage": "last", "kernel": "5x5"}, set()),
        ({"stage": "last", "exclude": "body.b"}, {"body.a", "body.turned", "head.up"}),
        ({"stage": "last", "names": "head.*"}, {"head.up"}),
        ({"stage": "first", "names": "head.*"}, {"head.up"}),
        ({"stage": "inner", "names": "head.*"}, set()),
        ({"stage": "last", "names": "*.squeeze"}, set()),
        ({"position": "first"}, {"stem"}),
        ({"position": "last"}, {"head.up"}),
    ],
    # Sets have no order of their own, and several workers must give every test the same name.
    ids=lambda value: " ".join(sorted(value)) if isinstance(value, set) else str(value),
)
def test_stages_are_those_of_the_named_part_by_the_pixels_of_its_outputs(match: Any, found: set[str]) -> None:
    assert Match.model_validate(match).find(NETWORK) == found


def test_a_stage_that_is_none() -> None:
    text = BASE.replace('groups = "dense"', 'stage = "lst"')
    with pytest.raises(RecipeError, match=r"rule 1 match\.stage: Input should be 'first', 'inner' or 'last'"):
        parse_recipe(text, "r")


FORMS = [
    site("stem", (Call((64, 64), (32, 32)),), in_channels=3, kernel=(7, 7), stride=(2, 2)),
    site("early", (Call((32, 32), (32, 32)),)),
    site("wide", (Call((32, 32), (32, 32)),), groups=32, kernel=(7, 7), out_channels=32),
    site("point", (Call((32, 32), (32, 32)),), kernel=(1, 1)),
    site("pair", (Call((32, 32), (32, 32)),), kernel=(1, 1), groups=2),
    site("scale", (Call((32, 32), (32, 32)),), kernel=(1, 1), groups=32),
    site("patches", (Call((32, 32), (8, 8)),), kernel=(4, 4), stride=(4, 4)),
    site("dilated", (Call((8, 8), (8, 8)),), dilation=(2, 2)),
    site("late", (Call((8, 8), (8, 8)),)),
    site("depthwise", (Call((8, 8), (8, 8)),), groups=32, out_channels=32),
    site("five", (Call((8, 8), (8, 8)),), kernel=(5, 5)),
]
SPOKEN_OF = {
    "3x3-only": {"separable": ["early", "dilated", "late"]},
    "half-macs": {"separable": ["early", "patches", "dilated", "late", "five"], "low-rank": ["point", "pair"]},
    "inception-7x7": {"separable": ["stem"]},
    "large-kernels": {"separable": ["stem", "five"]},
    "all-spatial": {
        "separable": ["stem", "early", "wide", "patches", "dilated", "late", "depthwise", "five"],
    },
    "acnet": {"acb": ["stem", "early", "wide", "dilated", "late", "depthwise", "five"]},
    "acnet-branch-bn": {"acb": ["stem", "early", "wide", "dilated", "late", "depthwise", "five"]},
    "strip-large-kernels": {"cross": ["stem", "wide", "five"]},
    "offset": {"offset": ["early", "wide", "patches", "late", "depthwise", "five"]},
    "weighted-offset": {"weighted-offset": ["early", "wide", "patches", "late", "depthwise", "five"]},
    "deformable-last-stage": {"predicted-offset": ["dilated", "late"]},
    "mixed": {"predicted-offset": ["dilated", "late"], "separable": ["early"]},
}


@pytest.mark.parametrize("name", shipped_names())
def test_which_recipe_names_every_shipped_one(name: str) -> None:
    page = Path(__file__).parents[2] / "docs" / "guide" / "which-recipe.md"
    assert f"`{name}`" in page.read_text(encoding="utf-8").split("## A recipe of your own")[0]


@pytest.mark.parametrize("name", SPOKEN_OF)
def test_which_convs_a_shipped_recipe_swaps_by_which_kind(name: str) -> None:
    recipe = parse_recipe(*read_recipe_text(name))
    found: dict[str, list[str]] = {}
    for each, (spoken, number) in zip(FORMS, find_rule(FORMS, recipe).items(), strict=True):
        ways = () if number is None else recipe.rules[number].ways
        fitting = [way.kind.name for way in ways if way.kind.unsupported(each.conv) is None]
        for kind in fitting[:1]:
            found.setdefault(kind, []).append(spoken)
    assert found == SPOKEN_OF[name]


@pytest.mark.parametrize("name", shipped_names())
def test_a_shipped_recipe_promises_what_its_kinds_do(name: str) -> None:
    recipe = parse_recipe(*read_recipe_text(name))
    promises = []
    for wish in (swap for rule in recipe.rules for swap in rule.swap):
        settled = replacements.load(wish["kind"]).settled
        sizes = {"rank": 1, "order": "vertical-first"} if settled is not None else {}
        sized = {key: size for key, size in sizes.items() if settled is not None and key in settled.model_fields}
        settings = {key: item for key, item in wish.items() if key not in ("kind", "ratio", "energy")} | sized
        kind, found = replacements.load_swap(Swap("conv", wish["kind"], settings))
        promises.append(kind.preserves(FORMS[1].conv, found))
    assert all(promises) == (recipe.preserves == "exactly")


def test_the_feature_map_is_that_of_the_input() -> None:
    halving = site(calls=(Call((32, 32), (16, 16)),), stride=(2, 2))
    assert Match(feature_map=((32, 32),)).holds(halving, "inner")
    assert not Match(feature_map=((16, 16),)).holds(halving, "inner")
    assert "of the input" in str(Match.model_fields["feature_map"].description)


def test_a_conv_that_never_runs_has_no_feature_map() -> None:
    assert not Match.model_validate({"feature_map": {"min": 1}}).holds(site(calls=()), "inner")


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        ("[[rules]]", "[[rules]", r"my.toml: not valid TOML: .*line 2"),
        ('kernel = "3x3"', 'kernle = "3x3"', "unknown key 'kernle' in rule 1 match; did you mean kernel"),
        ('"separable"', '"seperable"', "rule 1: unknown kind 'seperable'; did you mean separable"),
        ('"separable"', '"separable", ordr = "auto"', "unknown key 'ordr'; did you mean order"),
        ('"separable"', '"separable", rank = 0', "rank: Input should be greater than or equal to 1 .got 0"),
        ('"3x3"', '"3by3"', "rule 1 match.kernel: give a size such as"),
        ('"dense"', '"dens"', "rule 1 match.groups: Input should be 'dense', 'grouped' or 'depthwise'"),
        ('groups = "dense"', "in_channels = { mn = 3 }", "unknown key 'mn' in rule 1 match.in_channels; did you mean"),
        ('groups = "dense"', "in_channels = { min = 9, max = 3 }", "min = 9 is above max = 3"),
        ('groups = "dense"', 'followed_by = "batchnorm"', "unknown operation 'batchnorm'; did you mean batch_norm"),
        ("macs = 0.5", "macs = 1.5", "budget.macs: Input should be less than or equal to 1"),
        ("macs = 0.5", 'macs = "0.5"', "budget.macs: Input should be a valid number"),
        ("macs = 0.5", "macs = true", "budget.macs: Input should be a valid number"),
        ("macs = 0.5", 'max_drop = "0.5 B"', r"budget.max_drop: .*0\.5 B is no loss that may be allowed; give 0\.5"),
        ("macs = 0.5", "max_drop = 0", "budget.max_drop: .*a loss of 0 leaves nothing to swap"),
        ("macs = 0.5", "max_drop = true", "budget.max_drop: .*True is no loss"),
        ("[budget]", 'optional = "yes"\n[budget]', "rule 1 optional: Input should be a valid boolean"),
        ("[budget]", "optional = 1\n[budget]", "rule 1 optional: Input should be a valid boolean"),
        ("macs = 0.5", "macs = 0.5\nparams = 0.5", "a budget needs one of macs, params, latency, max_drop"),
        ("macs = 0.5", 'over = "model"', "a budget needs one of macs, params, latency, max_drop"),
        ("macs = 0.5", 'max_drop = 0.5\nover = "matched"', "over says of what a fraction is taken, and max_drop is"),
        ("[budget]", "[budgt]", "unknown key 'budgt'; did you mean budget"),
        (
            "[budget]\nmacs = 0.5",
            "",
            "rule 1 says no size: give separable a rank or ratio or energy, or the recipe a .budget.",
        ),
        ('"separable"', '"separable", rank = 4', "budget. has nothing to choose"),
        ('swap = { kind = "separable" }', "", "say either swap = .* or keep = true"),
        ('swap = { kind = "separable" }', "swap = { rank = 3 }", "swap needs a kind"),
        ('swap = { kind = "separable" }', "swap = []", "say either swap = .* or keep = true"),
        ('swap = { kind = "separable" }', "swap = [3]", "rule 1 swap: Input should be a valid dictionary .got 3."),
        ('{ kind = "separable" }', '["separable"]', "rule 1 swap: Input should be a valid dictionary"),
        ('"separable"', '["separable", "cross"]', "swap needs a kind"),
        ('{ kind = "separable" }', '[{ kind = "separable" }, { kind = "cros" }]', "'cros'; did you mean cross"),
        (
            '{ kind = "separable" }',
            '[{ kind = "acb" }, { kind = "cross", rank = 1 }]',
            "kind 'cross': unknown key 'rank'",
        ),
        (
            '{ kind = "separable" }',
            '[{ kind = "cross" }, { kind = "cross" }]',
            "rule 1: swap has the kind 'cross' twice",
        ),
    ],
)
def test_mistakes_are_told_in_one_line_with_the_place(old: str, new: str, text: str) -> None:
    assert old in BASE
    with pytest.raises(RecipeError, match=text) as caught:
        parse_recipe(BASE.replace(old, new), "my.toml")
    assert str(caught.value).startswith("my.toml: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "swap", "budget"),
    [
        ({"order": "vertical-first"}, {"kind": "separable", "order": "vertical-first"}, "0.5 of the model's MACs"),
        ({"budget.macs": 0.3}, {"kind": "separable"}, "0.3 of the model's MACs"),
        ({"budget.macs": 1}, {"kind": "separable"}, "1 of the model's MACs"),
        ({"budget.params": 0.3}, {"kind": "separable"}, "0.3 of the model's parameters"),
        ({"budget.over": "matched"}, {"kind": "separable"}, "0.5 of the matched convs' MACs"),
        ({"rank": 8}, {"kind": "separable", "rank": 8}, "None"),
        ({"rank": 8, "budget.macs": 0.3}, None, None),
        ({"budget.macs": 0.3, "rank": 8}, None, None),
        ({"budget.over": "matched", "budget.macs": 0.4}, {"kind": "separable"}, "0.4 of the matched convs' MACs"),
        ({"budget.macs": 0.4, "budget.over": "matched"}, {"kind": "separable"}, "0.4 of the matched convs' MACs"),
    ],
)
def test_overrides(overrides: dict[str, Any], swap: dict[str, Any] | None, budget: str | None) -> None:
    if swap is None:
        with pytest.raises(RecipeError, match="nothing to choose"):
            parse_recipe(BASE, "r", overrides)
        return
    recipe = parse_recipe(BASE, "r", overrides)
    assert recipe.rules[0].swap == (swap,)
    assert str(recipe.budget) == budget


def test_a_size_given_by_the_user_takes_the_place_of_the_recipes() -> None:
    recipe = parse_recipe(*read_recipe_text("large-kernels"), {"rank": 5})
    assert recipe.rules[0].swap == ({"kind": "separable", "rank": 5},)


@pytest.mark.parametrize(("overrides", "budget"), [({"correlation": 0.3}, "0.9 of the model's MACs"), ({}, "0.9")])
def test_a_setting_that_is_no_size_leaves_the_budget(overrides: dict[str, Any], budget: str) -> None:
    """A kind without a size leaves it to the budget whether to swap at all."""
    cross = '[[rules]]\nmatch = { names = "a" }\nswap = { kind = "cross" }\n[budget]\nmacs = 0.9\n'
    assert str(parse_recipe(cross, "r", overrides).budget).startswith(budget)
    both = '[[rules]]\nmatch = { names = "b" }\nswap = { kind = "separable" }\n' + cross
    assert str(parse_recipe(both, "r", overrides | {"rank": 8}).budget).startswith(budget)


def test_an_override_that_no_rule_takes() -> None:
    with pytest.raises(RecipeError, match="no rule of the recipe has a setting 'ordr'; did you mean order"):
        parse_recipe(BASE, "r", {"ordr": 1})


def test_unknown_recipe_and_missing_file(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no recipe '3x3-onyl'; did you mean 3x3-only"):
        read_recipe_text("3x3-onyl")
    with pytest.raises(RecipeError, match=r"no recipe file .*none\.toml; shipped recipes: 3x3-only"):
        read_recipe_text(str(tmp_path / "none.toml"))
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="is not a text file"):
        read_recipe_text(str(tmp_path / "binary.toml"))


def test_the_schema_holds_every_kind_and_every_setting() -> None:
    schema = json_schema()
    json.dumps(schema)
    swaps = {s["properties"]["kind"]["const"]: s for s in schema["$defs"]["Swap"]["oneOf"]}
    assert swaps.keys() == set(replacements.names())
    for name, swap in swaps.items():
        assert set(swap["properties"]) == {"kind", *replacements.load(name).settings.model_fields}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("rules = 3", "rules: Input should be an object|rule 1: Input should be"),
        ("rules = [3]", "rule 1: Input should be"),
        (f"budget = 3\n{RULE}", "budget: Input should be"),
        ("", "rules: Field required"),
        ('summary = "x"\nrules = [', r"at line 2, the end of the document"),
    ],
)
def test_rules_that_are_no_rules(text: str, told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        parse_recipe(text, "r", {"rank": 3} if text else {})


def test_a_name_that_no_file_can_have() -> None:
    with pytest.raises(RecipeError, match=r"no recipe 'aaaa.*; known: "):
        read_recipe_text("a" * 300)


@pytest.mark.parametrize("name", shipped_names())
def test_the_schema_takes_every_shipped_recipe(name: str) -> None:
    jsonschema.validate(tomllib.loads(read_recipe_text(name)[0]), json_schema(), jsonschema.Draft202012Validator)


@pytest.mark.parametrize(
    ("match", "fits"),
    [
        ('kernel = "3x3"', True),
        ('kernel = ["3x3", 5]', True),
        ('kernel = ["3x3", [1, 7]]', False),
        ('kernel = { min = "2x2", max = 7 }', True),
        ('kernel = "3by3"', False),
        ("in_channels = 64", True),
        ("in_channels = { min = 16 }", True),
        ('in_channels = "many"', False),
        ('names = "layer4.*"', True),
        ('names = ["layer3.*", "layer4.*"]', True),
        ('groups = ["dense", "depthwise"]', True),
        ('groups = "dence"', False),
        ('followed_by = "activation"', True),
        ('followed_by = "reloo"', False),
        ('kernal = "3x3"', False),
    ],
)
def test_the_schema_takes_what_recipes_may_say_and_no_more(match: str, fits: bool) -> None:
    text = f'[[rules]]\nmatch = {{ {match} }}\nswap = {{ kind = "separable", rank = 4 }}\n'
    assert jsonschema.Draft202012Validator(json_schema()).is_valid(tomllib.loads(text)) is fits
    if fits:
        parse_recipe(text, "a test")
    else:
        with pytest.raises(RecipeError):
            parse_recipe(text, "a test")


def test_every_field_of_the_schema_says_what_it_is_for() -> None:
    schema = json_schema()
    parts = [part for name, part in schema["$defs"].items() if name != "Swap"]
    tables = [schema, *parts, *schema["$defs"]["Swap"]["oneOf"]]
    silent = [
        (table["title"], name)
        for table in tables
        for name, part in table["properties"].items()
        if "description" not in part and name != "kind"
    ]
    assert silent == []
