"""The order of images: every one once an epoch, shared among processes, drawn alike whoever reads it."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from asymswap.data.batches import (
    Batches,
    Reader,
    TrainingImages,
    mixing,
    parse_presets,
    presets_for,
    training_transform,
)
from asymswap.data.datasets import LabelledImages, from_memory
from asymswap.errors import AsymswapError, SourceError
from asymswap.types import Preprocessing
from asymswap.utils.distributed import Team

GREY = Preprocessing(channels=1, size=(8, 8), mean=(0.0,), std=(1.0,))


def readers(images: int, batch: int, accumulate: int, size: int) -> list[Reader]:
    """Of images that say their number, which are their labels too."""
    data = numbered(torch.arange(float(images))[:, None, None, None])
    made = TrainingImages(data, nn.Identity(), 3, True)
    return [Reader(made, batch, accumulate, Team(rank, size), 0) for rank in range(size)]


def numbers(reader: Reader, epoch: int = 0, start: int = 0) -> list[list[list[int]]]:
    """The images in each batch of each step."""
    groups = [group for group, _ in reader.groups(epoch, start)]
    assert all(batch.content[0].flatten().tolist() == batch.content[1].tolist() for group in groups for batch in group)
    return [[batch.content[1].tolist() for batch in group] for group in groups]


@settings(max_examples=40)
@given(st.integers(1, 200), st.integers(1, 40), st.integers(1, 3), st.integers(1, 3), st.integers(0, 5))
def test_every_image_once_an_epoch(images: int, batch: int, accumulate: int, size: int, epoch: int) -> None:
    if images < accumulate * size:
        return
    seen: list[int] = []
    for reader in readers(images, batch, accumulate, size):
        steps = numbers(reader, epoch)
        assert len(steps) == reader.steps
        assert all(len(group) == accumulate for group in steps)
        assert all(1 <= len(one) <= max(2, batch) for group in steps for one in group)
        seen += [number for group in steps for one in group for number in one]
    assert sorted(seen) == list(range(images))


def test_two_processes_see_at_each_step_what_one_sees_of_the_double_batch() -> None:
    (one,), two = readers(101, 20, 1, 1), readers(101, 10, 1, 2)
    for whole, *halves in zip(numbers(one), *map(numbers, two), strict=True):
        assert sorted(whole[0]) == sorted(halves[0][0] + halves[1][0])
    for reader in (one, *two):
        assert [size for _, size in reader.groups(0, 0)] == [len(group[0]) for group in numbers(one)]


def test_an_epoch_can_be_continued_and_is_not_the_one_before() -> None:
    reader = readers(50, 8, 2, 1)[0]
    whole = numbers(reader, 1)
    assert numbers(reader, 1, 2) == whole[2:]
    assert numbers(reader, 2) != whole


def test_fewer_images_than_processes() -> None:
    with pytest.raises(AsymswapError, match=r"3 images cannot be shared among 2 processes x `accumulate=2`"):
        readers(3, 8, 2, 2)


class Holes:
    """Pictures of which some cannot be read."""

    ready = True

    def __init__(self, *broken: int) -> None:
        self.labels = list(range(10))
        self.broken = broken

    def picture(self, index: int) -> Tensor:
        if index in self.broken:
            raise SourceError(f"image {index} cannot be read")
        return torch.full((1, 8, 8), float(index))


def numbered(images: Tensor) -> LabelledImages:
    names = tuple(map(str, range(len(images))))
    return LabelledImages(range(len(images)), from_memory(images, 1), names, "made", GREY)


def read(pictures: Any, workers: int = 0, strict: bool = False, presets: tuple[str, ...] = ("none",)) -> list[Any]:
    images = TrainingImages(pictures, training_transform(GREY, presets), 0, strict)
    reader = Reader(images, 4, 1, Team(), workers)
    return [batch for group, _ in reader.groups(0, 0) for batch in group]


@pytest.mark.parametrize("workers", [0, 1])
def test_the_next_image_stands_in_for_one_that_cannot_be_read(workers: int) -> None:
    batches = read(Holes(3, 4, 9), workers)
    shown = sorted(int(image[0, 0, 0]) for batch in batches for image in batch.content[0])
    assert shown == [0, 0, 1, 2, 5, 5, 5, 6, 7, 8]
    assert sorted(int(label) for batch in batches for label in batch.content[1]) == shown
    assert sum(batch.skipped for batch in batches) == 3


@pytest.mark.parametrize("workers", [0, 1])
def test_strictly_it_is_an_error_of_one_line(workers: int) -> None:
    with pytest.raises(SourceError, match=r"^image 3 cannot be read$"):
        read(Holes(3), workers, strict=True)
    with pytest.raises(
        SourceError, match=r"^no image of the data can be read; `strict=True` names the first that cannot$"
    ):
        read(Holes(*range(10)), workers)


def test_augmentation_does_not_depend_on_workers_order_or_what_was_drawn_before() -> None:
    pictures = numbered(torch.rand(10, 1, 8, 8, generator=torch.Generator().manual_seed(0)))
    presets = ("randaugment",)
    torch.manual_seed(5)
    first = read(pictures, presets=presets)
    before = torch.get_rng_state()
    second = read(pictures, workers=1, presets=presets)
    assert torch.equal(torch.get_rng_state(), before)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one.content[0], other.content[0])
    images = TrainingImages(pictures, training_transform(GREY, presets), 0, False)
    epochs = [images[10 * epoch + 4][0] for epoch in (0, 0, 1, 2)]
    assert torch.equal(epochs[0], epochs[1])
    assert not (torch.equal(epochs[1], epochs[2]) and torch.equal(epochs[2], epochs[3]))


def test_presets_do_what_they_say() -> None:
    """A ramp, of which one sees whether it was mirrored, and by how far it was shifted."""
    pictures = numbered((torch.arange(8.0) / 8).expand(1, 1, 8, 8))
    slopes: dict[str, set[int]] = {}
    for preset in ("none", "flip", "crop", "flip-crop"):
        images = TrainingImages(pictures, training_transform(GREY, (preset,)), 0, False)
        rows = [images[epoch][0][0, 4] for epoch in range(40)]
        slopes[preset] = {int(torch.sign(row[4] - row[3])) for row in rows}
        shifts = {round(float(row[4] * 8)) for row in rows}
        assert len(shifts) == {"none": 1, "flip": 2, "crop": 3, "flip-crop": 6}[preset] or preset == "flip-crop"
    assert slopes == {"none": {1}, "flip": {1, -1}, "crop": {1}, "flip-crop": {1, -1}}
    assert presets_for("digits") == presets_for("mnist:x") == ("crop",)
    assert presets_for("photos") == ("flip-crop",)


def test_mixed_batches_have_shares_of_classes() -> None:
    images, labels = torch.rand(6, 1, 8, 8), torch.arange(6) % 3
    torch.manual_seed(0)
    for presets in (("mixup",), ("cutmix",), ("mixup", "cutmix")):
        mix = mixing(presets, 3)
        assert mix is not None
        mixed, shares = mix(images, labels)
        assert mixed.shape == images.shape
        assert not torch.equal(mixed, images)
        assert shares.shape == (6, 3)
        torch.testing.assert_close(shares.sum(1), torch.ones(6))
    assert mixing(("crop",), 3) is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("flipcrop", r"`augment=…` 'flipcrop' is unknown; did you mean flip-crop"),
        ("xyz", "`augment=…` 'xyz' is unknown; choose none, flip, crop, flip-crop, randaugment, mixup, cutmix"),
        ("crop,flip-crop", "`augment=crop,flip-crop`: give one of none, flip, crop"),
    ],
)
def test_presets_that_are_none(text: str, said: str) -> None:
    with pytest.raises(AsymswapError, match=said):
        parse_presets(text)
    assert parse_presets("randaugment, mixup") == ("randaugment", "mixup")


@given(st.integers(1, 30), st.integers(1, 3), st.integers(1, 3))
def test_processes_share_the_users_batches(count: int, accumulate: int, size: int) -> None:
    """Each in as many as the others in every step; only fewer than the processes are left out, at an epoch's end."""
    if count < size:
        with pytest.raises(SourceError, match=f"gives {count} batches for {size} processes"):
            Batches(list(range(count)), accumulate, Team(0, size), seed=0)
        return
    sources = [Batches(list(range(count)), accumulate, Team(rank, size), seed=0) for rank in range(size)]
    seen: list[int] = []
    for groups in zip(*(source.groups(0, 0) for source in sources), strict=True):
        assert len({len(group) for group, _ in groups}) == 1
        assert {whole for _, whole in groups} == {sum(len(group) for group, _ in groups)}
        seen += sorted(batch.content for group, _ in groups for batch in group)
    assert seen == list(range(count - count % size))
    rest = [group for group, _ in sources[0].groups(0, 1)]
    assert rest == [group for group, _ in sources[0].groups(0, 0)][1:]


def test_a_sampler_that_shares_too() -> None:
    data = TensorDataset(torch.zeros(8))
    loader = DataLoader(data, sampler=DistributedSampler(data, 2, 0))
    with pytest.raises(SourceError, match="leave out the DistributedSampler"):
        Batches(loader, 1, Team(0, 2), seed=0)
    assert Batches(loader, 1, Team(), seed=0).count == 4


def test_data_without_an_end() -> None:
    endless = Batches(lambda: itertools.count(), 2, Team(), seed=0, most=3)
    assert (endless.steps, endless.count) == (3, 6)
