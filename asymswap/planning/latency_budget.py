"""Plans under a budget of latency: a table of the seconds of each conv and its swaps on this machine, then a check.

The table has the seconds inside of the model for each form of conv and a grid of its options. It is kept in a file
with the machine's description, since it takes some seconds to make. A plan by this table is then measured as a whole
beside the original: swaps that have become slower are undone, and where the whole takes longer than the budget allows,
the next plan gets less.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import nn

from asymswap.errors import OutputError, RecipeError
from asymswap.measure.latency import Timed, in_format, inputs_like, machine, time_models
from asymswap.measure.timing import Timing
from asymswap.planning.apply import apply_random
from asymswap.planning.plan import Choices, CostModel, choose
from asymswap.results.convert import LatencyRow
from asymswap.types import Option, Plan, Progress, Site, Swap, silent
from asymswap.utils.files import write_text
from asymswap.utils.inputs import Inputs

_GRID = 8  # options of each conv that are timed; between them latency is interpolated by the MACs
_ATTEMPTS = 5
_NOISE = 0.02  # differences below this share are the machine's noise


def plan_in_time(
    model: nn.Module, example: Inputs, choices: Choices, timing: Timing, progress: Progress = silent
) -> tuple[Plan, LatencyRow]:
    """Return the plan that keeps the recipe's budget of latency when measured, or the nearest of a few attempts.

    `example` is one input; only its sizes count. Raises RecipeError for a budget that no plan can keep.
    """
    budget = choices.recipe.budget
    assert budget is not None
    original = in_format(model, timing.memory_format)
    inputs = inputs_like(example, timing.memory_format, timing.batch)
    table = _Table(timing)
    table.fill(original, inputs, choices, progress)
    costs = table.costs(original, inputs, choices)
    undone: dict[str, str] = {}

    def measure(plan: Plan) -> tuple[Timed, Timed, LatencyRow]:
        """Time the original and the converted network in turn."""
        models = {"original": original, "converted": apply_random(original, plan)}
        names = [swap.site for swap in plan.swaps]
        found = time_models(models, inputs, names, rounds=timing.rounds, progress=progress)
        before, after = found["original"], found["converted"]
        row = LatencyRow(
            before=before.whole,
            after=after.whole,
            memory_format=timing.memory_format,
            batch=timing.batch,
            threads=torch.get_num_threads(),
            machine=machine()["processor"],
            wanted=budget.fraction,
            undone=tuple(undone),
        )
        return before, after, row

    fraction = budget.fraction
    # Best is a ratio within the budget that uses most of it, else the nearest above.
    best: tuple[tuple[bool, float], Plan, LatencyRow] | None = None
    tried: Plan | None = None
    for _ in range(_ATTEMPTS):
        try:
            plan = choose(choices, costs, fraction, undone)
        except RecipeError:
            # By the table no plan takes as little as is now requested: an earlier one is as near as we get.
            if best is None:
                raise
            break
        if plan == tried:
            break
        tried = plan
        before, after, row = measure(plan)
        # A swap whose size a rule gives, or that makes the network stronger, is not the budget's to undo.
        slower = {}
        for swap in plan.swaps:
            was, now = before.modules[swap.site], after.modules[swap.site]
            if swap.site in choices.left_open and now > was * (1 + _NOISE):
                settings = ", ".join(f"{key} {value}" for key, value in swap.settings.items())
                slower[swap.site] = f"{settings} took {1e3 * now:.3f} ms where the conv takes {1e3 * was:.3f} ms"
        undone |= slower
        if slower:
            continue
        ratio = after.whole / before.whole
        within = ratio <= budget.fraction
        fit = within, ratio if within else -ratio
        if best is None or fit > best[0]:
            best = fit, plan, row
        if within and ratio >= (1 - 2 * _NOISE) * budget.fraction:
            break
        # A little below the budget: noise would otherwise make the next plan miss it as narrowly.
        fraction = min(1.0, fraction * (1 - _NOISE / 2) * budget.fraction / ratio)
    if best is None:
        # Every attempt found another swap to undo: the last one was not measured without it.
        plan = choose(choices, costs, fraction, undone)
        return plan, measure(plan)[2]
    return best[1], best[2]


class _Table:
    """Seconds of convs and of their options, by their form and not by their name.

    `_known` has for each form of conv, and for "" (the conv itself) and each option, its MACs and seconds.
    """

    def __init__(self, timing: Timing) -> None:
        self._machine = {**machine(), "memory_format": timing.memory_format, "batch": timing.batch}
        digest = hashlib.sha256(json.dumps(self._machine, sort_keys=True).encode()).hexdigest()[:16]
        given = os.environ.get("XDG_CACHE_HOME")
        folder = timing.cache or (Path(given) if given else Path.home() / ".cache") / "asymswap"
        self._path = folder / f"latency-{digest}.json"
        self._rounds = timing.rounds
        self._known: dict[str, dict[str, tuple[int, float]]] = {}
        # A file that cannot be read is measured again.
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            seconds = json.loads(self._path.read_text(encoding="utf-8"))["seconds"]
            self._known = TypeAdapter(dict[str, dict[str, tuple[int, float]]]).validate_python(seconds)

    def fill(self, original: nn.Module, inputs: Inputs, choices: Choices, progress: Progress) -> None:
        """Time what is not known yet, and write it to the file, where that can be written."""
        # For each site the swaps that are timed, with their MACs.
        tries: dict[str, list[tuple[Swap, int]]] = {site.name: [] for site in choices.matched}
        tries |= {name: _grid(name, options) for name, (_, options) in choices.left_open.items()}
        tries |= {name: [(item.swap(option), option.cost.macs)] for name, (item, option) in choices.fixed.items()}
        sites = {site.name: site for site in choices.matched}
        if all(
            {"", *(_option_key(swap.kind, swap.settings) for swap, _ in some)}
            <= self._known.get(_form(sites[name]), {}).keys()
            for name, some in tries.items()
        ):
            return
        # In the n-th model every conv has its n-th option, or its last one.
        levels = [
            {name: some[min(level, len(some) - 1)] for name, some in tries.items() if some}
            for level in range(max(map(len, tries.values())))
        ]
        models = {"": original}
        for number, level in enumerate(levels):
            models[str(number)] = apply_random(original, Plan(tuple(swap for swap, _ in level.values())))
        found = time_models(models, inputs, list(tries), rounds=self._rounds, progress=progress)
        timed = [(name, "", site.cost.macs, found[""]) for name, site in sites.items()]
        for number, level in enumerate(levels):
            for name, (swap, macs) in level.items():
                timed.append((name, _option_key(swap.kind, swap.settings), macs, found[str(number)]))
        for name, key, macs, times in timed:
            # The fastest of all convs of one form counts.
            known = self._known.setdefault(_form(sites[name]), {})
            known[key] = macs, min(times.modules[name], known.get(key, (0, math.inf))[1])
        text = json.dumps({"machine": self._machine, "seconds": self._known}, indent=1)
        # The file is a convenience: without it the next conversion measures again.
        with contextlib.suppress(OSError, OutputError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_text(self._path, text + "\n")

    def costs(self, original: nn.Module, inputs: Inputs, choices: Choices) -> CostModel:
        """Return latency in nanoseconds; for the whole model the convs' from the table and the rest's as timed now."""
        names = [site.name for site in choices.matched]
        rest = time_models({"": original}, inputs, names, rounds=self._rounds)[""].rest

        def seconds(site: Site) -> float:
            return self._known[_form(site)][""][1]

        return CostModel(
            "latency",
            round(1e9 * (rest + sum(map(seconds, choices.matched)))),
            lambda site: round(1e9 * seconds(site)),
            lambda site, option: round(1e9 * self._seconds_of(site, option)),
        )

    def _seconds_of(self, site: Site, option: Option) -> float:
        """Return the seconds of an option, as timed or between the two timed ones with fewer and with more MACs."""
        known = self._known[_form(site)]
        exact = known.get(_option_key(option.kind, option.settings))
        if exact is not None:
            return exact[1]
        entries = sorted(entry for key, entry in known.items() if key.startswith(f"{option.kind} "))
        below = [entry for entry in entries if entry[0] <= option.cost.macs]
        above = [entry for entry in entries if entry[0] > option.cost.macs]
        if not below or not above:
            # Beyond the grid: the nearest, or what grows with the MACs from there.
            macs, seconds = (below or above)[-1 if below else 0]
            return seconds * max(1.0, option.cost.macs / max(macs, 1))
        (low, fast), (high, slow) = below[-1], above[0]
        return fast + (slow - fast) * (option.cost.macs - low) / (high - low)


def _grid(name: str, options: Sequence[Option]) -> list[tuple[Swap, int]]:
    """Return some of a conv's options with their MACs, of each kind in rising order, one for each number of MACs."""
    grid = []
    for kind in dict.fromkeys(option.kind for option in options):
        own = sorted((option for option in options if option.kind == kind), key=lambda option: -option.loss)
        by_macs = {option.cost.macs: option for option in own}
        every = sorted(by_macs)
        chosen = sorted({round(step * (len(every) - 1) / (_GRID - 1)) for step in range(_GRID)})
        grid += [(Swap(name, kind, by_macs[every[index]].settings), every[index]) for index in chosen]
    return grid


def _form(site: Site) -> str:
    """Return all that the speed of a conv depends on, as text."""
    calls = [[*call.input, call.batch] for call in site.calls]
    return f"{site.conv} on {json.dumps(calls)}"


def _option_key(kind: str, settings: Mapping[str, Any]) -> str:
    return f"{kind} {json.dumps(dict(settings), sort_keys=True)}"
