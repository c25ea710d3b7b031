"""What cannot be done ends with one clear line on stderr, exit code 1, and leaves nothing behind."""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
import sys
import urllib.error
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import build
from safetensors.torch import save_file
from torch import fx, nn

CONVERT = ("convert", "digits-resnet", "--recipe", "3x3-only")
MODEL = "model.pt"
READERS = {
    "convert": ("convert", MODEL, "--recipe", "3x3-only", "-o", "out.pt"),
    "candidates": ("candidates", MODEL),
    "show": ("show", MODEL),
    "weights": ("candidates", "digits-resnet", "--weights", MODEL),
}
each_reader = pytest.mark.parametrize("reader", READERS)

Refusal = Callable[..., str]
Run = Callable[..., Any]
State = dict[str, torch.Tensor]


class Trap:
    """Unpickled, it would make a file: what a hostile checkpoint could do."""

    def __reduce__(self) -> Any:
        return os.system, ("echo > sprung",)


def digits_state() -> State:
    return build("digits-resnet", {}).state_dict()


def save_zip(value: Any) -> None:
    torch.save(value, MODEL)


def save_legacy(value: Any) -> None:
    torch.save(value, MODEL, _use_new_zipfile_serialization=False)


def save_plain(value: Any, protocol: int | None = None) -> None:
    Path(MODEL).write_bytes(pickle.dumps(value, protocol))


def save_other_zip() -> None:
    with zipfile.ZipFile(MODEL, "w") as archive:
        archive.writestr("word/document.xml", "<w:document/>")


def save_torchscript() -> None:
    torch.jit.save(torch.jit.script(nn.Sequential(nn.Conv2d(3, 4, 3))), MODEL)


def save_exported() -> None:
    program = torch.export.export(nn.Sequential(nn.Conv2d(3, 4, 3)), (torch.zeros(1, 3, 8, 8),))
    torch.export.save(program, "model.pt2")
    Path("model.pt2").rename(MODEL)


def save_graph_module() -> None:
    torch.save(fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 4, 3))), MODEL)


NOT_CHECKPOINTS: dict[str, tuple[Callable[[], object], str]] = {
    "missing": (lambda: None, r"no file model\.pt; give (a path that exists or a model|an asymswap checkpoint)"),
    "folder": (lambda: Path(MODEL).mkdir(), r"model\.pt is a folder; give the checkpoint file in it"),
    "empty": (lambda: Path(MODEL).touch(), r"model\.pt is empty \(0 bytes\); write or download it again"),
    "text": (lambda: Path(MODEL).write_text("my notes\n"), r"model\.pt is text, not a checkpoint; give a \.pt"),
    "HTML": (lambda: Path(MODEL).write_text("<!DOCTYPE html>"), r"model\.pt is a web page, not a checkpoint"),
    "LFS": (lambda: Path(MODEL).write_text("version https://git-lfs.github.com/spec/v1"), r"git lfs pull"),
    "HDF5": (lambda: Path(MODEL).write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(99)), r"an HDF5 file \(Keras\?\)"),
    "binary": (lambda: Path(MODEL).write_bytes(bytes(range(256))), r"binary data of an unknown kind"),
    "other zip": (save_other_zip, r"a zip archive of something else \(it holds word/document\.xml\); give a \.pt"),
    "TorchScript": (save_torchscript, r"a state_dict of an unknown architecture|does not fit digits-resnet: missing"),
    "torch.export": (save_exported, r"a state_dict of an unknown architecture|does not fit digits-resnet: missing"),
    "GraphModule": (save_graph_module, r"needs .*fx\.graph_module\.reduce_graph_module, outside of the allowlist"),
    "trap": (lambda: save_zip(Trap()), r"needs posix\.system, outside of the allowlist; nothing of it was executed"),
    "nested trap": (lambda: save_zip({"state_dict": digits_state(), "x": Trap()}), r"needs posix\.system, outside"),
    "legacy trap": (lambda: save_legacy({"x": Trap()}), r"needs posix\.system, outside of the allowlist"),
    "plain trap": (lambda: save_plain(Trap()), r"is a pickle that needs posix\.system, outside of the allowlist"),
    "old plain trap": (lambda: save_plain(Trap(), 0), r"is text, not a checkpoint"),
    "list": (lambda: save_zip([1, 2]), r"model\.pt holds a list, neither a state_dict nor a module"),
    "nothing": (lambda: save_zip({}), r"model\.pt holds no state_dict: looked under .*; it holds nothing"),
    "numbered": (lambda: save_zip({0: torch.ones(1)}), r"model\.pt holds no state_dict: .*; it holds 0"),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated")
