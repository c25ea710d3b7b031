"""Numbers as text: the one place that decides how many digits a person sees."""

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from asymswap.errors import BIDIRECTIONAL, CONTROLS, visible
from asymswap.results.benchmark import TITLES, Setting
from asymswap.results.convert import LatencyRow
from asymswap.types import Fed, Ratio

_UNCLEAN = re.compile(f"[{CONTROLS}\ud800-\udfff\ufffe\uffff{BIDIRECTIONAL}]")
_MARKUP = re.compile(r"[\\`*\[]|<(?=[A-Za-z/!?])")
_UNITS = (("G", 1e9), ("M", 1e6), ("k", 1e3))
_KNOWN_FROM = {
    "given": "given",
    "weights": "as the weights say",
    "family": "as usual in its family",
    "file": "as the file says",
    "images": "the size of the images",
    "asked": "asked of the network",
    "assumed": "assumed",
}


def count(value: float) -> str:
    """Return a count with a unit: `40.6 M`."""
    unit, scale = next((one for one in _UNITS if value >= one[1]), ("", 1.0))
    digits = ".3g" if unit and value < 100 * scale else ".0f"
    return f"{value / scale:{digits}} {unit}".rstrip()


def size(value: float) -> str:
    """Return a number of bytes with a unit: `1.2 MB`."""
    return next((f"{value / scale:.1f} {unit}B" for unit, scale in _UNITS if value >= scale), f"{value:.0f} B")


def percent(fraction: float) -> str:
    return f"{100 * fraction:.1f} %"


def score(value: float, unit: str, digits: int = 2, sign: str = "") -> str:
    """Return a score with its unit, a fraction as per cent: `87.80 %`, `30.44 dB`, `0.1234`."""
    if unit in ("%", "points"):
        return f"{100 * value:{sign}.{digits}f} {unit}"
    small = "{:{}.2f}" if unit else "{:{}.4g}" if not 1e4 <= abs(value) < 1e12 else "{:{},.0f}"
    return f"{small.format(value, sign)} {unit}".rstrip()


def score_change(change: float, unit: str) -> str:
    """Return the difference of two scores with its unit: `-0.28 points`, `-0.03 dB`, `+0.0012`."""
    return score(change, "points" if unit == "%" else unit, sign="+")


def lost(change: float, of: Any) -> str:
    """Return a loss of a score with its unit; `of` has the score's unit and says if lower is better."""
    return score(change, "points" if of.unit == "%" and not of.lower_is_better else of.unit)


def measured_on(scores: Collection[Any], data: str) -> str:
    """Say what was measured on what: `Top-1 and top-5 on digits: 360 test images`; `scores` have names."""
    *most, last = [score.name for score in scores] or ["no score"]
    text = f"{', '.join(most)} and {last}" if most else last
    lower = [score.name for score in scores if score.lower_is_better]
    # A name of the user's is written as it is.
    text = f"{text.replace('top', 'Top', 1) if text.startswith('top-') else text} on {data}"
    return text + (f" (lower is better: {', '.join(lower)})" if lower else "")


def share(part: float, whole: float) -> str:
    return percent(part / whole) if whole else "-"


def plural(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def runtime(name: str) -> str:
    """Return the title of a runtime; a file may name any."""
    return TITLES.get(name, name)


def setting(row: Setting | LatencyRow, where: str | None = None) -> str:
    """Return in which runtime something ran, and how; in several, the memory format is PyTorch's."""
    name = runtime(row.runtime if isinstance(row, Setting) else where or "")
    name += "" if row.device == "cpu" else f" on {row.device}"
    return ", ".join(filter(None, (name, f"batch {row.batch}", row.memory_format, plural(row.threads, "thread"))))


def extent(pixels: Iterable[int]) -> str:
    return "x".join(map(str, pixels))


def milliseconds(seconds: float) -> str:
    """Return a time in milliseconds with three digits, without the unit."""
    value = 1e3 * seconds
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}".removesuffix(".")


def error(value: float) -> str:
    """Return a relative error: small ones as a power of ten, very large ones as a multiple, others in per cent."""
    if value == 0:
        return "0"
    if value >= 10:
        return f"{value:,.0f} x"
    return f"{value:.0e}" if value < 1e-3 else percent(value)


