"""Who holds which tensors: what the user gave stays theirs alone, what we have made is not held twice."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision import models

import asymswap
from asymswap.api import convert as convert_module
from asymswap.errors import SourceError
from asymswap.models.opened import OpenedModel
from asymswap.models.opening import open_for_verb, open_model

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE = (3, 32, 32)


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 5),
    )


def memory(model: nn.Module) -> dict[int, str]:
    """Where each tensor of a model lies, whatever holds it."""
    return {tensor.untyped_storage().data_ptr(): key for key, tensor in model.state_dict().items()}


def shared(one: nn.Module, other: nn.Module) -> set[str]:
    """Names of the tensors of the first model that lie in memory of the second."""
    held = memory(other)
    return {key for place, key in memory(one).items() if place in held}


def train_a_step(model: nn.Module) -> None:
    """Change every parameter and every statistic of a model, in place."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(torch.randn(4, *SIZE)).square().sum().backward()
    optimizer.step()


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[OpenedModel]]:
    """The models that `convert` opens while the test runs."""
    found: list[OpenedModel] = []

    def watch(*arguments: Any) -> OpenedModel:
        found.append(open_for_verb(*arguments))
        return found[-1]

    monkeypatch.setattr(convert_module, "open_for_verb", watch)
    yield found
    assert found


def convert(model: str | Path | nn.Module, **options: Any) -> nn.Module:
    """Convert a model that was opened for this alone, as the command line does it."""
    opened = replace(asymswap.open_model(model, input_size=SIZE, **options), handed_over=True)
    converted = asymswap.convert(opened, "all-spatial", overrides={"rank": 1})
    assert converted.plan.swaps
    return converted.model


def test_a_given_module_shares_nothing_and_training_the_result_leaves_it_alone() -> None:
    model = small().eval()
    before = copy.deepcopy(model.state_dict())
    converted = convert(model)
    assert shared(converted, model) == set()
    train_a_step(converted)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert not any(torch.equal(t, before[key]) for key, t in converted.state_dict().items() if key == "5.weight")


def test_a_module_that_a_factory_keeps_shares_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opened: list[OpenedModel]
) -> None:
    (tmp_path / "keeping_nets.py").write_text("KEPT = []\n\ndef net():\n    return KEPT[0]\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    import keeping_nets  # type: ignore[import-not-found]

    model = small()
    keeping_nets.KEPT.append(model)
    try:
        assert shared(convert("keeping_nets:net"), model) == set()
        assert opened[0].model is model
        # Its weights are copied into it: the file's own tensors may be somebody's too.
        torch.save(small().state_dict(), tmp_path / "x.pt")
        assert shared(convert(tmp_path / "x.pt", arch="keeping_nets:net"), model) == set()
        assert shared(convert("keeping_nets:net", weights=str(tmp_path / "x.pt")), model) == set()
    finally:
        del sys.modules["keeping_nets"]


@pytest.mark.parametrize("source", ["reference", "state dict", "module", "safetensors", "asymswap checkpoint"])
def test_what_we_have_opened_ourselves_is_not_held_twice(
    source: str, tmp_path: Path, opened: list[OpenedModel]
) -> None:
    path = tmp_path / "x.pt"
    model = models.squeezenet1_1(num_classes=7).eval()
    arch = None
    if source == "reference":
        converted = convert("squeezenet1_1", weights="none")
    else:
        if source == "state dict":
            torch.save(model.state_dict(), path)
            arch = "squeezenet1_1"
        elif source == "safetensors":
            from safetensors.torch import save_file

            path = tmp_path / "x.safetensors"
            save_file(model.state_dict(), path)
            arch = "squeezenet1_1"
        elif source == "module":
            torch.save(model, path)
        else:
            recipe = tmp_path / "r.toml"
            recipe.write_text(
                '[[rules]]\nmatch = { names = "features.3.*", kernel = "3x3" }\nswap = { kind = "acb" }\n'
            )
            asymswap.save(asymswap.convert(asymswap.open_model(model, input_size=SIZE), recipe), path)
        converted = convert(path, arch=arch)
    original = opened[-1].model
    swapped = {f"{name}." for name, part in converted.named_modules() if isinstance(part, nn.Sequential)}
    kept = {key for key in original.state_dict() if key in converted.state_dict()}
    assert kept
    assert swapped
    assert shared(converted, original) == kept
    # Nothing of it is left that a second conversion could meet.
    again = convert("squeezenet1_1", weights="none") if source == "reference" else convert(path, arch=arch)
    assert shared(again, converted) == set()


def test_a_module_read_by_code_of_the_file_may_be_held_by_it(tmp_path: Path, opened: list[OpenedModel]) -> None:
    torch.save(small(), tmp_path / "x.pt")
    converted = convert(tmp_path / "x.pt", trust_pickle=True)
    assert shared(converted, opened[-1].model) == set()


def test_polishing_leaves_the_original_as_it_was(opened: list[OpenedModel], monkeypatch: pytest.MonkeyPatch) -> None:
    before = copy.deepcopy(open_model("digits-resnet").model.state_dict())
    calibration = asymswap.calibration.calibrate.Calibration(data="digits", images=32, polish_steps=2, polish_images=64)
    asymswap.convert("digits-resnet", "3x3-only", calibration=calibration)
    assert all(torch.equal(tensor, before[key]) for key, tensor in opened[-1].model.state_dict().items())


@pytest.mark.parametrize("fused", [False, True])
def test_a_module_given_to_load_stays_as_it_is(fused: bool, tmp_path: Path) -> None:
    model = small().eval()
    conversion = asymswap.convert(
        asymswap.open_model(small().eval(), input_size=SIZE), "offset" if fused else "3x3-only"
    )
    path = tmp_path / "x.pt"
    if fused:
        asymswap.save_fused(asymswap.fuse(conversion), path)
    else:
        asymswap.save(conversion, path)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7.0)
    before: dict[str, Tensor] = copy.deepcopy(model.state_dict())
    loaded = asymswap.load(path, model=model)
    assert shared(loaded, model) == set()
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert not torch.equal(loaded.get_parameter("5.weight"), before["5.weight"])