@each_reader
@pytest.mark.parametrize("name", NOT_CHECKPOINTS)
def test_no_checkpoint(name: str, reader: str, refusal: Refusal) -> None:
    make, expected = NOT_CHECKPOINTS[name]
    make()
    said = refusal(*READERS[reader])
    assert re.search(expected, said) or (reader == "show" and "is not an asymswap checkpoint" in said)
    assert not Path("sprung").exists()


def test_the_trap_is_one(run: Any) -> None:
    save_zip(Trap())
    assert run("candidates", MODEL, "--trust-pickle").code == 1
    assert Path("sprung").exists()


@each_reader
@pytest.mark.parametrize("kept", [0.001, 0.01, 0.1, 0.5, 0.9, 0.9999])
@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
def test_cut_off(form: str, kept: float, reader: str, refusal: Refusal) -> None:
    state = digits_state()
    {"zip": save_zip, "legacy": save_legacy, "safetensors": lambda state: save_file(state, MODEL)}[form](state)
    whole = Path(MODEL).read_bytes()
    Path(MODEL).write_bytes(whole[: int(kept * len(whole))])
    assert re.search(r"model\.pt is (cut off|.*damaged)", refusal(*READERS[reader]))


@pytest.mark.parametrize(
    ("arch", "expected"),
    [
        ("resnet18", r"does not fit torchvision:resnet18: missing: layer2\.0\.downsample\.0\.weight, .*; "
                     r"conv1\.weight is 24x1x3x3, the model's 64x3x7x7.*; nearest known architecture: digits-resnet"),
        ("resnet19", r"resnet19.* names no known architecture; did you mean resnet18, "),
        ("resnet20", r"resnet20.* names no known architecture; did you mean cifar:resnet20, "),
        ("cifar:resnet21", r"names no known architecture; did you mean cifar:resnet\d\d, "),
        ("nothing-like-it", r"names no known architecture; known are torchvision's names, timm:…, cifar:…"),
        ("no_such_module:net", r"cannot import 'no_such_module' of 'no_such_module:net': no module named"),
    ],
)  # fmt: skip
def test_wrong_architecture(arch: str, expected: str, refusal: Refusal) -> None:
    save_zip(digits_state())
    assert re.search(expected, refusal(*READERS["convert"], "--arch", arch))


def test_unknown_architecture(refusal: Refusal) -> None:
    save_zip({"a.weight": torch.ones(3, 3), "b.weight": torch.ones(4)})
    said = refusal(*READERS["candidates"])
    assert re.search(r"an unknown architecture; name it with .*; nearest known: .* missing: ", said)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda t: t.fill_(float("nan")), r"cannot be converted: 'conv1\.weight' holds NaN; use another checkpoint"),
        (lambda t: t.fill_(float("inf")), r"'conv1\.weight' holds infinity"),
        (lambda t: t.to(torch.int8), r"model\.pt cannot be used: 'conv1\.weight' is of dtype int8"),
        (lambda t: t.to("meta"), r"'conv1\.weight' is on the meta device and holds no numbers"),
        (lambda t: t.to_sparse(), r"'conv1\.weight' is sparse"),
        (lambda t: t[:3], r"does not fit digits-resnet: conv1\.weight is 3x1x3x3, the model's 24x1x3x3"),
    ],
)
def test_unusable_weights(change: Callable[[torch.Tensor], torch.Tensor], expected: str, refusal: Refusal) -> None:
    state = digits_state()
    save_zip({**state, "conv1.weight": change(state["conv1.weight"].clone())})
    assert re.search(expected, refusal(*READERS["convert"], "--arch", "digits-resnet"))


