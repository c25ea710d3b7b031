"""Checkpoints in several files: put together again, and never leading out of their folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build
from safetensors.torch import save_file
from torch import Tensor

from asymswap.errors import SourceError
from asymswap.fileformats.detect import FileKind, resolve, sniff
from asymswap.fileformats.model_file import fingerprint, read_raw
from asymswap.models.opening import open_model

pytestmark = pytest.mark.usefixtures("one_thread")

State = dict[str, Tensor]
INDEX = "model.safetensors.index.json"


def state() -> State:
    torch.manual_seed(5)
    return build("digits-resnet", {}).state_dict()


def write_shards(folder: Path, save: Callable[[State, Path], object] = save_file, ending: str = "safetensors") -> Path:
    """A state dict in three files and an index."""
    whole, weight_map = state(), {}
    for number in range(3):
        part = dict(list(whole.items())[number::3])
        name = f"model-{number + 1:05}-of-00003.{ending}"
        save(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    index = folder / f"model.{ending}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return index


@pytest.mark.parametrize(("save", "ending"), [(save_file, "safetensors"), (torch.save, "bin")])
@pytest.mark.parametrize("by_folder", [False, True])
def test_shards_make_one_state_dict(save: Any, ending: str, by_folder: bool, tmp_path: Path) -> None:
    index = write_shards(tmp_path, save, ending)
    assert sniff(index) is FileKind.SHARDS
    assert resolve(tmp_path) == index
    opened = open_model(tmp_path if by_folder else index)
    assert opened.origin.reference == "digits-resnet"
    assert opened.file == index
    assert all(torch.equal(tensor, state()[key]) for key, tensor in opened.model.state_dict().items())


def test_the_fingerprint_is_that_of_all_files(tmp_path: Path) -> None:
    index = write_shards(tmp_path)
    before = open_model(index).sha256
    assert before == fingerprint(index)
    shard = tmp_path / "model-00002-of-00003.safetensors"
    parts = read_raw(shard, trust_pickle=False).value
    save_file({key: tensor + 1 for key, tensor in parts.items()}, shard)
    assert fingerprint(index) != before


def test_shards_may_be_links(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    index = write_shards(tmp_path / "blobs")
    for path in (tmp_path / "blobs").iterdir():
        (tmp_path / "snapshot" / path.name).symlink_to(path)
    assert open_model(tmp_path / "snapshot" / index.name).origin.reference == "digits-resnet"


OUTSIDE = ["../secret.safetensors", "/etc/passwd", "sub/secret.safetensors", "..", ".", "", "..\\secret", "a\0b"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_names_that_lead_out_of_the_folder(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    for place in (tmp_path, folder / "sub"):
        save_file({"conv1.weight": torch.ones(1)}, place / "secret.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"conv1.weight": name}}))
    with pytest.raises(SourceError, match=r"which leads out of its folder; nothing of it was read"):
        read_raw(folder / INDEX, trust_pickle=False)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", r"is no index of shards: it must be JSON with a \"weight_map\" of keys to files"),
        ("{}", r"is no index of shards"),
        ('{"weight_map": 3}', r"is no index of shards"),
        ('{"weight_map": {}}', r'its "weight_map" must name a file for every key'),
        ('{"weight_map": {"a": 3}}', r'its "weight_map" must name a file for every key'),
        ('{"weight_map": {"a": "no.safetensors"}}', r"names no\.safetensors, which is not in .*; download it too"),
        ('{"weight_map": {"a": "model.safetensors.index.json"}}', r"is an index of shards that an index names"),
        ('{"weight_map": {"a": "text.bin"}}', r"text\.bin is text, not a checkpoint"),
        ('{"weight_map": {"a": "list.bin"}}', r"list\.bin is no part of a state_dict, as .* says; it holds a list"),
        ('{"weight_map": {"a": "other.bin"}}', r"other\.bin lacks 'a', which .* says it holds; download both again"),
        ('{"a":' * 100_000, r"is no index of shards"),
    ],
)
def test_indices_that_cannot_be_followed(text: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(text)
    (tmp_path / "text.bin").write_text("notes")
    torch.save([1], tmp_path / "list.bin")
    torch.save({"b": torch.ones(1)}, tmp_path / "other.bin")
    with pytest.raises(SourceError, match=expected):
        read_raw(tmp_path / INDEX, trust_pickle=False)


def test_folders_say_what_is_in_them(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"is a folder; give the checkpoint file in it$"):
        sniff(tmp_path)
    for name in ("b.pt", "a.safetensors", "c.ckpt", "d.bin", "e.pth", "notes.txt"):
        (tmp_path / name).touch()
    with pytest.raises(SourceError, match=r"in it: a\.safetensors, b\.pt, c\.ckpt, d\.bin and 1 more$"):
        sniff(tmp_path)
    (tmp_path / ".metadata").touch()
    (tmp_path / "__0_0.distcp").touch()
    with pytest.raises(
        SourceError, match=r"which torch\.distributed\.checkpoint wrote in parts; join them with `python"
    ):
        sniff(tmp_path)
    (tmp_path / "one.index.json").touch()
    (tmp_path / "two.index.json").touch()
    assert resolve(tmp_path) == tmp_path
