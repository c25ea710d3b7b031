"""Plans under a budget of latency: a table of what each conv and its swaps take on this machine, and the proof.

The table has, for each conv of another form and for a grid of its options, the seconds that it takes inside of the
model. It is kept in a file, together with the machine's description, since it costs some seconds to make. A plan by
these prices is then measured as a whole beside the original: swaps that have become slower are undone, and where the
whole takes longer than the budget allows, the next plan gets less.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn

from asymswap.errors import AsymswapError, OutputError, RecipeError, check_choice
from asymswap.measure.latency import MemoryFormat, Timed, in_format, inputs_like, time_models
from asymswap.measure.machine import machine
from asymswap.planning.apply import apply_random
from asymswap.planning.plan import Choices, choose
from asymswap.results.convert import LatencyRow
from asymswap.types import Option, Plan, Progress, Site, Swap, silent
from asymswap.utils.files import write_text
from asymswap.utils.inputs import Inputs

_GRID = 8
"""Options of each conv that are timed; between them the latency is taken to grow evenly with the MACs."""

_ATTEMPTS = 5
_NOISE = 0.02
"""Differences below this share are not told apart from the machine's noise."""


@dataclass(frozen=True)
class Timing:
    """How latency is measured: the weights' memory format, images at a time, rounds, and where tables are kept.

    `cache` is a folder; None stands for the user's own cache folder. The threads are torch's.
    """

    memory_format: MemoryFormat = "channels-last"
    batch: int = 1
    rounds: int = 20
    cache: Path | None = None

    def __post_init__(self) -> None:
        """Raise AsymswapError for what cannot be measured."""
        check_choice("the memory format", self.memory_format, get_args(MemoryFormat))
        if self.batch < 1 or self.rounds < 1:
            raise AsymswapError(f"batches of {self.batch} in {self.rounds} rounds measure nothing; give 1 or more")


def plan_in_time(
    model: nn.Module, example: Inputs, choices: Choices, timing: Timing, progress: Progress = silent
) -> tuple[Plan, LatencyRow]:
    """The plan that keeps the recipe's budget of latency when measured, or comes as near as a few attempts get.

    `example` is one input; only its sizes count. Raises RecipeError for a budget that no plan can keep.
    """
    budget = choices.recipe.budget
    assert budget is not None
    original = in_format(model, timing.memory_format)
    inputs = inputs_like(example, timing.memory_format, timing.batch)
    table = _Table(timing)
    table.fill(original, inputs, choices, progress)
    prices = _Prices(table, table.whole(original, inputs, choices))
    undone: dict[str, str] = {}
    fraction = budget.fraction
    best: tuple[float, Plan, LatencyRow] | None = None
    tried: Plan | None = None
    for _ in range(_ATTEMPTS):
        try:
            plan = choose(choices, prices, fraction, undone)
        except RecipeError:
            # By the table no plan takes as little as is now asked for: an earlier one is as near as we get.
            if best is None:
                raise
            break
        if plan == tried:
            break
        tried = plan
        before, after = _measure(original, plan, inputs, timing, progress)
        # What a rule has asked for by its size, or to make the network stronger, is not the budget's to take back.
        slower = [(name, reason) for name, reason in _slower(plan, before, after) if name in choices.curves]
        ratio = after.whole / before.whole
        if not slower and (best is None or _suits(ratio, budget.fraction) > _suits(best[0], budget.fraction)):
            best = ratio, plan, _row(before, after, timing, budget.fraction, undone)
        if not slower and (1 - 2 * _NOISE) * budget.fraction <= ratio <= budget.fraction:
            break
        undone |= dict(slower)
        # A little below what is wanted: noise would otherwise make the next plan miss it as narrowly.
        if not slower:
            fraction = min(1.0, fraction * (1 - _NOISE / 2) * budget.fraction / ratio)
    if best is None:
        # Every attempt found another swap to take back: the last one was not measured without it.
        plan = choose(choices, prices, fraction, undone)
        before, after = _measure(original, plan, inputs, timing, progress)
        return plan, _row(before, after, timing, budget.fraction, undone)
    return best[1], best[2]


