"""Recipes: strict TOML that says which convs are swapped, by which kind, and what the result may cost.

docs/reference/recipes.md tells how they are written. The first rule whose `match` a conv meets decides about it. Of
several kinds in `swap` that can take the conv, a budget takes what loses least; with no budget the first that saves
something wins.

A stage is made of the convs whose output has the same number of pixels; sizes count at which a kernel of more than one
tap runs, among the convs that `names` and `exclude` leave. `stage = "last"` is the smallest of them (the bottom of a
U-Net), "first" the largest, "inner" all between; where there is but one size, it is first and last at once.
"""

from __future__ import annotations

import contextlib
import copy
import fnmatch
import functools
import math
import re
import tomllib
from collections.abc import Callable, Collection, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

import pydantic
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import CoreSchema

from asymswap import replacements
from asymswap.errors import AsymswapError, RecipeError, near_names, validation_text
from asymswap.graph import vocabulary
from asymswap.planning.drop_budget import Drop
from asymswap.planning.shipped import read_recipe_text
from asymswap.replacements import KindSettings, Replacement
from asymswap.types import Site, Size


def _as_size(value: Any) -> Any:
    """Read "3x5" or 3 as (height, width)."""
    size = replacements.as_size(value)
    if isinstance(size, tuple) and len(size) == 2:
        return size
    raise ValueError('give a size such as "3x3" or 3')


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def _check_word(word: str) -> str:
    if word not in vocabulary.WORDS:
        hint = near_names(word, vocabulary.WORDS) or f"; known: {', '.join(sorted(vocabulary.WORDS))}"
        raise ValueError(f"unknown operation {word!r}{hint}")
    return word


class _OrOne:
    """Allows in the JSON Schema one item in place of a list, or a number in place of a range."""

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: pydantic.GetJsonSchemaHandler) -> Any:
        several = handler(schema)
        return {"anyOf": [several.get("items", {"type": "number"}), several]}


