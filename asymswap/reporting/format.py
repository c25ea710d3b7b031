"""Numbers as text: the one place that decides how many digits a person sees."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from asymswap.errors import BIDIRECTIONAL, CONTROLS, visible
from asymswap.types import Fed, Ratio


def count(value: float) -> str:
    """A large count with a unit: `40.6 M`."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            scaled = value / size
            return f"{scaled:.0f} {unit}" if scaled >= 100 else f"{scaled:.3g} {unit}"
    return f"{value:.0f}"


def share(part: float, whole: float) -> str:
    """A part of a whole as a percentage."""
    return percent(part / whole) if whole else "-"


def percent(fraction: float) -> str:
    """A fraction as a percentage with one digit."""
    return f"{100 * fraction:.1f} %"


def accuracy(fraction: float) -> str:
    """An accuracy as a percentage with two digits."""
    return f"{100 * fraction:.2f} %"


def plural(number: int, what: str) -> str:
    """`1 thread`, `2 threads`."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def time_share(ratio: Ratio) -> str:
    """A ratio of times as a percentage, with a question mark where it cannot be told from 1."""
    return percent(ratio.value) + (" ?" if not ratio.is_significant else "")


def doubts(first: str, measured: Iterable[tuple[str, Ratio | None]]) -> list[str]:
    """Say which times, each given with its name and its ratio to the time of `first`, cannot be told from that."""
    noisy: list[str] = []
    equal: list[str] = []
    surety = ""
    for name, ratio in measured:
        if ratio is None:
            continue
        surety = confidence(ratio)
        if ratio.is_noisy or not ratio.is_significant:
            (noisy if ratio.is_noisy else equal).append(f"{name} {ratio.low:.2f} to {ratio.high:.2f}")
    lines = []
    if noisy:
        lines.append(
            f"The machine was too busy to tell times to within 5 %; more rounds would, or a quiet machine. Of the time "
            f"of {first}, with {surety} confidence: {'; '.join(noisy)}."
        )
    if equal:
        lines.append(f"Not told from {first}, or within 2 % of its time ({surety} confidence): {'; '.join(equal)}.")
    return lines


def confidence(ratio: Ratio) -> str:
    """The confidence of a ratio's interval."""
    return f"{100 * ratio.confidence:.0f} %"


def milliseconds(seconds: float) -> str:
    """A time in milliseconds with three digits, without the unit."""
    value = 1e3 * seconds
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}".removesuffix(".")


def error(value: float | None) -> str:
    """A relative error: small ones as a power, those of many times the thing itself as such, others as a percentage."""
    if value is None:
        return "-"
    if value == 0:
        return "0"
    if value >= 10:
        return f"{value:,.0f} x"
    return f"{value:.0e}" if value < 1e-3 else percent(value)


def size(value: float) -> str:
    """Bytes with a unit."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= scale:
            return f"{value / scale:.1f} {unit}"
    return f"{value:.0f} B"


def extent(pixels: tuple[int, int]) -> str:
    """A size in pixels: `56x56`."""
    return "x".join(map(str, pixels))


def sentence(note: str) -> str:
    """A note, which begins small and ends without a full stop, as a sentence."""
    return f"{note[:1].upper()}{note[1:]}" + "." * (not note.endswith("?"))


_UNCLEAN = re.compile(f"[{CONTROLS}\ud800-\udfff\ufffe\uffff{BIDIRECTIONAL}]")


def clean(text: str) -> str:
    """The text without characters that XML forbids or that reorder what is read; names come from anybody's files."""
    return _UNCLEAN.sub("\ufffd", text)


_MARKUP = re.compile(r"[\\`*\[]|<(?=[A-Za-z/!?])")


def markdown_text(text: str) -> str:
    """Text as Markdown that shows just it, in one line; names and reasons may come from anybody's file.

    A `<` that begins no tag stays as it is. A `|` matters in tables alone, which escape it.
    """
    return _MARKUP.sub(r"\\\g<0>", visible(" ".join(text.split())))


def markdown_code(text: str) -> str:
    """A name as code in Markdown, or as plain text where code could not hold it: nothing can be escaped in there."""
    shown = visible(" ".join(text.split()))
    return markdown_text(text) if not shown or set(shown) & set("`\\") else f"`{shown}`"


def settings(values: Mapping[str, Any]) -> str:
    """Settings in a short phrase: `rank 17, vertical`, the order being named by what comes first; `kernel 5x5`."""
    parts = []
    for key, value in values.items():
        if value is True:
            parts.append(key)
        elif isinstance(value, str):
            parts.append(value.removesuffix("-first"))
        elif isinstance(value, list) and all(isinstance(side, int) for side in value):
            parts.append(f"{key} {'x'.join(map(str, value))}")
        else:
            parts.append(f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}")
    return ", ".join(parts)


_KNOWN_FROM = {
    "given": "given",
    "weights": "as the weights say",
    "family": "as usual in its family",
    "file": "as the file says",
    "images": "that of the images",
    "asked": "asked of the network",
    "assumed": "assumed",
}


def fed(row: Fed) -> str:
    """How images are preprocessed before a network sees them, and where that is known from."""
    if row.resize is None:
        how = f"images resized to it ({row.interpolation})"
    else:
        how = f"shorter side resized to {row.resize} ({row.interpolation}), the middle cut out"
    mean, std = (", ".join(f"{value:.4g}" for value in values) for values in (row.mean, row.std))
    name = f"{row.normalization}, " if row.normalization else ""
    order = ", channels blue, green, red" if row.bgr else ""
    text = (
        f"{row.input} ({_KNOWN_FROM[row.size_from]}), {how}; pixels from {row.low:.3g} to {row.high:.3g}, mean {mean}, "
        f"std {std}{order} ({name}{_KNOWN_FROM[row.normalization_from]})"
    )
    if not row.distances:
        return text
    nearest = sorted(row.distances.items(), key=lambda item: item[1])[:3]
    return f"{text}; distance to its batch norms' statistics: {', '.join(f'{name} {d:.3f}' for name, d in nearest)}"


def fed_by_model(rows: Iterable[tuple[str, Fed | None]]) -> list[str]:
    """Sentences on how images are preprocessed for models; models that share it share a sentence."""
    models: dict[str, list[str]] = {}
    for name, row in rows:
        if row is not None:
            models.setdefault(fed(row), []).append(name)
    if len(models) == 1:
        return [f"Fed: {text}." for text in models]
    return [f"Fed to {', '.join(names)}: {text}." for text, names in models.items()]