def _suits(ratio: float, wanted: float) -> tuple[bool, float]:
    """How well a measured ratio suits: best is one within the budget that uses most of it, else the nearest above."""
    return ratio <= wanted, ratio if ratio <= wanted else -ratio


def _measure(
    original: nn.Module, plan: Plan, inputs: Inputs, timing: Timing, progress: Progress
) -> tuple[Timed, Timed]:
    """Original and converted network beside each other."""
    models = {"original": original, "converted": apply_random(original, plan)}
    names = [swap.site for swap in plan.swaps]
    found = time_models(models, inputs, names, rounds=timing.rounds, progress=progress)
    return found["original"], found["converted"]


def _slower(plan: Plan, before: Timed, after: Timed) -> Iterator[tuple[str, str]]:
    """The swapped convs that have become slower, with the reason for keeping them."""
    for swap in plan.swaps:
        was, now = before.modules[swap.site], after.modules[swap.site]
        if now > was * (1 + _NOISE):
            settings = ", ".join(f"{key} {value}" for key, value in swap.settings.items())
            yield swap.site, f"{settings} took {1e3 * now:.3f} ms where the conv takes {1e3 * was:.3f} ms"


def _row(before: Timed, after: Timed, timing: Timing, wanted: float, undone: Mapping[str, str]) -> LatencyRow:
    return LatencyRow(
        before=before.whole,
        after=after.whole,
        memory_format=timing.memory_format,
        batch=timing.batch,
        threads=torch.get_num_threads(),
        machine=machine()["processor"],
        wanted=wanted,
        undone=tuple(undone),
    )


class _Prices:
    """Latency in nanoseconds, from the table; `seconds` are those of the whole model."""

    what = "latency"

    def __init__(self, table: _Table, seconds: float) -> None:
        self._table = table
        self.total = round(1e9 * seconds)

    def keep(self, site: Site) -> int:
        return round(1e9 * self._table.seconds(site))

    def option(self, site: Site, kind: str, option: Option) -> int:
        return round(1e9 * self._table.seconds_of(site, kind, option))


@dataclass(frozen=True)
class _Try:
    """One option of a conv that is timed."""

    swap: Swap
    macs: int


