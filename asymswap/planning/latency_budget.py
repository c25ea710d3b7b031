"""Plans under a budget of latency: a table of the seconds of each conv and its swaps in a runtime, then a check.

The table has the seconds inside of the model for each form of conv and a grid of its options, and is kept in a file for
each machine and runtime. A plan by this table is then measured as a whole beside the original: swaps that have become
slower are undone, and where the whole takes longer than the budget allows, the next plan gets less.
"""

import contextlib
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from pydantic import TypeAdapter
from torch import nn

from asymswap.errors import AsymswapError, OutputError, RecipeError
from asymswap.measure.latency import REST, Parts, Passes, best_of, in_format, machine, ratio_of, seconds_of, take_turns
from asymswap.measure.runtimes import RUNTIMES, Network
from asymswap.measure.timing import DTYPES, Timing
from asymswap.planning.apply import apply_plan
from asymswap.planning.plan import Choices, CostModel, choose
from asymswap.results.convert import LatencyRow, TimeRow
from asymswap.types import Option, Plan, Progress, Ratio, Site, Swap, silent
from asymswap.utils.files import write_file
from asymswap.utils.inputs import Inputs

_GRID = 8  # options of each conv that are timed; between them latency is interpolated by the MACs
_ATTEMPTS = 5
_NOISE = 0.02  # differences below this share are the machine's noise


class Bench:
    """Times variants of one model, which share its weights, in the runtime of a timing."""

    def __init__(self, model: nn.Module, example: Inputs, timing: Timing, progress: Progress) -> None:
        self.runtime, self._example, self._progress = RUNTIMES[timing.runtime], example, progress
        self.version = self.runtime.version()
        self.setting, self._rounds = self.runtime.setting(timing), timing.rounds
        self._dtype = timing.precision and getattr(torch, DTYPES[timing.precision])
        self.original = in_format(model, timing.memory_format if self.runtime.has_formats else "contiguous")

    def measure(
        self, models: Mapping[str, nn.Module], names: Sequence[str], whole: bool = True
    ) -> tuple[dict[str, Passes], dict[str, Parts]]:
        """Time models in turn, as a `whole` if asked for, and the named modules that all of them have."""
        with tempfile.TemporaryDirectory(prefix="asymswap-") as folder:
            networks = {key: Network(model, self._example, Path(folder), self._dtype) for key, model in models.items()}
            passes: dict[str, Passes] = {}
            if whole:
                turns = {key: self.runtime.prepare(network, self.setting) for key, network in networks.items()}
                self.version = turns[""].version
                passes |= take_turns(turns, rounds=self._rounds, progress=self._progress)
            probes = {key: self.runtime.probe(network, self.setting, names) for key, network in networks.items()}
            layers = take_turns(probes, rounds=self._rounds, progress=self._progress)
        best = {key: best_of(every) for key, every in layers.items()}
        first = best.get("", next(iter(best.values())))
        for name in names:
            if not first[name] > 0:
                raise AsymswapError(f"{self.runtime.title} does not tell the time of {name}, or of what it is part of")
        return passes, best