@each_reader
def test_no_conv(reader: str, refusal: Refusal) -> None:
    save_zip(nn.Sequential(nn.Linear(3, 3)))
    expected = {
        "show": "is not an asymswap checkpoint; `asymswap convert` writes them",
        "weights": "holds a whole module; give it as the model instead of as --weights",
    }
    said = refusal(*READERS[reader])
    assert said.endswith(expected.get(reader, "has no Conv2d, so there is nothing to swap"))


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ("4x8x8", r"--input 4x8x8 does not suit digits-resnet: the first conv takes 1 channel; give 1x8x8"),
        ("224", r"--input '224' is not channels x height x width, such as 3x224x224"),
        ("1xax8", r"--input '1xax8' is not channels x height x width"),
        ("1x0x8", r"--input '1x0x8' is not channels x height x width"),
        ("1x-8x8", r"--input '1x-8x8' is not channels x height x width"),
        ("1x9000000x9000000", r"not enough memory; use a smaller model or --input"),
    ],
)
def test_wrong_input_size(size: str, expected: str, refusal: Refusal) -> None:
    assert re.search(expected, refusal(*CONVERT, "--input", size))


def test_too_small_an_input(refusal: Refusal) -> None:
    said = refusal("candidates", "squeezenet1_1", "--weights", "none", "--input", "3x8x8")
    assert re.search(r"the model does not run on an input of 1x3x8x8: .*too small", said)