def time_share(ratio: Ratio | None, first: bool = False) -> str | None:
    """Return a ratio of times in per cent, all of it for the first model; with a question mark if not significant."""
    if ratio is None:
        return percent(1) if first else None
    return percent(ratio.value) + " ?" * (not ratio.is_significant)


def doubts(first: str, measured: Iterable[tuple[str, Ratio | None]]) -> list[str]:
    """Return which times, each a name and the ratio to the time of `first`, do not differ significantly from it."""
    known = [(f"{name} {ratio.low:.2f} to {ratio.high:.2f}", ratio) for name, ratio in measured if ratio is not None]
    noisy = [text for text, ratio in known if ratio.is_noisy]
    equal = [text for text, ratio in known if not ratio.is_noisy and not ratio.is_significant]
    surety = f"{score(known[-1][1].confidence, '%', 0)} confidence" if known else ""
    busy = "The machine was too busy to measure times to within 5 %; run more rounds, or on a quiet machine."
    same = f"Not significantly different from {first}, or within 2 % of its time"
    lines = [f"{busy} Of the time of {first}, with {surety}: {'; '.join(noisy)}."] if noisy else []
    return lines + ([f"{same} ({surety}): {'; '.join(equal)}."] if equal else [])


def sentence(note: str) -> str:
    """Return a note, which begins small and ends without a full stop, as a sentence."""
    return f"{note[:1].upper()}{note[1:]}" + "." * (note != "" and not note.endswith("?"))


def clean(text: str) -> str:
    """Replace characters that XML forbids or that reorder what is read; names may come from anybody's files."""
    return _UNCLEAN.sub("\ufffd", text)


def markdown_text(text: str, code: bool = False) -> str:
    """Return anybody's text as one line of Markdown that shows just this; tables escape its `|`.

    A name is set as code unless code could not hold it, which has no escapes.
    """
    shown = visible(" ".join(text.split()))
    if code and shown and not set(shown) & set("`\\"):
        return f"`{shown}`"
    return _MARKUP.sub(r"\\\g<0>", shown)


def settings(values: Mapping[str, Any]) -> str:
    """Return settings as a short phrase: `rank 17, vertical` (the order by what comes first), `kernel 5x5`."""

    def phrase(key: str, value: Any) -> str:
        if value is True:
            return key
        if isinstance(value, str):
            return value.removesuffix("-first")
        if isinstance(value, list | tuple):
            sizes = all(isinstance(side, int) for side in value)
            return f"{key} {extent(value)}" if sizes else " + ".join(map(str, value))
        return f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}"

    return ", ".join(phrase(key, value) for key, value in values.items())


def fed(row: Fed) -> str:
    """Return how images are preprocessed before a network sees them, and who says so."""
    how = f"images resized to it ({row.interpolation})"
    if row.own_size:
        how = "each image at its own size"
    elif row.resize is not None:
        how = f"shorter side resized to {row.resize} ({row.interpolation}), the middle cut out"
    mean, std = (", ".join(f"{value:.4g}" for value in values) for values in (row.mean, row.std))
    name = f"{row.normalization}, " if row.normalization else ""
    order = ", channels blue, green, red" if row.bgr else ""
    text = f"{row.input} ({_KNOWN_FROM[row.size_from]}), {how}; pixels from {row.low:.3g} to {row.high:.3g}, "
    text += f"mean {mean}, std {std}{order} ({name}{_KNOWN_FROM[row.normalization_from]})"
    if row.distances:
        nearest = sorted(row.distances.items(), key=lambda item: item[1])[:3]
        text += f"; distance to its batch norms' statistics: {', '.join(f'{name} {d:.3f}' for name, d in nearest)}"
    return text


def fed_by_model(rows: Iterable[tuple[str, Fed | None]]) -> list[str]:
    """Return sentences on how images are preprocessed; models with the same preprocessing share a sentence."""
    models: dict[str, list[str]] = {}
    for name, row in rows:
        if row is not None:
            models.setdefault(fed(row), []).append(name)
    return [f"Fed{'' if len(models) == 1 else ' to ' + ', '.join(names)}: {text}." for text, names in models.items()]


def samples(number: int, data: str) -> str:
    """Return what was taken of data: images by a reference, samples of a user's loader."""
    own = data.startswith("a ") or " samples of a " in data
    return f"{plural(number, 'unlabelled sample' if own else 'unlabelled image')} of {data}"
