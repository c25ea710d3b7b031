"""Verbs that measure by a metric, by pairs of images and by masks: the same figures as the metric gives itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import asymswap
from asymswap.data.datasets import open_data
from asymswap.reporting.convert import to_html
from asymswap.reporting.sweep import draw, sweep_view
from asymswap.reporting.tables import view
from asymswap.results.records import Provenance, to_json
from asymswap.results.sweep import Tradeoff, from_json

RANDOM = np.random.default_rng(1)
RECIPE = '[[rules]]\nmatch = { kernel = "3x3" }\nswap = { kind = "separable", rank = 1 }\n'


class Net(nn.Module):
    """From images to images."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Conv2d(1, 12, 3, padding=1), nn.Conv2d(12, 1, 3, padding=1)
        self.middle = nn.Conv2d(12, 12, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.last(self.middle(self.first(x).relu()).relu())  # type: ignore[no-any-return]


class Segments(Net):
    def forward(self, x: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        made = super().forward(x)
        return {"out": torch.cat([made, 1 - made], 1)}


TARGET = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(3))


def distance(model: nn.Module) -> float:
    """How far the model's output is from a target; lower is better."""
    with torch.no_grad():
        return float((model(TARGET) - TARGET).norm())


LOWER = asymswap.Metric(distance, lower_is_better=("distance",))


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "one.toml").write_text(RECIPE)
    return tmp_path / "one.toml"


def opened(model: nn.Module) -> asymswap.OpenedModel:
    return asymswap.open_model(model, input_size=(1, 8, 8))


@pytest.fixture
def pairs(tmp_path: Path) -> str:
    for name in ("in", "out"):
        (tmp_path / name).mkdir()
        for number in range(3):
            Image.fromarray(RANDOM.integers(0, 256, (16, 16), np.uint8)).save(tmp_path / name / f"{number}.png")
    return f"pairs:{tmp_path / 'in'},{tmp_path / 'out'}"


class TestConvert:
    def test_the_metric_itself_before_and_after(self, recipe: Path) -> None:
        model = Net().train()
        done = asymswap.convert(opened(model), recipe, evaluate=LOWER)
        accuracy = done.report.accuracy
        assert accuracy is not None
        (row,) = accuracy.scores
        assert (row.name, row.unit, row.lower_is_better) == ("distance", "", True)
        assert row.before == distance(model.eval())
        assert row.after == distance(done.model.eval())
        assert row.after != row.before
        assert accuracy.images is None
        assert "evaluate" in done.report.seconds

    def test_reports_show_its_name_and_both_numbers(self, recipe: Path, tmp_path: Path) -> None:
        done = asymswap.convert(opened(Net()), recipe, evaluate=LOWER)
        assert done.report.accuracy is not None
        (row,) = done.report.accuracy.scores
        before, after, change = f"{row.before:.4g}", f"{row.after:.4g}", f"{row.after - row.before:+.4g}"
        assert f"| distance | {before} | {after} | {change} |" in view(done.report, None).markdown()
        page = to_html(done.report, Provenance())
        assert f"(lower is better: distance): {before} before, {after} after: {change}." in page
        asymswap.save(done, tmp_path / "m.pt")
        asymswap.write_report(tmp_path / "m.pt", tmp_path / "m.md")
        assert f"| distance | {before} | {after} | {change} |" in (tmp_path / "m.md").read_text()

    def test_it_fails_before_anything_is_calibrated(self, recipe: Path) -> None:
        stages = []

        def broken(model: nn.Module) -> float:
            return 1 / 0

        with pytest.raises(asymswap.AsymswapError, match=r"the metric broken raised ZeroDivisionError"):
            asymswap.convert(
                "digits-resnet",
                "half-macs",
                evaluate=broken,
                calibration=asymswap.Calibration("digits", images=8),
                progress=lambda stage, *_: stages.append(stage),
            )
        assert stages[-1] == "evaluating before"

    def test_names_that_change_are_told(self, recipe: Path) -> None:
        names = iter("ab")
        with pytest.raises(asymswap.AsymswapError, match="gave a for the first model and b for another"):
            asymswap.convert(opened(Net()), recipe, evaluate=lambda model: {next(names): 1.0})

    def test_pairs_of_a_network_of_which_nobody_said_how_it_is_fed(self, recipe: Path, pairs: str) -> None:
        done = asymswap.convert(opened(Net()), recipe, evaluate=pairs, crop_border=1)
        assert done.report.accuracy is not None
        assert done.report.accuracy.scores[0].name == "PSNR"
        assert done.report.accuracy.scores[0].unit == "dB"
        assert done.report.accuracy.images == 3
        assert done.report.warnings[0].startswith("Net is fed the pixels, 0 to 1, of pairs:")
        text = view(done.report, None).markdown()
        assert "each image at its own size; pixels from 0 to 1" in text
        assert " dB | " in text

    def test_the_same_images_are_told(self, recipe: Path, pairs: str) -> None:
        calibration = asymswap.Calibration(pairs.removeprefix("pairs:").partition(",")[0], images=3)
        model = asymswap.open_model(
            Net(), input_size=(1, 16, 16), preprocessing=asymswap.PreprocessingOptions(normalize="none")
        )
        done = asymswap.convert(model, recipe, evaluate=pairs, calibration=calibration)
        assert done.report.calibration is not None
        assert any("calibrated and evaluated on the same images" in note for note in done.report.calibration.notes)