RECIPES = {
    "syntax": ("[[rules]]\nswap = {\n", r"r\.toml: not valid TOML: .*\(at .*\)"),
    "syntax in a line": ("summary = ''\n\nrules = ?\n", r"r\.toml: not valid TOML: .*\(at line 3, column 9\)"),
    "empty": ("", r"r\.toml: rules: Field required"),
    "kind": ("[[rules]]\nswap = { kind = 'separabel' }", r"rule 1: unknown kind 'separabel'; did you mean separable\?"),
    "key": ("rule = []\n[[rules]]\nkeep = true", r"r\.toml: unknown key 'rule'; did you mean rules\?"),
    "rule's key": ("[[rules]]\nmach = {}\nkeep = true", r"unknown key 'mach' in rule 1; did you mean match\?"),
    "setting": ("[[rules]]\nswap = { kind = 'separable', ratoi = 1 }", r"unknown key 'ratoi'; did you mean ratio\?"),
    "nothing": ("[[rules]]\nmatch = { names = 'x' }\nkeep = true", r"rule 1 matches none of the model's 9 Conv2d "),
    "budget": (
        "[[rules]]\nmatch.kernel = 3\nswap.kind = 'separable'\n[budget]\nmacs = 0.01",
        r"the budget of 0\.01 of the model's MACs cannot be reached: .*; ask for at least 0\.\d\d\d",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_wrong_recipe(name: str, refusal: Refusal) -> None:
    text, expected = RECIPES[name]
    Path("r.toml").write_text(text)
    assert re.search(expected, refusal("convert", "digits-resnet", "--recipe", "r.toml"))
    if name != "budget":
        assert re.search(expected, refusal("candidates", "digits-resnet", "--recipe", "r.toml"))


SWEEP = ("sweep", "digits-resnet", "--recipe", "half-macs", "--evaluate", "digits")
USAGE = {
    "no recipe": ((*CONVERT[:2],), r"give --recipe or --plan; `asymswap recipes` lists the recipes"),
    "unknown recipe": ((*CONVERT[:3], "3x3-onli"), r"no recipe '3x3-onli'; did you mean 3x3-only\?"),
    "recipe and plan": ((*CONVERT, "--plan", "p.json"), "give either --recipe or --plan, not both"),
    "nothing to choose": ((*CONVERT[:3], "acnet", "--macs", "0.5"), "no rule's kind has sizes; leave the budget out"),
    "missing recipe file": ((*CONVERT[:3], "mine.toml"), r"no recipe file mine\.toml; shipped recipes: 3x3-only, "),
    "setting": ((*CONVERT, "--set", "rnak=3"), r"no rule of the recipe has a setting 'rnak'; did you mean rank\?"),
    "no setting": ((*CONVERT, "--set", "rank"), r"--set 'rank' is not key=value"),
    "a runtime that is none": ((*CONVERT, "--latency", "0.8", "--runtime", "openvno"), r"did you mean openvino\?"),
    "a latency that is none": ((*CONVERT, "--latency", "fast"), "give a fraction above 0 and at most 1"),
    "a runtime for nothing": ((*CONVERT, "--runtime", "openvino"), "such as --runtime, go with --latency or --time"),
    "two budgets": ((*CONVERT, "--macs", "0.5", "--params", "0.5"), "--macs 0.5 and --params 0.5 are two; give one"),
    "budget": ((*CONVERT, "--macs", "2"), r"--macs 2 is not above 0 and at most 1: a fraction, 0\.5 keeps half"),
    "unreachable": ((*CONVERT, "--macs", "0.001"), r"cannot be reached: .* 0\.\d+ is left; ask for at least 0\.\d+"),
    "report": ((*CONVERT, "--report", "r.txt"), r"report r\.txt: the file must end in \.html, \.json or \.md"),
    "ending": ((*CONVERT, "-o", "x.onnx"), r"x\.onnx must end in \.pt, \.pth, \.safetensors"),
    "one file": (
        (*CONVERT, "--report", "r.json", "--write-plan", "./r.json"),
        r"--report and --write-plan both name .*r\.json; give them two files",
    ),
    "plan over model": (
        (*CONVERT, "-o", "x.pt", "--write-plan", "x.pt"),
        r"-o and --write-plan both name x\.pt; give them two files",
    ),
    "sweep over itself": (
        (*SWEEP, "-o", "s.html", "--report", "s.html"),
        r"-o and --report s\.html both name s\.html; give them two files",
    ),
    "seed": ((*CONVERT, "--seed", "99999999999999999999"), r"the seed 9{20} is out of range; give one from 0 to \d+"),
    "data": ((*CONVERT, "--evaluate", "digts"), r"data 'digts' is neither a known name nor an existing folder"),
    "arch": ((*CONVERT, "--arch", "resnet18"), r"goes with a file, and 'digits-resnet' names a network itself"),
    "plan": ((*CONVERT[:2], "--plan", "no.json"), r"cannot read the plan no\.json: No such file or directory"),
    "argument": ((*CONVERT, "--weights", "none", "--arg", "classes=3"), r"'classes'; did you mean num_classes"),
    "value": ((*CONVERT, "--weights", "none", "--arg", "num_classes=-1"), r"does not take \{'num_classes': -1\}: "),
    "too long": (("candidates", "x" * 300), r"no model 'x+', and no such file"),
    "offsets and report": (("show", "digits-resnet", "--offsets", "--report", "r.md"), "--report is about the "),
    "draw and plan": (("show", "digits-resnet", "--draw", "o.svg", "--plan"), "--plan is about the conversion, --off"),
    "data and report": (("show", "digits-resnet", "--data", "digits", "--report", "r.md"), "--report is about"),
    "report exists": ((*CONVERT, "--report", __file__), r"exists already; give another name"),
    "plan exists": ((*CONVERT, "--write-plan", __file__), r"exists already; give another name"),
    "plot of no form": (("candidates", "digits-resnet", "--plot", __file__), r"the file must end in \.svg or \.png"),
    "long output": ((*CONVERT, "-o", "x" * 300 + ".pt"), r"cannot be the name of a file: File name too long"),
}  # fmt: skip


@pytest.mark.parametrize("name", USAGE)
def test_wrong_usage(name: str, refusal: Refusal) -> None:
    arguments, expected = USAGE[name]
    assert re.search(expected, refusal(*arguments))


MODELS = {
    "resnet19": r"no model 'resnet19', and no such file; did you mean resnet18, ",
    "cifar:resent20": r"no model 'cifar:resent20', and no such file; did you mean cifar:resnet20, ",
    "resnet20": r"no model 'resnet20', and no such file; did you mean cifar:resnet20, ",
    "nothing-like-it": r"no such file; known are torchvision's names, timm:…, cifar:…, digits-resnet, module:factory",
    "cifar:resnet20": r"has no published weights; use .* for random weights or .* for a state_dict",
    "resnet18@IMAGENET1K_V9": r"torchvision's resnet18 has no weights 'IMAGENET1K_V9'.*; did you mean IMAGENET1K_V1\?",
    "digits-resnet@V1": r"digits-resnet has one set of weights",
    "no_such_module:net": r"cannot import 'no_such_module' of 'no_such_module:net': no module named 'no_such_module'",
    ":net": r"cannot import '' of ':net': ValueError",
    "json:dumped": r"json has no callable 'dumped'; did you mean dump, dumps\?",
    "json:dumps": r"json:dumps cannot be called with \{\}: missing a required argument: 'obj'",
    "platform:node": r"platform:node returned a str, not an nn\.Module",
}


@pytest.mark.parametrize("name", MODELS)
def test_wrong_model(name: str, refusal: Refusal) -> None:
    assert re.search(MODELS[name], refusal("convert", name, "--recipe", "3x3-only"))
    assert re.search(MODELS[name], refusal("candidates", name))


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("def net(): raise KeyError('width')", r"user_net:net failed: KeyError: 'width' \(--debug shows where\)"),
        ("def net(): exit(3)", r"user_net:net failed: SystemExit: 3"),
        ("def net(:", r"cannot import 'user_net' of 'user_net:net': SyntaxError: "),
        ("import no_such_module", r"cannot import 'user_net' of 'user_net:net': ModuleNotFoundError: .*no_such_module"),
    ],
)
def test_failing_factory(code: str, expected: str, refusal: Refusal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "user_net", raising=False)
    Path("user_net.py").write_text(code)
    assert re.search(expected, refusal("candidates", "user_net:net"))


