"""Which images are trained on and which are held back."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from asymswap.data.datasets import open_parts, split
from asymswap.errors import SourceError
from asymswap.types import Preprocessing

COLOUR = Preprocessing(channels=3, size=(4, 4), mean=(0.0,) * 3, std=(1.0,) * 3)
GREY = Preprocessing(channels=1, size=(8, 8), mean=(0.0,), std=(1.0,))


def write(folder: Path, counts: dict[str, int]) -> Path:
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", (4, 4), (number,) * 3).save(folder / name / f"{number:03}.png")
    return folder


@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=60), st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.9]), st.integers(0, 9)
)
def test_a_split_is_stratified_whole_and_the_same_every_time(labels: list[int], fraction: float, seed: int) -> None:
    kept, held = split(labels, fraction, seed)
    assert sorted(kept + held) == list(range(len(labels)))
    counts, back = Counter(labels), Counter(labels[index] for index in held)
    assert all(back[label] == min(round(fraction * count), count - 1) for label, count in counts.items())
    assert split(labels, fraction, seed) == (kept, held)


def test_another_seed_holds_back_others() -> None:
    assert split([0] * 100, 0.1, 0) != split([0] * 100, 0.1, 1)


def test_one_folder_is_split(tmp_path: Path) -> None:
    write(tmp_path, {"a": 10, "b": 20})
    train, held = open_parts(str(tmp_path), COLOUR, None, 0)
    assert (len(train), len(held or ())) == (27, 3)
    assert train.description == f"27 of folder {tmp_path}: 30 images of 2 classes (seed 0)"
    seen = [data[i] for data in (train, held or ()) for i in range(len(data))]
    assert len({(float(image[0, 0, 0]), label) for image, label in seen}) == 30


def test_the_folder_val_is_taken_and_test_stays_unseen(tmp_path: Path) -> None:
    for name, count in (("train", 10), ("val", 2), ("test", 3)):
        write(tmp_path / name, {"a": count, "b": count})
    train, held = open_parts(str(tmp_path), COLOUR, None, 0)
    assert (len(train), len(held or ())) == (20, 4)
    train, held = open_parts(str(tmp_path), COLOUR, "0.2", 0)
    assert (len(train), len(held or ())) == (16, 4)
    assert held is not None
    assert "train" in held.description
    train, held = open_parts(str(tmp_path), COLOUR, "test", 0)
    assert (len(train), len(held or ())) == (20, 6)


@pytest.mark.parametrize("text", ["none", "0"])
def test_nothing_held_back(text: str) -> None:
    train, held = open_parts("digits", GREY, text, 0)
    assert len(train) == 1437
    assert held is None


def test_other_data_to_validate_on(tmp_path: Path) -> None:
    write(tmp_path / "one", {"a": 3, "b": 3})
    write(tmp_path / "two", {"a": 1, "b": 1})
    train, held = open_parts(str(tmp_path / "one"), COLOUR, str(tmp_path / "two"), 0)
    assert (len(train), len(held or ())) == (6, 2)
    write(tmp_path / "three", {"a": 1, "c": 1})
    with pytest.raises(
        SourceError, match=r"the classes to validate on \(a, c …\) are not those to train on \(a, b …\)"
    ):
        open_parts(str(tmp_path / "one"), COLOUR, str(tmp_path / "three"), 0)


def test_what_cannot_be_trained_on(tmp_path: Path) -> None:
    write(tmp_path, {"a": 4, "b": 0})
    with pytest.raises(
        SourceError, match=r"there is no image of class 'b' to train on in folder .*; add some, or remove"
    ):
        open_parts(str(tmp_path), COLOUR, "none", 0)
    (tmp_path / "full").mkdir()
    write(tmp_path / "full", {"a": 4, "b": 4})
    with pytest.raises(SourceError, match=r"`validation=1.5` is no fraction of the images; give 0.1, none, test or"):
        open_parts(str(tmp_path / "full"), COLOUR, "1.5", 0)
    with pytest.raises(SourceError, match=r"a validation part of 0.01 of folder .* would be empty; give a larger"):
        open_parts(str(tmp_path / "full"), COLOUR, "0.01", 0)
