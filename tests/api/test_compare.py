"""Models beside each other: every number against one measured another way."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest
from torch import Tensor, nn

import asymswap
from asymswap.data.datasets import open_data
from asymswap.data.metrics import predict
from asymswap.errors import AsymswapError, SourceError
from asymswap.measure.statistics import mcnemar_exact
from asymswap.measure.timing import Timing
from asymswap.models.opening import open_model, open_models
from asymswap.reporting.tables import view
from asymswap.results.evaluate import AgainstFirst, ComparedRow, Comparison, OutputGap, Score, TimingRow
from asymswap.results.records import to_json
from asymswap.types import Cost, Ratio, Seconds

DIGITS = "digits-resnet"
HALF = asymswap.PreprocessingOptions(normalize="half")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The network of the digits: as a state dict, at half of its MACs, and at so few that it errs."""
    folder = tmp_path_factory.mktemp("models")
    original = open_model(DIGITS).model
    torch.save(original.state_dict(), folder / "plain.pt")
    paths = {"plain": folder / "plain.pt"}
    for name, fraction in (("half", 0.5), ("quarter", 0.25)):
        done = asymswap.convert(DIGITS, "half-macs", overrides={"budget.macs": fraction})
        paths[name] = folder / f"{name}.safetensors"
        asymswap.save(done, paths[name])
    return paths


@pytest.fixture(scope="module")
def on_digits(files: dict[str, Path]) -> Comparison:
    return asymswap.compare([DIGITS, files["plain"], files["quarter"]], data="digits")


