"""Inputs from whatever a user has: what is chosen, what is held back, what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from asymswap.calibration.config import Calibration
from asymswap.data.inputs import HELD_BACK, Batches, open_inputs, settle_on
from asymswap.errors import SourceError
from asymswap.models.opening import open_model
from asymswap.types import Patches, Preprocessing, UserData
from asymswap.utils.inputs import arguments_of


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, image: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        out: Tensor = self.conv(image)
        out = out if scale is None else out * scale[:, None, None, None]
        return out if shift is None else out + shift[:, None, None, None]


class Named(Two):
    def forward(self, *, image: Tensor) -> Tensor:  # type: ignore[override]
        out: Tensor = self.conv(image)
        return out


def rows(count: int) -> Tensor:
    """Samples that know their number."""
    return torch.arange(count, dtype=torch.float32)[:, None, None, None].expand(-1, 4, 6, 6).clone()


def numbers(batches: Batches) -> list[int]:
    return [int(number) for batch in batches for number in batch[0][:, 0, 0, 0]]


def opened(data: Any, count: int, seed: int = 0, **options: Any) -> tuple[list[int], list[int]]:
    chosen, held = open_inputs(open_model(Two()), UserData(data, **options), count, seed)
    return numbers(chosen), numbers(held)


@given(total=st.integers(1, 700), count=st.integers(1, 700), seed=st.integers(0, 5))
def test_what_is_held_back_depends_on_the_data_alone(total: int, count: int, seed: int) -> None:
    samples = torch.zeros(total, 4, 1, 1)
    samples[:, 0, 0, 0] = torch.arange(total)
    chosen, held = opened(samples, count, seed)
    back = min(HELD_BACK, total // 5)
    assert len(chosen) == len(set(chosen)) == min(count, total - back)
    if back:
        assert held == opened(samples, 1, seed + 1)[1]
        assert len(held) == back
        assert not set(held) & set(chosen)
    else:
        assert set(chosen) <= set(held)


@pytest.mark.parametrize("kind", ["list", "loader", "function", "generator", "dataset of batches"])
def test_batches_are_taken_in_order_and_the_first_are_held_back(kind: str) -> None:
    samples = rows(100)
    loader = DataLoader(TensorDataset(samples, torch.zeros(100)), batch_size=10)
    data: Any = {
        "list": list(samples.split(10)),
        "loader": loader,
        "function": lambda: iter(loader),
        "generator": Calibration(iter(loader)).data,
        "dataset of batches": [(batch, None) for batch in samples.split(10)],
    }[kind]
    chosen, held = opened(data, 35)
    assert held == list(range(40))
    assert chosen == list(range(40, 75))
    # The same at the second reading.
    assert opened(data, 35) == (chosen, held)


def test_a_dataset_is_drawn_from() -> None:
    chosen, held = opened(TensorDataset(rows(50), torch.zeros(50)), 20)
    assert (len(chosen), len(held)) == (20, 10)
    assert chosen != sorted(chosen)
    assert not set(chosen) & set(held)


def test_few_batches_are_shared_out() -> None:
    assert opened(list(rows(12).split(6)), 100) == (list(range(6, 12)), list(range(6)))
    # With a single one there is nothing to hold back, which is told.
    model = open_model(Two())
    assert [open_inputs(model, UserData(list(rows(12).split(size))), 9)[1].shared for size in (6, 12)] == [False, True]
    assert [open_inputs(model, UserData(rows(count)), 9)[1].shared for count in (5, 4)] == [False, True]
    assert opened([rows(6)], 100) == (list(range(6)), list(range(6)))


def test_a_batch_becomes_arguments() -> None:
    net, x, s = Two(), rows(3), torch.ones(3)
    for batch, inputs, expected in (
        (x, None, (x,)),
        ((x, torch.tensor([1, 2, 3])), None, (x,)),
        ([x, s], None, (x,)),
        ({"image": x, "label": s}, None, (x,)),
        ((x, s), lambda batch: batch, (x, s)),
        ((x, s), lambda batch: {"scale": batch[1], "image": batch[0]}, (x, s)),
        ((x, s), lambda batch: {"image": batch[0], "shift": batch[1]}, (x, None, s)),
        ({"image": x, "shift": s}, None, (x, None, s)),
        (({"image": x, "scale": s}, 5), None, (x, s)),
    ):
        found = arguments_of(net, batch, inputs)
        assert len(found) == len(expected)
        assert all(one is other for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("net", "batch", "inputs", "expected"),
    [
        (Two(), {"picture": rows(1)}, None, r"does not fit forward\(image: .*missing a required argument: 'image'"),
        (Two(), rows(1), lambda b: (b, b, b, b), r"returned does not fit forward\(image.*too many positional"),
        (Two(), rows(1), lambda b: {"imag": b}, r"does not fit forward\(image"),
        (Two(), rows(1), lambda b: b.missing, "`inputs=…` .*AttributeError: "),
        (Two(), [], None, "a batch holds 0 parts: give `inputs=…`"),
        (Two(), ("a", 3), None, r"the batch \(tuple\) does not fit .*it holds no tensor; give as `inputs=…`"),
        (Named(), {"image": rows(1)}, None, "'image' has no position"),
    ],
)
def test_what_does_not_fit_the_forward(net: nn.Module, batch: Any, inputs: Any, expected: str) -> None:
    with pytest.raises(SourceError, match=expected) as caught:
        arguments_of(net, batch, inputs)
    assert "\n" not in str(caught.value)


def exhausted() -> Iterator[Tensor]:
    made = iter([rows(3)])
    list(made)
    return made


def failing() -> Iterator[Tensor]:
    yield rows(3)
    raise KeyError("lost")


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ([], r"the data \(list\) gives no batch"),
        (exhausted(), "gives no batch; a generator that was read before is exhausted"),
        (torch.zeros(0, 4, 6, 6), "holds no samples"),
        (5, "data cannot be int: give a data reference, a tensor, a Dataset, an iterable"),
        ({"image": rows(3)}, "data cannot be dict"),
        (failing, r"the data raised KeyError: 'lost' \(test_inputs\.py, line \d+\)"),
        (lambda: 1 / 0, r"the data's function raised ZeroDivisionError: division by zero \(test_inputs.py, line \d+\)"),
        ([rows(3), "text"], "it holds no tensor"),
    ],
)
def test_data_that_gives_nothing_of_use(data: Any, expected: str) -> None:
    with pytest.raises(SourceError, match=expected) as caught:
        opened(data, 4)
    assert "\n" not in str(caught.value)


def test_samples_of_several_sizes_need_a_loader() -> None:
    class Sizes(torch.utils.data.Dataset[Tensor]):
        def __len__(self) -> int:
            return 10

        def __getitem__(self, index: int) -> Tensor:
            return torch.zeros(4, 6, 6 + index)

    with pytest.raises(
        SourceError, match=r"putting samples of Sizes into a batch raised .*; give a DataLoader with a collate_fn"
    ):
        opened(Sizes(), 4)


def test_memory_ends_the_reading() -> None:
    read: list[int] = []

    def endless() -> Iterator[Tensor]:
        while True:
            read.append(1)
            yield rows(40)

    open_inputs(open_model(Two()), UserData(endless), 10**6, memory_gib=1e-4)
    assert len(read) < 20


@pytest.mark.parametrize("suffix", [".npz", ".pt", ".safetensors"])
def test_a_file_of_inputs_by_name(suffix: str, tmp_path: Path) -> None:
    tensors = {"image": rows(30), "scale": torch.arange(30.0)}
    path = tmp_path / f"inputs{suffix}"
    if suffix == ".npz":
        np.savez(path, **{name: tensor.numpy() for name, tensor in tensors.items()})
    elif suffix == ".pt":
        torch.save(tensors, path)
    else:
        save_file(tensors, path)
    chosen, held = open_inputs(open_model(Two()), UserData(str(path)), 100)
    for batch in [*chosen, *held]:
        assert torch.equal(batch[0][:, 0, 0, 0], batch[1])
    assert (chosen.count, held.count) == (24, 6)
    settled = settle_on(open_model(Two()), UserData(str(path)))
    assert settled.fed is None
    assert settled.takes() == "1x4x6x6, 1"


def test_numbers_are_taken_as_they_are(tmp_path: Path) -> None:
    """Any values and channels; only bytes are images from 0 to 255."""
    values = 300 * torch.randn(20, 4, 6, 6)
    np.save(tmp_path / "a.npy", values.numpy())
    settled = settle_on(open_model(Two()), UserData(str(tmp_path / "a.npy")))
    assert settled.fed is not None
    assert any("as they are: give `PreprocessingOptions(normalize=…)`" in line for line in settled.fed_warnings)
    chosen, _ = open_inputs(settled, UserData(str(tmp_path / "a.npy")), 20)
    found = torch.cat([batch[0] for batch in chosen])
    assert len(found) == 16
    assert all(bool((values == one).flatten(1).all(1).any()) for one in found)


def test_patches_come_from_the_images(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 3))
    levels = np.arange(5, dtype=np.uint8) * 40
    for number, level in enumerate(levels):
        Image.fromarray(np.full((20 + number, 30), level)).save(tmp_path / f"{number}.png")
    identity = Preprocessing(1, (20, 20), (0.0,), (1.0,))
    model = open_model(net)
    model = replace(model, preprocessing=identity)
    chosen, held = open_inputs(model, UserData(str(tmp_path), patches=Patches(8)), 40, 1)
    batch = torch.cat([one[0] for one in chosen])
    assert batch.shape == (40, 1, 8, 8)
    assert held.count == 1
    # Every patch is of one image, whose pixels are all alike.
    seen = {round(float(255 * patch.mean())) for patch in batch}
    assert len(seen) == 4
    # The one that is held back is of the fifth image.
    assert {round(float(255 * held.load(0)[0].mean())), *seen} == set(map(int, levels))
    noisy, _ = open_inputs(model, UserData(str(tmp_path), patches=Patches(8, noise=0.1)), 40, 1)
    added = torch.cat([one[0] for one in noisy]) - batch
    assert abs(float(added.std()) - 0.1) < 0.01
    again, _ = open_inputs(model, UserData(str(tmp_path), patches=Patches(8, noise=0.1)), 40, 1)
    assert torch.equal(torch.cat([one[0] for one in again]) - batch, added)
    with pytest.raises(SourceError, match="smaller than a patch; give a smaller `patch=64`"):
        list(open_inputs(model, UserData(str(tmp_path), patches=Patches(64)), 4)[0])
