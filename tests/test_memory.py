"""What converting a large model takes: little more than its weights, from whatever it comes."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

IMPORTS = "import torch, torchvision, asymswap.api.convert, asymswap.cli.main, asymswap.reporting.convert"

# 531 MB of weights in 11 layers, of which 9 % are those of convs: what is held twice would show.
NAME = "vgg11"
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
"""Times the weights, over what the imports take: 1.2 is measured. What is promised, 2.2, would hide a second copy."""


# Between the tests and what they measure: a process starts with the peak of whoever starts it.
MEASURE = """
import os, subprocess, sys
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, usage = os.wait4(process.pid, 0)
print(os.waitstatus_to_exitcode(status), usage.ru_maxrss * 1024)
"""


def peak(folder: Path, *command: str) -> int:
    """The largest resident memory, in bytes, of a Python process with these arguments that must succeed."""
    python = [sys.executable, "-c", MEASURE, sys.executable]
    # One thread: what further ones keep for themselves is no matter of the model's.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*python, *command], cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=True, timeout=300
    )
    code, size = map(int, done.stdout.split())
    assert code == 0
    return size


PREPARE = f"""
import json, torch, asymswap
from safetensors.torch import save_file
from torchvision import models

torch.manual_seed(0)
model = models.get_model("{NAME}", weights=None).eval()
state = model.state_dict()
torch.save(state, "state.pt")
torch.save(model, "module.pt")
save_file(state, "state.safetensors")
print(sum(tensor.nbytes for tensor in state.values()))
del model, state
recipe = '[[rules]]\\nmatch = {{ names = "features.3" }}\\nswap = {{ kind = "separable", rank = 8 }}\\n'
open("some.toml", "w").write(recipe)
state = asymswap.open_model("state.pt", arch="{NAME}", input_size=(3, 64, 64))
asymswap.save(asymswap.convert(state, "some.toml"), "half.asym.pt")
"""


@dataclass(frozen=True)
class Prepared:
    """A folder with the model in every form, the bytes of its weights, and what the imports take."""

    folder: Path
    weights: int
    floor: int


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    folder = tmp_path_factory.mktemp("large")
    done = subprocess.run([sys.executable, "-c", PREPARE], cwd=folder, stdout=subprocess.PIPE, check=True, timeout=300)
    return Prepared(folder, int(done.stdout), peak(folder, "-c", IMPORTS))


@pytest.mark.parametrize(
    "source", [pytest.param(name, marks=() if name in QUICK else pytest.mark.nightly) for name in SOURCES]
)
def test_peak_of_a_conversion(source: str, prepared: Prepared) -> None:
    command = ["-m", "asymswap", "convert", *SOURCES[source], "--recipe", "3x3-only", "--input", "3x64x64", "--force"]
    over = peak(prepared.folder, *command) - prepared.floor
    assert over > 0.9 * prepared.weights, "that cannot be: the weights are not even there once"
    assert over < ONCE * prepared.weights


# Its feature maps change in size from layer to layer, so that they fit into no hole that others left.
WITHOUT_HOLES = 1.8
"""Times the weights: 1.3 to 1.6 is measured, 2.1 where two images run at once through memory with holes."""
PREPARE_SMALL = """
import torch
from torchvision import models

state = models.get_model("densenet161", weights=None).state_dict()
torch.save(state, "small.pt")
print(sum(tensor.nbytes for tensor in state.values()))
"""


def test_peak_of_a_network_whose_feature_maps_are_large_beside_its_weights(prepared: Prepared) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PREPARE_SMALL], cwd=prepared.folder, stdout=subprocess.PIPE, check=True
    )
    command = ["-m", "asymswap", "convert", "small.pt", "--arch", "densenet161", "--recipe", "3x3-only"]
    assert peak(prepared.folder, *command) - prepared.floor < WITHOUT_HOLES * int(done.stdout)
