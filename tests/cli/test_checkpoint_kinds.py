"""Checkpoints as training frameworks and exporters write them, converted from the command line."""

from __future__ import annotations

import json
import os
import re
import sys
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build
from safetensors.torch import save_file
from torch import Tensor, nn

import asymswap

State = dict[str, Tensor]
CONVERT = ("convert", "x.pt", "--recipe", "3x3-only", "-o", "out.pt", "--json")

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*torch.jit.* is deprecated", "ignore:.*deprecated.*:DeprecationWarning"
)


class Trap:
    """Unpickled, it would make a file."""

    def __reduce__(self) -> Any:
        return os.system, ("touch sprung",)


def digits(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return build("digits-resnet", {}).eval()


def behind(prefix: str, state: State) -> State:
    return {f"{prefix}{key}": tensor for key, tensor in state.items()}


@pytest.fixture
def foreign() -> Iterator[type]:
    """A class that is there when the file is written, and gone when it is read."""
    module = types.ModuleType("framework_of_theirs")
    module.Config = type("Config", (dict,), {"__module__": module.__name__})  # type: ignore[attr-defined]
    sys.modules[module.__name__] = module
    yield module.Config
    sys.modules.pop(module.__name__, None)


def lightning(config: type) -> Any:
    state = behind("model.", digits().state_dict()) | {"criterion.weight": torch.ones(10)}
    return {
        "epoch": 3, "global_step": 10, "pytorch-lightning_version": "2.4.0", "state_dict": OrderedDict(state),
        "hyper_parameters": config(lr=0.1), "callbacks": {"best": {"score": torch.tensor(1.0)}},
        "optimizer_states": [torch.optim.AdamW(digits().parameters()).state_dict()], "lr_schedulers": [], "loops": {},
    }  # fmt: skip


def mmengine(config: type) -> Any:
    meta = {"epoch": 3, "cfg": "model = dict()", "dataset_meta": {"classes": ("a",)}}
    return {"meta": meta, "state_dict": digits().state_dict(), "message_hub": {"log_scalars": {"loss": config(a=1)}}}


CHECKPOINTS: dict[str, Callable[[type], Any]] = {
    "Lightning": lightning,
    "mmengine": mmengine,
    "detectron": lambda config: {"model": digits().state_dict(), "optimizer": {}, "iteration": 3},
    "timm": lambda config: {"arch": "x", "state_dict": digits().state_dict(), "args": config(a=1), "version": 2},
    "DDP and compile": lambda config: {"net": behind("module._orig_mod.", digits().state_dict())},
    "compiled part": lambda config: behind("backbone._orig_mod.", digits().state_dict()),
    "FSDP": lambda config: behind("_fsdp_wrapped_module.", digits().state_dict()),
    "EMA": lambda config: {"ema_state": torch.optim.swa_utils.AveragedModel(digits()).state_dict()},
    "extra state": lambda config: digits().state_dict() | {"conv1._extra_state": None},
    "module": lambda config: {"model": digits().state_dict(), "cfg": config},
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_training_checkpoints(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, foreign: type) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(CHECKPOINTS[name](foreign), "x.pt")
    sys.modules.pop(foreign.__module__)
    opened = asymswap.open_model("x.pt")
    assert opened.reference == "x.pt"
    assert_same(opened.model, digits())


def assert_same(one: nn.Module, other: nn.Module) -> None:
    """Raise AssertionError where keys or tensors differ."""
    a, b = one.state_dict(), other.state_dict()
    assert a.keys() == b.keys()
    assert all(torch.equal(tensor, b[key]) for key, tensor in a.items())


def test_what_was_done_is_told(run: Any, foreign: type) -> None:
    torch.save(lightning(foreign), "x.pt")
    notes = json.loads(run(*CONVERT).out)["model"]["notes"]
    assert notes[0] == "weights taken from 'state_dict' in x.pt"
    assert "left unread, being outside of the allowlist: framework_of_theirs.Config" in notes
    assert re.search(r"keys without their 'model\.'; left out \(.* chooses\): criterion\.weight", "\n".join(notes))
    assert any(note.startswith("architecture taken from keys and shapes: digits-resnet (") for note in notes)


def several() -> dict[str, Any]:
    one, two, three = (digits(seed).state_dict() for seed in range(3))
    return {
        "state_dict": one, "state_dict_ema": behind("module.", two), "models": {"teacher": three},
        "same": one, "both": behind("student.", two) | behind("teacher.", three), "means": {"a": torch.ones(3)},
        "meta.net": {"b": three}, "rng": one | {"x": torch.ones(1)},
    }  # fmt: skip


KEYS = {
    None: 0, "state_dict": 0, "state_dict_ema": 1, "models": 2, "models.teacher": 2, "both.student": 1,
    "both.teacher": 2, "meta.net": 2, "meta.net.b": 2,
}  # fmt: skip
"""With the seed of the weights that each chooses."""


@pytest.mark.parametrize("as_weights", [False, True])
def test_a_key_chooses(as_weights: bool, run: Any) -> None:
    torch.save(several(), "x.pt")
    for key, seed in KEYS.items():
        given: Any = {"model": "digits-resnet", "weights": "x.pt"} if as_weights else {"model": "x.pt"}
        assert_same(asymswap.open_model(**given, key=key).model, digits(seed))
    model = ("digits-resnet", "--weights", "x.pt") if as_weights else ("x.pt",)
    assert run("convert", *model, "--key", "models.teacher", "--recipe", "3x3-only", "-o", "out.pt", "-q").code == 0
    converted, expected = asymswap.load("out.pt").state_dict(), digits(2).state_dict()
    assert torch.equal(converted["linear.weight"], expected["linear.weight"])


def test_the_others_are_named_where_none_was_chosen(run: Any) -> None:
    torch.save(several(), "x.pt")
    notes = json.loads(run("candidates", "x.pt", "--json").out)["notes"]
    assert re.search(r"other weights in x\.pt: state_dict_ema, models\.teacher, both \(.* chooses\)", "\n".join(notes))
    notes = json.loads(run("candidates", "x.pt", "--json", "--key", "state_dict_ema").out)["notes"]
    assert not any("other weights" in note for note in notes)


@pytest.mark.parametrize(
    ("model", "key", "expected"),
    [
        (
            "x.pt",
            "state_dict_emma",
            r"x\.pt has no state_dict under .*key.*state_dict_emma.*; did you mean state_dict_ema",
        ),
        ("x.pt", "zzz", r"under .*key.*zzz.*; it has state_dict, state_dict_ema, models\.teacher, same, both, "),
        ("x.pt", "", r"under .*key"),
        ("digits-resnet", "ema", r"goes with a file, and 'digits-resnet' names a network; give .* with it"),
        ("done.pt", "ema", r"goes with training checkpoints; done\.pt was converted before and holds one model"),
        ("module.pt", "ema", r"module\.pt has no state_dict under .*key.*ema.*; it has no keys to choose from"),
    ],
)
def test_keys_that_choose_nothing(model: str, key: str, expected: str, refusal: Any, tmp_path: Path) -> None:
    torch.save(several(), "x.pt")
    torch.save(nn.Sequential(nn.Conv2d(1, 2, 3)), "module.pt")
    if model == "done.pt":
        asymswap.save(asymswap.convert("digits-resnet", "3x3-only"), model)
    assert re.search(expected, refusal("candidates", model, "--key", key))


def save_exported(model: nn.Module) -> None:
    torch.export.save(torch.export.export(model, (torch.zeros(1, 1, 8, 8),)), "x.pt2")
    Path("x.pt2").rename("x.pt")


def save_shards(model: nn.Module) -> None:
    Path("x.pt").mkdir()
    save_file(model.state_dict(), "x.pt/a.safetensors")
    weight_map = dict.fromkeys(model.state_dict(), "a.safetensors")
    Path("x.pt/model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


FORMS: dict[str, tuple[Callable[[nn.Module], object], str]] = {
    "traced": (
        lambda m: torch.jit.save(torch.jit.trace(m, torch.zeros(1, 1, 8, 8)), "x.pt"),
        "weights taken out of a TorchScript archive, whose code was not executed",
    ),
    "exported": (save_exported, "weights taken out of a torch.export archive, whose graph was not read"),
    "shards": (save_shards, "architecture taken from keys and shapes: digits-resnet"),
}  # fmt: skip


@pytest.mark.parametrize("arch", [None, pytest.param("digits-resnet", marks=pytest.mark.nightly)])
@pytest.mark.parametrize("form", FORMS)
def test_archives_give_their_weights(form: str, arch: str | None, run: Any) -> None:
    save, expected = FORMS[form]
    save(digits())
    outcome = run(*CONVERT, *(() if arch is None else ("--arch", arch)))
    assert outcome.code == 0, outcome.err
    said = json.loads(outcome.out)["model"]["notes"]
    assert any(note.startswith(expected) for note in said) or (form, arch) == ("shards", "digits-resnet")
    assert torch.equal(asymswap.load("out.pt").state_dict()["conv1.weight"], digits().state_dict()["conv1.weight"])


class Mine(nn.Module):
    """A class of the user's own: a network that is known, in other words."""


def mine() -> Mine:
    model = Mine()
    model.__dict__.update(digits().__dict__)
    return model


def test_a_module_of_ones_own_gives_its_weights_where_it_is_said_what_it_is(run: Any, refusal: Any) -> None:
    torch.save(mine(), "x.pt")
    assert "Mine, outside of the allowlist; nothing of it was executed" in refusal(*CONVERT)
    outcome = run(*CONVERT, "--arch", "digits-resnet")
    assert outcome.code == 0, outcome.err
    notes = json.loads(outcome.out)["model"]["notes"]
    assert f"weights taken out of a {__name__}.Mine, whose code was not executed" in notes
    assert torch.equal(asymswap.load("out.pt").state_dict()["conv1.weight"], digits().state_dict()["conv1.weight"])


@pytest.mark.parametrize("arch", [(), ("--arch", "digits-resnet")])
def test_a_trap_is_refused_whatever_it_stands_beside(arch: tuple[str, ...], refusal: Any, foreign: type) -> None:
    torch.save({"state_dict": digits().state_dict(), "a": foreign(x=1), "b": Trap()}, "x.pt")
    said = refusal(*CONVERT, *arch)
    assert (
        "needs framework_of_theirs.Config, posix.system, outside of the allowlist; nothing of it was executed" in said
    )
    assert not Path("sprung").exists()


def test_an_unknown_network_behind_a_prefix(refusal: Any) -> None:
    state = {key: tensor for key, tensor in digits().state_dict().items() if key != "linear.bias"}
    torch.save(behind("net.", state), "x.pt")
    said = refusal(*CONVERT)
    assert re.search(
        r"nearest known: digits-resnet \(9\d% of keys and shapes under 'net\.'; missing: linear\.bias\)", said
    )
    assert re.search(
        r"x\.pt does not fit digits-resnet: missing: linear\.bias; give", refusal(*CONVERT, "--arch", "digits-resnet")
    )
