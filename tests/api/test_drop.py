"""`max_drop`: the smallest network whose loss, measured on inputs that are held back, is no more than asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import asymswap
from asymswap.data.inputs import open_inputs
from asymswap.errors import AsymswapError, RecipeError
from asymswap.results.records import read_report

DENSE = '[[rules]]\nmatch = { kernel = "3x3" }\nswap = { kind = "separable" }\n[budget]\nmax_drop = 0.5\n'


def silent(*_: object) -> None: ...


class Net(nn.Module):
    """Classifies noise in ten classes; its second kernel has four pairs of strong directions, and weak others."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.body = nn.Conv2d(1, 12, 5, padding=2), nn.Conv2d(12, 16, 3, padding=1)
        self.last = nn.Linear(16, 10)
        pairs = torch.einsum("ri,rcj,or->ocij", torch.randn(4, 3), torch.randn(4, 12, 3), torch.randn(16, 4))
        with torch.no_grad():
            self.body.weight.copy_(0.1 * pairs + 0.02 * torch.randn(16, 12, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        features = self.body(self.first(x).relu()).relu()
        scores: Tensor = self.last(20 * features.mean((2, 3)))
        return scores


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("recipes") / "dense.toml"
    path.write_text(DENSE)
    return str(path)


@pytest.fixture(scope="module")
def images() -> Tensor:
    drawn = torch.Generator().manual_seed(3)
    return torch.randn(400, 1, 8, 8, generator=drawn) * torch.rand(400, 1, 1, 1, generator=drawn)


def converted(recipe: str, images: Tensor, drop: float | str, **options: Any) -> asymswap.Conversion:
    calibration = asymswap.Calibration(images, images=128, outputs=options.pop("outputs", "scores"))
    return asymswap.convert(Net().eval(), recipe, max_drop=drop, calibration=calibration, progress=silent, **options)


def test_the_file_loses_what_the_report_says_and_a_stricter_request_is_never_smaller(
    recipe: str, images: Tensor, tmp_path: Path
) -> None:
    shares = []
    for drop in (0.4, 3, 10):
        conversion = converted(recipe, images, drop)
        row = conversion.report.drop
        assert row is not None
        path = tmp_path / f"{drop}.pt"
        asymswap.save(conversion, path)
        original, loaded = Net().eval(), asymswap.load(path, model=Net())
        given = asymswap.Calibration(images, held_back=4096).given()
        batches = open_inputs(asymswap.open_model(original, example_inputs=images[:1]), given, 1)[1]
        held_back = torch.cat([batch[0] for batch in batches])
        with torch.no_grad():
            lost = float((original(held_back).argmax(1) != loaded.eval()(held_back).argmax(1)).double().mean())
        assert len(held_back) == row.samples == 200
        assert row.lost == pytest.approx(lost, abs=1e-12)
        assert lost <= row.allowed == drop / 100
        assert row.interval is not None
        assert row.interval[0] <= lost <= row.interval[1]
        report = conversion.report
        assert row.share == report.after.macs / report.before.macs
        assert read_report(conversion.header.provenance, "it").drop == row
        shares.append(row.share)
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] < shares[0]


class Denoiser(nn.Module):
    """Takes noise out by blurring, and a little by random weights."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.body = nn.Sequential(nn.Conv2d(1, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 12, 3, padding=1), nn.ReLU())
        self.last = nn.Conv2d(12, 1, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        blurred = nn.functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        return blurred + 0.2 * self.last(self.body(x))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("smooth")
    drawn = np.random.default_rng(0)
    for number in range(20):
        waves = np.add.outer(np.sin(np.arange(24) / drawn.uniform(2, 9)), np.cos(np.arange(24) / drawn.uniform(2, 9)))
        Image.fromarray((60 * waves + 127).astype(np.uint8)).save(place / f"{number:02}.png")
    return place


def denoising(recipe: str, folder: Path, drop: float | str) -> asymswap.Conversion:
    fed = asymswap.PreprocessingOptions(normalize="none", size=(24, 24))
    model = asymswap.open_model(Denoiser().eval(), preprocessing=fed, input_size=(1, 24, 24))
    calibration = asymswap.Calibration(str(folder), patch=16, patches=64, noise=0.1)
    return asymswap.convert(model, recipe, max_drop=drop, calibration=calibration, progress=silent)


def test_decibels_of_a_denoiser_are_against_the_images_without_noise(recipe: str, folder: Path) -> None:
    conversion = denoising(recipe, folder, "0.3dB")
    row = conversion.report.drop
    assert row is not None
    assert (row.score, row.unit, row.samples) == ("PSNR", "dB", 512)
    assert 0 <= row.lost <= row.allowed == 0.3
    # On other patches and other noise, by another computation.
    clean = torch.stack(
        [torch.from_numpy(np.array(Image.open(path), dtype=np.float32) / 255)[None] for path in folder.iterdir()]
    )
    noisy = clean + 0.1 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        errors = [
            (model(noisy).clamp(0, 1) - clean).square().mean((1, 2, 3)) for model in (Denoiser(), conversion.model)
        ]
    lost = float((10 * (errors[1].log10() - errors[0].log10())).mean())
    assert lost == pytest.approx(row.lost, abs=0.1)
    assert "Of PSNR at most 0.30 dB may be lost: " in str(conversion)


def test_a_per_cent_of_a_denoiser_is_of_its_outputs(recipe: str, folder: Path) -> None:
    row = denoising(recipe, folder, "2%").report.drop
    assert row is not None
    assert (row.score, row.allowed) == ("output error", 0.02)
    assert row.lost <= 0.02


def test_a_metric_of_the_users_decides_and_is_measured_once_more_for_each_try(recipe: str, images: Tensor) -> None:
    right = Net().eval()(images).argmax(1)
    measured = []

    def accuracy(model: nn.Module) -> float:
        with torch.no_grad():
            measured.append(float((model(images).argmax(1) == right).double().mean()))
        return measured[-1]

    conversion = converted(recipe, images, 0.02, evaluate=accuracy)
    row, scores = conversion.report.drop, conversion.report.accuracy
    assert row is not None
    assert scores is not None
    assert len(measured) == 1 + row.solves
    assert (row.score, row.interval, row.samples) == ("accuracy", None, None)
    assert scores.scores[0].before == 1.0
    assert scores.scores[0].after == pytest.approx(1 - row.lost)
    assert accuracy(conversion.model) == pytest.approx(1 - row.lost)
    assert row.lost <= 0.02
    assert "The network was chosen by the loss measured" in str(conversion)


def test_polish_is_measured_and_never_ends_with_more(recipe: str, images: Tensor) -> None:
    calibration = asymswap.Calibration(images, images=128, outputs="scores", polish_steps=20)
    conversion = asymswap.convert(Net().eval(), recipe, max_drop=3, calibration=calibration, progress=silent)
    plain = converted(recipe, images, 3).report.drop
    row = conversion.report.drop
    assert row is not None
    assert plain is not None
    assert row.lost <= 0.03
    assert row.solves > plain.solves
    assert any("polished for 20 steps" in note for note in conversion.report.calibration.notes)  # type: ignore[union-attr]


def test_batches_of_a_loader_are_held_back_up_to_half(recipe: str, images: Tensor) -> None:
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images), batch_size=50)
    row = converted(recipe, loader, 5).report.drop  # type: ignore[arg-type]
    assert row is not None
    assert row.samples == 200


@pytest.mark.parametrize(
    ("drop", "expected"),
    [
        ("0.1dB", r"0\.1 dB is in decibels, but what is measured is agreement; give points, such as 0\.5$"),
        ("some", "max_drop: .*some is no loss that may be allowed"),
    ],
)
def test_what_cannot_be_kept_says_why(recipe: str, images: Tensor, drop: float | str, expected: str) -> None:
    with pytest.raises(AsymswapError, match=expected):
        converted(recipe, images, drop)


def test_what_every_network_loses_cannot_be_asked_for(recipe: str, images: Tensor) -> None:
    kept = (
        r"the budget of a measured loss of at most 0\.0001% cannot be kept: at 0\.\d+ of the MACs \d+\.\d+ % of output "
    )
    with pytest.raises(RecipeError, match=kept + "error are lost; allow more, or polish$"):
        asymswap.convert(
            Denoiser().eval(), recipe, max_drop="0.0001%", calibration=asymswap.Calibration(images), progress=silent
        )


def test_values_without_the_right_images_have_no_decibels(recipe: str, images: Tensor) -> None:
    with pytest.raises(AsymswapError, match=r"decibels need the right images: `noise=…` for a denoiser, pairs:INPUTS"):
        asymswap.convert(
            Denoiser().eval(), recipe, max_drop="0.1dB", calibration=asymswap.Calibration(images), progress=silent
        )


def test_outputs_that_cannot_be_compared_are_refused(recipe: str, images: Tensor) -> None:
    class Mute(Net):
        def forward(self, x: Tensor) -> Any:
            super().forward(x)
            return {}

    calibration = asymswap.Calibration(images, images=128, outputs="values")
    with pytest.raises(AsymswapError, match="outputs cannot be compared; give `evaluate=…`"):
        asymswap.convert(Mute().eval(), recipe, max_drop="2%", calibration=calibration, progress=silent)


def test_without_anything_to_measure_on_it_is_refused(recipe: str) -> None:
    with pytest.raises(AsymswapError, match=r"`max_drop=…` is measured: give `calibration=…` with data, of which"):
        asymswap.convert(Net(), recipe, example_inputs=torch.zeros(1, 1, 8, 8))
    with pytest.raises(RecipeError, match=r"a budget of loss needs measuring: use asymswap\.convert"):
        asymswap.plan(Net(), recipe, example_inputs=torch.zeros(1, 1, 8, 8))


def test_a_sweep_measures_what_a_loss_is_measured_by(recipe: str, folder: Path, images: Tensor) -> None:
    row = converted(recipe, images, 3).report.drop
    assert row is not None
    calibration = asymswap.Calibration(images, images=128, outputs="scores", held_back=4096)
    options: dict[str, Any] = {"budgets": [row.share + 1e-6], "tolerance": "3%"}
    found = asymswap.sweep(Net().eval(), [recipe], calibration=calibration, progress=False, **options)
    assert found.tolerance == 0.03
    assert (found.first.name, found.images) == (row.score, row.samples)
    assert -found.gain(found.points[0]) == pytest.approx(row.lost, abs=2.5 / 200)
