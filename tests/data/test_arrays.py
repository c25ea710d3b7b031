"""Tensor files and torchvision's collections as data: what is read, and what is refused."""

from __future__ import annotations

import pickle
import re
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from processes import forked
from torchvision import datasets

from asymswap.data import arrays
from asymswap.data.datasets import LabelledImages, open_data
from asymswap.errors import SourceError
from asymswap.types import Preprocessing

GREY = Preprocessing(channels=1, size=(4, 4), mean=(0.0,), std=(1.0,))
COLOUR = Preprocessing(channels=3, size=(4, 4), mean=(0.0,) * 3, std=(1.0,) * 3)


def pixels(count: int, channels: int = 3) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).integers(0, 256, (count, channels, 4, 4), dtype=np.uint8)


def stacked(data: LabelledImages) -> torch.Tensor:
    return torch.stack([data[index][0] for index in range(len(data))])


def test_the_same_images_in_every_form_of_file(tmp_path: Path) -> None:
    images, labels = pixels(3), np.array([2, 0, 1])
    np.savez(tmp_path / "a.npz", images=images, labels=labels)
    np.savez(tmp_path / "b.npz", x=images.transpose(0, 2, 3, 1), y=labels)
    torch.save((torch.from_numpy(images), torch.from_numpy(labels)), tmp_path / "c.pt")
    torch.save({"images": torch.from_numpy(images).float() / 255, "labels": torch.tensor(labels)}, tmp_path / "d.pt")
    expected = torch.from_numpy(images).float() / 255
    for name in ("a.npz", "b.npz", "c.pt", "d.pt"):
        data = open_data(str(tmp_path / name), COLOUR, "train")
        torch.testing.assert_close(stacked(data), expected)
        assert [data[index][1] for index in range(3)] == [2, 0, 1]
        assert data.classes == ("0", "1", "2")


def test_parts_within_one_file(tmp_path: Path) -> None:
    images = pixels(5, 1)
    parts = {"x_train": images[:3, 0], "y_train": [0, 1, 1], "x_test": images[3:, 0], "y_test": [1, 0]}
    np.savez(tmp_path / "a.npz", **parts)
    train, test = (open_data(str(tmp_path / "a.npz"), GREY, part) for part in ("train", "test"))
    torch.testing.assert_close(torch.cat([stacked(train), stacked(test)]), torch.from_numpy(images).float() / 255)


def test_named_classes_and_channels_that_are_made(tmp_path: Path) -> None:
    torch.save({"images": torch.full((1, 3, 4, 4), 51, dtype=torch.uint8), "labels": torch.tensor([1]),
                "classes": ["cat", "dog"]}, tmp_path / "a.pt")  # fmt: skip
    data = open_data(str(tmp_path / "a.pt"), GREY, "test")
    assert data.classes == ("cat", "dog")
    torch.testing.assert_close(stacked(data), torch.full((1, 1, 4, 4), 0.2), atol=1e-4, rtol=0)


