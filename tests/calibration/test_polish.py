from __future__ import annotations

import copy
import time

import pytest
import torch
from torch import Tensor, nn

from asymswap.calibration.config import Calibration
from asymswap.calibration.polish import _augmented, _patch, polish_
from asymswap.errors import AsymswapError
from asymswap.measure.fidelity import difference
from asymswap.planning.apply import apply_plan
from asymswap.types import Plan, Swap


@pytest.fixture(scope="module")
def teacher() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
    nn.init.normal_(model[-1].weight, std=2.0)
    for _ in range(10):
        model(torch.randn(32, 3, 8, 8))
    return model.eval()


@pytest.fixture
def student(teacher: nn.Module) -> nn.Module:
    return apply_plan(teacher, Plan((Swap("3", "separable", {"rank": 4, "order": "vertical-first"}),)))


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(256, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def test_it_learns_what_the_teacher_says_and_leaves_the_teacher_alone(
    teacher: nn.Module, student: nn.Module, images: Tensor
) -> None:
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    fresh = torch.randn(256, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        gap = float(difference(teacher(fresh), student(fresh)))
    result = polish_(teacher, student, [(images,)], Calibration("images", polish_steps=60))
    with torch.no_grad():
        assert float(difference(teacher(fresh), student(fresh))) < 0.8 * gap
    assert result.steps == 60
    assert result.after < result.before
    assert all(torch.equal(before[key], value) for key, value in teacher.state_dict().items())
    assert torch.equal(student[1].running_mean, teacher[1].running_mean)


def test_the_outputs_of_replaced_layers_are_learned_too(teacher: nn.Module, images: Tensor) -> None:
    """Also where a replacement has taken over the batch norm behind it, and gives what that gave."""
    pair = Swap("3", "separable", {"rank": 4, "order": "vertical-first"})
    whole = Swap("0", "acb", {"bn": "branch", "eps": 1e-5, "momentum": 0.1}, absorbs="1")
    for plan, name in ((Plan((pair,)), "3"), (Plan((pair, whole)), "1")):
        fresh = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(2))
        errors = []
        for told in (plan, Plan(())):
            torch.manual_seed(0)
            student = apply_plan(teacher, plan)
            if name == "1":
                for parameter in student[0].parameters():
                    parameter.data *= 1 + 0.3 * torch.randn_like(parameter)
            polish_(teacher, student, [(images,)], Calibration("images", polish_steps=60), plan=told)
            upto = int(name) + 1
            with torch.no_grad():
                errors.append(float(difference(teacher[:upto](fresh), student[:upto](fresh))))
        assert errors[0] < 0.9 * errors[1], (name, errors)


def test_it_never_ends_worse_than_it_began(teacher: nn.Module, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of the teacher cannot be bettered, and a learning rate that ruins it is seen on the images held back."""
    monkeypatch.setattr("asymswap.calibration.polish._RATES", (1.0,))
    monkeypatch.setattr("asymswap.calibration.polish._USUAL_RATE", 1.0)
    student = apply_plan(teacher, Plan(()))
    start = {key: value.clone() for key, value in student.state_dict().items()}
    result = polish_(teacher, student, [(images,)], Calibration("images", polish_steps=10))
    assert result.kept_step == 0
    assert result.after == result.before
    assert all(torch.equal(start[key], value) for key, value in student.state_dict().items())
    assert str(result).startswith("polishing brought nothing: 10 steps of 128 samples at a rate of ")
    assert "too few" in str(result)


def test_the_rate_is_found_by_trial(
    teacher: nn.Module, student: nn.Module, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = copy.deepcopy(student)
    found = polish_(teacher, student, [(images,)], Calibration("images", polish_steps=64))
    monkeypatch.setattr("asymswap.calibration.polish._RATES", (1e-6,))
    monkeypatch.setattr("asymswap.calibration.polish._USUAL_RATE", 1e-6)
    fixed = polish_(teacher, other, [(images,)], Calibration("images", polish_steps=64))
    assert (found.steps, found.before) == (fixed.steps, fixed.before)
    assert fixed.rate == 1e-6 < found.rate
    assert found.after < 0.9 * fixed.after < 0.9 * fixed.before


def test_a_run_that_gets_worse_goes_back_and_on_at_a_lower_rate(
    teacher: nn.Module, student: nn.Module, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a rate that ruins the network it ends at half of a half of it, and still with a gain."""
    monkeypatch.setattr("asymswap.calibration.polish._RATES", (0.2,))
    monkeypatch.setattr("asymswap.calibration.polish._USUAL_RATE", 0.2)
    result = polish_(teacher, student, [(images,)], Calibration("images", polish_steps=39))
    assert result.rate <= 0.05
    assert result.after <= result.before


def test_large_images_are_cut_into_patches_where_the_network_makes_images_of_any_size(teacher: nn.Module) -> None:
    class Insisting(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            assert x.shape[2:] == (96, 96)
            return x

    image = torch.randn(1, 3, 96, 96)
    dense = nn.Conv2d(3, 3, 3, padding=1)
    assert [_patch(model, image) for model in (dense, teacher, Insisting())] == [64, None, None]
    assert _patch(dense, image[..., :95]) is None
    places = torch.arange(96.0 * 128).reshape(1, 1, 96, 128).expand(32, 1, 96, 128)
    cut = _augmented(places, 64, torch.Generator().manual_seed(0))
    assert cut.shape == (32, 1, 64, 64)
    assert len(cut[:, 0, 0, 0].unique()) > 16
    assert set(cut.diff(dim=2).unique().tolist()) == {128.0}
    student = nn.Conv2d(3, 3, 3, padding=1)
    assert polish_(dense, student, [(torch.randn(20, 3, 96, 96),)], Calibration("images", polish_steps=50)).batch == 18


def test_batches_of_the_user_are_cut_but_not_put_together() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(2, 2, 3)

        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            assert len(x) == len(scale)
            sizes.add(tuple(x.shape))
            return self.conv(x) * scale[:, None, None, None]

    sizes = set[tuple[int, ...]]()
    teacher, student = Two(), Two()
    batches = [(torch.randn(count, 2, side, side), torch.ones(count)) for count, side in ((3, 8), (150, 6), (5, 9))]
    result = polish_(teacher, student, batches, Calibration(batches, polish_steps=60))
    assert result.after < 0.9 * result.before
    assert (result.images, result.batch) == (158, 128)
    assert len(sizes & {(3, 2, 8, 8), (128, 2, 6, 6), (22, 2, 6, 6), (5, 2, 9, 9)}) >= 2
    assert (150, 2, 6, 6) not in sizes or len(sizes) == 3  # unless that one is held back, which is judged as a whole


def test_a_network_too_slow_for_the_time_ends_after_a_step(teacher: nn.Module, student: nn.Module) -> None:
    class Slow(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            time.sleep(0.02)
            scores: Tensor = self.model(x)
            return scores

    images = torch.randn(64, 3, 8, 8)
    result = polish_(Slow(teacher), Slow(student), [(images,)], Calibration("images", polish_minutes=1e-4))
    assert (result.steps, result.batch, result.rate) == (1, 8, 3e-4)


def test_minutes_end_it_too(teacher: nn.Module, student: nn.Module, images: Tensor) -> None:
    assert 0 < polish_(teacher, student, [(images,)], Calibration("images", polish_minutes=0.01)).steps < 10_000


def test_the_same_seed_gives_the_same_bits(teacher: nn.Module, images: Tensor) -> None:
    plan = Plan((Swap("3", "separable", {"rank": 4, "order": "vertical-first"}),))
    results = []
    for _ in range(2):
        student = apply_plan(teacher, plan)
        polish_(teacher, student, [(images,)], Calibration("images", polish_steps=5, seed=3))
        results.append(student.state_dict())
    assert all(torch.equal(value, results[1][key]) for key, value in results[0].items())


def test_difference_is_the_relative_squared_one_of_all_outputs() -> None:
    maps = {"out": torch.ones(2, 3, 4, 4), "aux": [torch.zeros(2, 3), torch.arange(2)]}
    other = {"out": 1.1 * maps["out"], "aux": maps["aux"]}
    assert float(difference(maps, other)) == pytest.approx(0.01, rel=1e-4)
    assert float(difference(maps["out"].half(), maps["out"].half())) == 0


def test_images_are_mirrored_and_shifted_but_not_changed_otherwise() -> None:
    """Each pixel of a gradient tells where it comes from: neighbours in a row differ by one either way."""
    images = torch.arange(16.0).expand(64, 1, 16, 16)
    batch = _augmented(images, None, torch.Generator().manual_seed(0))
    assert batch.shape == images.shape
    inner = batch[:, :, :, 3:-3].diff(dim=3)
    assert set(inner.unique().tolist()) == {-1.0, 1.0}
    assert set(batch[:, 0, 8, 8].tolist()) == {*range(6, 11), *range(5, 10)}
    assert torch.equal(batch[:, :, 1:], batch[:, :, :-1])


def test_the_model_keeps_its_memory_format(teacher: nn.Module, student: nn.Module, images: Tensor) -> None:
    polish_(teacher, student, [(images,)], Calibration("images", polish_steps=3))
    assert all(parameter.is_contiguous() for parameter in (*student.parameters(), *teacher.parameters()))


def test_a_frozen_model_cannot_be_polished(teacher: nn.Module, student: nn.Module, images: Tensor) -> None:
    student.requires_grad_(False)
    with pytest.raises(AsymswapError, match="every parameter of the model is frozen"):
        polish_(teacher, student, [(images,)], Calibration("images", polish_steps=1))
