"""The figures of docs/results/claims.md: differences over pairs of runs, and what of them may be said."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

# For what it imports of its own folder.
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks" / "studies"))
from claims_page import Book, Difference, Result, difference, verdicts, write_page

PERCENT = st.integers(0, 1000).map(lambda right: right / 10)


def result(kind: str, seed: int, *top1: float, network: str = "resnet18") -> Result:
    found: dict[str, Any] = {
        "top1": list(top1),
        "cpu_seconds_per_epoch": [2.0, 1.0],
        "params": 10 if kind == "plain" else 5,
        "macs": 10,
        "memory": 1,
        "state": "abc on a machine",
    }
    return Result("digits", network, "scratch", kind, seed, found)


@settings(deadline=None, max_examples=50, derandomize=True)
@given(
    st.lists(st.tuples(PERCENT, PERCENT), min_size=3, max_size=9).filter(
        lambda pairs: len({a - b for a, b in pairs}) > 1
    )
)
def test_the_interval_is_that_of_a_paired_t_test(pairs: list[tuple[float, float]]) -> None:
    runs = [(result("acb", n, 0.0, a / 100), result("plain", n, 0.0, b / 100)) for n, (a, b) in enumerate(pairs)]
    found = difference(runs, lambda one: one.final)
    assert found is not None
    test = stats.ttest_rel([a for a, _ in pairs], [b for _, b in pairs])
    interval = test.confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), rel=1e-6, abs=1e-6)
    assert found.p == pytest.approx(test.pvalue, rel=1e-6, abs=1e-9)


def test_two_pairs_decide_nothing_however_far_apart() -> None:
    runs = [(result("acb", n, 0.0, 0.9 + n / 1e6), result("plain", n, 0.0, 0.1)) for n in range(2)]
    found = difference(runs, lambda one: one.final)
    assert found is not None
    assert found.low > 0
    assert verdicts([found]) == ["not decided"]
    assert difference([], lambda one: one.final) is None


def test_what_many_tests_let_happen_by_chance_only_leans() -> None:
    def told(*ps: float) -> list[str]:
        return verdicts([Difference(9, 1.0 if n % 2 == 0 else -1.0, -5.0, 5.0, p) for n, p in enumerate(ps)])

    assert told(0.04) == ["holds"]
    assert told(0.04, 0.03, 0.5) == ["not decided, leans to yes", "not decided, leans to no", "not decided"]
    # Holm's steps: 3 x 0.01, then 2 x 0.02, then 0.04.
    assert told(0.02, 0.01, 0.04) == ["holds", "does not hold", "holds"]


def test_equal_differences_of_one_image_decide_nothing() -> None:
    runs = [(result("acb", n, 0.0, 0.9), result("plain", n, 0.0, 0.91)) for n in range(3)]
    found = difference(runs, lambda one: one.final, grain=1.0)
    assert found is not None
    assert found.low < 0 < found.high


def test_a_run_is_compared_with_the_plain_network_of_its_own_seed_and_network() -> None:
    book = Book(
        [
            result("plain", 0, 0.1),
            result("acb", 0, 0.2),
            result("acb", 1, 0.3),
            result("acb", 0, 0.4, network="densenet"),
        ]
    )
    assert [(one.seed, plain.seed) for one, plain in book.pairs(kind="acb")] == [(0, 0)]


def test_the_page_says_what_is_missing_and_reads_what_is_there(tmp_path: Path) -> None:
    curves = {"plain": (0.1, 0.5, 0.8), "weighted-offset": (0.1, 0.8, 0.75)}
    out = tmp_path / "claims.json"
    out.write_text(
        json.dumps(
            {
                f"digits/se-resnet18-scratch-{kind}-0": dict(result(kind, 0, *curve).found)
                for kind, curve in curves.items()
            }
        )
    )
    setting = SimpleNamespace(
        size=(1, 8, 8), images="few", test=360, epochs={"scratch": 2, "converted": 1},
        lr={"scratch": 1.0, "converted": 1.0},
        batch=2, precision="fp32", seeds=1,
    )  # fmt: skip
    wanted = {
        "data": ["digits"], "networks": ["se-resnet18"], "kinds": ["plain", "weighted-offset", "acb"],
        "ways": ["scratch"], "settings": {"digits": setting}, "about": [],
    }  # fmt: skip
    write_page(tmp_path / "page" / "claims.md", out, wanted)
    text = (tmp_path / "page" / "claims.md").read_text()
    assert "2 of 3 runs are done" in text
    assert "- Digits, se-resnet18, scratch: acb" in text
    # 0.8 is what plain ends with: it gets there in its second epoch, the other in its first, which is not its last.
    assert "| se-resnet18 | weighted-offset | 1 | 75.00 | -5.00 | 1 | 5 |" in text
    assert "| se-resnet18 | plain | 1 | 80.00 |  | 2 | 10 |" in text
    assert (tmp_path / "page" / "claims-digits-scratch.svg").read_text().count("<svg") == 1