def test_images_without_labels_serve_where_none_are_needed(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", pixels(2))
    assert len(open_data(str(tmp_path / "a.npy"), COLOUR, "train", unlabelled=True)) == 2
    with pytest.raises(SourceError, match=r"a\.npy holds images without labels; give an \.npz or \.pt file with both"):
        open_data(str(tmp_path / "a.npy"), COLOUR, "train")


class Evil:
    def __reduce__(self) -> Any:
        return print, ("run!",)


GOOD = {"images": torch.zeros(1, 3, 4, 4), "labels": torch.tensor([0])}
REFUSED: dict[str, tuple[Any, str]] = {
    "no images": ({"labels": torch.zeros(2, dtype=torch.long)}, r"holds no images \(its entries: labels\)"),
    "a shape": ({"images": torch.zeros(2, 5), "labels": torch.zeros(2)}, r"shape \(2, 5\), which is no images"),
    "channels": ({"images": torch.zeros(2, 5, 4, 4), "labels": [0, 1]}, "takes 3 channels, the data has 5"),
    "no number": ({"images": torch.full((2, 3, 4, 4), torch.nan)}, "holds NaN or infinite numbers"),
    "numbers": ({"images": torch.zeros(2, 3, 4, 4, dtype=torch.complex64)}, "images of torch.complex64"),
    "too few labels": (
        {"images": torch.zeros(2, 3, 4, 4), "labels": torch.tensor([1])},
        r"labels of shape \(1,\) and torch.int64 for 2 images",
    ),
    "a label below zero": (
        {"images": torch.zeros(2, 3, 4, 4), "labels": torch.tensor([1, -1])},
        "give a whole number from 0 to 999,999 for each",
    ),
    "a class too few": (
        {"images": torch.zeros(2, 3, 4, 4), "labels": torch.tensor([1, 2]), "classes": ["a", "b"]},
        "has a label 2, but names only 2 classes",
    ),
    "classes that are a number": ({**GOOD, "classes": 5}, "has 'classes' that are no list of names"),
    "classes that are a module": ({**GOOD, "classes": torch.nn.ReLU()}, "has 'classes' that are no list of names"),
    "sparse": ({"images": torch.zeros(1, 3, 4, 4).to_sparse()}, "holds a Tensor, which is no plain tensor"),
    "meta": ({"images": torch.zeros(1, 3, 4, 4, device="meta")}, "holds a Tensor, which is no plain tensor"),
    "float8": ({"images": torch.zeros(1, 3, 4, 4).to(torch.float8_e5m2)}, "images of torch.float8_e5m2"),
    "labels with a gradient": ({**GOOD, "labels": torch.zeros(1, requires_grad=True)}, "give a whole number"),
    "a text": ("images", "holds a str; give an .npz or .pt file"),
    "code": (Evil(), r"cannot be read \(it is a pickle that needs builtins\.print, .*executed"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_images(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    value, text = REFUSED[name]
    torch.save(value, tmp_path / "a.pt")
    with pytest.raises(SourceError, match=text) as caught:
        open_data(str(tmp_path / "a.pt"), COLOUR, "train")
    assert "\n" not in str(caught.value)
    assert "run!" not in capsys.readouterr().out


class Obeyed:
    """A tensor with an attribute that numpy would read memory by."""

    def __reduce__(self) -> Any:
        function, args = torch.zeros(1).__reduce_ex__(2)
        attributes = {"__array_interface__": {"shape": (9,), "typestr": "<f8", "data": (8, True), "version": 3}}
        return torch._tensor._rebuild_from_type_v2, (function, torch.Tensor, args, attributes)


@pytest.mark.parametrize("name", ["images", "labels", "classes"])
def test_an_attribute_that_numpy_obeys_is_refused(name: str, tmp_path: Path) -> None:
    torch.save({**GOOD, name: Obeyed()}, tmp_path / "a.pt")
    with pytest.raises(SourceError, match="fills a tensor with attributes that it has itself, or that torch obeys"):
        open_data(str(tmp_path / "a.pt"), COLOUR, "train")


def test_arrays_that_claim_more_than_there_is(tmp_path: Path) -> None:
    header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (1000000000000, 3, 4, 4)}"
    content = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(48)
    (tmp_path / "a.npy").write_bytes(content)
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("images.npy", content)
    for name in ("a.npy", "a.npz"):
        with pytest.raises(SourceError, match=r"it claims 48,000,000,000,000 bytes for an array of 10+x3x4x4"):
            open_data(str(tmp_path / name), COLOUR, "train", unlabelled=True)


def test_an_archive_of_arrays_that_unpacks_to_far_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrays, "_UNPACKED", 100_000)
    np.savez_compressed(tmp_path / "a.npz", images=np.zeros((2, 3, 200, 200), np.uint8))
    with pytest.raises(SourceError, match=r"it has [\d,]+ bytes and would unpack to 240,"):
        open_data(str(tmp_path / "a.npz"), COLOUR, "train", unlabelled=True)


def test_labels_of_any_whole_type(tmp_path: Path) -> None:
    for kind in ("uint8", "uint16", "int32", "uint64"):
        np.savez(tmp_path / "a.npz", images=pixels(3), labels=np.array([1, 0, 2], dtype=kind))
        data = open_data(str(tmp_path / "a.npz"), COLOUR, "train")
        assert [data[index][1] for index in range(3)] == [1, 0, 2]


def test_a_label_that_is_no_number_of_a_class(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=pixels(2), labels=np.array([1, 2**40]))
    with pytest.raises(SourceError, match="give a whole number from 0 to 999,999 for each"):
        open_data(str(tmp_path / "a.npz"), COLOUR, "train")


def test_a_compressed_file_whose_bits_are_flipped(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "a.npz", images=pixels(50), labels=np.arange(50))
    whole = bytearray((tmp_path / "a.npz").read_bytes())
    for place in range(60, 400):
        whole[place] ^= 255
    (tmp_path / "a.npz").write_bytes(whole)
    with pytest.raises(SourceError, match=r"a\.npz cannot be read"):
        open_data(str(tmp_path / "a.npz"), COLOUR, "train")


def test_a_key_of_tuples_in_tuples_does_not_end_the_process(tmp_path: Path) -> None:
    """Hashing it would overflow the stack; run apart, so that it is a failure and not the end of all tests."""
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02}N" + b"\x85" * 300_000 + b"Ns.")
        archive.writestr("a/version", b"3\n")
    code = (
        "import sys\nfrom pathlib import Path\nfrom asymswap.errors import SourceError\n"
        "from asymswap.data.arrays import read_arrays\n"
        "try:\n    read_arrays(Path(sys.argv[1]), 'test')\nexcept SourceError as error:\n    print(error)\n"
    )
    done = forked(code, tmp_path / "a.pt", cwd=tmp_path)
    assert done.returncode == 0, done
    assert re.fullmatch(r"data .*a\.pt cannot be read \(it has a key that is neither text nor a sm.*\n", done.stdout)


@pytest.mark.parametrize("name", ["a.npy", "a.npz", "a.pt"])
def test_damaged_files(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"nothing of the kind")
    with pytest.raises(SourceError, match=rf"data .*{name} cannot be read"):
        open_data(str(tmp_path / name), COLOUR, "train")


def write_idx(path: Path, values: np.ndarray[Any, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape) + values.tobytes())


@pytest.mark.parametrize(("reference", "folder"), [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST")])
def test_mnist_and_its_like(tmp_path: Path, reference: str, folder: str) -> None:
    images = pixels(3, 1)[:, 0]
    for prefix in ("train", "t10k"):
        write_idx(tmp_path / folder / "raw" / f"{prefix}-images-idx3-ubyte", images)
        write_idx(tmp_path / folder / "raw" / f"{prefix}-labels-idx1-ubyte", np.array([7, 0, 9], dtype=np.uint8))
    # The folder that holds it, or itself.
    for place in (tmp_path, tmp_path / folder):
        data = open_data(f"{reference}:{place}", COLOUR, "train")
        torch.testing.assert_close(stacked(data), torch.from_numpy(images)[:, None].expand(-1, 3, -1, -1).float() / 255)
        assert [data[index][1] for index in range(3)] == [7, 0, 9]
        assert len(data.classes) == 10


def test_cifar10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 32, 32), dtype=np.uint8)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    (folder / "b").write_bytes(pickle.dumps({"data": images.reshape(2, -1), "labels": [3, 5]}))
    (folder / "m").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [["b", None]])
    monkeypatch.setattr(datasets.CIFAR10, "train_list", [["b", None]])
    monkeypatch.setattr(datasets.CIFAR10, "meta", {"filename": "m", "key": "label_names", "md5": None})
    data = open_data(f"cifar10:{tmp_path}", Preprocessing(3, (32, 32), (0.0,) * 3, (1.0,) * 3), "test")
    torch.testing.assert_close(stacked(data), torch.from_numpy(images).float() / 255)
    assert data.classes == tuple("abcdefghij")
    assert data.description == f"cifar10 in {tmp_path}: 2 test images of 10 classes"


def test_collections_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(
        SourceError, match=r"has no folder cifar-100-python; give the folder above it, or `download=True`"
    ):
        open_data(f"cifar100:{tmp_path}", COLOUR, "train")
    (tmp_path / "MNIST").mkdir()
    with pytest.raises(SourceError, match=r"mnist:.* cannot be read \(Dataset not found"):
        open_data(f"mnist:{tmp_path}", COLOUR, "train")
    with pytest.raises(SourceError, match=r"cifra10:x' is neither .*; did you mean cifar10"):
        open_data("cifra10:x", COLOUR, "train")
    with pytest.raises(SourceError, match=r"`download=True` is for cifar10, .*; 'digits.x' cannot be downloaded"):
        open_data("digits.x", COLOUR, "train", download=True)


def test_a_download_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", unreachable)
    with pytest.raises(SourceError, match=r"data cifar10:.* cannot be read .no route to host"):
        open_data(f"cifar10:{tmp_path}", COLOUR, "train", download=True)
