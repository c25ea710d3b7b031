"""Models that the user's own code builds: what is run, when, and how it fails."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import asymswap
from asymswap.errors import CheckpointError, SourceError
from asymswap.models import factories
from asymswap.models.opening import open_model
from asymswap.models.references import is_file_reference
from asymswap.types import Origin

pytestmark = pytest.mark.usefixtures("one_thread")

Run = Callable[..., Any]
Refusal = Callable[..., str]

NET = """
from pathlib import Path
import torch
from torch import nn
from layers_beside import conv

print("net.py was run")
Path("canary").touch()

class Net(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.conv = conv(3, width)
        self.head = conv(width, 2)

    def forward(self, x):
        return self.head(self.conv(x).relu()).mean((2, 3))

    @classmethod
    def wide(cls):
        return cls(8)

class Needy(Net):
    def __init__(self, depth, width):
        super().__init__(width)

def returns_text():
    return "net"

def fails():
    raise ValueError("two\\nlines")

def plain():
    return nn.Sequential(conv(3, 4))

ready = Net(6)
_private = 1
"""
BESIDE = """
from torch import nn

def conv(a, b):
    return nn.Conv2d(a, b, 3, padding=1)
"""


@pytest.fixture
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a Python file and one that it imports, below the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    sys.modules.pop("layers_beside", None)
    folder = tmp_path / "nets@home"
    folder.mkdir()
    (folder / "net.py").write_text(NET)
    (folder / "layers_beside.py").write_text(BESIDE)
    return folder


TRUSTED = {"trust_code": True}
NAME = "nets@home/net.py"


@pytest.mark.parametrize(
    ("reference", "is_code", "is_python_file"),
    [
        ("package.module:callable", True, False),
        ("net.py:Net", True, True),
        ("path/to/net.py:Net", True, True),
        ("path/to/net.py:Net.wide", True, True),
        (r"C:\nets\net.py:Net", True, True),
        (r"C:\nets\net.py", True, True),
        ("C:/nets/NET.PY:Net", True, True),
        ("net.py", True, True),
        ("resnet18", False, False),
        ("torchvision:resnet18", False, False),
        ("timm:resnet18", False, False),
        ("cifar:no-such", False, False),
        ("model.pt", False, False),
    ],
)
def test_what_names_code(reference: str, is_code: bool, is_python_file: bool) -> None:
    assert factories.names_code(reference) is is_code
    assert factories.names_python_file(reference) is is_python_file
    if is_python_file:
        assert not is_file_reference(reference)


@pytest.mark.parametrize(
    "path", [r"C:\weights\model.pt", r"D:model.safetensors", "C:/weights/model.pt", r"C:\weights\model"]
)
def test_a_drive_letter_makes_no_reference_to_code(path: str) -> None:
    assert is_file_reference(path)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("a/net.py:Net", "../b/net.py:Net", True),
        (r"C:\a\net.py:Net", "net.py:Net", True),
        ("net.py:Net", "net.py:Other", False),
        ("net.py:Net", "ten.py:Net", False),
        ("net:Net", "net.py:Net", False),
        ("net:Net", "net:Net", True),
        ("a.net:Net", "b.net:Net", False),
    ],
)
def test_when_a_callable_is_named_again(one: str, other: str, same: bool) -> None:
    assert factories.same_callable(one, other) is same
    assert factories.same_callable(other, one) is same


def test_a_file_is_not_run_unless_it_is_trusted(nets: Path) -> None:
    with pytest.raises(SourceError, match=r"is built by running nets@home/net\.py, which can then do whatever you can"):
        open_model(f"{NAME}:Net")
    torch.save({"conv.weight": torch.zeros(1)}, "w.pt")
    with pytest.raises(SourceError, match=r"if you trust it say `trust_code=True`$"):
        open_model("w.pt", arch=f"{NAME}:Net", trust_pickle=True)
    assert not Path("canary").exists()


def test_a_trusted_file_is_run(nets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = list(sys.path)
    opened = open_model(f"{NAME}:Net", arguments={"width": 5}, trust_code=True)
    assert opened.model.get_submodule("conv").out_channels == 5
    assert opened.origin == Origin(f"{NAME}:Net", {"width": 5})
    assert opened.notes[0] == "built by running nets@home/net.py, which `trust_code=True` allowed"
    assert Path("canary").exists()
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "net.py was run\n")
    # What lies beside the file is found for as long as it runs, and never before what was there.
    assert sys.path == [*before, str(nets)]
    assert not list(nets.glob("net*.pyc"))


def test_a_file_that_has_changed_is_read_again(nets: Path) -> None:
    assert open_model(f"{NAME}:Net", **TRUSTED).model.get_submodule("conv").out_channels == 4
    (nets / "net.py").write_text(NET.replace("width=4", "width=7"))
    assert open_model(f"{NAME}:Net", **TRUSTED).model.get_submodule("conv").out_channels == 7


@pytest.mark.parametrize(("attribute", "width"), [("Net", 4), ("Net.wide", 8), ("ready", 6)])
def test_what_may_be_named(attribute: str, width: int, nets: Path) -> None:
    assert open_model(f"{nets}/net.py:{attribute}", **TRUSTED).model.get_submodule("conv").out_channels == width


@pytest.mark.parametrize(
    ("reference", "arguments", "expected"),
    [
        ("no.py:Net", {}, r"no\.py of 'no\.py:Net' does not exist; give PATH\.py:NAME"),
        ("folder.py:Net", {}, r"folder\.py of 'folder\.py:Net' is a folder, not a Python file"),
        (NAME, {}, r"say what in it builds the model, as nets@home/net\.py:Net; it defines Net, Needy, returns_text"),
        (f"{NAME}:", {}, r"say what in it builds the model, as nets@home/net\.py:Net"),
        (f"{NAME}:net", {}, r"nets@home/net\.py has no callable 'net'; did you mean Net"),
        (f"{NAME}:Net.wyde", {}, r"nets@home/net\.py has no callable 'Net\.wyde'"),
        (f"{NAME}:_private", {}, r"has no callable '_private'"),
        (f"{NAME}:Needy", {"width": 3}, r"missing a required argument: 'depth'; give the arguments depth=…"),
        (f"{NAME}:Needy", {}, r"missing a required argument: 'depth'; give the arguments depth=…, width=…"),
        (f"{NAME}:Net", {"widht": 3}, r"unexpected keyword argument 'widht'; did you mean width\?"),
        (f"{NAME}:plain", {"q": 3}, r"unexpected keyword argument 'q'; it takes none"),
        (f"{NAME}:ready", {"width": 3}, r":ready is a module already, so the argument width changes nothing"),
        (f"{NAME}:returns_text", {}, r"net\.py:returns_text returned a str, not an nn\.Module"),
        (f"{NAME}:fails", {}, r"net\.py:fails failed: ValueError: two lines \(`debug=True` shows where\)"),
        ("bad.py:Net", {}, r"cannot run bad\.py of 'bad\.py:Net': SyntaxError: "),
        ("bad.py", {}, r"bad\.py is Python code: say what in it builds the model, as bad\.py:NAME$"),
        ("leaves.py:Net", {}, r"cannot run leaves\.py of 'leaves\.py:Net': SystemExit: 3"),
        ("lacks.py:Net", {}, r"cannot run lacks\.py of 'lacks\.py:Net': ModuleNotFoundError: .*no_such_module"),
        (
            "package/inner.py:Net",
            {},
            r"inner\.py imports from the package that it belongs to: name it as a module, package\.inner:Net,",
        ),
        ("timn:resnet18", {}, r"no module named 'timn'; did you mean timm\?"),
    ],
)
def test_code_that_builds_nothing(reference: str, arguments: dict[str, int], expected: str, nets: Path) -> None:
    Path("folder.py").mkdir()
    Path("bad.py").write_text("class Net(:")
    Path("leaves.py").write_text("import sys; sys.exit(3)")
    Path("lacks.py").write_text("import no_such_module")
    Path("package").mkdir()
    Path("package/inner.py").write_text("from .other import Net")
    with pytest.raises(SourceError, match=expected) as caught:
        open_model(reference, arguments=arguments, trust_code=True)
    assert "\n" not in str(caught.value)


def test_a_file_that_fails_leaves_no_module_behind(nets: Path) -> None:
    Path("bad.py").write_text("1 / 0")
    with pytest.raises(SourceError, match="ZeroDivisionError"):
        open_model("bad.py:Net", **TRUSTED)
    assert "bad.py" not in sys.modules


def test_weights_for_a_network_of_a_file(nets: Path) -> None:
    model = open_model(f"{NAME}:Net", **TRUSTED).model
    torch.save({"state_dict": model.state_dict()}, "w.pt")
    for name, request in (
        ("w.pt", {"arch": f"{NAME}:Net", "trust_code": True}),
        (f"{NAME}:Net", {"weights": "w.pt", "trust_code": True}),
    ):
        opened = open_model(name, **request)
        assert torch.equal(opened.model.get_parameter("conv.weight"), model.get_parameter("conv.weight"))
        assert "built by running nets@home/net.py, which `trust_code=True` allowed" in opened.notes


def test_from_file_to_file_and_back(nets: Path) -> None:
    converted = asymswap.convert(
        asymswap.open_model(f"{NAME}:Net", arguments={"width": 8}, input_size=(3, 9, 9), trust_code=True),
        "all-spatial",
        overrides={"rank": 2},
    )
    asymswap.save(converted, "net.asym.pt")
    x = torch.randn(1, 3, 9, 9, generator=torch.Generator().manual_seed(0))
    expected = converted.model.eval()(x)
    Path("canary").unlink()
    with pytest.raises(CheckpointError, match=r"built by nets@home/net\.py:Net, which is code of yours; load it with"):
        asymswap.load("net.asym.pt")
    with pytest.raises(SourceError, match="`trust_code=True`"):
        asymswap.convert(asymswap.open_model("net.asym.pt", arch=f"{NAME}:Net"), plan={"swaps": []})
    assert not Path("canary").exists()
    own = factories.UserCode(trust_code=True).build(f"{NAME}:Net", {"width": 8})
    assert torch.equal(asymswap.load("net.asym.pt", model=own)(x), expected)
    # By another path, and with the arguments that the checkpoint holds.
    again = asymswap.convert(
        asymswap.open_model("net.asym.pt", arch=f"{nets}/net.py:Net", trust_code=True), plan={"swaps": []}
    )
    assert torch.equal(again.model(x), expected)


def test_what_is_made_of_known_classes_loads_without_the_file(nets: Path) -> None:
    converted = asymswap.convert(
        asymswap.open_model(f"{NAME}:plain", trust_code=True), "all-spatial", overrides={"rank": 1}
    )
    asymswap.save(converted, "plain.pt")
    (nets / "net.py").unlink()
    assert isinstance(asymswap.load("plain.pt"), nn.Sequential)


def test_the_command_line(nets: Path, run: Run, refusal: Refusal) -> None:
    options = ("--recipe", "all-spatial", "--set", "rank=2", "--set", "allow_growth=true", "--input", "3x9x9")
    assert "if you trust it" in refusal("convert", f"{NAME}:Net", *options)
    done = run("convert", f"{NAME}:Net", "--trust-code", *options, "--json")
    assert done.code == 0, done
    assert json.loads(done.out)["model"]["notes"][0].startswith("built by running nets@home/net.py")
    assert "code of yours" in refusal("convert", "Net.asym.pt", *options)
    assert "if you trust it" in refusal("fuse", "Net.asym.pt", "--separable", "--arch", f"{NAME}:Net")
    fused = run("fuse", "Net.asym.pt", "--separable", "--arch", f"{NAME}:Net", "--trust-code", "-q")
    assert (fused.code, Path("Net.fused.pt").exists()) == (0, True)
    listed = run("candidates", f"{NAME}:Net", "--trust-code", "--input", "3x9x9")
    assert "Built by running nets@home/net.py, which " in " ".join(listed.out.split())
