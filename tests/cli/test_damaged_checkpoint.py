"""Asymswap checkpoints that are damaged, hostile, of a newer version, or of something else than they say."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import asymswap
from asymswap.checkpoint import FORMAT
from asymswap.errors import CheckpointError
from asymswap.results.records import read_provenance

Refusal = Callable[..., str]
Stored = dict[str, Any]


class Trap:
    """Unpickled, it would make a file."""

    def __reduce__(self) -> Any:
        return os.system, ("touch sprung",)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Stored:
    """The header and the state dict of a sound checkpoint."""
    path = tmp_path_factory.mktemp("sound") / "sound.pt"
    asymswap.save(asymswap.convert("digits-resnet", "3x3-only"), path)
    read = torch.load(path, weights_only=True)
    return {"header": json.loads(read["asymswap"]), "state_dict": read["state_dict"]}


def write(header: object, state: object) -> None:
    text = header if isinstance(header, str | int) else json.dumps(header)
    torch.save({"asymswap": text, "state_dict": state}, "x.pt")


def packed(value: object) -> str:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return base64.b64encode(zlib.compress(buffer.getvalue())).decode()


def huge() -> nn.Module:
    with torch.device("meta"):
        return nn.Conv2d(10**6, 10**6, 3)


# What is wrong with the header, so that the file cannot even be shown.
HEADERS: dict[str, tuple[Callable[[Stored], object], str]] = {
    "newer": (lambda h: {**h, "format": FORMAT + 1}, rf"x\.pt is of format {FORMAT + 1}, newer than {FORMAT}; up"),
    "format": (lambda h: {**h, "format": 0}, r"x\.pt has a damaged header: format: "),
    "not JSON": (lambda h: "{", r"x\.pt has a damaged header: Expecting property name"),
    "deep": (lambda h: "[" * 100_000, r"x\.pt has a damaged header: maximum recursion depth"),
    "number": (lambda h: 3, r"x\.pt is damaged: its asymswap header or state_dict is not what it should be"),
    "list": (lambda h: [], r"x\.pt has a damaged header: "),
    "unknown key": (lambda h: {**h, "extra": 1}, r"x\.pt has a damaged header: unknown key 'extra'"),
    "plans": (lambda h: {**h, "plans": None}, r"x\.pt has a damaged header: plans: Input should be a valid array"),
    "no plan": (lambda h: {**h, "plans": [{}]}, r"the plan in x\.pt is not a plan: swaps: Field required"),
    "kind": (lambda h: {**h, "plans": [other_kind(h)]}, r"the plan in x\.pt, .*: unknown kind 'sparabel'"),
    "base64": (lambda h: {**h, "skeleton": "!"}, r"x\.pt has a damaged structure: Only base64 data is allowed"),
    "zlib": (lambda h: {**h, "skeleton": "QUJD"}, r"x\.pt has a damaged structure: Error -3 while decompressing"),
}  # fmt: skip


def other_kind(header: Stored) -> Stored:
    swaps = [{**swap, "kind": "sparabel"} for swap in header["plans"][0]["swaps"]]
    return {**header["plans"][0], "swaps": swaps}


def preprocessing(**changes: object) -> Callable[[Stored], object]:
    return lambda header: {**header, "preprocessing": {**header["preprocessing"], **changes}}


# Numbers are not guessed from text, and nothing is believed that no image has.
HEADERS |= {
    "text for a number": (preprocessing(channels="1"), r"damaged header: preprocessing\.channels: Input should be a"),
    "fraction": (preprocessing(size=[8.5, 8]), r"preprocessing\.size: Input should be a valid integer"),
    "huge input": (preprocessing(size=[10**6, 10**6]), r"no image has 1 channels of 1000000x1000000 pixels"),
    "endless clip": (preprocessing(form="clips", frames=10**9), r"1 channels of 8x8 pixels in 1000000000 frames"),
    "no clip": (preprocessing(form="clips", frames=0), r"1 channels of 8x8 pixels in 0 frames"),
    "no input": (preprocessing(size=[0, 8]), r"no image has 1 channels of 0x8 pixels"),
    "deviation": (preprocessing(std=[0.0]), r"means must be numbers, and deviations numbers above 0"),
    "means": (preprocessing(mean=[]), r"a mean and a deviation are needed for each of 1 channels"),
    "plans": (lambda h: {**h, "plans": [{"swaps": []}] * 101}, r"plans: .* at most 100 items"),
    "control": (lambda h: {**h, "provenance": {"recipe": ["\x1b[2J"]}}, r"control characters, which a termi"),
    "control key": (lambda h: {**h, "provenance": {"\x9b": 1}}, r"control characters, which a terminal would obey"),
}  # fmt: skip


@pytest.mark.parametrize("name", HEADERS)
def test_damaged_header(name: str, stored: Stored, refusal: Refusal) -> None:
    change, expected = HEADERS[name]
    write(change(stored["header"]), stored["state_dict"])
    for command in (("show",), ("show", "--plan"), ("candidates",), ("convert", "--recipe", "3x3-only", "-o", "y.pt")):
        assert re.search(expected, refusal(command[0], "x.pt", *command[1:]))
    with pytest.raises(CheckpointError, match=r"x\.pt"):
        asymswap.load("x.pt")


def test_too_large_a_structure(stored: Stored, refusal: Refusal) -> None:
    bomb = base64.b64encode(zlib.compress(bytes(65 * 2**20))).decode()
    write({**stored["header"], "skeleton": bomb}, stored["state_dict"])
    assert "x.pt stores a structure of over 67108864 bytes, which no model needs" in refusal("show", "x.pt")


# What keeps the model from being built again.
ORIGINS: dict[str, tuple[dict[str, object], str]] = {
    "unknown": ({"origin": {"reference": "no-net"}}, r"x\.pt cannot be rebuilt: it was built by no-net, which is code"),
    "code": ({"origin": {"reference": "os:getcwd"}}, r"built by os:getcwd, which is code or a file of yours; load"),
    "another file, said to be none": (
        {"origin": {"reference": "ultralytics:/etc/net.yaml", "arguments": {"yaml": None}}},
        r"built by ultralytics:/etc/net\.yaml, which is code or a file of yours; load it with",
    ),
    "another file": (
        {"origin": {"reference": "ultralytics:/etc/net.yaml"}},
        r"built by ultralytics:/etc/net\.yaml, which is code or a file of yours; load it with",
    ),
    "arguments": (
        {"origin": {"reference": "digits-resnet", "arguments": {"num_classes": "x"}}},
        r"cannot be rebuilt: digits-resnet does not take \{'num_classes': 'x'\}",
    ),
    "download": (
        {"origin": {"reference": "torchvision:resnet18", "arguments": {"weights": "DEFAULT"}}},
        r"cannot be rebuilt: 'weights' is not an argument for torchvision's resnet18",
    ),
    "other": ({"origin": {"reference": "cifar:resnet20"}}, r"x\.pt does not fit cifar:resnet20: missing: "),
    "site": (
        {"plans": [{"swaps": [{"site": "conv1x", "kind": "separable", "settings": {"rank": 1}}]}]},
        r"cannot be rebuilt: the model has no Conv2d named 'conv1x'; did you mean conv1",
    ),
    "structure": ({"skeleton": packed({"a": 1})}, r"the checkpoint's stored structure is a dict, not a module"),
    "trap": ({"skeleton": packed(Trap())}, r"the checkpoint's stored structure .* needs posix\.system, outside of the"),
}  # fmt: skip


def ranked(rank: int, **settings: object) -> list[Stored]:
    return [{"swaps": [{"site": "conv1", "kind": "separable", "settings": {"rank": rank, **settings}}]}]


VERTICAL = {"order": "vertical-first"}
ORIGINS |= {
    "rank": ({"plans": ranked(10**9, **VERTICAL)}, r"does not fit digits-resnet: missing: conv1\.vertical"),
    "rank of a batch norm": ({"plans": ranked(10**9, between="bn", **VERTICAL)}, r"does not fit digits-resnet: miss"),
    "rank beyond numbers": ({"plans": ranked(10**18, **VERTICAL)}, r"rebuilt: its plan asks for what cannot be built"),
    "classes": (
        {"origin": {"reference": "digits-resnet", "arguments": {"num_classes": 10**10}}},
        r"does not fit digits-resnet: linear\.weight is 10x48, the model's 10000000000x48",
    ),
    "structure of terabytes": ({"skeleton": packed(huge()), "plans": []}, r"not fit digits-resnet: missing: weight"),
    "backbone": (
        {"origin": {"reference": "torchvision:fcn_resnet50", "arguments": {"pretrained_backbone": True}}},
        r"'pretrained_backbone' is not an argument for torchvision's fcn_resnet50",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ORIGINS)
def test_cannot_be_rebuilt(name: str, stored: Stored, refusal: Refusal) -> None:
    change, expected = ORIGINS[name]
    write({**stored["header"], **change}, stored["state_dict"])
    assert re.search(expected, refusal("candidates", "x.pt"))
    with pytest.raises(CheckpointError, match=expected):
        asymswap.load("x.pt")
    assert not Path("sprung").exists()


STATES: dict[str, tuple[Callable[[Stored], object], str]] = {
    "list": (lambda s: [1], r"x\.pt is damaged: its asymswap header or state_dict"),
    "empty": (lambda s: {}, r"x\.pt does not fit digits-resnet: missing: conv1\.weight, "),
    "missing": (lambda s: {k: t for k, t in s.items() if k != "conv1.weight"}, r"missing: conv1\.weight"),
    "shape": (lambda s: {**s, "conv1.weight": torch.ones(1)}, r"conv1\.weight is 1, the model's 24x1x3x3"),
    "dtype": (lambda s: {**s, "conv1.weight": s["conv1.weight"].int()}, r"x\.pt cannot be used: .* of dtype int32"),
    "meta": (lambda s: {k: t.to("meta") for k, t in s.items()}, r"x\.pt cannot be used: .* on the meta device"),
}


@pytest.mark.parametrize("name", STATES)
def test_damaged_weights(name: str, stored: Stored, refusal: Refusal) -> None:
    change, expected = STATES[name]
    write(stored["header"], change(stored["state_dict"]))
    assert re.search(expected, refusal("candidates", "x.pt"))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"aliases": {"a": "nowhere"}}, r"x\.safetensors is damaged: 'a' is an alias of 'nowhere', which it lacks"),
        ({"aliases": {"a": "conv1.weight"}}, r"does not fit digits-resnet: unexpected: a$"),
        ({"format": 99}, rf"x\.safetensors is of format 99, newer than {FORMAT}"),
    ],
)
def test_damaged_safetensors(change: Stored, expected: str, stored: Stored, refusal: Refusal) -> None:
    text = json.dumps({**stored["header"], **change})
    save_file(stored["state_dict"], "x.safetensors", metadata={"asymswap": text})
    assert re.search(expected, refusal("candidates", "x.safetensors"))


@pytest.mark.parametrize("report", [3, {"model": 3, "before": 1, "after": 2, "output": 3}, {"model": {}, "before": 1}])
def test_provenance_of_another_making(report: object, stored: Stored, run: Any) -> None:
    write({**stored["header"], "provenance": {"report": report, "versions": {"torch": "1"}}}, stored["state_dict"])
    outcome = run("show", "x.pt")
    assert outcome.code == 1
    assert re.match(r"error: x\.pt has a damaged (provenance|report): .*; --json prints it\n$", outcome.err)
    assert json.loads(run("show", "x.pt", "--json").out)["provenance"]["report"] == report


COSTS = {"macs": 1, "params": 1}
TOLD = {"model": {"reference": "x", "weights": 5, "sha256": None}, "before": COSTS, "after": COSTS, "recipe": "x",
        "budget": None, "output": {"relative": 0.1, "probe": "x"}}  # fmt: skip


@pytest.mark.parametrize(
    "provenance",
    [
        {"report": TOLD},
        {"report": {**TOLD, "model": {**TOLD["model"], "weights": "x"}, "before": {"macs": 10**400, "params": 1}}},  # type: ignore[dict-item]
        {"fused": {"sites": [{"site": 5, "kind": "x", "outcome": "left"}]}},
    ],
)
def test_what_cannot_be_shown_is_refused(provenance: Stored, stored: Stored, refusal: Refusal) -> None:
    write({**stored["header"], "provenance": provenance}, stored["state_dict"])
    assert re.match(r"x\.pt has a damaged (provenance|report): ", refusal("show", "x.pt"))


@pytest.mark.parametrize(
    ("provenance", "where"),
    [
        ({"training": [{"classes": 5}]}, r"training\.0\.classes"),
        ({"training": 5}, "training"),
        ({"report": {"model": []}}, r"report\.model"),
        ({"report": {"model": {"reference": "x", "weights": "x", "sha256": "0"}, "files": 5}}, r"report\.files"),
    ],
)
def test_what_a_provenance_tells_is_checked(provenance: Stored, where: str) -> None:
    with pytest.raises(CheckpointError, match=rf"^x\.pt has a damaged provenance: {where}: Input should be "):
        read_provenance(provenance, "x.pt")


@pytest.mark.parametrize("verb", ["evaluate", "finetune"])
def test_commands_that_read_the_provenance(verb: str, stored: Stored, refusal: Refusal) -> None:
    write({**stored["header"], "provenance": {"report": {"model": []}}}, stored["state_dict"])
    assert "x.pt has a damaged provenance: report.model: " in refusal(verb, "x.pt", "--data", "digits")


def test_nothing_in_an_error_commands_the_terminal(stored: Stored, refusal: Refusal) -> None:
    torch.save({"\x1b]0;title\x07": torch.ones(1), **{str(n) + "x" * 900: torch.ones(1) for n in range(9)}}, "x.pt")
    said = refusal("candidates", "x.pt", "--arch", "digits-resnet")
    assert r"\x1b]0;title\x07" in said
    assert said.isprintable()
    assert len(said) <= 2001


def test_show_wants_a_checkpoint(stored: Stored, refusal: Refusal) -> None:
    torch.save(stored["state_dict"], "x.pt")
    assert "x.pt is not an asymswap checkpoint; `asymswap convert` writes them" in refusal("show", "x.pt")
    assert "no file digits-resnet" in refusal("show", "digits-resnet")


def test_options_that_do_not_go_with_a_checkpoint(stored: Stored, refusal: Refusal) -> None:
    write(stored["header"], stored["state_dict"])
    assert "x.pt brings its own weights" in refusal("candidates", "x.pt", "--weights", "none")
    assert "does not fit digits-resnet" in refusal("candidates", "x.pt", "--arch", "resnet18")


def test_a_sound_one_is_sound(stored: Stored, run: Any) -> None:
    save_file(stored["state_dict"], "x.safetensors", metadata={"asymswap": json.dumps(stored["header"])})
    write(stored["header"], stored["state_dict"])
    for path in ("x.pt", "x.safetensors"):
        assert run("show", path).code == 0
    with safe_open("x.safetensors", "pt") as file:
        assert set(file.keys()) == set(asymswap.load("x.pt").state_dict())