def test_an_opened_model_serves_several_verbs_and_stays_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it was opened from; and what the verbs return shares no memory with it."""
    torch.save(small().state_dict(), tmp_path / "x.pt")
    asymswap.save(asymswap.convert(small().eval(), "offset"), tmp_path / "x.asym.pt")
    for source, arch in (("squeezenet1_1", None), (tmp_path / "x.pt", small()), (tmp_path / "x.asym.pt", None)):
        weights = "none" if source == "squeezenet1_1" else None
        model = asymswap.open_model(source, weights=weights, arch=arch, input_size=SIZE)
        before = copy.deepcopy(model.model.state_dict())
        monkeypatch.setattr("asymswap.models.opening.open_model", pytest.fail)
        first = asymswap.convert(model, "all-spatial", overrides={"rank": 1})
        again = asymswap.convert(model, "all-spatial", overrides={"rank": 1})
        assert shared(first.model, model.model) == shared(again.model, first.model) == set()
        asymswap.candidates(model)
        asymswap.compare([model, model])
        asymswap.benchmark([model], rounds=1, layers=False)
        results = [first.model]
        if source != "squeezenet1_1":
            asymswap.export(model, tmp_path / "x.pt2", force=True)
        if source == tmp_path / "x.asym.pt":
            results.append(asymswap.fuse(model).model)
            assert shared(results[-1], model.model) == set()
        for result in results:
            train_a_step(result)
        assert not model.model.training
        assert all(torch.equal(tensor, before[key]) for key, tensor in model.model.state_dict().items())
        monkeypatch.undo()


def test_what_a_verb_returned_is_a_model_for_the_next(tmp_path: Path) -> None:
    net = small().eval()
    conversion = asymswap.convert(asymswap.open_model(net, input_size=SIZE), "offset")
    opened = asymswap.open_model(conversion)
    assert opened.plans == (conversion.plan,)
    assert opened.reference == "Sequential"
    assert asymswap.compare([asymswap.open_model(net, input_size=SIZE), conversion]).models[1].gap is not None
    fusion = asymswap.fuse(conversion)
    assert shared(fusion.model, conversion.model) == set()
    assert asymswap.export(fusion, tmp_path / "x.pt").model == "Sequential"
    assert shared(asymswap.convert(fusion, "all-spatial", overrides={"rank": 1}).model, fusion.model) == set()


def test_what_is_no_model_and_what_cannot_be_said_twice() -> None:
    with pytest.raises(SourceError, match="a int is no model"):
        asymswap.open_model(7)  # type: ignore[arg-type]
    with pytest.raises(SourceError, match="digits-resnet is open already; give these options where it is opened first"):
        asymswap.open_model(asymswap.open_model("digits-resnet"), weights="none")
    with pytest.raises(SourceError, match="`arch=…` is a module already, so the argument 'width' changes nothing"):
        asymswap.open_model("x.pt", arch=small(), arguments={"width": 2})
    wider = asymswap.open_model(asymswap.open_model("digits-resnet"), input_size=(1, 16, 16))
    assert wider.preprocessing.size == (16, 16)


def test_two_loads_share_nothing(tmp_path: Path) -> None:
    for name in ("x.pt", "x.safetensors"):
        asymswap.save(asymswap.convert("digits-resnet", "3x3-only"), tmp_path / name)
        one, other = asymswap.load(tmp_path / name), asymswap.load(tmp_path / name)
        assert shared(one, other) == set()