class _Table:
    """Seconds of convs and of their options, by their form and not by their name."""

    def __init__(self, timing: Timing) -> None:
        self._machine = {**machine(), "memory_format": timing.memory_format, "batch": timing.batch}
        mark = hashlib.sha256(json.dumps(self._machine, sort_keys=True).encode()).hexdigest()[:16]
        self._path = (timing.cache or _cache_folder()) / f"latency-{mark}.json"
        self._rounds = timing.rounds
        self._known = _read(self._path)

    def fill(self, original: nn.Module, inputs: Inputs, choices: Choices, progress: Progress) -> None:
        """Time what is not known yet, and write it to the file, where that can be written."""
        sites = {site.name: site for site in choices.sites}
        tries = {name: _grid(name, kind, options) for name, (kind, options) in choices.named_options.items()}
        for name, (result, option) in choices.fixed.items():
            tries[name] = [_Try(result, option.cost.macs)] if isinstance(result, Swap) and option is not None else []
        if all(self._knows(sites[name], some) for name, some in tries.items()):
            return
        # In the n-th model every conv has its n-th option, or its last one.
        levels = [
            {name: some[min(level, len(some) - 1)] for name, some in tries.items() if some}
            for level in range(max(map(len, tries.values())))
        ]
        models = {
            str(n): apply_random(original, Plan(tuple(t.swap for t in lv.values()))) for n, lv in enumerate(levels)
        }
        found = time_models({"": original, **models}, inputs, list(tries), rounds=self._rounds, progress=progress)
        for name in tries:
            self._note(sites[name], "", sites[name].cost.macs, found[""].modules[name])
        for number, level in enumerate(levels):
            for name, one in level.items():
                key = _option_key(one.swap.kind, one.swap.settings)
                self._note(sites[name], key, one.macs, found[str(number)].modules[name])
        self._write()

    def _knows(self, site: Site, tries: Sequence[_Try]) -> bool:
        known = self._known.get(_form(site), {})
        return "" in known and all(_option_key(one.swap.kind, one.swap.settings) in known for one in tries)

    def whole(self, original: nn.Module, inputs: Inputs, choices: Choices) -> float:
        """What the whole model takes: the convs as in the table, and the rest as it is now."""
        names = [*choices.fixed, *choices.curves]
        rest = time_models({"": original}, inputs, names, rounds=self._rounds)[""].rest
        return rest + sum(self.seconds(site) for site in choices.sites if site.name in names)

    def seconds(self, site: Site) -> float:
        """What a conv takes as it is."""
        return self._known[_form(site)][""][1]

    def seconds_of(self, site: Site, kind: str, option: Option) -> float:
        """What an option takes: as timed, or between the two timed ones of its kind with fewer and with more MACs."""
        known = self._known[_form(site)]
        exact = known.get(_option_key(kind, option.settings))
        if exact is not None:
            return exact[1]
        entries = sorted((macs, seconds) for key, (macs, seconds) in known.items() if key.startswith(f"{kind} "))
        below = [entry for entry in entries if entry[0] <= option.cost.macs]
        above = [entry for entry in entries if entry[0] > option.cost.macs]
        if not below or not above:
            # Beyond the grid: the nearest, or what grows with the MACs from there.
            macs, seconds = (below or above)[-1 if below else 0]
            return seconds * max(1.0, option.cost.macs / max(macs, 1))
        (low, fast), (high, slow) = below[-1], above[0]
        return fast + (slow - fast) * (option.cost.macs - low) / (high - low)

    def _note(self, site: Site, key: str, macs: int, seconds: float) -> None:
        """Convs of one form that stand in several places: the fastest."""
        known = self._known.setdefault(_form(site), {})
        known[key] = [macs, min(seconds, known[key][1] if key in known else seconds)]

    def _write(self) -> None:
        text = json.dumps({"machine": self._machine, "seconds": self._known}, indent=1)
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_text(self._path, text + "\n")
        except (OSError, OutputError):
            # It is a convenience: without it the next conversion measures again.
            return


def _grid(name: str, kind: str, options: Sequence[Option]) -> list[_Try]:
    """Some of a conv's options, from the cheapest to the dearest, one for each number of MACs."""
    by_macs = {option.cost.macs: option for option in sorted(options, key=lambda option: -option.loss)}
    every = [by_macs[macs] for macs in sorted(by_macs)]
    chosen = sorted({round(step * (len(every) - 1) / (_GRID - 1)) for step in range(_GRID)}) if every else []
    return [_Try(Swap(name, kind, every[index].settings), every[index].cost.macs) for index in chosen]


def _form(site: Site) -> str:
    """All that the speed of a conv depends on, as text."""
    calls = [[*call.input, call.batch] for call in site.calls]
    return f"{site.conv} on {json.dumps(calls)}"


def _option_key(kind: str, settings: Mapping[str, Any]) -> str:
    return f"{kind} {json.dumps(dict(settings), sort_keys=True)}"


def _cache_folder() -> Path:
    """Where this user's programs keep what can be made again."""
    given = os.environ.get("XDG_CACHE_HOME")
    return (Path(given) if given else Path.home() / ".cache") / "asymswap"


def _read(path: Path) -> dict[str, dict[str, list[float]]]:
    """The table in a file; an empty one where there is none that can be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["seconds"]
        return {
            form: {key: [int(macs), float(seconds)] for key, (macs, seconds) in entries.items()}
            for form, entries in found.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
