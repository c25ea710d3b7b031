"""Write docs/results/claims.md and its pictures from the results that claims.py has written so far."""

from __future__ import annotations

import itertools
import math
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # for what it shares with the checks of a release

from measured import markdown_table, read_json, states

PLAIN = "plain"
TITLES = {"digits": "Digits", "cifar10": "CIFAR-10"}
WAY_TITLES = {"scratch": "trained from scratch", "converted": "converted from the trained plain network"}
ENOUGH = 3
"""Fewer pairs than these decide nothing."""

INTRODUCTION = """\
# Claims about asymmetric convolutions, tested

<!-- Written by benchmarks/studies/claims.py; change that (or claims_page.py beside it), not this. -->

The article behind this project says that ResNets, DenseNets and SE networks with asymmetric convolutions converge
faster, recognise better, and need fewer parameters and less computation. Here five kinds are tested against these
claims with `asymswap.convert`, `finetune`, `evaluate` and `fuse`, beside the plain network of the same seed: the same
number of epochs, the same images in the same order, the same settings.

All numbers are for **narrow networks, few epochs and few images**, which two cores can train many times. A verdict
holds only for that setting; an undecided claim may be decided at full size.
"""


@dataclass(frozen=True)
class Result:
    """One finished run: what it was, and what its file holds."""

    data: str
    network: str
    way: str
    kind: str
    seed: int
    found: Mapping[str, Any]

    @property
    def final(self) -> float:
        """Accuracy in % after the last epoch."""
        return 100 * float(self.found["top1"][-1])

    @property
    def speed(self) -> float:
        """Accuracy in %, averaged over the ends of all epochs: the area below the curve."""
        return 100 * mean(self.found["top1"][1:])


class Book:
    """All results."""

    def __init__(self, results: Iterable[Result]) -> None:
        self.results = {(one.data, one.network, one.way, one.kind, one.seed): one for one in results}

    def some(self, **fields: Any) -> list[Result]:
        """Results with these fields, by seed."""
        chosen = [one for one in self.results.values() if all(getattr(one, key) == fields[key] for key in fields)]
        return sorted(chosen, key=lambda one: (one.network, one.seed))

    def pairs(self, **fields: Any) -> list[tuple[Result, Result]]:
        """Each of these results with the plain network to compare it with, if there is one."""
        found = []
        for one in self.some(**fields):
            plain = self.results.get((one.data, one.network, one.way, PLAIN, one.seed))
            if plain is not None:
                found.append((one, plain))
        return found


@dataclass(frozen=True)
class Difference:
    """A mean difference to the plain network over pairs of runs, in points, its 95 % interval and p (paired t)."""

    pairs: int
    mean: float
    low: float
    high: float
    p: float

    def __str__(self) -> str:
        if self.pairs < 2:
            return f"{self.mean:+.2f}"
        return f"{self.mean:+.2f} ({self.low:+.2f} to {self.high:+.2f})"


def difference(
    pairs: Sequence[tuple[Result, Result]], of: Callable[[Result], float], grain: float = 0.0
) -> Difference | None:
    """The difference of the first and the second of each pair.

    `grain` is the weight of one test image: the deviation over the pairs is never taken to be less, because a few
    differences that happen to be equal do not make accuracy finer than that.
    """
    from scipy import stats

    gaps = [of(one) - of(plain) for one, plain in pairs]
    if not gaps:
        return None
    count, middle = len(gaps), mean(gaps)
    if count == 1:
        return Difference(1, middle, -math.inf, math.inf, 1.0)
    error = max(stdev(gaps), grain) / count**0.5
    half = float(stats.t.ppf(0.975, count - 1)) * error
    p = 2 * float(stats.t.sf(abs(middle) / error, count - 1)) if error else float(middle == 0)
    return Difference(count, middle, middle - half, middle + half, p)


