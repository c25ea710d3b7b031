"""Mistakes are told before torch is loaded, by the same messages as the verbs have."""

from __future__ import annotations

from pathlib import Path

import pytest
from families import known_references
from processes import forked

from asymswap.cli import early
from asymswap.errors import AsymswapError
from asymswap.models.fingerprints import stored_networks

MISTAKES = {
    "convert resnet18 --recipe 3x3-onyl": "did you mean 3x3-only",
    "sweep digits-resnet --recipe half-macs --recipe 3x3-onyl --calibrate digits": "did you mean 3x3-only",
    "convert resnet81 --recipe 3x3-only": "did you mean resnet18",
    "convert resnet81@V1 --recipe 3x3-only": "did you mean resnet18",
    "convert nofile.pt --recipe 3x3-only": "no file nofile.pt",
    "convert no/such/folder --recipe 3x3-only": "no file no/such/folder",
    "convert digits-resnet --recipe half-macs --macs 50": "a fraction, 0.5 keeps half",
    "convert digits-resnet --recipe half-macs --params 0": "above 0 and at most 1",
    "convert resnet18 --recipe 3x3-only --input 1x32x32": "the first conv takes 3 channels; give 3x32x32",
    "convert digits-resnet --recipe 3x3-only --input 3x8x8": "the first conv takes 1 channel; give 1x8x8",
    "convert digits-resnet --recipe half-macs --calibrate nodir/": "neither a known name nor an existing folder",
    "convert digits-resnet --recipe half-macs --evaluate digitz": "did you mean digits?",
    "convert digits-resnet --recipe 3x3-only -o nodir/x.pt": "the folder nodir does not exist",
    "convert digits-resnet --recipe half-macs --latency 0.5 --runtime onnx": "the runtime 'onnx' is unknown",
    "evaluate digits-resnet resnet81 --data digits": "did you mean resnet18",
    "finetune digits-resnet --data digits --epochs -3": "--epochs -3 must be above 0",
    "export nofile.pt": "no file nofile.pt",
}


def test_torch_is_not_loaded_for_a_mistake(tmp_path: Path) -> None:
    code = f"""
import sys, io, contextlib
for name in [name for name in sys.modules if name.split(".")[0] in ("torch", "torchvision")]:
    del sys.modules[name]  # the process that this one comes from has loaded them
class Refused:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torch":
            raise RuntimeError("torch was imported")
sys.meta_path.insert(0, Refused())
for name in [name for name in sys.modules if name.startswith("asymswap")]:
    del sys.modules[name]
from asymswap.cli.main import app
from asymswap.cli import options
for line, expected in {MISTAKES!r}.items():
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.suppress(SystemExit):
        sys.argv = ["asymswap", *line.split()]
        app()
    assert expected in said.getvalue(), (line, said.getvalue())
    assert said.getvalue().startswith("error: ") and said.getvalue().count("\\n") == 1, (line, said.getvalue())
"""
    done = forked(code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "reference",
    ["resnet18", "resnet18@IMAGENET1K_V1", "torchvision:resnet18", "cifar:resnet20", "digits-resnet", "timm:resnet18",
     "quantized_resnet18", "pkg.mod:factory", "net.py:Net", "nets@home/net.py:Net", "ultralytics:yolov8n",
     "ultralytics:path/to/own.yaml", "timm:hf-hub:somebody/net"],
)  # fmt: skip
def test_what_may_be_right_is_left_to_the_verbs(reference: str) -> None:
    early.check({"model": reference, "models": [reference], "recipe": "3x3-only", "macs": 0.5, "data": "digits"})


def test_every_builder_that_can_be_opened_passes() -> None:
    for reference in known_references():
        early.check({"model": reference})
    assert set(stored_networks()) <= set(known_references())


def test_channels_can_be_given_to_the_builder() -> None:
    early.check({"model": "resnet18", "input_size": "1x32x32", "arguments": ["in_channels=1"]})
    with pytest.raises(AsymswapError, match="the first conv takes 3"):
        early.check({"model": "resnet18", "input_size": "1x32x32"})


def test_the_nearest_option_is_named(tmp_path: Path) -> None:
    for line, expected in {
        "convert digits-resnet --recipie x": "did you mean --recipe?",
        "convert digits-resnet --images 9": "did you mean --calibration-images or --polish-images?",
        "convert digits-resnet --xyzzy 9": "convert --help-all lists all",
        "export x.pt --to onx": "'onx' is not one of 'onnx'",
        "convrt x": "Did you mean 'convert'?",
    }.items():
        done = forked("from asymswap.cli.main import main\nmain()", *line.split(), cwd=tmp_path)
        said = " ".join(done.stderr.replace("│", " ").split())
        assert done.returncode == 2
        assert expected in said
        assert "Value error" not in said