Pair = Annotated[Size, BeforeValidator(_as_size), replacements.SIZE_SCHEMA]
Glob = Annotated[str, Field(max_length=1000)]
Globs = Annotated[tuple[Glob, ...], BeforeValidator(_as_tuple), Field(max_length=10_000), _OrOne()]
Word = Annotated[str, Field(json_schema_extra={"enum": sorted(vocabulary.WORDS)}), BeforeValidator(_check_word)]
Words = Annotated[tuple[Word, ...], BeforeValidator(_as_tuple), _OrOne()]
Groupings = Annotated[tuple[Literal["dense", "grouped", "depthwise"], ...], BeforeValidator(_as_tuple), _OrOne()]
Position = Literal["first", "inner", "last"]
Positions = Annotated[tuple[Position, ...], BeforeValidator(_as_tuple), _OrOne()]
Group = Literal["Smaller and faster", "Wider view", "Stronger in training, same cost afterwards", "Learned sampling"]
GROUPS: tuple[str, ...] = get_args(Group)
Preserves = Literal["exactly", "approximately", "nothing"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Range(_Strict):
    """A range of numbers, both ends included."""

    min: Annotated[float, Field(strict=True)] | None = Field(None, description="The smallest number that is in it.")
    max: Annotated[float, Field(strict=True)] | None = Field(None, description="The largest number that is in it.")

    @model_validator(mode="after")
    def _not_empty(self) -> Range:
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min = {self.min:g} is above max = {self.max:g}")
        return self

    def holds(self, value: float) -> bool:
        return (self.min is None or value >= self.min) and (self.max is None or value <= self.max)


class SizeRange(_Strict):
    """A range of (height, width) pairs; it holds where both sides lie in it."""

    min: Pair | None = Field(None, description="No side is below this one.")
    max: Pair | None = Field(None, description="No side is above this one.")

    def holds(self, size: Size) -> bool:
        low, high = self.min or (0, 0), self.max or size
        return all(a <= b <= c for a, b, c in zip(low, size, high, strict=True))


AnyOf = Annotated[tuple[Pair, ...], BeforeValidator(_as_tuple), _OrOne()]
Sizes = Annotated[
    Annotated[SizeRange, pydantic.Tag("range")] | Annotated[AnyOf, pydantic.Tag("any of")],
    pydantic.Discriminator(lambda value: "range" if isinstance(value, dict | SizeRange) else "any of"),
]
Numbers = Annotated[
    Range,
    BeforeValidator(lambda value: {"min": value, "max": value} if type(value) in (int, float) else value),
    _OrOne(),
]


class Match(_Strict):
    """What a conv must be for a rule to match it; what is not given does not matter."""

    names: Globs = ("*",)
    """Globs of whole module names, of which one must match: `layer3.*` is not `layer30.conv`."""
    exclude: Globs = Field((), description="Globs of names that are left out.")
    kernel: Sizes | None = Field(None, description="Size of the kernel.")
    stride: Sizes | None = Field(None, description="Stride, in the form of a size.")
    dilation: Sizes | None = Field(None, description="Dilation, in the form of a size.")
    groups: Groupings | None = None
    """`dense` (one group), `depthwise` (one for each input channel) or `grouped` (any other number)."""
    in_channels: Numbers | None = Field(None, description="Input channels, of all groups together.")
    out_channels: Numbers | None = Field(None, description="Output channels, of all groups together.")
    feature_map: Sizes | None = Field(None, description="Height and width of the input where the conv runs first.")
    position: Positions | None = None
    """`first` and `last` of all convs in the order in which they run, `inner` for the others."""
    stage: Positions | None = None
    """Of the convs that `names` and `exclude` leave: those with the largest outputs are the `first` stage, those with
    the smallest the `last`, all between are `inner`."""

    macs: Numbers | None = Field(None, description="Multiply-adds of the conv in one forward pass, over all its calls.")
    params: Numbers | None = Field(None, description="Parameters of the conv.")
    followed_by: Words | None = None
    """Operations of which one reads the conv's output, maybe behind a batch norm."""
    preceded_by: Words | None = Field(None, description="Operations of which one makes the conv's input, likewise.")

    def find(self, sites: Sequence[Site]) -> set[str]:
        """Return the names of the matching sites of a model, given in run order."""
        running = [site for site in sites if site.calls]
        places: dict[str, Position] = {running[-1].name: "last", running[0].name: "first"} if running else {}
        pixels = {site.name: math.prod(site.calls[0].output) for site in running if self._names(site)}
        # A size at which no spatial conv runs (squeeze-excitation) is no stage.
        sizes = {pixels[site.name] for site in running if site.name in pixels and site.conv.kernel != (1, 1)}
        ends: dict[Position, int] = {"first": max(sizes, default=0), "last": min(sizes, default=0)}
        stages: dict[str, set[Position]] = {
            name: {end for end, extreme in ends.items() if size == extreme} or {"inner"}
            for name, size in pixels.items()
            if size in sizes
        }
        return {
            one.name for one in sites if self.holds(one, places.get(one.name, "inner"), stages.get(one.name, set()))
        }

    def holds(self, site: Site, position: Position, stages: Set[Position] = frozenset()) -> bool:
        """Return True if a site matches, at this place among all sites and in these stages."""
        conv, cost = site.conv, site.cost
        facts: dict[str, Collection[Any]] = {
            **{name: [getattr(conv, name)] for name in ("kernel", "stride", "dilation", "in_channels", "out_channels")},
            "groups": [conv.grouping],
            "feature_map": [call.input for call in site.calls[:1]],
            "position": [position],
            "stage": stages,
            "macs": [cost.macs],
            "params": [cost.params],
        }
        for name, values in facts.items():
            condition = getattr(self, name)
            if condition is not None:
                allows = condition.__contains__ if isinstance(condition, tuple) else condition.holds
                if not any(map(allows, values)):
                    return False
        for words, neighbours in ((self.followed_by, site.after or ()), (self.preceded_by, site.before or ())):
            if words is not None and not any(
                near.op in words or ("activation" in words and near.op in vocabulary.ACTIVATIONS) for near in neighbours
            ):
                return False
        return self._names(site)

    def _names(self, site: Site) -> bool:
        return _matches(self.names)(site.name) and not _matches(self.exclude)(site.name)


@functools.cache
def _matches(globs: tuple[str, ...]) -> Callable[[str], bool]:
    """Match a name against any of the globs; the patterns that `fnmatch` makes never backtrack over a `*`."""
    plain = {glob for glob in globs if not set("*?[") & set(glob)}
    patterns = [re.compile(fnmatch.translate(glob)) for glob in globs if glob not in plain]
    return lambda name: name in plain or any(pattern.match(name) for pattern in patterns)


@dataclass(frozen=True)
class Way:
    """One kind by which a conv can be swapped, with the settings that a rule asks for, checked."""

    kind: Replacement
    settings: KindSettings
    absorbs: str | None = None  # at a site: the batch norm that the replacement takes over

    @property
    def lacks_size(self) -> bool:
        """True if the kind has sizes, and none is given."""
        return bool(self.kind.SIZES) and all(getattr(self.settings, size) is None for size in self.kind.SIZES)

    @property
    def leaves_choice(self) -> bool:
        """True if a budget can choose: the size, or for a kind without one whether to swap at all."""
        return self.lacks_size if self.kind.SIZES else not self.settings.allow_growth


class Rule(_Strict):
    """One rule: the convs that it matches, and what they become. Matching none is an error, unless `optional`."""

    match: Match = Field(Match.model_validate({}), description="Which convs the rule matches; by default all.")
    swap: Annotated[tuple[dict[str, Any], ...], BeforeValidator(_as_tuple)] = ()
    """What they become: a kind and its settings, or a list of several to choose from."""
    keep: Literal[True] | None = Field(None, description="Leave them as they are; given instead of `swap`.")
    optional: Annotated[bool, Field(strict=True)] = Field(False, description="It is no error if no conv matches.")

    @model_validator(mode="after")
    def _one_outcome(self) -> Rule:
        if bool(self.swap) == bool(self.keep):
            raise ValueError("say either swap = { kind = … } or keep = true")
        if not all(isinstance(swap.get("kind"), str) for swap in self.swap):
            raise ValueError("swap needs a kind, such as swap = { kind = 'separable' }")
        try:
            kinds = [way.kind.name for way in self.ways]
        except RecipeError as error:
            raise ValueError(str(error)) from None
        for kind in kinds:
            if kinds.count(kind) > 1:
                raise ValueError(f"swap has the kind {kind!r} twice; a conv that it suits could become either")
        return self

    @functools.cached_property
    def ways(self) -> tuple[Way, ...]:
        """What a matched conv may become, checked; nothing where it is kept."""
        asked = [(swap["kind"], {key: value for key, value in swap.items() if key != "kind"}) for swap in self.swap]
        return tuple(Way(replacements.load(kind), replacements.parse_settings(kind, own)) for kind, own in asked)


MEASURES = {"macs": "MACs", "params": "parameters", "latency": "latency"}
BUDGETS = (*MEASURES, "max_drop")
Fraction = Annotated[float, Field(strict=True, gt=0, le=1)]


def _as_drop(value: Any) -> Any:
    try:
        if Drop.parse(value).value == 0:
            raise AsymswapError("a loss of 0 leaves nothing to swap; give what may be lost")
    except AsymswapError as error:
        raise ValueError(str(error)) from None
    return value


def _as_latency(value: Any) -> Any:
    """Read 0.6 as a fraction, and leave "5ms" or "0.005s" as the text that it is."""
    if isinstance(value, str):
        if _seconds(value):
            return value
        with contextlib.suppress(ValueError):
            value = float(value)
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1:
        return float(value)
    raise ValueError('give a fraction above 0 and at most 1, or a time such as "5ms" or "0.005s"')


def _seconds(text: str) -> float:
    """Return the seconds of a time, 0 for what is none."""
    found = re.fullmatch(r"\s*(\d*\.?\d+)\s*(ms|s)\s*", text)
    return 0.0 if found is None else float(found[1]) / (1000 if found[2] == "ms" else 1)


class Budget(_Strict):
    """What may be left, of the model or of the matched convs: a fraction of the MACs, the parameters or the latency.

    Or, with `max_drop`, how much may be lost, as it is measured, for as few MACs as that takes.
    """

    macs: Fraction | None = Field(None, description="At most this fraction of the multiply-adds.")
    params: Fraction | None = Field(None, description="At most this fraction of the parameters.")
    latency: Annotated[float | str, BeforeValidator(_as_latency)] | None = None
    """At most this fraction of the latency on this machine, or a time: `0.6`, `"5ms"`, `"0.005s"`."""
    max_drop: Annotated[float | str, BeforeValidator(_as_drop)] | None = None
    """At most this measured loss: `0.5` (points), `"0.1dB"` or `"2%"`; above 0."""
    over: Literal["model", "matched"] = "model"
    """Fraction of the whole model, or of the convs that rules match and their kinds can swap."""

    @model_validator(mode="after")
    def _one_measure(self) -> Budget:
        given = [name for name in BUDGETS if getattr(self, name) is not None]
        if len(given) != 1:
            instead = f", not {' and '.join(given)}" if given else ""
            raise ValueError(f"a budget needs one of {', '.join(BUDGETS)}{instead}")
        if (self.max_drop or self.seconds) is not None and "over" in self.model_fields_set:
            raise ValueError(f"over says of what a fraction is taken, and {given[0]} is none; remove one of the two")
        return self

    @property
    def measure(self) -> str:
        """The cost of `MEASURES` that is bounded, or made as low as the loss allows."""
        return next((name for name in MEASURES if getattr(self, name) is not None), "macs")

    @property
    def fraction(self) -> float:
        """The bound on it; 1 where it is no fraction."""
        bound = self.macs or self.params or self.latency
        return bound if isinstance(bound, float) else 1.0

    @property
    def seconds(self) -> float | None:
        """The bound on the latency, where it is a time."""
        return _seconds(self.latency) if isinstance(self.latency, str) else None

    def __str__(self) -> str:
        if self.max_drop is not None:
            return f"a measured loss of at most {Drop.parse(self.max_drop)}"
        if self.seconds is not None:
            return f"{1e3 * self.seconds:g} ms"
        owner = "the matched convs'" if self.over == "matched" else "the model's"
        return f"{self.fraction:g} of {owner} {MEASURES[self.measure]}"


class About(_Strict):
    """The description of a recipe, for people."""

    summary: str = Field("", description="What the recipe does, in one sentence.")
    group: Group | None = Field(None, description="Where `asymswap recipes` lists it.")
    preserves: Preserves | None = None
    """How well the converted network, before any training, does what the original did."""


class Recipe(About):
    """A whole recipe."""

    rules: Annotated[tuple[Rule, ...], BeforeValidator(_as_tuple), Field(min_length=1, max_length=1000)]
    """The first rule that matches a conv decides about it."""

    budget: Budget | None = Field(None, description="What may be left; it chooses the sizes that the rules leave open.")

    @model_validator(mode="after")
    def _sizes_and_budget(self) -> Recipe:
        every = [(number, way) for number, rule in enumerate(self.rules, start=1) for way in rule.ways]
        for number, way in every:
            if self.budget is None and way.lacks_size:
                sizes = f"give {way.kind.name} a {' or '.join(way.kind.SIZES)}"
                raise ValueError(f"rule {number} says no size: {sizes}, or the recipe a [budget]")
        if self.budget is not None and not any(way.leaves_choice for _, way in every):
            why = "no rule's kind has sizes; leave the budget out"
            if any(way.kind.SIZES for _, way in every):
                why = "every rule gives its own size; remove one of the two"
            raise ValueError(f"the [budget] has nothing to choose: {why}")
        return self


_LARGEST, _LONGEST_KEY = 2**20, 100
_STRING = re.compile(r"\"[^\"]*\"|'[^']*'")


def read_about(name: str) -> About:
    """Return the description of a shipped recipe, without checking its rules: their kinds would load torch."""
    value = tomllib.loads(read_recipe_text(name)[0])
    return About.model_validate({key: value[key] for key in About.model_fields if key in value})


def parse_recipe(text: str, where: str, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Check a recipe's text, with the user's `overrides` put in; raises RecipeError in one line."""
    if len(text) > _LARGEST:
        raise RecipeError(f"{where} has {len(text):,} characters, more than {_LARGEST:,}: is it a recipe?")
    for number, line in enumerate(text.split("\n"), start=1):
        # Reading a dotted key takes time that grows with the square of its length.
        if line.count(".") > _LONGEST_KEY and _STRING.sub("", line).count(".") > _LONGEST_KEY:
            raise RecipeError(f"{where}: line {number} has a key of more than {_LONGEST_KEY} parts")
    try:
        value = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        # Also of numbers with thousands of digits, and of lists in lists in lists.
        end = f"at line {text.rstrip().count(chr(10)) + 1}, the end of the document"
        raise RecipeError(f"{where}: not valid TOML: {str(error).replace('at end of document', end)}") from None
    try:
        return Recipe.model_validate(_overridden(value, overrides or {}))
    except ValidationError as error:
        # The keys that are known where the first unknown one is, for near names.
        unknown = next((one["loc"] for one in error.errors() if one["type"] == "extra_forbidden"), ("",))
        tables = [part for part in ("", *unknown[:-1]) if isinstance(part, str)]
        owners: dict[str, type[BaseModel]] = {"": Recipe, "rules": Rule, "match": Match, "budget": Budget}
        known = list(owners.get(tables[-1], Range).model_fields)
        raise RecipeError(f"{where}: {validation_text(error, known)}") from None


def _overridden(value: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Put the user's `overrides` into a recipe that has been read but not checked.

    `budget.macs` (and so on) and `budget.over` change the budget, of which one measure is left; any other key goes into
    every rule that swaps by a kind with such a setting. A size replaces the rule's own, and the budget where no rule is
    left for it. Settings come first, then the last measure, then `over`, in whatever order they are given.
    """
    given, budget = value.get("rules"), value.get("budget")
    tables = [] if budget is None else [budget]
    if not isinstance(given, list) or not all(isinstance(one, dict) for one in given + tables):
        # The check of the whole says what is wrong with the rules, or the budget.
        return value
    rules = [{**rule, "swap": copy.deepcopy([*_as_tuple(rule.get("swap", ()))])} for rule in given]
    swaps = [swap for rule in rules for swap in rule["swap"] if isinstance(swap, dict)]
    kinds = [(swap, replacements.load(swap["kind"])) for swap in swaps if swap.get("kind") in replacements.names()]
    known = {key for _, kind in kinds for key in kind.settings.model_fields}
    parts = {key.removeprefix("budget."): new for key, new in overrides.items() if key.startswith("budget.")}
    sized = any(key in kind.SIZES for key in overrides for _, kind in kinds)
    for key in (key for key in overrides if not key.startswith("budget.")):
        for swap, kind in kinds:
            for size in kind.SIZES if key in kind.SIZES else ():
                swap.pop(size, None)
            if key in kind.settings.model_fields:
                swap[key] = overrides[key]
        if key not in known:
            hint = near_names(key, known) or f"; known: {', '.join(sorted(known))}"
            raise RecipeError(f"no rule of the recipe has a setting {key!r}{hint}")
    if sized:
        left: list[Way] = []
        for rule in rules:
            with contextlib.suppress(ValidationError):  # the check of the whole says what is wrong with it
                left += [way for way in Rule.model_validate(rule).ways if way.leaves_choice]
        budget = budget if left else None
    # Another measure makes another budget, to which `over` then applies.
    for part in sorted(parts, key=lambda part: part not in BUDGETS):
        budget = {**({} if part in BUDGETS else budget or {}), part: parts[part]}
    return {**value, "rules": rules, "budget": budget}


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of a recipe, for editors, with the settings of each kind."""
    schema, swaps = Recipe.model_json_schema(), []
    for name in replacements.names():
        settings = replacements.load(name).settings.model_json_schema()
        properties = {"kind": {"const": name}, **settings["properties"]}
        swaps.append({**settings, "properties": properties, "required": ["kind"], "title": name})
    schema["$defs"]["Swap"] = {"oneOf": swaps}
    one, rule = {"$ref": "#/$defs/Swap"}, schema["$defs"]["Rule"]["properties"]
    both = [one, {"type": "array", "items": one, "minItems": 1}]
    rule["swap"] = {"description": rule["swap"]["description"], "anyOf": both}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
