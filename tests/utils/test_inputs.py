"""Inputs made up for each form of network."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import asymswap.utils.inputs
from asymswap.types import InputForm, Preprocessing
from asymswap.utils.inputs import PORTION, example, portions, probe, sizes, with_values
from asymswap.utils.tensors import list_tensors

FORMS: dict[InputForm, list[tuple[int, ...]]] = {
    "images": [(2, 3, 8, 12)],
    "image-list": [(3, 8, 12), (3, 8, 12)],
    "image-pair": [(2, 3, 8, 12), (2, 3, 8, 12)],
    "clips": [(2, 3, 5, 8, 12)],
}


def preprocessing(form: InputForm) -> Preprocessing:
    return Preprocessing(3, (8, 12), (0.5,) * 3, (0.5,) * 3, form=form, frames=5 if form == "clips" else 1)


@pytest.mark.parametrize("form", FORMS)
def test_the_probe_has_the_form_and_is_the_same_for_a_seed(form: InputForm) -> None:
    made = list_tensors(probe(preprocessing(form), torch.float16, images=2, seed=1))
    assert [tuple(tensor.shape) for tensor in made] == FORMS[form]
    assert all(tensor.dtype == torch.float16 for tensor in made)
    again = list_tensors(probe(preprocessing(form), torch.float16, images=2, seed=1))
    other = list_tensors(probe(preprocessing(form), torch.float16, images=2, seed=2))
    assert all(torch.equal(one, two) for one, two in zip(made, again, strict=True))
    assert not any(torch.equal(one, two) for one, two in zip(made, other, strict=True))


def test_what_normalises_by_itself_gets_no_negative_pixels() -> None:
    [images] = probe(preprocessing("image-list"), torch.float32)
    assert all(float(image.min()) >= 0 and float(image.max()) <= 1 for image in images)


@pytest.mark.parametrize(
    ("form", "text"),
    [
        ("images", "1x3x8x12"),
        ("image-list", "3x8x12"),
        ("image-pair", "1x3x8x12, 1x3x8x12"),
        ("clips", "1x3x5x8x12"),
    ],
)
def test_the_example_is_one_input_without_values(form: InputForm, text: str) -> None:
    made = example(preprocessing(form), torch.float32)
    assert sizes(made) == text
    assert all(tensor.is_meta for tensor in list_tensors(made))
    filled = list_tensors(with_values(made))
    assert all(not tensor.is_meta and bool(torch.isfinite(tensor).all()) for tensor in filled)
    assert all(torch.equal(a, b) for a, b in zip(filled, list_tensors(with_values(made)), strict=True))


def test_the_two_images_of_a_pair_differ() -> None:
    first, second = with_values(example(preprocessing("image-pair"), torch.float32))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("most", [0, 1, 3, 100])
def test_portions_are_the_same_inputs_a_few_at_a_time(form: InputForm, most: int, monkeypatch: Any) -> None:
    inputs = probe(preprocessing(form), torch.float32, images=7)
    numbers = sum(tensor.numel() for tensor in list_tensors(inputs)) // 7
    monkeypatch.setattr(asymswap.utils.inputs, "PORTION", most * numbers)
    made = list(portions(inputs))
    assert [len(portion[0]) for portion in made] == {0: [1] * 7, 1: [1] * 7, 3: [3, 3, 1], 100: [7]}[most]
    for position, whole in enumerate(inputs):
        parts = [portion[position] for portion in made]
        assert all(isinstance(part, type(whole)) for part in parts)
        assert torch.equal(torch.cat([torch.stack(list(part)) for part in parts]), torch.stack(list(whole)))


def test_a_portion_is_one_image_of_the_usual_size_or_many_small_ones() -> None:
    assert next(portions((torch.empty(8, 3, 224, 224, device="meta"),)))[0].shape[0] == 1
    assert next(portions((torch.empty(64, 3, 32, 32, device="meta"),)))[0].shape[0] == PORTION // (3 * 32 * 32) == 49


def test_an_input_is_described_in_short() -> None:
    assert preprocessing("images").describe() == "3x8x12"
    assert preprocessing("clips").describe() == "3x5x8x12"
