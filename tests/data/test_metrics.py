"""Scores against independent oracles: decibels and IoU by hand, SSIM by the formula, and metrics of the user's."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import asymswap
from asymswap.data import metrics
from asymswap.data.metrics import Metric, check_same, evaluator_of, read_metric
from asymswap.errors import AsymswapError
from asymswap.results.evaluate import Score

RANDOM = np.random.default_rng(0)
PLAIN = asymswap.PreprocessingOptions(normalize="none")


class Darker(nn.Module):
    """Half of the image, by a conv that a recipe could swap."""

    def __init__(self, channels: int = 1, factor: float = 0.5) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        with torch.no_grad():
            self.conv.weight.zero_()
            for channel in range(channels):
                self.conv.weight[channel, channel, 1, 1] = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)  # type: ignore[no-any-return]


class Scores(nn.Module):
    """Scores of the classes 0 to `classes` - 1: high for the one whose tenth is nearest to the pixel."""

    def __init__(self, classes: int = 3, form: str = "tensor", step: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, classes, 1)
        with torch.no_grad():
            # -(x - c)^2 + x^2 = 2cx - c^2
            self.conv.weight[:] = 2 * torch.arange(classes)[:, None, None, None] / 10
            assert self.conv.bias is not None
            self.conv.bias[:] = -((torch.arange(classes) / 10) ** 2)
        self.form, self.step = form, step

    def forward(self, x: Tensor) -> Any:
        scores = self.conv(x)[:, :, :: self.step, :: self.step]
        return {"tensor": scores, "dict": {"out": scores, "aux": scores * 0}, "flat": scores.mean((2, 3))}[self.form]


def opened(model: nn.Module, channels: int = 1, size: int = 8, how: Any = PLAIN) -> asymswap.OpenedModel:
    return asymswap.open_model(model, input_size=(channels, size, size), preprocessing=how)


def write(folder: Path, images: dict[str, np.ndarray[Any, Any]]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, pixels in images.items():
        Image.fromarray(pixels.astype(np.uint8)).save(folder / name)
    return folder


def measure(by: Any, model: asymswap.OpenedModel, **options: Any) -> dict[str, float]:
    found = evaluator_of(by, model, **options)(model.model, lambda done, total: None)
    return {score.name: score.value for score in found}


SIZES = [(16, 20), (24, 12), (13, 13)]
INPUTS = [RANDOM.integers(0, 256, (*size, 3)) for size in SIZES]
TARGETS = [RANDOM.integers(0, 256, (*size, 3)) for size in SIZES]


@pytest.fixture
def pairs(tmp_path: Path) -> str:
    first = write(tmp_path / "in", {f"{name}.png": one for name, one in zip("abc", INPUTS, strict=True)})
    second = write(tmp_path / "out", {f"{name}.png": one for name, one in zip("abc", TARGETS, strict=True)})
    (first / "notes.txt").write_text("no image")
    return f"pairs:{first},{second}"


class TestPairs:
    @pytest.mark.parametrize("crop", [0, 2])
    def test_decibels_by_hand(self, pairs: str, crop: int) -> None:
        expected = []
        for one, other in zip(INPUTS, TARGETS, strict=True):
            difference = one / 255 * 0.5 - other / 255
            kept = difference[crop : len(one) - crop, crop : one.shape[1] - crop]
            expected.append(-10 * math.log10(float((kept**2).mean())))
        found = measure(pairs, opened(Darker(3), 3), crop_border=crop)
        assert found["PSNR"] == pytest.approx(sum(expected) / 3, abs=1e-4)

    def test_similarity_by_its_formula(self, pairs: str) -> None:
        pytest.importorskip("torchmetrics")
        taps = torch.exp(-((torch.arange(11) - 5.0) ** 2) / (2 * 1.5**2))
        window = (taps[:, None] * taps / taps.sum() ** 2).double()[None, None].repeat(3, 1, 1, 1)
        expected = []
        for one, other in zip(INPUTS, TARGETS, strict=True):
            x, y = ((torch.from_numpy(pixels) / 255.0).permute(2, 0, 1)[None].double() for pixels in (one, other))
            x = x * 0.5

            def mean(z: Tensor) -> Tensor:
                # Borders are mirrored.
                return nn.functional.conv2d(nn.functional.pad(z, (5, 5, 5, 5), "reflect"), window, groups=3)

            covariance = mean(x * y) - mean(x) * mean(y)
            spread = mean(x * x) - mean(x) ** 2 + mean(y * y) - mean(y) ** 2
            similar = (2 * mean(x) * mean(y) + 1e-4) * (2 * covariance + 9e-4)
            expected.append(float((similar / ((mean(x) ** 2 + mean(y) ** 2 + 1e-4) * (spread + 9e-4))).mean()))
        assert measure(pairs, opened(Darker(3), 3))["SSIM"] == pytest.approx(sum(expected) / 3, abs=1e-4)

    def test_grey_networks_get_grey_images(self, pairs: str) -> None:
        first = [np.asarray(Image.fromarray(one.astype(np.uint8)).convert("L")) / 255 for one in INPUTS]
        second = [np.asarray(Image.fromarray(one.astype(np.uint8)).convert("L")) / 255 for one in TARGETS]
        errors = [float(((one * 0.5 - other) ** 2).mean()) for one, other in zip(first, second, strict=True)]
        expected = sum(-10 * math.log10(error) for error in errors) / 3
        assert measure(pairs, opened(Darker()))["PSNR"] == pytest.approx(expected, abs=1e-4)

    def test_outputs_are_normalised_as_the_inputs_and_clamped(self, pairs: str) -> None:
        """A network that returns its input makes the input's picture, whatever its normalisation."""
        plain = measure(pairs, opened(Darker(3, 1.0), 3))
        for how in ({"normalize": "half"}, {"normalize": "bytes"}, {"mean": (0.1, 0.2, 0.3), "std": (1.0, 2.0, 3.0)}):
            found = measure(pairs, opened(Darker(3, 1.0), 3, how=asymswap.PreprocessingOptions(**how)))
            assert found["PSNR"] == pytest.approx(plain["PSNR"], abs=1e-3)
        white = measure(pairs, opened(Darker(3, 1e4), 3))["PSNR"]
        errors = [float((((one > 0) - other / 255) ** 2).mean()) for one, other in zip(INPUTS, TARGETS, strict=True)]
        assert white == pytest.approx(sum(-10 * math.log10(error) for error in errors) / 3, abs=1e-3)

    def test_an_image_without_error_counts_as_100_db(self, tmp_path: Path) -> None:
        folder = write(tmp_path / "same", {"a.png": INPUTS[0]})
        assert measure(f"pairs:{folder},{folder}", opened(Darker(3, 1.0), 3))["PSNR"] == 100.0
        # Two files are a pair whatever their names.
        write(folder, {"b.png": INPUTS[0]})
        assert measure(f"pairs:{folder / 'a.png'},{folder / 'b.png'}", opened(Darker(3, 1.0), 3))["PSNR"] == 100.0

    def test_without_torchmetrics_decibels_are_told_all_the_same(
        self, pairs: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(metrics.importlib.util, "find_spec", lambda name: None)
        report = asymswap.evaluate(opened(Darker(3), 3), pairs)
        assert [score.name for score in report.models[0].scores] == ["PSNR"]
        assert report.notes == ("no SSIM: it needs torchmetrics (pip install 'asymswap[metrics]')",)

    def test_and_of_small_images(self, tmp_path: Path) -> None:
        folder = write(tmp_path / "small", {"a.png": INPUTS[0][:10]})
        model = opened(Darker(3), 3)
        evaluator = evaluator_of(f"pairs:{folder},{folder}", model)
        assert [score.name for score in evaluator(model.model, lambda *_: None)] == ["PSNR"]
        assert evaluator.note == "no SSIM: it needs targets of 11 x 11 pixels"

    def test_what_does_not_pair_is_told(self, pairs: str, tmp_path: Path) -> None:
        model = opened(Darker(3), 3)
        (tmp_path / "out/b.png").rename(tmp_path / "out/bb.png")
        with pytest.raises(AsymswapError, match=r"'.*in/b\.png' has no partner of the same stem in the other folder"):
            evaluator_of(pairs, model)
        (tmp_path / "in/b.png").unlink()
        with pytest.raises(AsymswapError, match=r"'.*out/bb\.png' has no partner of the same stem in the other folder"):
            evaluator_of(pairs, model)
        Image.open(tmp_path / "in/a.png").save(tmp_path / "in/a.bmp")
        with pytest.raises(AsymswapError, match=r"in/a\.bmp' and '.*in/a\.png' have one stem"):
            evaluator_of(pairs, model)

    @pytest.mark.parametrize(
        ("reference", "options", "said"),
        [
            ("pairs:in", {}, r"'pairs:in': give pairs:INPUTS,TARGETS, two folders or two files"),
            ("pairs:nowhere,out", {}, r"data folder 'nowhere' holds no images"),
            ("pairs:in,nowhere", {}, r"data folder 'nowhere' holds no images"),
            (
                "pairs:in,out",
                {"crop_border": 7},
                r"`crop_border=7` leaves nothing of 'out/b\.png' \(3x24x12\), or is below 0",
            ),
            ("pairs:in,out", {"crop_border": -1}, r"`crop_border=-1` leaves nothing of .*, or is below 0"),
            ("masks:in,out", {"crop_border": 1}, r"`crop_border=…` goes with pairs:INPUTS,TARGETS"),
        ],
    )
    def test_wrong_pairs(
        self,
        pairs: str,
        reference: str,
        options: dict[str, int],
        said: str,
        monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path,
    ) -> None:
        monkeypatch.chdir(tmp_path)
        with pytest.raises(AsymswapError, match=said):
            measure(reference, opened(Darker(3), 3), **options)

    def test_outputs_of_another_size(self, pairs: str) -> None:
        shrinks = nn.Sequential(Darker(3), nn.AvgPool2d(2))
        with pytest.raises(AsymswapError, match=r"makes 3x8x10 of '.*in/a\.png', but its target '.*' is 3x16x20"):
            measure(pairs, opened(shrinks, 3))
        with pytest.raises(AsymswapError, match=r"the model makes NaN of '.*in/a\.png'"):
            measure(pairs, opened(Darker(3, math.nan), 3))
        with pytest.raises(AsymswapError, match=r"does not run on '.*in/a\.png' \(3x16x20\): "):
            measure(pairs, opened(nn.Sequential(nn.Flatten(), nn.Linear(192, 2)), 3))


GREY = np.array([[0, 25, 26, 51], [0, 0, 25, 51]])  # classes 0 1 1 2 / 0 0 1 2
MASK = np.array([[0, 1, 2, 2], [0, 255, 0, 2]])


class TestMasks:
    @pytest.fixture
    def masks(self, tmp_path: Path) -> str:
        first = write(tmp_path / "images", {"a.png": GREY, "b.png": np.zeros((2, 4))})
        second = write(tmp_path / "masks", {"a.png": MASK, "b.png": np.array([[0, 0, 0, 1], [255] * 4])})
        return f"masks:{first},{second}"

    @pytest.mark.parametrize("form", ["tensor", "dict"])
    def test_every_pixel_by_hand(self, masks: str, form: str) -> None:
        model = asymswap.open_model(Scores(4, form), input_size=(1, 2, 4), preprocessing=PLAIN)
        # Pixels right: 0 in a: 2, 0 in b: 3, 1: 1, 2: 2; masks hold 0: 6, 1: 2, 2: 3; said were 0: 6, 1: 3, 2: 2.
        union = {0: 6 + 6 - 5, 1: 2 + 3 - 1, 2: 3 + 2 - 2}
        expected = (5 / union[0] + 1 / union[1] + 2 / union[2]) / 3  # class 3 is nowhere
        found = measure(masks, model)
        assert found["pixel accuracy"] == pytest.approx(8 / 11)
        assert found["mIoU"] == pytest.approx(expected)

    def test_against_torchmetrics(self, tmp_path: Path) -> None:
        segmentation = pytest.importorskip("torchmetrics.functional.classification")
        images = {f"{n}.png": RANDOM.integers(0, 60, (8, 8)) for n in range(4)}
        truth = {f"{n}.png": RANDOM.choice([0, 1, 2, 3, 4, 255], (8, 8)) for n in range(4)}
        reference = f"masks:{write(tmp_path / 'i', images)},{write(tmp_path / 'm', truth)}"
        net = Scores(5)
        said = torch.stack(
            [net(torch.from_numpy(one / 255)[None, None].float())[0].argmax(0) for one in images.values()]
        )
        right = torch.stack([torch.from_numpy(one) for one in truth.values()])
        expected = segmentation.multiclass_jaccard_index(said, right, 5, ignore_index=255)
        assert measure(reference, opened(Scores(5)))["mIoU"] == pytest.approx(float(expected), abs=1e-5)

    def test_scores_are_resized_to_the_mask(self, tmp_path: Path) -> None:
        halves = np.zeros((8, 8))
        halves[:, 4:] = 26
        reference = f"masks:{write(tmp_path / 'i', {'a.png': halves})},{write(tmp_path / 'm', {'a.png': halves > 0})}"
        assert measure(reference, opened(Scores(2, step=2)))["pixel accuracy"] == 1.0

    def test_palettes_hold_class_numbers(self, masks: str, tmp_path: Path) -> None:
        model = asymswap.open_model(Scores(4), input_size=(1, 2, 4), preprocessing=PLAIN)
        before = measure(masks, model)
        for path in (tmp_path / "masks").iterdir():
            with Image.open(path) as stored:
                image = stored.copy()
            image.putpalette([255 - value for value in range(256) for _ in range(3)])
            image.save(path)
            assert image.mode == "P"
        assert measure(masks, model) == before

    def test_what_is_no_segmentation(self, masks: str, tmp_path: Path) -> None:
        with pytest.raises(AsymswapError, match=r"mask '.*masks/a\.png' has a class 2, but the model scores 2 classes"):
            measure(masks, opened(Scores(2)))
        with pytest.raises(AsymswapError, match=r"the model returns 1x3, not scores of two classes or more for every"):
            measure(masks, opened(Scores(3, "flat")))
        with pytest.raises(AsymswapError, match=r"the model returns 1x1x8x8, not scores of two classes"):
            measure(masks, opened(Scores(1)))
        write(tmp_path / "masks", {"a.png": np.full((2, 4), 255), "b.png": np.full((2, 4), 255)})
        with pytest.raises(AsymswapError, match=r"every pixel of masks:.* is 255, which is ignored"):
            measure(masks, opened(Scores(3)))
        write(tmp_path / "masks", {"a.png": np.zeros((2, 4, 3))})
        with pytest.raises(AsymswapError, match=r"mask '.*masks/a\.png' holds colours"):
            measure(masks, opened(Scores(3)))


class TestOwn:
    def test_numbers_by_name(self) -> None:
        seen = []

        def two(model: nn.Module) -> dict[str, Any]:
            seen.append((model.training, torch.is_inference_mode_enabled(), torch.is_grad_enabled()))
            return {"good": torch.tensor([0.5]), "bad": np.float32(2)}

        model = opened(Darker().train())
        model.model.train()
        found = evaluator_of(Metric(two, lower_is_better=("bad",)), model)(model.model, lambda *_: None)
        assert found == (Score("good", 0.5), Score("bad", 2.0, lower_is_better=True))
        assert seen == [(False, False, True)]
        assert model.model.training
        assert measure(lambda model: 3, model) == {"metric": 3.0}
        assert measure(Metric(lambda model: 3, name="three"), model) == {"three": 3.0}
        assert measure([two, Metric(lambda model: 3, "three", "three")], model) == {
            "good": 0.5,
            "bad": 2.0,
            "three": 3.0,
        }

    def test_a_metric_that_raises_is_told_with_its_own_line(self) -> None:
        def broken(model: nn.Module) -> float:
            weights: Any = torch.ones(2)
            return float((weights @ torch.ones(3)).sum())

        line = broken.__code__.co_firstlineno + 2
        with pytest.raises(
            AsymswapError, match=rf"the metric broken raised RuntimeError: .*size.*\(test_metrics\.py, line {line}\)"
        ):
            measure(broken, opened(Darker()))

    @pytest.mark.parametrize(
        ("found", "said"),
        [
            (None, r"the metric lpips gave None; return a finite number, or some by name"),
            (math.nan, r"the metric lpips gave nan; return a finite number"),
            (math.inf, r"the metric lpips gave inf; return a finite number"),
            ({}, r"the metric lpips gave \{\}; return a finite number, or some by name"),
            ({"a": 1, "b": "much"}, r"the metric lpips gave much for 'b'; return a finite number"),
            ({"a": torch.ones(2)}, r"the metric lpips gave tensor\(\[1\., 1\.\]\) for 'a'"),
            ({1: 2.0}, r"gave 2\.0 for 1; return a finite number, or some by name"),
            ({"lpisp": 1.0}, r"lower is better for 'lpips', which metric lpips does not give; did you mean lpisp"),
            ({"b": 1.0}, r"lower is better for 'lpips', which metric lpips does not give; it gives b"),
        ],
    )
    def test_what_is_no_score(self, found: Any, said: str) -> None:
        with pytest.raises(AsymswapError, match=said):
            measure(Metric(lambda model: found, ("lpips",), "lpips"), opened(Darker()))

    def test_what_is_no_metric(self) -> None:
        for wrong, name in ((3, "by 3"), ([], r"by \[\]"), ([3], "by 3")):
            with pytest.raises(AsymswapError, match=rf"a function or a Metric, not {name}"):
                evaluator_of(wrong, opened(Darker()))  # type: ignore[arg-type]
        with pytest.raises(AsymswapError, match=r"`lower_is_better=\(1,\)` is no tuple or set of names"):
            Metric(len, (1,))  # type: ignore[arg-type]
        twice = [Metric(lambda model: 1, name="x")] * 2
        with pytest.raises(AsymswapError, match=r"two metrics give 'x'; give one of them another name"):
            measure(twice, opened(Darker()))

    def test_a_metric_may_not_change_the_model(self) -> None:
        def tunes(model: nn.Module) -> float:
            model.train()
            model(torch.ones(2, 1, 8, 8))
            return 1.0

        model = opened(nn.Sequential(Darker(), nn.BatchNorm2d(1)))
        with pytest.raises(AsymswapError, match=r"the metric tunes changed '1\.num_batches_tracked' of the model"):
            measure(tunes, model)

    def test_the_same_names_for_every_model(self) -> None:
        names = iter("ab")
        with pytest.raises(AsymswapError, match=r"the metric gave a for the first model and b for another; give the"):
            asymswap.evaluate([opened(Darker()), opened(Darker())], lambda model: {next(names): 1.0})
        with pytest.raises(AsymswapError, match=r"the metric gave x for the first model and x, y for another"):
            check_same([Score("x", 1)], [Score("x", 1), Score("y", 2)])


FILE = """
import helper
LOWER_IS_BETTER = ("loss", "other")

def loss(model):
    print("working")
    return helper.VALUE

def other(model):
    return {"other": 2.0, "weights": sum(p.numel() for p in model.parameters())}

def raises(model):
    return model.nothing
"""


class TestFiles:
    @pytest.fixture
    def file(self, tmp_path: Path) -> Path:
        (tmp_path / "helper.py").write_text("VALUE = 0.25\n")
        (tmp_path / "mine.py").write_text(FILE)
        return tmp_path / "mine.py"

    def test_a_function_of_a_file(self, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
        metric = read_metric(f"{file}:loss")
        model = opened(Darker())
        assert evaluator_of(metric, model)(model.model, lambda *_: None) == (Score("loss", 0.25, lower_is_better=True),)
        out, err = capsys.readouterr()
        assert (out, err) == ("", "working\n")
        found = evaluator_of([metric, read_metric(f"{file}:other")], model)(model.model, lambda *_: None)
        assert [(one.name, one.value, one.lower_is_better) for one in found] == [
            ("loss", 0.25, True), ("other", 2.0, True), ("weights", 9.0, False),
        ]  # fmt: skip

    def test_of_a_package(self, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.syspath_prepend(str(file.parent))
        file.rename(file.with_name("mine_metrics.py"))
        assert measure(read_metric("mine_metrics:loss"), opened(Darker())) == {"loss": 0.25}

    def test_an_edited_file_is_another_setting(self, file: Path) -> None:
        model = opened(Darker())
        before = evaluator_of(read_metric(f"{file}:loss"), model).fingerprint
        assert evaluator_of(read_metric(f"{file}:loss"), model).fingerprint == before
        assert evaluator_of(read_metric(f"{file}:other"), model).fingerprint != before
        file.write_text(FILE.replace("2.0", "3.0"))
        assert evaluator_of(read_metric(f"{file}:loss"), model).fingerprint != before

    def test_where_it_fails(self, file: Path) -> None:
        line = FILE.splitlines().index("    return model.nothing") + 1
        with pytest.raises(
            AsymswapError, match=rf"the metric raises raised AttributeError: .*noth.*\(mine\.py, line {line}\)"
        ):
            measure(read_metric(f"{file}:raises"), opened(Darker()))

    @pytest.mark.parametrize(
        ("reference", "said"),
        [
            ("{}", r"give FILE\.py:FUNCTION, or package\.module:FUNCTION"),
            ("{}:lsos", r"mine\.py has no callable 'lsos'; did you mean loss"),
            ("nowhere.py:loss", r"nowhere\.py of 'nowhere\.py:loss' does not exist"),
            ("no_such_package:loss", r"no module named 'no_such_package'"),
        ],
    )
    def test_what_is_not_there(self, file: Path, reference: str, said: str) -> None:
        with pytest.raises(AsymswapError, match=said):
            read_metric(reference.format(file))
        file.write_text("LOWER_IS_BETTER = 3\ndef loss(model): return 1\n")
        with pytest.raises(AsymswapError, match=r"`lower_is_better=3` is no tuple or set of names"):
            read_metric(f"{file}:loss")


Run = Callable[..., Any]
