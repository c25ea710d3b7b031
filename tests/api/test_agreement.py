"""Agreement without labels: the same number from every verb, on the inputs that a conversion holds back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import asymswap
from asymswap.data.inputs import open_inputs, settle_on
from asymswap.errors import AsymswapError
from asymswap.results.evaluate import Comparison


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 12, 3, padding=1), nn.Conv2d(12, 12, 3, padding=1)
        self.head = nn.Linear(12 + 3, 5)

    def forward(self, image: Tensor, extra: Tensor) -> Tensor:
        x = torch.relu(self.b(torch.relu(self.a(image)))).mean((2, 3))
        out: Tensor = self.head(torch.cat([x, extra], 1))
        return out


def both(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return batch[0], batch[1]


@pytest.fixture(scope="module")
def loader() -> DataLoader[tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(0)
    pair = torch.randn(150, 4, 12, 12, generator=generator), torch.randn(150, 3, generator=generator)
    return DataLoader(TensorDataset(*pair), batch_size=16)


@pytest.mark.parametrize("outputs", ["scores", "values"])
def test_convert_sweep_evaluate_and_compare_say_one_number(
    loader: DataLoader[tuple[Tensor, ...]], outputs: asymswap.calibration.config.OutputKind
) -> None:
    torch.manual_seed(0)
    net = TwoInputs().eval()
    calibration = asymswap.Calibration(loader, images=64, inputs=both, outputs=outputs)
    options = {"overrides": {"budget.macs": 0.5}, "calibration": calibration}
    conversion = asymswap.convert(net, "half-macs", **options)  # type: ignore[arg-type]
    assert conversion.report.model.input == "1x4x12x12, 1x3"
    agreement = conversion.report.agreement
    assert agreement is not None
    (found,) = agreement.outputs
    expected = found.value
    # By hand, on the first batches with 32 samples.
    held = [batch for number, batch in enumerate(loader) if number < 2]
    with torch.no_grad():
        one, other = (torch.cat([model(*batch) for batch in held]) for model in (net, conversion.model.eval()))
    by_hand = (
        (one.argmax(1) == other.argmax(1)).double().mean()
        if outputs == "scores"
        else torch.cosine_similarity(one.double(), other.double()).mean()
    )
    assert abs(float(by_hand) - expected) < 1e-9
    assert agreement.samples == 32
    swept = asymswap.sweep(net, ["half-macs"], calibration=calibration, budgets=[0.5])
    assert [*swept.points[0].scores.values()] == [expected]
    assert swept.first.name == ("agreement" if outputs == "scores" else "cosine")
    for report in (
        asymswap.evaluate([net, conversion.model], calibration, against_original=True),
        asymswap.compare([net, conversion.model], data=calibration, against_original=True),
    ):
        first, second = report.models
        assert first.scores[0].value == pytest.approx(1)
        assert second.scores[0].value == pytest.approx(expected, abs=1e-12)
    assert isinstance(report, Comparison)
    gap, batch = report.models[1].gap, len(held[0][0])
    assert report.outputs_on.startswith(f"{batch} of ")
    assert gap is not None
    one, other = one[:batch].double(), other[:batch].double()
    assert gap.relative == pytest.approx(float((one - other).norm() / one.norm()), rel=1e-6)


def test_images_agree_in_decibels_and_sweeps_by_their_error(tmp_path: object) -> None:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 1, 3, padding=1), nn.Sigmoid()).eval()
    data = torch.rand(60, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    calibration = asymswap.Calibration(data, images=40)
    conversion = asymswap.convert(net, "half-macs", overrides={"budget.macs": 0.7}, calibration=calibration)
    agreement = conversion.report.agreement
    assert agreement is not None
    assert (agreement.outputs[0].measure, agreement.samples) == ("PSNR", 12)
    swept = asymswap.sweep(net, ["half-macs"], calibration=calibration, budgets=[0.7])
    assert (swept.first.name, swept.first.value, swept.first.lower_is_better) == ("output error", 0.0, True)
    assert swept.points[0].scores["output error"] == pytest.approx(agreement.outputs[0].relative)


def test_one_model_has_nothing_to_agree_with(loader: DataLoader[tuple[Tensor, ...]]) -> None:
    with pytest.raises(AsymswapError, match="nothing to agree with: give the original first"):
        asymswap.evaluate(TwoInputs(), loader, against_original=True)
    with pytest.raises(AsymswapError, match="a sweep needs something to measure by"):
        asymswap.sweep(TwoInputs(), ["half-macs"])


@pytest.mark.parametrize("outputs", ["scores", "values"])
def test_models_that_take_images_of_other_sizes_agree_on_the_same_ones(tmp_path: Path, outputs: Any) -> None:
    generator = np.random.default_rng(0)
    for number in range(60):
        brightest = generator.integers(1, 256, 3)
        Image.fromarray(generator.integers(0, brightest, (96, 96, 3), dtype=np.uint8)).save(tmp_path / f"{number}.png")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(8, 5)).eval()
    known = asymswap.PreprocessingOptions(normalize="half")
    models = [asymswap.open_model(net, input_size=(3, side, side), preprocessing=known) for side in (768, 16)]
    calibration = asymswap.Calibration(str(tmp_path), outputs=outputs, held_back=30)
    every = []
    with torch.no_grad():
        for model in models:
            settled = settle_on(model, calibration.given())
            batches = open_inputs(settled, calibration.given(), 1)[1]
            if not every:  # no class is to win everywhere
                net[-1].bias -= torch.cat([net(*batch) for batch in batches]).mean(0)
            every.append((batches.counts, torch.cat([net(*batch) for batch in batches]).double()))
    (counts, one), (others, other) = every
    assert counts != others
    assert sum(counts) == sum(others) == 30
    by_hand = one.argmax(1) == other.argmax(1) if outputs == "scores" else torch.cosine_similarity(one, other)
    expected = float(by_hand.double().mean())
    assert 0.05 < expected < 0.95
    for first, second in (models, models[::-1]):
        found = asymswap.evaluate([first, second, first], calibration, against_original=True).models
        values = [model.scores[0].value for model in found]
        assert values == pytest.approx([1.0, expected, 1.0], rel=1e-5)


class Noisy(Dataset[Tensor]):
    """Samples that are another each time they are read."""

    def __len__(self) -> int:
        return 80

    def __getitem__(self, index: int) -> Tensor:
        return torch.rand(3, 16, 16) + index / 80


@pytest.mark.parametrize("kind", ["shuffled", "random", "function"])
def test_random_data_is_the_same_at_every_reading(kind: str) -> None:
    """A network agrees with itself, and what is held back is not calibrated on."""
    x = torch.rand(128, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    shuffled = DataLoader(TensorDataset(x), 8, shuffle=True)
    data: Any = {"shuffled": shuffled, "random": Noisy(), "function": lambda: torch.rand(80, 3, 16, 16)}[kind]
    torch.manual_seed(1)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 9)).eval()
    opened = asymswap.open_model(net, input_size=(3, 16, 16))
    before = torch.get_rng_state()
    calibration = asymswap.Calibration(data, images=40, outputs="values")
    assert torch.equal(torch.get_rng_state(), before)
    found = asymswap.evaluate([net, net], calibration, against_original=True)
    assert [score.value for model in found.models[1:] for score in model.scores] == [1.0]
    seen, held = (
        torch.cat([batch[0] for batch in part]) for part in open_inputs(opened, calibration.given(), calibration.images)
    )
    again = torch.cat([batch[0] for batch in open_inputs(opened, calibration.given(), 40)[1]])
    assert torch.equal(held, again)
    assert not any(torch.equal(one, other) for one in seen for other in held)
    assert torch.equal(torch.get_rng_state(), before)