def answers(model: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, answers and labels on all test digits, one by one."""
    data = open_data("digits", open_model(DIGITS).preprocessing, "test")
    pairs = [data[index] for index in range(len(data))]
    with torch.no_grad():
        scores = torch.cat([model.eval()(image[None]) for image, _ in pairs])
    return scores, scores.argmax(1), torch.tensor([label for _, label in pairs])


class TestOnData:
    def test_accuracy_is_that_of_evaluate(self, on_digits: Comparison, files: dict[str, Path]) -> None:
        data = open_data("digits", open_model(DIGITS).preprocessing, "test")
        for row, model in zip(
            on_digits.models, [open_model(DIGITS).model, None, asymswap.load(files["quarter"])], strict=True
        ):
            if model is not None:
                found = predict(model, data)
                top5 = float((found.ranks < 5).double().mean())
                assert [(one.name, one.value) for one in row.scores] == [("top-1", found.top1), ("top-5", top5)]

    def test_outputs_and_answers_are_compared_image_by_image(
        self, on_digits: Comparison, files: dict[str, Path]
    ) -> None:
        one, first, labels = answers(open_model(DIGITS).model)
        other, own, _ = answers(asymswap.load(files["quarter"]))
        row = on_digits.models[2]
        assert row.gap is not None
        assert row.against_first is not None
        # Outputs are compared on a few of the images, answers on all.
        few = torch.randperm(len(one), generator=torch.Generator().manual_seed(0))[:32]
        one, other = one[few], other[few]
        assert on_digits.outputs_on == "32 images of digits"
        assert row.gap.relative == pytest.approx(float((one - other).norm() / one.norm()), rel=1e-4)
        assert row.gap.largest == pytest.approx(float((one - other).abs().max()), rel=1e-4)
        assert row.gap.agreement == float((first == own).double().mean())
        gained, lost = (
            int(((own == labels) & (first != labels)).sum()),
            int(((own != labels) & (first == labels)).sum()),
        )
        assert (row.against_first.only_this, row.against_first.only_first) == (gained, lost)
        assert lost > 10
        assert row.against_first.p == pytest.approx(binomtest(gained, gained + lost).pvalue)

    def test_the_same_model_in_another_form_differs_in_nothing(self, on_digits: Comparison) -> None:
        first, plain, _ = on_digits.models
        assert first.gap is None
        assert plain.gap == OutputGap(0.0, 0.0, 1.0)
        assert plain.against_first == AgainstFirst(1.0, 0, 0, 1.0)
        assert plain.scores == first.scores
        assert (plain.cost, plain.weights_bytes) == (first.cost, first.weights_bytes)

    def test_sizes_and_costs(self, on_digits: Comparison, files: dict[str, Path]) -> None:
        first, plain, quarter = on_digits.models
        assert first.file_bytes is None
        assert plain.file_bytes == files["plain"].stat().st_size
        model = open_model(DIGITS).model
        assert first.cost.params == sum(p.numel() for p in model.parameters())
        assert first.weights_bytes == sum(t.numel() * t.element_size() for t in model.state_dict().values())
        assert quarter.cost.macs / first.cost.macs == pytest.approx(0.25, abs=0.01)

    def test_fewer_images_are_the_same_for_all(self, files: dict[str, Path]) -> None:
        found = asymswap.compare([DIGITS, files["plain"]], data="digits", images=50)
        assert (found.images, found.outputs_on) == (50, "32 images of digits")
        assert found.models[1].gap == OutputGap(0.0, 0.0, 1.0)
        assert found == asymswap.compare([DIGITS, files["plain"]], data="digits", images=50)


class Net(nn.Module):
    def __init__(self, channels: int = 3, classes: int = 4, maps: bool = False) -> None:
        super().__init__()
        torch.manual_seed(classes)
        self.conv = nn.Conv2d(channels, classes, 3)
        self.maps = maps

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.conv(x)
        return made if self.maps else made.mean((2, 3))


class TestOnRandomImages:
    def test_outputs_of_two_shapes_are_not_compared(self) -> None:
        found = asymswap.compare(
            [
                asymswap.open_model(Net(), input_size=(3, 8, 8)),
                asymswap.open_model(Net(classes=7), input_size=(3, 8, 8)),
            ]
        )
        assert found.models[1].gap is None
        assert found.models[1].notes[-1] == "its outputs (7) cannot be compared with the first's (4)"

    def test_nor_are_models_of_two_input_sizes(self) -> None:
        found = asymswap.compare([Net(), Net(channels=1)])
        assert found.models[1].gap is None
        assert "it takes 1x224x224" in found.models[1].notes[-1]
        assert [row.input for row in found.models] == ["3x224x224", "1x224x224"]

    def test_the_difference_is_that_of_the_outputs(self) -> None:
        one, other = Net(), Net()
        with torch.no_grad():
            other.conv.weight.mul_(1.5)
            other.conv.bias.mul_(1.5)  # type: ignore[union-attr]
        found = asymswap.compare(
            [asymswap.open_model(one, input_size=(3, 8, 8)), asymswap.open_model(other, input_size=(3, 8, 8))]
        )
        assert found.models[1].gap is not None
        assert found.models[1].gap.relative == pytest.approx(0.5, rel=1e-5)
        assert found.models[1].gap.agreement is None

    def test_models_stay_as_they_are(self) -> None:
        model = Net().train()
        before = [p.clone() for p in model.parameters()]
        asymswap.compare(
            [asymswap.open_model(model, input_size=(3, 8, 8)), asymswap.open_model(Net(), input_size=(3, 8, 8))],
            timing=Timing(rounds=1),
        )
        assert model.training
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        assert next(model.parameters()).is_contiguous()

    def test_what_has_no_class_scores_has_no_accuracy(self) -> None:
        found = asymswap.compare(
            [
                asymswap.open_model(Net(1, 10), input_size=(1, 8, 8), preprocessing=HALF),
                asymswap.open_model(Net(1, 10, maps=True), input_size=(1, 8, 8), preprocessing=HALF),
            ],
            data="digits",
        )
        assert [score.name for score in found.models[0].scores] == ["top-1", "top-5"]
        assert found.models[1].scores == ()
        assert found.models[1].notes[-2].startswith("no accuracy: the model returns 256x10x6x6")

    def test_time_is_taken_only_when_it_is_asked_for(self) -> None:
        assert (
            asymswap.compare(
                [asymswap.open_model(Net(), input_size=(3, 8, 8)), asymswap.open_model(Net(), input_size=(3, 8, 8))]
            ).timing
            is None
        )
        found = asymswap.compare([Net(), Net(channels=1)], timing=Timing("torch", "contiguous", 2, 3))
        assert found.timing is not None
        assert (found.timing.memory_format, found.timing.batch, found.timing.rounds) == ("contiguous", 2, 3)
        for row in found.models:
            assert row.latency is not None
            assert 0 < row.latency.minimum <= row.latency.median
        assert found.models[0].latency_ratio is None
        ratio = found.models[1].latency_ratio
        assert ratio is not None
        assert 0 < ratio.low <= ratio.value <= ratio.high


@given(st.integers(0, 60), st.integers(0, 60))
@settings(deadline=None, derandomize=True, max_examples=60)
def test_mcnemar_is_a_coin(gained: int, lost: int) -> None:
    expected = binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    assert mcnemar_exact(gained, lost) == pytest.approx(expected)


def test_mcnemar_of_very_many() -> None:
    assert mcnemar_exact(2000, 2000) == 1.0
    assert mcnemar_exact(1800, 2200) == pytest.approx(binomtest(1800, 4000).pvalue)


@pytest.mark.parametrize(
    ("models", "options", "error", "said"),
    [
        ([DIGITS], {}, AsymswapError, r"compare takes two models or more, not 1"),
        (DIGITS, {}, AsymswapError, r"compare takes two models or more, not 1"),
        ([DIGITS, DIGITS], {"images": 0}, AsymswapError, r"`images=0` leaves nothing to compare on"),
        ([DIGITS, "no-such.pt"], {}, SourceError, r"no-such\.pt"),
        ([DIGITS, "digits-resnte"], {}, SourceError, r"did you mean digits-resnet"),
        ([DIGITS, DIGITS], {"data": "digit"}, SourceError, r"did you mean digits"),
    ],
)
def test_what_cannot_be_compared(models: list[str], options: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        asymswap.compare(models, **options)


def test_options_that_suit_none_of_several_models() -> None:
    with pytest.raises(AsymswapError, match=r'`arch="resnet18"` goes with a file, and none'):
        open_models([DIGITS, DIGITS], arch="resnet18")
    with pytest.raises(AsymswapError, match=r'`weights="none"` goes with a reference, and all models'):
        open_models(["a.pt", "b.pt"], weights="none")


def made() -> Comparison:
    first = ComparedRow(
        "a|b",
        "x",
        "y",
        "3x8x8",
        Cost(1000, 200),
        (),
        800,
        900,
        Seconds(0.002, 0.003, 0.1),
        scores=(Score("top-1", 0.9, "%"),),
    )
    second = ComparedRow(
        "b.pt", "x", "y", "3x8x8", Cost(500, 50), ("a note",), 200, None, Seconds(0.001, 0.0015, 0.1),
        Ratio(0.52, 0.5, 0.53), OutputGap(0.05, 1.0, 0.97),
        (Score("top-1", 0.88, "%"),), AgainstFirst(0.97, 23, 3, 0.0001),
    )  # fmt: skip
    timing = TimingRow("torch", 1, 2, "channels-last", "Some Processor", 20)
    return Comparison("0.1.0", (first, second), "100 images of photos", "photos: 100 images", None, timing)


class TestViews:
    def test_markdown_is_a_table_with_everything(self) -> None:
        lines = view(made(), None).markdown().splitlines()
        assert lines[0] == (
            "| Model | MACs | of 1st | Params | of 1st | Weights | File | ms | Median | of 1st | Output "
            "| Agree | top-1 |"
        )
        assert lines[2].startswith(
            "| `a\\|b` | 1 k | 100.0 % | 200 | 100.0 % | 800 B | 900 B | 2.00 | 3.00 | 100.0 % | - "
        )
        assert lines[3] == (
            "| `b.pt` | 500 | 50.0 % | 50 | 25.0 % | 200 B | - | 1.00 | 1.50 | 52.0 % | 5.0 % | 97.0 % | 88.00 % |"
        )
        text = "\n".join(lines)
        for words in (
            "2 threads of Some Processor",
            "channels-last",
            "their minimum",
            "p = 0.0001",
            "b.pt: a note.",
            "top-1 -2.00 points",
        ):
            assert words in text

    def test_json_has_every_number(self) -> None:
        data = json.loads(json.dumps(to_json(made())))
        assert data["schema"] == 1
        assert data["models"][1]["cost"] == {"macs": 500, "flops": 1000, "params": 50}
        assert data["models"][1]["latency"] == {"minimum": 0.001, "median": 0.0015, "spread": 0.1}
        assert data["models"][1]["latency_ratio"] == {"value": 0.52, "low": 0.5, "high": 0.53, "confidence": 0.95}
        assert data["models"][1]["against_first"]["p"] == 0.0001
        assert data["timing"]["threads"] == 2


class TestCommand:
    QUICK = ("--rounds", "1")

    def test_a_table(self, run: Callable[..., Any], files: dict[str, Path]) -> None:
        outcome = run("compare", DIGITS, files["half"], "--data", "digits", *self.QUICK)
        assert (outcome.code, outcome.err) == (0, "")
        first, second = [line for line in outcome.out.splitlines() if "%" in line][:2]
        assert first.startswith(DIGITS)
        assert "99.72 %" in first
        assert "1 thread" in outcome.out
        assert second.split()[-1] == "%"

    def test_json_and_markdown(self, run: Callable[..., Any], files: dict[str, Path]) -> None:
        line = ("compare", DIGITS, files["half"], "--no-latency")
        data = json.loads(run(*line, "--json").out)
        assert data["timing"] is None
        assert 0.49 < data["models"][1]["cost"]["macs"] / data["models"][0]["cost"]["macs"] <= 0.5
        assert run(*line, "--markdown").out.startswith("| Model | MACs | of 1st |")

    def test_what_is_relative_to_zeros_is_null(self, run: Callable[..., Any], tmp_path: Path) -> None:
        state = build(DIGITS, {}).state_dict()
        torch.save(state, tmp_path / "rnd.pt")
        torch.save({key: torch.zeros_like(tensor) for key, tensor in state.items()}, tmp_path / "zero.pt")
        line = ("compare", "zero.pt", "rnd.pt", "--arch", DIGITS, "--no-latency", "--json")

        def refuse(word: str) -> None:
            raise AssertionError(f"{word} is no JSON")

        data = json.loads(run(*line).out, parse_constant=refuse)
        assert data["models"][1]["gap"]["relative"] is None
        assert data["models"][1]["gap"]["largest"] > 0

    def test_threads_are_told(self, run: Callable[..., Any]) -> None:
        found = json.loads(run("compare", DIGITS, DIGITS, "--threads", "2", "--json", *self.QUICK).out)
        assert found["timing"]["threads"] == 2

    def test_it_is_timed_with_threads_that_wait_awake(
        self, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
        assert run("compare", DIGITS, DIGITS, "--no-latency").code == 0
        assert "OMP_WAIT_POLICY" not in os.environ

    def test_two_forms_at_once(self, refusal: Callable[..., str]) -> None:
        assert "give one of them" in refusal("compare", DIGITS, DIGITS, "--json", "--markdown")

    def test_one_model(self, refusal: Callable[..., str]) -> None:
        assert refusal("compare", DIGITS) == "compare takes two models or more, not 1"