def plan_in_time(
    model: nn.Module, example: Inputs, choices: Choices, timing: Timing, progress: Progress = silent
) -> tuple[Plan, LatencyRow | None]:
    """Return the plan that keeps the recipe's budget of latency when measured, or the nearest of a few attempts.

    `example` is one input; only its sizes count. A plan without a swap is not measured. Raises RecipeError for a budget
    that no plan can keep, and where nothing was faster than the original.
    """
    budget = choices.recipe.budget
    assert budget is not None
    bench = Bench(model, example, timing, progress)
    costs = _latencies(bench, timing, choices)
    allowed = budget.fraction if budget.seconds is None else min(1.0, 1e9 * budget.seconds / costs.total)
    undone: dict[str, str] = {}
    fraction = allowed
    # Best is a ratio within the budget that uses most of it, else the nearest above.
    best: tuple[tuple[bool, float], Plan, LatencyRow] | None = None
    tried: Plan | None = None
    ratio: Ratio | None = None
    for attempt in range(_ATTEMPTS):
        try:
            plan = choose(choices, costs, fraction, undone)
        except RecipeError:
            # By the table no plan takes as little as is now requested: an earlier one is as near as we get.
            if ratio is None:
                raise
            break
        if not plan.swaps and ratio is None:
            return plan, None
        if plan == tried:
            break
        tried = plan
        models = {"": bench.original, "converted": apply_plan(bench.original, plan, share=True, weights="random")}
        passes, layers = bench.measure(models, [swap.site for swap in plan.swaps])
        ratio = ratio_of(passes["converted"], passes[""])
        before, after = (seconds_of(passes[key]) for key in models)
        times = TimeRow(timing.runtime, bench.version, before, after, ratio)
        how = timing.memory_format, bench.setting.batch, bench.setting.threads, machine()["processor"]
        wanted = budget.seconds or budget.fraction
        row = LatencyRow((times,), *how, wanted, tuple(undone), budget.seconds is not None, timing.device)
        slower = {}
        for swap in plan.swaps:
            was, now = (layers[key][swap.site] for key in models)
            # A swap whose size a rule gives, or that makes the network stronger, is not the budget's to undo.
            if swap.site in choices.left_open and now > was * (1 + _NOISE):
                settings = ", ".join(f"{key} {value}" for key, value in swap.settings.items())
                slower[swap.site] = f"{settings} took {1e3 * now:.3f} ms where the conv takes {1e3 * was:.3f} ms"
        undone |= slower
        if slower and attempt < _ATTEMPTS - 1:
            continue
        within = ratio.value <= allowed
        fit = within, ratio.value if within else -ratio.value
        if (within or (ratio.is_significant and ratio.value < 1)) and (best is None or fit > best[0]):
            best = fit, plan, row
        if within and ratio.value >= (1 - 2 * _NOISE) * allowed:
            break
        # A little below the budget: noise would otherwise make the next plan miss it as narrowly.
        fraction = min(1.0, fraction * (1 - _NOISE / 2) * allowed / ratio.value)
    if best is not None:
        return best[1], best[2]
    assert ratio is not None
    where = (
        f"in {bench.runtime.title} at batch {bench.setting.batch}: the network with swaps takes {ratio.value:.2f} of "
        f"the time ({ratio.low:.2f} to {ratio.high:.2f} with {ratio.confidence:.0%} confidence)"
    )
    if ratio.is_noisy and not ratio.is_significant:
        raise RecipeError(
            f"the machine is too noisy to tell if a swap pays {where}; try it on a quiet one, or with more `rounds=…`"
        )
    raise RecipeError(f"the budget of {budget} cannot be reached, and no swap pays {where}")


_Known = dict[str, dict[str, tuple[int, float]]]
"""For each form of conv, and for "" (the conv itself) and each option, its MACs and seconds."""


def cache_folder() -> Path:
    """Return the folder of what was timed before."""
    given = os.environ.get("XDG_CACHE_HOME")
    return (Path(given) if given else Path.home() / ".cache") / "asymswap"