def test_no_network_and_no_cached_weights(refusal: Refusal, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def unreachable(*_: object) -> None:
        raise urllib.error.URLError(OSError(-2, "Name or service not known"))

    cache = tmp_path / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.urlopen", unreachable)
    for command in (("convert", "resnet18", "--recipe", "3x3-only"), ("candidates", "resnet18")):
        said = refusal(*command)
        assert f"the weights IMAGENET1K_V1 of resnet18 are not in {cache} and cannot be downloaded" in said
        assert re.search("use .* for random weights or .* for a state_dict", said)


@pytest.mark.parametrize("content", [b"", b"<html>", b"PK"])
def test_damaged_cached_weights(
    content: bytes, refusal: Refusal, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cached = tmp_path / "hub" / "checkpoints" / "resnet18-f37072fd.pth"
    cached.parent.mkdir(parents=True)
    cached.write_bytes(content)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    said = refusal("candidates", "resnet18")
    assert re.search(rf"cannot load {cached} into resnet18: .*; delete that file if it is damaged", said)


def swapped(**changes: object) -> dict[str, object]:
    return {"site": "layer1.0.conv1", "kind": "separable", "settings": {"rank": 4}, **changes}


PLANS: dict[str, tuple[object, str]] = {
    "syntax": ("{", r"plan\.json is not a plan: Invalid JSON: "),
    "empty": ("", r"plan\.json is not a plan: Invalid JSON: "),
    "list": ([], r"plan\.json is not a plan: Input should be an object"),
    "no swaps": ({}, r"plan\.json is not a plan: swaps: Field required"),
    "key": ({"swaps": [], "swap": 1}, r"plan\.json is not a plan: .*swap"),
    "kind": ({"swaps": [swapped(kind="separabel")]}, r"unknown kind 'separabel'; did you mean separable\?"),
    "setting": ({"swaps": [swapped(settings={"rnak": 4})]}, r"unknown key 'rnak'; did you mean rank\?"),
    "rank": ({"swaps": [swapped(settings={"rank": 0})]}, r"site 'layer1\.0\.conv1': .*rank: Input should be greater"),
    "no size": (
        {"swaps": [swapped(settings={"order": "vertical-first"})]},
        r"swap 'layer1\.0\.conv1' by 'separable': it has no size; give one of rank, ratio, energy",
    ),
    "full rank": ({"swaps": [swapped(settings={"rank": 999})]}, r"rank = 999 is above the full rank 72"),
    "site": ({"swaps": [swapped(site="layer1.0.conv3")]}, r"'layer1\.0\.conv3', which the model lacks; did you mean"),
    "twice": ({"swaps": [swapped(), swapped()]}, r"plan\.json has 'layer1\.0\.conv1' twice"),
    "both": ({"swaps": [swapped()], "keeps": [{"site": "layer1.0.conv1"}]}, r"has 'layer1\.0\.conv1' twice"),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANS)
def test_wrong_plan(name: str, refusal: Refusal) -> None:
    plan, expected = PLANS[name]
    Path("plan.json").write_text(plan if isinstance(plan, str) else json.dumps(plan))
    assert re.search(expected, refusal("convert", "digits-resnet", "--plan", "plan.json"))


NASTY = "a\x1b[31mb\x1b]0;pwn\x07c\x9bd\u202ee x:bug:y [bold]f[/bold]"
SHOWN = r"a\x1b[31mb\x1b]0;pwn\x07c\x9bd\u202ee x:bug:y [bold]f[/bold]"
"""What a terminal obeys, and what rich would make of a text; and the same as it may be shown."""


def test_class_names_of_a_data_set_do_nothing_to_a_terminal(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    classes = np.array([NASTY, *map(str, range(9))])
    np.savez("data.npz", images=np.zeros((10, 3, 16, 16), np.float32), labels=np.arange(10), classes=classes)
    outcome = run("evaluate", "digits-resnet", "--data", "data.npz")
    assert outcome.code == 0, outcome.err
    assert SHOWN in outcome.out
    assert not set("\x1b\x07\x9b\u202e") & set(outcome.out)


def test_prefixes_of_keys_do_nothing_to_a_terminal(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    torch.save({f"{NASTY}.{key}": tensor for key, tensor in digits_state().items()}, MODEL)
    outcome = run("candidates", MODEL, "--arch", "digits-resnet")
    assert outcome.code == 0, outcome.err
    assert SHOWN in outcome.out
    assert not set("\x1b\x07\x9b\u202e") & set(outcome.out)


def test_an_index_that_names_what_cannot_be_a_file(refusal: Refusal) -> None:
    Path("m.index.json").write_text(json.dumps({"weight_map": {"w": f"{NASTY}\n{'x' * 300}".replace("/", "")}}))
    said = refusal("candidates", "m.index.json")
    assert said.startswith(f"m.index.json names {SHOWN.replace('/', '')} {'x' * 300}, which is not in")


def test_the_names_of_files_that_the_system_refuses_are_escaped_too(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EIO, "Input/output error", f"{NASTY}\nerror: second")

    monkeypatch.setattr("asymswap.api.candidates.candidates", refuse)
    assert run("candidates", "digits-resnet").err == (
        f"error: the system refused: Input/output error: {SHOWN} error: second\n"
    )


def test_unknown_option_is_wrong_usage(run: Any) -> None:
    assert run("convert", "digits-resnet", "--recipee", "3x3-only").code == 2


@pytest.mark.parametrize("depth", [2_000, 100_000])
def test_lists_in_lists_in_lists(refusal: Callable[..., str], depth: int) -> None:
    """The command looks for a budget of latency in a recipe before anything else reads it."""
    Path("deep.toml").write_text("rules = " + "[" * depth)
    Path("deep.json").write_text("[" * depth)
    assert "maximum recursion depth exceeded" in refusal(*CONVERT[:2], "--recipe", "deep.toml")
    said = refusal("sweep", "digits-resnet", "--recipe", "half-macs", "--evaluate", "digits", "-o", "deep.json")
    assert said.startswith("deep.json is no sweep to resume")
    assert "rank" in refusal(*CONVERT, "--set", "rank=" + "[" * depth)
