"""Data references: what they open, how images are preprocessed, and what is said when they cannot be opened."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from asymswap.data.datasets import LabelledImages, image_transform, open_data
from asymswap.errors import AsymswapError, SourceError
from asymswap.types import Preprocessing

GREY = Preprocessing(channels=1, size=(8, 8), mean=(0.0,), std=(1.0,))
COLOUR = Preprocessing(channels=3, size=(4, 4), mean=(0.5, 0.5, 0.5), std=(0.5, 0.25, 1.0))


def write_images(folder: Path, colours: dict[str, tuple[int, int, int]], size: tuple[int, int] = (4, 4)) -> Path:
    for name, colour in colours.items():
        (folder / name).mkdir(parents=True)
        Image.new("RGB", size, colour).save(folder / name / "0.png")
    return folder


def labels(data: LabelledImages) -> list[int]:
    return [data[index][1] for index in range(len(data))]


def test_digits_split_is_stratified_and_leaves_nothing_out() -> None:
    train, test = (open_data("digits", GREY, part) for part in ("train", "test"))
    assert (len(train), len(test)) == (1437, 360)
    assert train.classes == test.classes == tuple("0123456789")
    counts = np.bincount(labels(test))
    assert counts.min() >= 34
    assert counts.max() <= 37
    together = [image.numpy().tobytes() for data in (train, test) for image, _ in (data[i] for i in range(len(data)))]
    truth = [image.astype(np.float32).tobytes() for image in load_digits().images / 16]
    assert sorted(together) == sorted(truth)


def test_digits_are_resized_repeated_and_normalised() -> None:
    image, label = open_data("digits", GREY, "test")[0]
    larger = Preprocessing(channels=3, size=(32, 24), mean=(0.5, 0.0, 0.0), std=(1.0, 1.0, 2.0), resize=40)
    resized, same_label = open_data("digits", larger, "test")[0]
    assert resized.shape == (3, 32, 24)
    assert resized.dtype == torch.float32
    assert isinstance(same_label, int)
    assert same_label == label
    torch.testing.assert_close(resized[0] + 0.5, resized[1])
    torch.testing.assert_close(resized[2] * 2, resized[1])
    assert resized[1].mean().item() == pytest.approx(image.mean().item(), abs=0.02)


def test_digits_are_those_of_scikit_learn_split_by_class() -> None:
    theirs = load_digits()
    labels = theirs.target.tolist()
    train, test = train_test_split(range(len(labels)), test_size=0.2, random_state=0, stratify=labels)
    for part, chosen in (("train", train), ("test", test)):
        data = open_data("digits", GREY, part)
        assert data.labels == [labels[i] for i in chosen]
        found = torch.stack([data.picture(number) for number in range(len(chosen))])
        assert torch.equal(found, torch.from_numpy(theirs.images[chosen]).float()[:, None] / 16)


def test_folder_classes_are_sorted_and_hidden_folders_and_files_are_left_out(tmp_path: Path) -> None:
    write_images(tmp_path, {"b": (0, 0, 0), "a": (255, 255, 255), ".cache": (9, 9, 9)})
    # Archives made on a Mac hold such a file beside each image.
    (tmp_path / "a" / "._0.png").write_bytes(b"\0\5\x16\7")
    data = open_data(str(tmp_path), COLOUR, "test")
    assert data.classes == ("a", "b")
    assert labels(data) == [0, 1]
    assert data.description == f"folder {tmp_path}: 2 images of 2 classes"


def test_folder_images_are_scaled_and_normalised_per_channel(tmp_path: Path) -> None:
    write_images(tmp_path, {"a": (255, 51, 0)})
    image, label = open_data(str(tmp_path), COLOUR, "train")[0]
    assert type(image) is torch.Tensor
    assert isinstance(label, int)
    expected = torch.tensor([(1 - 0.5) / 0.5, (0.2 - 0.5) / 0.25, (0 - 0.5) / 1])
    torch.testing.assert_close(image, expected[:, None, None].expand(3, 4, 4))


def test_folder_images_become_grey_for_one_channel(tmp_path: Path) -> None:
    write_images(tmp_path, {"a": (255, 0, 0)})
    image, _ = open_data(str(tmp_path), GREY, "test")[0]
    # ITU-R 601: red has 0.299 of the luma.
    torch.testing.assert_close(image, torch.full((1, 8, 8), 76 / 255))


def test_grey_images_become_three_equal_channels(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    Image.new("L", (4, 4), 51).save(tmp_path / "a" / "0.png")
    plain = dataclasses.replace(COLOUR, mean=(0.0,) * 3, std=(1.0,) * 3)
    image, _ = open_data(str(tmp_path), plain, "test")[0]
    torch.testing.assert_close(image, torch.full((3, 4, 4), 0.2))


@pytest.mark.parametrize("resize", [None, 4])
def test_resizing_and_cropping_keep_the_middle_in_the_middle(resize: int | None) -> None:
    pixels = np.zeros((4, 8), dtype=np.uint8)
    pixels[:, 4:] = 255
    image = image_transform(dataclasses.replace(GREY, size=(4, 4), resize=resize))(Image.fromarray(pixels))
    assert image.shape == (1, 4, 4)
    assert image[0, 0, 0].item() == pytest.approx(0, abs=0.01)
    assert image[0, 0, 3].item() == pytest.approx(1, abs=0.01)


def test_centre_crop_cuts_what_resizing_keeps() -> None:
    pixels = np.zeros((4, 8), dtype=np.uint8)
    pixels[:, :2] = 255
    cropped, whole = (
        image_transform(dataclasses.replace(GREY, size=(4, 4), resize=resize))(Image.fromarray(pixels))
        for resize in (4, None)
    )
    assert cropped.max().item() == 0.0
    assert whole.max().item() > 0.8


@pytest.mark.parametrize(("folders", "chosen"), [(("train", "test"), "test"), (("train", "val"), "val")])
def test_split_folder(tmp_path: Path, folders: tuple[str, str], chosen: str) -> None:
    for shade, name in enumerate(folders):
        write_images(tmp_path / name, {"a": (shade * 255,) * 3, "b": (shade * 255,) * 3})
    plain = dataclasses.replace(COLOUR, mean=(0.0,) * 3, std=(1.0,) * 3)
    train, test = (open_data(str(tmp_path), plain, part) for part in ("train", "test"))
    assert (train[0][0].mean().item(), test[0][0].mean().item()) == (0.0, 1.0)
    assert test.classes == ("a", "b")
    assert str(tmp_path / chosen) in test.description


def test_classes_named_like_parts_are_classes(tmp_path: Path) -> None:
    write_images(tmp_path, {"bus": (0, 0, 0), "train": (0, 0, 0)})
    assert open_data(str(tmp_path), COLOUR, "test").classes == ("bus", "train")


def test_a_class_without_images_keeps_its_number(tmp_path: Path) -> None:
    write_images(tmp_path, {"b": (0, 0, 0)})
    (tmp_path / "a").mkdir()
    data = open_data(str(tmp_path), COLOUR, "test")
    assert data.classes == ("a", "b")
    assert labels(data) == [1]


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_images(tmp_path / "pets", {"cat": (0, 0, 0)})
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_data("~/pets", COLOUR, "test").classes == ("cat",)


@pytest.mark.parametrize(
    ("reference", "text"),
    [
        ("digit", r"data 'digit' is neither a known name nor an existing folder; did you mean digits\?"),
        ("no/such", "data 'no/such' is neither .* folder; give digits, or a folder that holds one folder of images"),
        ("file.txt", "data '.*file.txt' is a file; give digits, or a folder"),
        ("empty", "folder '.*empty' holds no class folders; put each class's images into its own folder"),
        ("bare", "class folders of '.*bare' hold no images; known are .jpg"),
        ("half", "holds train, but no folder test or val that holds class folders; add it, or give the folder"),
        ("odd", r"other classes in train than in test \(only in one: b, c\); give both the same class folders"),
    ],
)
def test_what_cannot_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference: str, text: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file.txt").touch()
    for folder in ("empty", "bare/a", "half/train/a", "odd/train/a", "odd/train/b", "odd/test/a", "odd/test/c"):
        Path(folder).mkdir(parents=True)
    with pytest.raises(SourceError, match=text) as caught:
        open_data(reference, COLOUR, "test")
    assert "\n" not in str(caught.value)


def test_broken_image_is_named(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "bad.png").write_bytes(b"not a picture")
    data = open_data(str(tmp_path), COLOUR, "test")
    with pytest.raises(
        SourceError, match=r"image '.*bad\.png' cannot be read \(cannot identify .*; remove or replace it"
    ):
        data[0]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"channels": 4}, "the model takes 4 channels, images have 1 or 3; give `input_size=…`, or a file of"),
        ({"mean": (0.5,) * 3}, "preprocessing has 3 means and 1 stds for 1 channels; give one for each"),
        ({"interpolation": "bilinar"}, r"`interpolation=…` 'bilinar' is unknown; did you mean bilinear\?"),
        ({"interpolation": "x"}, "`interpolation=…` 'x' is unknown; choose nearest, .*bilinear"),
    ],
)
def test_preprocessing_that_fits_no_image(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(AsymswapError, match=text):
        open_data("digits", dataclasses.replace(GREY, **changes), "test")


def test_images_in_one_folder_where_labels_are_not_needed(tmp_path: Path) -> None:
    for number in range(3):
        Image.new("RGB", (4, 4), (40 * number,) * 3).save(tmp_path / f"{number}.png")
    (tmp_path / ".hidden.png").write_bytes(b"nothing")
    (tmp_path / "notes.txt").touch()
    plain = dataclasses.replace(COLOUR, mean=(0.0,) * 3, std=(1.0,) * 3)
    data = open_data(str(tmp_path), plain, "train", unlabelled=True)
    assert data.description == f"folder {tmp_path}: 3 images"
    assert [round(float(data[index][0].mean() * 255)) for index in range(3)] == [0, 40, 80]
    with pytest.raises(SourceError, match="holds no class folders; put each class's images into its own folder"):
        open_data(str(tmp_path), plain, "train")
    write_images(tmp_path / "classes", {"a": (1, 2, 3), "b": (4, 5, 6)})
    Image.new("RGB", (4, 4)).save(tmp_path / "classes" / "stray.png")
    both = open_data(str(tmp_path / "classes"), plain, "train", unlabelled=True)
    assert both.classes == ("a", "b"), "an image beside the folders of classes does not take their place"
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match="empty' holds no images, and no folders of images; put some into it"):
        open_data(str(tmp_path / "empty"), plain, "train", unlabelled=True)


def test_pixels_of_more_than_eight_bits(tmp_path: Path) -> None:
    ramp = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1023
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    Image.fromarray(ramp.astype(np.float32)).save(tmp_path / "float.tiff")
    data = open_data(str(tmp_path), GREY, "train", unlabelled=True)
    wanted = torch.from_numpy(ramp.astype(np.float32))[None] / 65535
    torch.testing.assert_close(data[0][0], wanted, atol=1 / 255, rtol=0)
    with pytest.raises(SourceError, match=r"float.tiff' cannot be read \(pixels of 32 bits"):
        data[1]
