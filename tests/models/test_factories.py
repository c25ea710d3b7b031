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
from asymswap.cli.options import parse_pairs
from asymswap.errors import CheckpointError, SourceError
from asymswap.models import factories
from asymswap.models.opening import is_file_reference, open_model
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

class Passes(Net):
    def __init__(self, *, only=None, **more):
        super().__init__(**more)

def passes(depth=1, **more):
    return Net(**more)

def by_place(width=4, /):
    return Net(width)

def asks(depth, **more):
    return Net()

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

DIGITS = """
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 5, padding=2)
        self.next = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 10)

    def forward(self, x):
        return self.head(self.next(self.conv(x).relu()).relu().mean((2, 3)))
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


def test_a_file_that_is_named_is_run(nets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = list(sys.path)
    opened = open_model(f"{NAME}:Net", arguments={"width": 5})
    assert opened.model.get_submodule("conv").out_channels == 5
    assert opened.origin == Origin(f"{NAME}:Net", {"width": 5})
    assert opened.notes[0] == "built by running nets@home/net.py"
    assert Path("canary").exists()
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "net.py was run\n")
    # What lies beside the file is found for as long as it runs, and never before what was there.
    assert sys.path == [*before, str(nets)]
    assert not list(nets.glob("net*.pyc"))


def test_a_file_that_has_changed_is_read_again(nets: Path) -> None:
    assert open_model(f"{NAME}:Net").model.get_submodule("conv").out_channels == 4
    (nets / "net.py").write_text(NET.replace("width=4", "width=7"))
    assert open_model(f"{NAME}:Net").model.get_submodule("conv").out_channels == 7


@pytest.mark.parametrize(("attribute", "width"), [("Net", 4), ("Net.wide", 8), ("ready", 6)])
def test_what_may_be_named(attribute: str, width: int, nets: Path) -> None:
    assert open_model(f"{nets}/net.py:{attribute}").model.get_submodule("conv").out_channels == width


@pytest.mark.parametrize(
    ("reference", "arguments", "expected"),
    [
        ("no.py:Net", {}, r"no\.py of 'no\.py:Net' does not exist; give PATH\.py:NAME"),
        ("folder.py:Net", {}, r"folder\.py of 'folder\.py:Net' is a folder, not a Python file"),
        (NAME, {}, r"say what in it builds the model, as nets@home/net\.py:Net; it defines Net, Needy, Passes"),
        (f"{NAME}:", {}, r"say what in it builds the model, as nets@home/net\.py:Net"),
        (f"{NAME}:net", {}, r"nets@home/net\.py has no callable 'net'; did you mean Net"),
        (f"{NAME}:Net.wyde", {}, r"nets@home/net\.py has no callable 'Net\.wyde'"),
        (f"{NAME}:_private", {}, r"has no callable '_private'"),
        (f"{NAME}:Needy", {"width": 3}, r"missing a required argument: 'depth'; give the arguments depth=…"),
        (f"{NAME}:Needy", {}, r"missing a required argument: 'depth'; give the arguments depth=…, width=…"),
        (f"{NAME}:Net", {"widht": 3}, r"unexpected keyword argument 'widht'; did you mean width\?"),
        (f"{NAME}:Passes", {"widht": 3}, r"Passes failed: TypeError: .* argument 'widht' .*; did you mean width\?$"),
        (f"{NAME}:passes", {"widht": 3}, r"passes failed: TypeError: .* argument 'widht' .*; did you mean width\?$"),
        (f"{NAME}:by_place", {"width": 3}, r"'width' parameter is positional only, .*; it takes none$"),
        (f"{NAME}:asks", {"width": 3}, r"missing a required argument: 'depth'; give the arguments depth=…$"),
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
        open_model(reference, arguments=arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("reference", ["resnet18", "timm:resnet10t"])
def test_an_argument_that_a_builder_hands_on_in_vain(reference: str) -> None:
    if reference.startswith("timm"):
        pytest.importorskip("timm")
    with pytest.raises(SourceError, match=r"argument 'num_clases'; did you mean num_classes(, norm_layer)?\?$"):
        open_model(reference, weights="none", arguments={"num_clases": 3})


def test_a_file_that_fails_leaves_no_module_behind(nets: Path) -> None:
    Path("bad.py").write_text("1 / 0")
    with pytest.raises(SourceError, match="ZeroDivisionError"):
        open_model("bad.py:Net")
    assert "bad.py" not in sys.modules


def test_weights_for_a_network_of_a_file(nets: Path) -> None:
    model = open_model(f"{NAME}:Net").model
    torch.save({"state_dict": model.state_dict()}, "w.pt")
    for name, request in (
        ("w.pt", {"arch": f"{NAME}:Net"}),
        (f"{NAME}:Net", {"weights": "w.pt"}),
    ):
        opened = open_model(name, **request)
        assert torch.equal(opened.model.get_parameter("conv.weight"), model.get_parameter("conv.weight"))
        assert "built by running nets@home/net.py" in opened.notes


def test_from_file_to_file_and_back(nets: Path) -> None:
    converted = asymswap.convert(
        asymswap.open_model(f"{NAME}:Net", arguments={"width": 8}, input_size=(3, 9, 9)),
        "all-spatial",
        overrides={"rank": 2},
    )
    asymswap.save(converted, "net.asym.pt")
    x = torch.randn(1, 3, 9, 9, generator=torch.Generator().manual_seed(0))
    expected = converted.model.eval()(x)
    Path("canary").unlink()
    hint = r"built by nets@home/net\.py:Net, which is code or a file of yours; load it with asymswap\.load\(path, "
    hint += r'model=Net\(width=8\)\) or give `arch="nets@home/net\.py:Net"`$'
    verbs: list[Callable[[], object]] = [
        lambda: asymswap.load("net.asym.pt"),
        lambda: asymswap.convert("net.asym.pt", plan={"swaps": []}),
        lambda: asymswap.candidates("net.asym.pt"),
        lambda: asymswap.fuse("net.asym.pt"),
        lambda: asymswap.export("net.asym.pt", "net.pt2"),
        lambda: asymswap.evaluate("net.asym.pt", "digits"),
        lambda: asymswap.finetune("net.asym.pt", "digits"),
    ]
    for verb in verbs:
        with pytest.raises(CheckpointError, match=hint):
            verb()
    assert not Path("canary").exists()
    own = factories.UserCode().build(f"{NAME}:Net", {"width": 8})
    assert torch.equal(asymswap.load("net.asym.pt", model=own)(x), expected)
    # By another path, and with the arguments that the checkpoint holds.
    again = asymswap.convert(asymswap.open_model("net.asym.pt", arch=f"{nets}/net.py:Net"), plan={"swaps": []})
    assert torch.equal(again.model(x), expected)


def test_an_argument_that_no_file_can_hold_is_told(nets: Path) -> None:
    (nets / "digits_net.py").write_text(DIGITS.replace("self)", "self, width=8, act=nn.ReLU)", 1))
    arguments = {"width": 8, "act": nn.GELU}
    opened = open_model(f"{nets}/digits_net.py:Net", arguments=arguments, input_size=(1, 8, 8))
    assert opened.origin.arguments == {"width": 8}
    assert opened.notes[1].startswith("a file cannot hold the arguments act=<class")
    asymswap.save(asymswap.convert(opened, "all-spatial", overrides={"rank": 2}), "net.pt")
    assert open_model("net.pt", arch=f"{nets}/digits_net.py:Net", arguments={"act": nn.GELU}).plans


def test_what_is_made_of_known_classes_loads_without_the_file(nets: Path) -> None:
    converted = asymswap.convert(f"{NAME}:plain", "all-spatial", overrides={"rank": 1})
    asymswap.save(converted, "plain.pt")
    (nets / "net.py").unlink()
    assert isinstance(asymswap.load("plain.pt"), nn.Sequential)


def test_the_command_line(nets: Path, run: Run, refusal: Refusal) -> None:
    options = ("--recipe", "all-spatial", "--set", "rank=2", "--set", "allow_growth=true", "--input", "3x9x9")
    done = run("convert", f"{NAME}:Net", "--arg", "width=6", *options, "--json")
    assert done.code == 0, done
    assert json.loads(done.out)["model"]["notes"][0].startswith("built by running nets@home/net.py")
    Path("canary").unlink()
    for command in ("convert", "fuse"):
        line = refusal(command, "Net.asym.pt", *(options if command == "convert" else ()))
        assert (
            f"code or a file of yours; load it with asymswap.load(path, model=Net(width=6)) or give --arch {NAME}:Net"
            in line
        )
    assert not Path("canary").exists()
    fused = run("fuse", "Net.asym.pt", "--separable", "--arch", f"{NAME}:Net", "-q")
    assert (fused.code, Path("Net.fused.pt").exists()) == (0, True)
    listed = run("candidates", f"{NAME}:Net", "--input", "3x9x9")
    assert "Built by running nets@home/net.py." in " ".join(listed.out.split())


def test_a_module_handed_over_goes_on_without_its_class(nets: Path) -> None:
    """Its conversion still knows the unconverted network; a file of it names the class, as a suggestion."""
    (nets / "digits_net.py").write_text(DIGITS)
    given = open_model(f"{nets}/digits_net.py:Net").model
    type(given).__module__ = "digits_net"
    Path("pair.toml").write_text('[[rules]]\nmatch = { kernel = "3x3" }\nswap = { kind = "separable", rank = 2 }\n')
    conversion = asymswap.convert(given, "pair.toml", input_size=(1, 8, 8))
    assert conversion.header.origin == Origin("class:digits_net.Net")
    fed = asymswap.PreprocessingOptions(normalize="none", size=(8, 8))
    fusion = asymswap.fuse(conversion, separable=True)
    assert fusion.report.as_original
    twice = asymswap.convert(conversion, "acnet", input_size=(1, 8, 8))
    assert {row.site: row.outcome for row in asymswap.fuse(twice).report.sites} == {"next": "left", "conv": "fused"}
    assert asymswap.export(asymswap.fuse(twice), "twice.onnx").fused == 0
    tuned = asymswap.finetune(twice, "digits", asymswap.Training(steps=1, batch_size=8, workers=0), preprocessing=fed)
    assert asymswap.export(tuned, "tuned.onnx").fused > 0
    assert len(asymswap.evaluate([conversion, twice, tuned, fusion], "digits", preprocessing=fed).models) == 4
    assert len(asymswap.compare([given, conversion, tuned], input_size=(1, 8, 8)).models) == 3
    assert asymswap.candidates(tuned).rows
    asymswap.save(conversion, "net.asym.pt")
    with pytest.raises(CheckpointError, match=r'model=Net\(\)\) or give `arch="digits_net:Net"`$'):
        asymswap.fuse("net.asym.pt")


@pytest.mark.parametrize(
    ("origin", "expected"),
    [
        ("class:mynet.Net", 'model=Net()) or give `arch="mynet:Net"`'),
        ("class:pkg.nets.Outer.Inner", 'model=Outer.Inner()) or give `arch="pkg.nets:Outer.Inner"`'),
        ("class:__main__.Net", "model=…) or give `arch=…`"),
        ("class:nets.build.<locals>.Net", "model=…) or give `arch=…`"),
        ("nets.py:Net; rm -rf ~", "model=…) or give `arch=…`"),
        ("nets.py:`x`", "model=…) or give `arch=…`"),
        ("torchvision:resnet18", "model=…) or give `arch=…`"),
    ],
)
def test_what_a_checkpoint_is_suggested_to_be_built_by(origin: str, expected: str) -> None:
    assert factories.how_to_build(Origin(origin)) == f"load it with asymswap.load(path, {expected}"


SMP = """
from torch import nn

