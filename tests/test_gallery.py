"""docs/guide/gallery.md and the script that makes its pictures by the commands that stand there."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree as ET

import pytest

from asymswap.planning.recipe import parse_recipe
from asymswap.planning.shipped import shipped_names

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "guide" / "gallery.md").read_text(encoding="utf-8")
NOTHING = argparse.Namespace(cifar=None, resnet20=None)


@pytest.fixture
def gallery(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    return importlib.import_module("gallery")


def test_every_picture_is_there_small_and_made_by_a_command(gallery: ModuleType) -> None:
    names = gallery.pictures(PAGE)
    assert sorted(names) == sorted(path.name for path in (ROOT / "docs" / "guide" / "gallery").iterdir())
    made = {word for words in gallery.commands(PAGE) for word in words}
    for name in names:
        path = ROOT / "docs" / "guide" / "gallery" / name
        assert path.stat().st_size < 200_000
        assert {name, name.replace(".png", ".html")} & made
        if path.suffix == ".svg":
            assert ET.parse(path).getroot().tag.endswith("svg")
        else:
            assert path.read_bytes().startswith(b"\x89PNG")
    assert sum(path.stat().st_size for path in (ROOT / "docs" / "guide" / "gallery").iterdir()) < 1_500_000


def test_the_recipes_of_the_page_can_be_read(gallery: ModuleType) -> None:
    files = gallery.files(PAGE)
    assert list(files) == ["last-stage.toml"]
    assert parse_recipe(files["last-stage.toml"], "last-stage.toml").budget is not None
    for words in gallery.commands(PAGE):
        used = [words[place + 1] for place, word in enumerate(words) if word == "--recipe"]
        assert set(used) <= {*shipped_names(), *files}


def test_what_only_the_reader_has_is_left_out(gallery: ModuleType) -> None:
    lacking = [gallery.missing(words, NOTHING) for words in gallery.commands(PAGE)]
    assert [name for name in lacking if name] == ["resnet20.pt"]
    half = argparse.Namespace(cifar=None, resnet20=Path("mine.pt"))
    assert [name for words in gallery.commands(PAGE) if (name := gallery.missing(words, half))] == ["cifar10"]
    both = argparse.Namespace(cifar=Path("c"), resnet20=Path("mine.pt"))
    assert not any(gallery.missing(words, both) for words in gallery.commands(PAGE))