class TestSweep:
    def run(self, **options: Any) -> Tradeoff:
        return asymswap.sweep(opened(Net()), ["half-macs"], LOWER, budgets=[0.9, 0.7, 0.5], **options)

    def test_lower_is_better_turns_front_and_advice(self) -> None:
        found = self.run(tolerance=1e6)
        values = {point.budget: point.scores["distance"] for point in found.measured}
        assert found.advised == min(found.measured, key=found.share)  # type: ignore[arg-type]
        assert found.advice().startswith(
            f"Advised: {found.advised.budget:g}, the last before distance rises by more than"
        )
        for point in found.measured:
            beaten = any(
                other.cost.macs <= point.cost.macs and values[other.budget] < values[point.budget]  # type: ignore[union-attr]
                for other in found.measured
            )
            assert (point in found.front) == (not beaten)
        strict = self.run(tolerance=0.0)
        assert strict.tolerance == 0.0
        assert strict.advised is None or strict.advised.scores["distance"] <= strict.first.value

    def test_a_hundredth_is_tolerated_by_itself(self) -> None:
        found = self.run()
        assert found.tolerance == found.first.value / 100
        assert any(
            "distance on the data of the metric distance (lower is better: distance)" in x
            for x in sweep_view(found).fine_print
        )
        assert from_json(json.loads(json.dumps(to_json(found)))).points == found.points

    def test_the_plot_is_named_by_the_metric(self) -> None:
        pytest.importorskip("matplotlib")
        picture = draw(self.run(), "svg").decode()
        assert ">distance</text>" in picture
        assert "accuracy" not in picture
        assert " more</text>" in picture

    def test_decibels_have_a_tolerance_of_their_own(self, pairs: str) -> None:
        found = asymswap.sweep(opened(Net()), ["half-macs"], pairs, budgets=[0.5])
        assert (found.first.name, found.first.unit, found.tolerance) == ("PSNR", "dB", 0.1)
        assert " of PSNR: allow more" in found.advice() or "before PSNR falls by more than 0.1 dB" in found.advice()
        with pytest.raises(asymswap.AsymswapError, match=r"the sweep to resume has other settings \(labels\)"):
            asymswap.sweep(opened(Net()), ["half-macs"], pairs, budgets=[0.4], known=found, crop_border=1)

    def test_points_of_an_accuracy(self) -> None:
        found = asymswap.sweep("digits-resnet", ["half-macs"], "digits", budgets=[0.6], tolerance=2)
        assert (found.tolerance, found.first.name) == (0.02, "top-1")

    def test_another_metric_is_another_setting(self) -> None:
        found = self.run()
        with pytest.raises(asymswap.AsymswapError, match=r"other settings \(data\)"):
            asymswap.sweep(
                opened(Net()), ["half-macs"], asymswap.Metric(distance, name="d"), budgets=[0.4], known=found
            )


