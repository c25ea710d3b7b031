"""What converting a large model takes: little more than its weights, from whatever it comes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from processes import forked
from safetensors.torch import save_file
from torch import nn
from torchvision import models

import asymswap

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

# 244 MB of weights in 8 layers, of which 4 % are those of convs: what is held twice would show.
NAME = "alexnet"
SOURCES = {
    "reference": [NAME, "--weights", "none"],
    "state dict": ["state.pt", "--arch", NAME],
    "state dict, identified": ["state.pt"],
    "pickled module": ["module.pt"],
    "safetensors": ["state.safetensors", "--arch", NAME],
    "safetensors, written as such": ["state.safetensors", "--arch", NAME, "-o", "out.safetensors"],
    "asymswap checkpoint": ["half.asym.pt"],
}
QUICK = ("reference", "asymswap checkpoint")
ONCE = 1.6
"""Times the weights, over what a tiny network takes: 1.3 to 1.4 is measured. The promised 2.2 would hide a copy."""

RECIPE = ("--recipe", "3x3-only")
MEASURE = """
import resource
from asymswap.cli.main import main
try:
    main()
finally:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def peak(folder: Path, *command: str) -> int:
    """The largest resident memory, in bytes, of a process that runs this command, which must succeed."""
    done = forked(MEASURE, *command, cwd=folder)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.splitlines()[-1])


@dataclass(frozen=True)
class Prepared:
    """A folder for the model in every form, the bytes of its weights, and what converting a tiny network takes."""

    folder: Path
    weights: int
    floor: int


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    folder = tmp_path_factory.mktemp("large")
    return Prepared(folder, size_of(models.get_model(NAME)), peak(folder, "convert", "digits-resnet", *RECIPE))


def size_of(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in model.state_dict().values())


def write(name: str, folder: Path) -> None:
    """The model in the form that a file of this name has, unless it is there already."""
    path = folder / name
    if path.exists():
        return
    torch.manual_seed(0)
    model = models.get_model(NAME, weights=None).eval()
    match name:
        case "state.pt":
            torch.save(model.state_dict(), path)
        case "module.pt":
            torch.save(model, path)
        case "state.safetensors":
            save_file(model.state_dict(), path)
        case "half.asym.pt":
            recipe = folder / "some.toml"
            recipe.write_text('[[rules]]\nmatch = { names = "features.3" }\nswap = { kind = "separable", rank = 8 }\n')
            write("state.pt", folder)
            state = asymswap.open_model(folder / "state.pt", arch=NAME, input_size=(3, 64, 64))
            asymswap.save(asymswap.convert(state, recipe), path)


@pytest.mark.parametrize(
    "source", [pytest.param(name, marks=() if name in QUICK else pytest.mark.nightly) for name in SOURCES]
)
def test_peak_of_a_conversion(source: str, prepared: Prepared) -> None:
    model, *options = SOURCES[source]
    if model != NAME:
        write(model, prepared.folder)
    command = ["convert", model, *options, *RECIPE, "--input", "3x64x64", "--force"]
    over = peak(prepared.folder, *command) - prepared.floor
    assert over > 0.9 * prepared.weights, "that cannot be: the weights are not even there once"
    assert over < ONCE * prepared.weights


# Its feature maps change in size from layer to layer, so that they fit into no hole that others left.
WITHOUT_HOLES = 1.8
"""Times the weights: 1.3 to 1.6 is measured, 2.1 where two images run at once through memory with holes."""


def test_peak_of_a_network_whose_feature_maps_are_large_beside_its_weights(prepared: Prepared) -> None:
    model = models.get_model("densenet161", weights=None)
    torch.save(model.state_dict(), prepared.folder / "small.pt")
    command = ["convert", "small.pt", "--arch", "densenet161", *RECIPE]
    assert peak(prepared.folder, *command) - prepared.floor < WITHOUT_HOLES * size_of(model)