def verdicts(found: Sequence[Difference]) -> list[str]:
    """Verdicts on "better than plain", corrected so that one page in twenty has any wrong one (Holm, 1979)."""
    verdict = []
    corrected: dict[int, float] = {}
    largest = 0.0
    for place, number in enumerate(sorted(range(len(found)), key=lambda n: found[n].p)):
        largest = max(largest, (len(found) - place) * found[number].p)
        corrected[number] = largest
    for number, one in enumerate(found):
        if one.pairs < ENOUGH or one.p >= 0.05:
            verdict.append("not decided")
        elif corrected[number] >= 0.05:
            verdict.append(f"not decided, leans to {'yes' if one.mean > 0 else 'no'}")
        else:
            verdict.append("holds" if one.mean > 0 else "does not hold")
    return verdict


def write_page(page: Path, out: Path, study: Mapping[str, Any]) -> None:
    """Write the page and its pictures; `study` names data, networks, kinds, ways and the settings."""
    book = Book(read(out))
    seeds = sum(study["settings"][data].seeds for data in study["data"])
    runs = seeds * math.prod(len(study[name]) for name in ("networks", "ways", "kinds"))
    state = f"**{len(book.results)} of {runs} runs are done**; see [what is missing](#what-is-missing).\n"
    parts = [
        INTRODUCTION,
        state,
        _claims(book, study),
        _inference(book),
        _setting(book, study),
        _missing(book, study),
    ]
    for data in study["data"]:
        for way in study["ways"]:
            if book.some(data=data, way=way):
                picture = page.with_name(f"claims-{data}-{way}.svg")
                _draw(book, data, way, study, picture)
                parts.append(_tables(book, data, way, study, picture.name))
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text("\n".join(parts), encoding="utf-8")


def read(out: Path) -> list[Result]:
    """Every result in the file; the key identifies its run."""
    found = []
    for key, content in read_json(out, {}).items():
        name = re.fullmatch(r"([^/]+)/(.+)-(scratch|converted)-(.+)-(\d+)", key)
        if name is not None:
            data, network, way, kind, seed = name.groups()
            found.append(Result(data, network, way, kind, int(seed), content))
    return found


def _claims(book: Book, study: Mapping[str, Any]) -> str:
    lines = [
        "## The claims",
        "",
        "All networks and seeds of one kind together; each run is compared with the plain network of its own seed. "
        "Differences are in points of accuracy, with Student's 95 % interval over the pairs. *Holds* and *does not "
        f"hold* need at least {ENOUGH} pairs and a paired t-test below 0.05 after correction for all tests on this "
        "page (Holm). *Leans* means below 0.05 only without correction, which with so many tests also happens by "
        "chance. Everything else is *not decided*. The intervals are about other seeds: the test images are always "
        "the same (360 of digits, one of which is 0.28 points; 2,000 of CIFAR-10), and so are the networks.",
    ]
    rows = _judged(book, study)
    for claim, about in (
        ("They converge faster", "averaged over all epochs"),
        ("They recognise better", LAST),
    ):
        mine = [row for row in rows if row.claim == claim]
        columns = ["data", "how", "kind", "pairs", "points (95 %)", "p", "verdict"]
        cells = [[TITLES[r.data], r.way, r.kind, r.of_which, str(r.found), _chance(r.found.p), r.verdict] for r in mine]
        lines += ["", f"### {claim}", "", _summary(mine), "", f"Difference in accuracy {about}:", ""]
        lines += [markdown_table(columns, cells, left=4)]
    return "\n".join([*lines, "", "### They need fewer parameters and less computation", "", _costs(book, study)])


LAST = "after the last epoch"


@dataclass(frozen=True)
class Judged:
    """One row of the tables of the claims."""

    claim: str
    data: str
    way: str
    kind: str
    of_which: str
    found: Difference
    verdict: str = ""