class Unet(nn.Module):
    def __init__(self, encoder_name="resnet34", encoder_weights="imagenet", channels=(8, 4), activation=None, **more):
        super().__init__()
        assert encoder_weights is None and encoder_name == "mit_b0" and more == {"aux": True, "scale": 0.5}, vars()
        self.layers = nn.Sequential(nn.Conv2d(3, channels[0], 3), nn.Conv2d(*channels, 3))

    def forward(self, x):
        return self.layers(x)
"""


def test_arguments_on_the_command_line_are_values_of_python(nets: Path, run: Run) -> None:
    Path("smp.py").write_text(SMP)
    arguments = ("encoder_weights=None", "encoder_name=mit_b0", "channels=(16, 8)", "aux=true", "scale=0.5")
    given = [word for text in arguments for word in ("--arg", text)]
    listed = run("candidates", "smp.py:Unet", *given, "--input", "3x9x9", "--json")
    assert [site["name"] for site in json.loads(listed.out)["sites"]] == ["layers.0", "layers.1"], listed.err


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("None", None),
        ("none", "none"),
        ("True", True),
        ("true", True),
        ("[true, 2]", [True, 2]),
        ("(2, 2)", (2, 2)),
        ("[3, 4]", [3, 4]),
        ("1e-3", 1e-3),
        ("'5'", "5"),
        ("resnet34", "resnet34"),
        ("a=b", "a=b"),
        ("{'a': 1}", {"a": 1}),
        ("__import__('os')", "__import__('os')"),
    ],
)
def test_the_values_of_arguments(text: str, value: object) -> None:
    assert parse_pairs("--arg", [f"key={text}"], python=True) == {"key": value}
