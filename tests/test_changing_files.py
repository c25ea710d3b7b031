"""A source file may change as soon as it has been read, and be the output itself; while it is read, it is an error."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from processes import forked
from safetensors.torch import save_file
from torch import Tensor, nn

import asymswap
from asymswap.models.networks import digits_resnet

pytestmark = pytest.mark.usefixtures("one_thread")

FORMS = ("x.pt", "x.safetensors", "x.module.pt", "x.asym.pt", "x.asym.safetensors")
ARCH = "digits-resnet"

# In a process of its own: whoever has mapped a file that is cut off is ended by a signal.
CHANGING = """
import os, sys
import asymswap
from asymswap.errors import SourceError
from pathlib import Path
from asymswap.fileformats import model_file

def overwrite(path):
    size = os.path.getsize(path)
    with open(path, "r+b") as file:
        file.write(b"\\xff" * size)
        file.truncate(64)

def convert(path, arch, out):
    changed = []

    def change(stage, done, total):
        # The source has been read, and nothing been solved.
        if stage in ("factorising", "converting") and not changed:
            overwrite(path)
            changed.append(path)

    asymswap.save(asymswap.convert(asymswap.open_model(path, arch=arch or None), "3x3-only", progress=change), out)
    assert changed

opening = model_file.safetensors.safe_open

class Cutting:
    def __init__(self, path, **options):
        self.path, self.file = path, opening(path, **options)

    def __enter__(self):
        inner = self.file.__enter__()
        os.truncate(self.path, os.path.getsize(self.path) // 2)
        return inner

    def __exit__(self, *error):
        return self.file.__exit__(*error)

for path, arch, out in zip(sys.argv[1:-1:3], sys.argv[2:-1:3], sys.argv[3:-1:3]):
    convert(path, arch, out)
model_file.safetensors.safe_open = Cutting
try:
    model_file.read_raw(Path(sys.argv[-1]), False)
except SourceError as error:
    print(error)
"""


def write(name: str, folder: Path, model: nn.Module) -> tuple[Path, str]:
    """The model in a file of this form, and what its architecture is, where that has to be said."""
    path = folder / name
    if "asym" in name:
        recipe = folder / "first.toml"
        recipe.write_text('[[rules]]\nmatch = { names = "layer1.*", kernel = "3x3" }\nswap = { kind = "acb" }\n')
        state = folder / "state.pt"
        torch.save(model.state_dict(), state)
        asymswap.save(asymswap.convert(asymswap.open_model(state, arch=ARCH), recipe), path, force=True)
        return path, ""
    if "module" in name:
        torch.save(nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Conv2d(16, 64, 3)), path)
        return path, ""
    torch.save(model.state_dict(), path) if name.endswith(".pt") else save_file(model.state_dict(), path)
    return path, ARCH


def network() -> nn.Module:
    torch.manual_seed(0)
    return digits_resnet()


def state_in(path: Path) -> dict[str, Tensor]:
    return dict(asymswap.load(path).state_dict())


@dataclass(frozen=True)
class Changed:
    """Where the sources were that have changed, what came of them all the same, and what should have come of them."""

    sources: dict[str, Path]
    found: dict[str, Path]
    wanted: dict[str, Path]
    cut: Path
    said: str


@pytest.fixture(scope="module")
def changed(tmp_path_factory: pytest.TempPathFactory) -> Changed:
    folder = tmp_path_factory.mktemp("changing")
    sources, found, wanted, arguments = {}, {}, {}, []
    for name in FORMS:
        sources[name], arch = write(name, folder, network())
        found[name], wanted[name] = folder / f"found.{name}", folder / f"wanted.{name}"
        asymswap.save(asymswap.convert(asymswap.open_model(sources[name], arch=arch or None), "3x3-only"), wanted[name])
        arguments += [sources[name], arch, found[name]]
    cut, _ = write("cut.safetensors", folder, network())
    done = forked(CHANGING, *arguments, cut, cwd=folder)
    assert (done.returncode, done.stderr) == (0, "")
    return Changed(sources, found, wanted, cut, done.stdout)


@pytest.mark.parametrize("name", FORMS)
def test_a_file_that_changes_once_it_has_been_read(name: str, changed: Changed) -> None:
    assert changed.sources[name].stat().st_size == 64
    expected, found = state_in(changed.wanted[name]), state_in(changed.found[name])
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in found.items())


def test_a_safetensors_file_that_is_cut_off_while_it_is_read(changed: Changed) -> None:
    assert changed.said.startswith(f"{changed.cut} is cut off or damaged: ")


@pytest.mark.parametrize("name", FORMS)
def test_the_output_may_take_the_place_of_the_source(name: str, tmp_path: Path) -> None:
    path, arch = write(name, tmp_path, network())
    wanted = path.with_name(f"wanted{path.suffix}")
    asymswap.save(asymswap.convert(asymswap.open_model(path, arch=arch or None), "3x3-only"), wanted)
    asymswap.save(asymswap.convert(asymswap.open_model(path, arch=arch or None), "3x3-only"), path, force=True)
    assert path.read_bytes() == wanted.read_bytes()


@pytest.mark.parametrize("name", FORMS[:2])
def test_a_loaded_model_outlives_its_file(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    conversion = asymswap.convert("digits-resnet", "3x3-only")
    asymswap.save(conversion, path)
    loaded = asymswap.load(path)
    with path.open("r+b") as file:
        file.write(b"\xff" * path.stat().st_size)
        file.truncate(0)
    expected = conversion.model.state_dict()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in loaded.state_dict().items())