def _judged(book: Book, study: Mapping[str, Any]) -> list[Judged]:
    """All comparisons of which there is at least one pair, judged together."""
    rows = []
    claims: dict[str, Callable[[Result], float]] = {
        "They converge faster": lambda one: one.speed,
        "They recognise better": lambda one: one.final,
    }
    for (claim, of), data, way, kind in itertools.product(claims.items(), study["data"], study["ways"], _kinds(study)):
        pairs = book.pairs(data=data, way=way, kind=kind)
        found = difference(pairs, of, 100 / study["settings"][data].test)
        if found is not None:
            counts = Counter(one.network for one, _ in pairs)
            of_which = ", ".join(f"{network} {count}" for network, count in counts.items())
            rows.append(Judged(claim, data, way, kind, of_which, found))
    found_verdicts = verdicts([row.found for row in rows])
    return [replace(row, verdict=verdict) for row, verdict in zip(rows, found_verdicts, strict=True)]


def _kinds(study: Mapping[str, Any]) -> list[str]:
    return [kind for kind in study["kinds"] if kind != PLAIN]


def _chance(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _summary(rows: Sequence[Judged]) -> str:
    """One paragraph for each verdict: which kinds got it, and where."""
    by_verdict: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        by_verdict[row.verdict].append(f"`{row.kind}` on {TITLES[row.data]}, {row.way}: {row.found}")
    paragraphs = [f"**{name.capitalize()}**: {'; '.join(by_verdict[name])}." for name in sorted(by_verdict)]
    return "\n\n".join(paragraphs or ["**Not decided**: nothing measured yet."])


def _costs(book: Book, study: Mapping[str, Any]) -> str:
    """Costs of the kinds relative to the plain network; they are the same for all seeds."""
    rows, fewer, more = [], [], []
    for kind in _kinds(study):
        cells: dict[str, list[float]] = defaultdict(list)
        for one, plain in book.pairs(kind=kind):
            for form, cost in (("trained", one.found), ("fused", one.found.get("fused", one.found))):
                for name in ("params", "macs"):
                    cells[f"{form} {name}"].append(cost[name] / plain.found[name])
        if not cells:
            continue
        rows.append(
            [f"`{kind}`", *(_range(cells[f"{a} {b}"]) for a in ("trained", "fused") for b in ("params", "macs"))]
        )
        ends = [cells["fused params"], cells["fused macs"]]
        (fewer if all(max(values) < 1 for values in ends) else more).append(f"`{kind}`")
    text = markdown_table(
        ["kind", "parameters, in training", "MACs, in training", "parameters, deployed", "MACs, deployed"], rows
    )
    verdict = []
    if fewer:
        verdict.append(f"**Holds** for {', '.join(fewer)}.")
    if more:
        verdict.append(f"**Does not hold** for {', '.join(more)}, which cost as much as the plain network or more.")
    return (
        "As fractions of the plain network's, smallest and largest over all networks and data. *In training* is the "
        "converted network; for the offset kinds it includes building their kernels, once per batch of any size. "
        "*Deployed* is after `asymswap fuse`, if the kind fuses.\n\n"
        f"{text}\n\n{' '.join(verdict)} `separable` was set to keep half of the MACs of the convs that it replaces "
        "(`ratio = 0.5`), so this holds by construction; its cost in accuracy is above."
    )


def _range(values: Sequence[float]) -> str:
    low, high = f"{min(values):.2f}", f"{max(values):.2f}"
    return low if low == high else f"{low} to {high}"


def _inference(book: Book) -> str:
    """acb must cost nothing at inference: the fused networks beside the plain ones."""
    lines = ["", "## `acb`, fused", ""]
    pairs = [(one, plain) for one, plain in book.pairs(kind="acb") if "fused" in one.found]
    if not pairs:
        return "\n".join([*lines, "Not measured yet."])
    fused = [one.found["fused"] for one, _ in pairs]
    macs = _range([one.found["fused"]["macs"] / plain.found["macs"] for one, plain in pairs])
    params = _range([one.found["fused"]["params"] / plain.found["params"] for one, plain in pairs])
    before, after = ([one["ms"][form] / one["ms"]["plain"] for one in fused] for form in ("converted", "fused"))
    changed = max(one["output_change"] for one in fused)
    agreement = 100 * min(one["agreement"] for one in fused)
    moved = 100 * max(abs(one["top1"] - one["top1_before"]) for one in fused)
    fitting = sum(one["as_original"] for one in fused)
    lines.append(
        f"{len(pairs)} trained networks were fused and measured again. They have {macs} x the plain network's MACs "
        f"and {params} x its parameters; the state dicts of {fitting} fit it. Their outputs differ from those before "
        f"fusing by {changed:.1e} (relative), their classes agree on at least {agreement:.2f} % of the test images, "
        f"and their accuracies are within {moved:.2f} points. Time of a batch of 32, each timed beside the plain "
        f"network: {median(before):.2f} x before fusing, {median(after):.2f} x after (medians)."
    )
    return "\n".join(lines)


def _setting(book: Book, study: Mapping[str, Any]) -> str:
    lines = ["", "## What was trained", ""]
    lines += [f"- {line}" for line in study["about"]]
    for data in study["data"]:
        setting = study["settings"][data]
        sizes = []
        for network in study["networks"]:
            plain = book.some(data=data, network=network, kind=PLAIN)
            if plain:
                found = plain[0].found
                sizes.append(f"{network} {found['params']:,} parameters and {found['macs'] / 1e6:.2f} MMACs")
        side = "x".join(map(str, setting.size))
        lines.append(
            f"- {TITLES[data]}, {side}: {setting.images}; {setting.epochs['scratch']} epochs from scratch at a rate "
            f"of up to {setting.lr['scratch']:g}, {setting.epochs['converted']} after conversion at "
            f"{setting.lr['converted']:g}; AdamW, cosine, batches of {setting.batch}, {setting.precision}, no "
            f"augmentation. Plain networks: {'; '.join(sizes) or 'none yet'}."
        )
    lines.append(f"- Measured with {states([one.found for one in book.results.values()])}.")
    return "\n".join(lines)


def _missing(book: Book, study: Mapping[str, Any]) -> str:
    lines, all_runs = [], 0
    for data in study["data"]:
        seeds = range(study["settings"][data].seeds)
        for network in study["networks"]:
            for way in study["ways"]:
                gaps = []
                for kind in study["kinds"]:
                    there = {one.seed for one in book.some(data=data, network=network, way=way, kind=kind)}
                    lacking = [seed for seed in seeds if seed not in there]
                    all_runs += len(seeds)
                    if lacking:
                        gaps.append(kind if len(lacking) == len(seeds) else f"{kind} (seeds {lacking})")
                if len(gaps) == len(study["kinds"]) and not any("seeds" in gap for gap in gaps):
                    gaps = ["everything"]
                if gaps:
                    lines.append(f"- {TITLES[data]}, {network}, {way}: {', '.join(gaps)}")
    head = f"{len(book.results)} of {all_runs} runs are done"
    if not lines:
        return f"\n## What is missing\n\nNothing: {head}."
    return "\n".join(["", "## What is missing", "", f"{head}. The same command runs the others:", "", *lines])


COLUMNS = [
    "network", "kind", "seeds", "final accuracy in %", "points over plain", "epochs to plain's final", "parameters",
    "MMACs", "deployed MMACs", "s/epoch", "MB", "offset",
]  # fmt: skip


def _tables(book: Book, data: str, way: str, study: Mapping[str, Any], picture: str) -> str:
    rows = []
    for network in study["networks"]:
        for kind in study["kinds"]:
            found = book.some(data=data, network=network, way=way, kind=kind)
            if found:
                rows.append([network, kind, *_cells(book, found, 100 / study["settings"][data].test)])
    title = f"{TITLES[data]}, {WAY_TITLES[way]}"
    return "\n".join(
        [
            "",
            f"## {title}",
            "",
            f"![Accuracy over epochs: {title}]({picture})",
            "",
            "Lines are means over the seeds, bands the range. Epoch 0 is before training, and may be below the frame.",
            "",
            markdown_table(COLUMNS, rows, left=2),
            "",
            "Final accuracy with the standard deviation over the seeds; *points* with the 95 % interval over pairs; "
            "*epochs* is the first epoch of each seed with at least the final accuracy of the plain network of that "
            "seed (- for never, 0 for before training); *s/epoch*: processor seconds of the fastest training epoch "
            "on one thread; *MB*: memory of one training step in float32 (activations of a batch, weights, gradients, "
            "AdamW's moments); *offset*: mean distance that taps have moved, in pixels.",
        ]
    )


def _cells(book: Book, found: Sequence[Result], grain: float) -> list[str]:
    first = found[0].found
    finals = [one.final for one in found]
    spread = f" ± {stdev(finals):.2f}" if len(finals) > 1 else ""
    pairs = [pair for one in found for pair in book.pairs(**{k: getattr(one, k) for k in _FIELDS})]
    gap = difference(pairs, lambda one: one.final, grain)
    offsets = [one.found["offset"] for one in found if "offset" in one.found]
    return [
        str(len(found)),
        f"{mean(finals):.2f}{spread}",
        "" if found[0].kind == PLAIN else "-" if gap is None else str(gap),
        " ".join(_reached(*pair) for pair in pairs) or "-",
        f"{first['params']:,}",
        f"{first['macs'] / 1e6:.2f}",
        f"{first.get('fused', first)['macs'] / 1e6:.2f}",
        f"{mean(min(one.found['cpu_seconds_per_epoch']) for one in found):.1f}",
        f"{first['memory'] / 1e6:.0f}",
        f"{mean(offsets):.2f}" if offsets else "",
    ]


_FIELDS = ("data", "network", "way", "kind", "seed")


def _reached(one: Result, plain: Result) -> str:
    """The first epoch at which a run is as good as the plain network ends."""
    aim = plain.found["top1"][-1]
    return next((str(epoch) for epoch, top1 in enumerate(one.found["top1"]) if top1 >= aim), "-")


def _draw(book: Book, data: str, way: str, study: Mapping[str, Any], target: Path) -> None:
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    matplotlib.rcParams["svg.hashsalt"] = "claims"  # the same picture from the same numbers
    networks = [network for network in study["networks"] if book.some(data=data, way=way, network=network)]
    figure = Figure(figsize=(4 * max(2, len(networks)), 4), layout="constrained")
    every = figure.subplots(1, len(networks), squeeze=False, sharey=True)[0]
    handles: dict[str, Any] = {}
    floor = 100.0
    for axes, network in zip(every, networks, strict=True):
        for number, kind in enumerate(study["kinds"]):
            curves = [one.found["top1"] for one in book.some(data=data, way=way, network=network, kind=kind)]
            if not curves:
                continue
            points = list(zip(*curves, strict=True))
            style = {"color": "black" if kind == PLAIN else f"C{number - 1}", "linewidth": 2 if kind == PLAIN else 1.2}
            (line,) = axes.plot([100 * mean(point) for point in points], label=kind, **style)
            low, high = ([100 * end(point) for point in points] for end in (min, max))
            floor = min([floor, *low[1:]])
            axes.fill_between(range(len(points)), low, high, color=style["color"], alpha=0.1, linewidth=0)
            handles[kind] = line
        axes.set_title(network)
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    every[0].set_ylabel("top-1 accuracy in %")
    # From the end of the first epoch on: the accuracy of chance would leave the rest no room.
    every[0].set_ylim(bottom=floor - 2)
    figure.legend(
        handles=list(handles.values()), labels=list(handles), loc="outside lower center", ncols=6, fontsize="small"
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, metadata={"Date": None})