class TestEvaluateAndCompare:
    def test_a_metric_of_several_models(self) -> None:
        other = nn.Conv2d(1, 1, 3, padding=1)
        report = asymswap.evaluate([opened(Net()), opened(other)], LOWER)
        assert [model.scores[0].value for model in report.models] == [distance(Net()), distance(other)]
        assert report.models[0].classifier is None
        assert report.images is None

    def test_compare_by_pairs(self, pairs: str) -> None:
        found = asymswap.compare([opened(Net()), opened(Net())], data=pairs)
        first, second = found.models
        assert first.scores[0].name == "PSNR"
        assert first.scores == second.scores
        assert second.gap is not None
        assert second.gap.relative == 0
        assert found.outputs_on == "2 random images (seed 0)"
        with pytest.raises(asymswap.AsymswapError, match="`images=…` chooses of labelled images"):
            asymswap.compare([opened(Net()), opened(Net())], data=pairs, images=2)

    def test_masks(self, pairs: str, tmp_path: Path) -> None:
        for path in (tmp_path / "out").iterdir():
            with Image.open(path) as image:
                pixels = np.asarray(image) % 2
            Image.fromarray(pixels).save(path)
        reference = pairs.replace("pairs", "masks")
        model = asymswap.open_model(
            Segments(), input_size=(1, 16, 16), preprocessing=asymswap.PreprocessingOptions(normalize="none")
        )
        scores = asymswap.evaluate(model, reference).models[0].scores
        assert [(score.name, score.unit) for score in scores] == [("mIoU", "%"), ("pixel accuracy", "%")]
        with pytest.raises(asymswap.AsymswapError, match=r'`part="train"` is for labelled images'):
            asymswap.evaluate(model, reference, part="train")

    def test_options_of_classifiers_alone(self) -> None:
        with pytest.raises(asymswap.AsymswapError, match=r"`crop_border=…` goes with pairs:INPUTS,TARGETS"):
            asymswap.evaluate("digits-resnet", "digits", crop_border=2)
        with pytest.raises(asymswap.AsymswapError, match=r"data 'pairs:a,b' has no classes; give images with labels"):
            open_data("pairs:a,b", asymswap.open_model("digits-resnet").preprocessing, "test")


FILE = """
LOWER_IS_BETTER = {"size"}

def size(model):
    print("measuring")
    return float(sum(parameter.numel() for parameter in model.parameters()))

def two(model):
    return {"one": 1, "two": 2.5}

def broken(model):
    raise RuntimeError("no data here")
"""


class TestCommands:
    @pytest.fixture(autouse=True)
    def file(self, run: Callable[..., Any]) -> None:
        Path("mine.py").write_text(FILE)

    def test_convert_and_sweep(self, run: Callable[..., Any]) -> None:
        done = run(
            "convert", "digits-resnet", "--recipe", "half-macs", "--metric", "mine.py:size", "--json", "--dry-run"
        )
        assert done.code == 0, done.err
        found = json.loads(done.out)
        (row,) = found["accuracy"]["scores"]
        assert (row["before"], row["after"]) == (found["before"]["params"], found["after"]["params"])
        assert (row["name"], row["lower_is_better"]) == ("size", True)
        swept = run("sweep", "digits-resnet", "--recipe", "half-macs", "--metric", "mine.py:size", "--macs", "0.5")
        assert swept.code == 0, swept.err
        assert "the last before size rises by more than" in " ".join(swept.out.split())

    def test_evaluate_and_compare(self, run: Callable[..., Any]) -> None:
        line = ("evaluate", "digits-resnet", "digits-resnet", "--metric", "mine.py:two", "--metric", "mine.py:size")
        done = run(*line)
        assert done.code == 0, done.err
        assert done.out.splitlines()[0].startswith("one, two and size on the data of the")
        assert any(text.split()[1:] == ["digits-resnet", "1", "2.5", "94,642"] for text in done.out.splitlines())
        compared = run(
            "compare", "digits-resnet", "digits-resnet", "--metric", "mine.py:size", "--no-latency", "--markdown"
        )
        assert compared.code == 0, compared.err
        assert compared.out.splitlines()[0].endswith("| Output | size |")

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            (("--metric", "mine.py:sizes"), "mine.py has no callable 'sizes'; did you mean size"),
            (("--metric", "mine.py:broken"), "raised RuntimeError: no data here (mine.py, line 12)"),
            (("--metric", "mine.py:two", "--data", "digits"), "--data and --metric both say what to measure by"),
            ((), "give --data, --metric with a function of your own, or a --task with evaluate()"),
            (("--metric", "mine.py:two", "--crop-border", "2"), "--crop-border goes with --data pairs:INPUTS,TARGETS"),
            (("--data", "digits", "--crop-border", "2"), "--crop-border goes with pairs:INPUTS,TARGETS"),
            (("--data", "pairs:a"), "'pairs:a': give pairs:INPUTS,TARGETS"),
        ],
    )
    def test_one_clear_line(self, refusal: Callable[..., str], options: tuple[str, ...], said: str) -> None:
        assert said in refusal("evaluate", "digits-resnet", *options)