def _latencies(bench: Bench, timing: Timing, choices: Choices) -> CostModel:
    """Return latency in nanoseconds: of convs by the table, whose file gets what it lacks, of the rest as timed now."""
    about = {**machine(), **vars(bench.setting), "version": bench.version, "precision": timing.precision}
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
    path = (timing.cache or cache_folder()) / f"latency-{digest}.json"
    table: _Known = {}
    # A file that cannot be read is measured again.
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        table = TypeAdapter(_Known).validate_python(json.loads(path.read_text(encoding="utf-8"))["seconds"])
    tries = _swaps_to_time(choices)
    sites = {site.name: site for site in choices.matched}
    if not all(
        {"", *(_option_key(swap) for swap, _ in some)} <= table.get(_form(sites[name]), {}).keys()
        for name, some in tries.items()
    ):
        _fill(table, bench, sites, tries)
        # The file is a convenience: without it the next conversion measures again.
        with contextlib.suppress(OSError, OutputError):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_file(path, json.dumps({"machine": about, "seconds": table}, indent=1) + "\n")
    rest = bench.measure({"": bench.original}, list(sites), whole=False)[1][""][REST]

    def keep(site: Site) -> int:
        return round(1e9 * table[_form(site)][""][1])

    def swapped(site: Site, option: Option) -> int:
        """Return the time as measured, or between the two timed options with fewer and with more MACs."""
        known, cost = table[_form(site)], option.cost.macs
        exact = known.get(_option_key(option))
        if exact is not None:
            return round(1e9 * exact[1])
        macs, timed = zip(*sorted(one for key, one in known.items() if key.startswith(f"{option.kind} ")), strict=True)
        # Below the grid it is the nearest, beyond it what grows with the MACs from there.
        return round(1e9 * float(np.interp(cost, macs, timed)) * max(1.0, cost / max(int(macs[-1]), 1)))

    return CostModel(round(1e9 * rest) + sum(map(keep, choices.matched)), keep, swapped)


def _swaps_to_time(choices: Choices) -> dict[str, list[tuple[Swap, int]]]:
    """Return for each site the swaps that are timed, with their MACs: of each kind a grid, one for each MACs."""
    tries: dict[str, list[tuple[Swap, int]]] = {site.name: [] for site in choices.matched}
    tries |= {name: [(item.swap(option), option.cost.macs)] for name, (item, option) in choices.fixed.items()}
    for name, (_, options) in choices.left_open.items():
        for kind in dict.fromkeys(option.kind for option in options):
            own = sorted((option for option in options if option.kind == kind), key=lambda option: -option.loss)
            by_macs = sorted({option.cost.macs: option for option in own}.items())
            chosen = sorted({round(step * (len(by_macs) - 1) / (_GRID - 1)) for step in range(_GRID)})
            tries[name] += [(Swap(name, kind, by_macs[at][1].settings), by_macs[at][0]) for at in chosen]
    return tries


def _fill(table: _Known, bench: Bench, sites: Mapping[str, Site], tries: Mapping[str, list[tuple[Swap, int]]]) -> None:
    """Time all sites and the swaps that are tried at them, and put their seconds into the table."""
    models = {"": bench.original}
    timed = [(name, "", site.cost.macs, "") for name, site in sites.items()]
    for level in range(max(map(len, tries.values()))):
        # In the n-th model every conv has its n-th option, or its last one.
        swaps = [some[min(level, len(some) - 1)] for some in tries.values() if some]
        plan = Plan(tuple(swap for swap, _ in swaps))
        models[str(level)] = apply_plan(bench.original, plan, share=True, weights="random")
        timed += [(swap.site, _option_key(swap), macs, str(level)) for swap, macs in swaps]
    # Programs hold weights of their own: in turn they would take the memory of all.
    groups = [{key: one} for key, one in models.items()] if bench.runtime.takes_time else [models]
    found: dict[str, Parts] = {}
    for group in groups:
        found |= bench.measure(group, list(tries), whole=False)[1]
    for name, key, macs, model in timed:
        # The fastest of all convs of one form counts.
        known = table.setdefault(_form(sites[name]), {})
        known[key] = macs, min(found[model][name], known.get(key, (0, math.inf))[1])


def _form(site: Site) -> str:
    """Return all that the speed of a conv depends on, as text."""
    calls = [[*call.input, call.batch] for call in site.calls]
    return f"{site.conv} on {json.dumps(calls)}"


def _option_key(one: Option | Swap) -> str:
    return f"{one.kind} {json.dumps(dict(one.settings), sort_keys=True)}"
