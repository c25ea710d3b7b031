"""Results that show themselves: as the command line does, in one line, and as HTML for a notebook."""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from html_tree import Page
from made_reports import kept, report, site

import asymswap
import asymswap.api
import asymswap.results
from asymswap.models.opening import Made
from asymswap.results.benchmark import Benchmark, BenchmarkedModel, Setting
from asymswap.results.candidates import Candidates
from asymswap.results.convert import Check, ExportReport, FusionReport, FusionRow, OffsetReport, OffsetRow, Report
from asymswap.results.evaluate import Classification, ComparedRow, Comparison, EvaluationReport, ModelScores, Score
from asymswap.results.finetune import TrainingReport
from asymswap.results.sweep import Point, Tradeoff
from asymswap.types import Call, Candidate, ConvSpec, Cost, Keep, Plan, Shown, Site, Swap

EVIL = "<script>alert(1)</script>\x1b[31m\nnet"
CALLS = (Call((8, 8), (8, 8)),)
SETTINGS = {"optimizer": "sgd", "lr": 0.1, "batch_size": 8, "precision": "fp32", "seed": 0}
TIMED = ((Setting("torch", 1, 1, None),), (), (), (), "float32", EVIL, 2, 5, 0.1, ())
MOVED = OffsetRow(EVIL, "offset", (1, 1), (1, 1), ((0.5, 1.0),), ((0.0, 0.0),), 1.2)
COST = Cost(3_000_000, 5000)
SCORE = Score("top-1", 0.9, "%")
RESULTS: tuple[Shown, ...] = (
    report(),
    Plan((Swap("conv1", "separable", {"rank": 3}),), (Keep("conv2", EVIL),)),
    Candidates(EVIL, "torch.fx", "an input", (Candidate(Site(EVIL, ConvSpec(3, 4, (3, 3)), CALLS)),), COST),
    Comparison("1", tuple(ComparedRow(EVIL, "", "", "3x8x8", COST) for _ in range(3)), "random images"),
    EvaluationReport(
        EVIL, 5, 0, 4, "cpu", (ModelScores(EVIL, (SCORE,), Classification(2, (0.2, 0.8), 1.5, 10.0, 2, (), ())),)
    ),
    Tradeoff(EVIL, "macs", COST, (SCORE,), 100, "digits", 0.01, (Point("half-macs", 0.5, COST, {"top-1": 0.8}),)),
    Benchmark("1", (BenchmarkedModel(EVIL, "", "", "", COST),), *TIMED),
    TrainingReport(model=EVIL, settings=SETTINGS),
    FusionReport(EVIL, "origin", (FusionRow("conv", "acb", "fused"),), COST, COST, 0.0, 0.0, "random images", True),
    ExportReport(EVIL, "onnx", "ONNX Runtime", 1, (Check("1x3x8x8", 0.0, 1e-4),)),
    OffsetReport(EVIL, (MOVED,), "random images"),
)  # fmt: skip
KINDS = pytest.mark.parametrize("result", RESULTS, ids=lambda result: type(result).__name__)


def test_every_result_has_a_view() -> None:
    for room in (asymswap.results, asymswap.api):
        for module in pkgutil.iter_modules(room.__path__):
            importlib.import_module(f"{room.__name__}.{module.name}")
    kinds = {kind for kind in Shown.__subclasses__() if kind.__module__.startswith("asymswap.")}
    assert {kind.__name__ for kind in Made.__subclasses__()} == {
        "Conversion",
        "Fusion",
        "FineTuned",
    }  # views of reports
    assert kinds - {Made} == {type(result) for result in RESULTS} == {kind for kind in kinds if kind._view}


@KINDS
def test_a_line_is_short_and_harmless(result: Shown) -> None:
    line = repr(result)
    assert line.startswith(f"<{type(result).__name__} ")
    assert line.endswith(">")
    assert "\n" not in line
    assert "\x1b" not in line
    assert len(line) < 300


@KINDS
def test_text_has_the_width_of_the_terminal(result: Shown, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "70")
    monkeypatch.setenv("FORCE_COLOR", "1")
    lines = str(result).splitlines()
    assert len(lines) > 2
    assert max(map(len, lines)) <= 70
    assert not any(line.endswith(" ") or "\x1b" in line for line in lines)


@KINDS
def test_html_is_a_part_of_a_page(result: Shown) -> None:
    text = result._repr_html_()
    page = Page(text)  # properly nested
    (part,) = page.root.children
    assert part.has("class_", "asymswap")
    assert not any(page.root.all(name) for name in ("html", "head", "body", "script", "link"))
    assert "\x1b" not in text
    (style,) = part.all("style")
    rules = re.findall(r"([^{}]+)\{[^}]*\}", re.sub(r"/\*.*?\*/", "", style.text))
    assert len(rules) > 10
    assert all(part.strip().startswith(".asymswap") for rule in rules for part in rule.split(","))


def test_the_cards_are_those_of_the_page() -> None:
    made = report(site(1), kept(2))
    page = Page(made._repr_html_()).root
    (figures,) = page.all("ul")
    names = [card.all("h3")[0].text for card in figures.children]
    assert names == ["MACs", "parameters", "weights", "time, PyTorch", "top-1"]
    (table,) = page.all("table")
    assert [row.all("th")[0].text for row in table.all("tbody")[0].children] == [row.site for row in made.swapped]


@pytest.mark.usefixtures("one_thread")
def test_it_is_what_the_command_line_prints(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "90")
    printed = run("candidates", "digits-resnet").out
    assert str(asymswap.candidates("digits-resnet")).splitlines() == [line.rstrip() for line in printed.splitlines()]


@pytest.mark.usefixtures("one_thread")
def test_a_conversion_is_its_report() -> None:
    conversion = asymswap.convert("digits-resnet", "3x3-only")
    line = "digits-resnet by 3x3-only: 7 of 9 convs swapped, MACs 2.5 M -> 1.26 M>"
    assert (repr(conversion), repr(conversion.report)) == (f"<Conversion {line}", f"<Report {line}")
    assert repr(conversion.plan) == "<Plan 7 convs swapped, 2 kept>"
    assert str(conversion) == str(conversion.report)
    assert conversion._repr_html_() == conversion.report._repr_html_()
    assert repr(asymswap.open_model(conversion)) == "<OpenedModel digits-resnet: digits-resnet, weights as given>"


def test_a_new_kind_of_result_must_not_keep_the_repr_of_a_dataclass() -> None:
    @dataclass(frozen=True)
    class Further(Shown):
        report: Report
        weights: torch.Tensor

    assert repr(Further(replace(report(), recipe="r"), torch.zeros(9))).startswith("<Further ")
