"""What is written loads again: in another process, executing nothing in it, and computing the same to the bit."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import forked
from safetensors import safe_open
from torch import Tensor, nn
from torchvision import models
from torchvision.models.resnet import BasicBlock

import asymswap
from asymswap.checkpoint import Header, header_to_json, read_checkpoint
from asymswap.errors import CheckpointError, OutputError
from asymswap.models.converted import save_checkpoint
from asymswap.models.networks import BUILDERS

SUFFIXES = ("pt", "safetensors")

# The user's own project: a module that is importable only from its folder.
USER_MODULE = """
from torch import nn


class Net(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.a = nn.Conv2d(3, width, 3, padding=1)
        self.b = nn.Conv2d(width, width, 3, padding=1, stride=2)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x):
        return self.norm(self.b(self.a(x).relu())).relu().mean((2, 3))


def make(width=16):
    return Net(width)
"""

# Loads every file of a job list in one process, and writes each model's output, or why there is none.
FRESH_PROCESS = """
import importlib, json, sys
import torch

sys.path.insert(0, sys.argv[3])
jobs = json.loads(open(sys.argv[1]).read())
# Torch alone must be able to read them.
hidden = {name: sys.modules.pop(name) for name in [*sys.modules] if name.partition(".")[0] == "asymswap"}
sys.modules["asymswap"] = None
for job in jobs:
    if job["path"].endswith(".pt"):
        torch.load(job["path"], weights_only=True)
sys.modules.update(hidden)

import asymswap

results = {}
for job in jobs:
    model = None
    if job["factory"]:
        module, name = job["factory"].split(":")
        model = getattr(importlib.import_module(module), name)()
    try:
        loaded = asymswap.load(job["path"], model=model)
        with torch.no_grad():
            results[job["path"]] = loaded(torch.load(job["input"]))
    except Exception as error:
        results[job["path"]] = repr(error)
torch.save(results, sys.argv[2])
"""


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """With models as small as these, threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass(frozen=True)
class Case:
    """A model to be converted: how, what it takes, and what loading needs beside the file."""

    convert: Callable[[Path], asymswap.Conversion]
    input: tuple[int, ...]
    factory: str | None = None


def shared_convs() -> nn.Module:
    """The same conv module run twice, under two names."""
    shared = nn.Conv2d(16, 16, 3, padding=1)
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), shared, nn.ReLU(), shared)


def shared_weights() -> nn.Module:
    """Two convs with one parameter, and a third that can be swapped."""
    first, second = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
    second.weight = first.weight
    return nn.Sequential(first, nn.ReLU(), second, nn.Conv2d(16, 16, 3, padding=1))


def every_field() -> nn.Module:
    """Convs of all sorts: stride, dilation, groups, string padding, padding modes, no bias."""
    return nn.Sequential(
        nn.Conv2d(3, 16, (5, 3), stride=(2, 1), padding=(2, 1), bias=False),
        nn.Conv2d(16, 32, 3, padding="same", dilation=2, padding_mode="reflect"),
        nn.BatchNorm2d(32),
        nn.Conv2d(32, 32, 3, groups=2, padding=1, padding_mode="circular"),
        nn.Conv2d(32, 32, 3, groups=32, padding="valid"),
    )


def module(make: Callable[[], nn.Module], size: tuple[int, int, int], **options: Any) -> Case:
    """A module that exists already, converted with ranks that stay cheap."""

    def convert(_: Path) -> asymswap.Conversion:
        torch.manual_seed(0)
        return asymswap.convert(
            asymswap.open_model(make(), input_size=size), "all-spatial", overrides={"rank": 1}, **options
        )

    return Case(convert, (2, *size))


def pickled_resnet(folder: Path) -> asymswap.Conversion:
    """Of torchvision's class, without its two wide stages, which hold most of the weights."""
    torch.manual_seed(0)
    model = models.ResNet(BasicBlock, [1, 1, 1, 1])
    model.layer3, model.layer4, model.fc = nn.Identity(), nn.Identity(), nn.Linear(128, 7)  # type: ignore[assignment]
    torch.save(model, folder / "resnet.pt")
    return asymswap.convert(asymswap.open_model(folder / "resnet.pt", input_size=(3, 64, 64)), "3x3-only")


def state_dict_of_resnet20(folder: Path) -> asymswap.Conversion:
    torch.manual_seed(0)
    torch.save({"state_dict": BUILDERS["resnet20"]().state_dict(), "epoch": 3}, folder / "resnet20.th")
    return asymswap.convert(asymswap.open_model(folder / "resnet20.th", arch="cifar:resnet20"), "3x3-only")


def factory(folder: Path) -> asymswap.Conversion:
    torch.manual_seed(0)
    return asymswap.convert(
        asymswap.open_model("asymswap_user_nets:make", input_size=(3, 32, 32)), "all-spatial", overrides={"rank": 4}
    )


CASES = {
    "digits-resnet": Case(lambda _: asymswap.convert("digits-resnet", "3x3-only"), (2, 1, 8, 8)),
    "pickled resnet": Case(pickled_resnet, (2, 3, 64, 64)),
    "state dict of cifar resnet20": Case(state_dict_of_resnet20, (2, 3, 32, 32)),
    "a user's factory": Case(factory, (2, 3, 32, 32), "asymswap_user_nets:make"),
    "module object": module(lambda: models.squeezenet1_1(num_classes=7), (3, 64, 64)),
    "every field of a conv": module(every_field, (3, 24, 24)),
    "shared convs": module(shared_convs, (3, 16, 16)),
    "shared weights": module(shared_weights, (16, 16, 16)),
    "bfloat16": module(lambda: every_field().bfloat16(), (3, 24, 24)),
    "float64": module(lambda: every_field().double(), (3, 24, 24)),
}


@dataclass(frozen=True)
class Written:
    """A converted case: in memory, in its two files, and what its files computed in another process."""

    conversion: asymswap.Conversion
    paths: dict[str, Path]
    input: Tensor


@pytest.fixture(scope="module")
def user_module(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the user's module, which this process can import from for as long as these tests run."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "asymswap_user_nets.py").write_text(USER_MODULE)
    return folder


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, user_module: Path) -> dict[str, Written]:
    """Every case, converted and saved in both forms."""
    folder = tmp_path_factory.mktemp("written")
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(user_module))
        for number, (name, case) in enumerate(CASES.items()):
            conversion = case.convert(folder)
            paths = {suffix: folder / f"{number}.asym.{suffix}" for suffix in SUFFIXES}
            for path in paths.values():
                asymswap.save(conversion, path)
            dtype = next(conversion.model.parameters()).dtype
            example = torch.randn(case.input, generator=torch.Generator().manual_seed(1)).to(dtype)
            found[name] = Written(conversion, paths, example)
    return found


@pytest.fixture(scope="module")
def computed_elsewhere(written: dict[str, Written], user_module: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What the loaded files compute in a fresh process, by path."""
    folder = tmp_path_factory.mktemp("elsewhere")
    jobs = []
    for number, (name, item) in enumerate(written.items()):
        torch.save(item.input, folder / f"{number}.input")
        common = {"input": str(folder / f"{number}.input"), "factory": CASES[name].factory}
        jobs += [{"path": str(path), **common} for path in item.paths.values()]
    (folder / "jobs.json").write_text(json.dumps(jobs))
    done = forked(FRESH_PROCESS, "jobs.json", "results.pt", user_module, cwd=folder)
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "results.pt")


def output_of(model: nn.Module, x: Tensor) -> Tensor:
    """What a model computes in eval mode, the model's own mode restored."""
    modes = {module: module.training for module in model.modules()}
    with torch.no_grad():
        result: Tensor = model.eval()(x)
    for each, mode in modes.items():
        each.training = mode
    return result


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("name", CASES)
def test_a_fresh_process_computes_the_same_to_the_bit(
    name: str, suffix: str, written: dict[str, Written], computed_elsewhere: dict[str, Any]
) -> None:
    item = written[name]
    found = computed_elsewhere[str(item.paths[suffix])]
    assert isinstance(found, Tensor), found
    assert torch.equal(found, output_of(item.conversion.model, item.input))
    assert found.dtype == item.input.dtype


@pytest.mark.parametrize("name", CASES)
def test_every_case_swaps_something(name: str, written: dict[str, Written]) -> None:
    assert written[name].conversion.plan.swaps


@pytest.mark.parametrize("name", CASES)
def test_a_pt_file_is_plain_weights_to_torch(name: str, written: dict[str, Written]) -> None:
    value = torch.load(written[name].paths["pt"], weights_only=True)
    assert value.keys() == {"asymswap", "state_dict"}
    own = written[name].conversion.model.state_dict()
    assert value["state_dict"].keys() == own.keys()
    assert all(torch.equal(tensor, own[key]) for key, tensor in value["state_dict"].items())


@pytest.mark.parametrize("name", CASES)
def test_both_forms_hold_the_same(name: str, written: dict[str, Written]) -> None:
    one, other = (read_checkpoint(written[name].paths[suffix]) for suffix in SUFFIXES)
    assert one.header == other.header
    assert one.state.keys() == other.state.keys()
    assert all(torch.equal(tensor, other.state[key]) for key, tensor in one.state.items())


def test_what_is_loaded_has_the_original_class_and_can_be_trained(written: dict[str, Written]) -> None:
    loaded = asymswap.load(written["pickled resnet"].paths["pt"])
    assert type(loaded) is models.ResNet
    assert not any(module.training for module in loaded.modules())
    assert isinstance(loaded.layer1[0].conv1, nn.Sequential)
    loaded.train()(torch.randn(2, 3, 64, 64)).sum().backward()
    assert all(parameter.grad is not None for parameter in loaded.parameters())


def test_loading_draws_no_random_numbers(written: dict[str, Written]) -> None:
    before = torch.get_rng_state()
    asymswap.load(written["module object"].paths["pt"])
    assert torch.equal(torch.get_rng_state(), before)


class TestClassOfTheUser:
    @pytest.fixture(autouse=True)
    def _importable(self, user_module: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.syspath_prepend(str(user_module))

    def make(self, width: int = 16) -> Any:
        from asymswap_user_nets import make

        return make(width)

    def path(self, written: dict[str, Written]) -> Path:
        return written["a user's factory"].paths["pt"]

    def test_without_the_class_the_error_says_how(self, written: dict[str, Written]) -> None:
        message = r"built by asymswap_user_nets:make.*model=make\(\)\) or give `arch=.asymswap_user_nets:make"
        with pytest.raises(CheckpointError, match=message):
            asymswap.load(self.path(written))

    def test_the_given_model_stays_unchanged(self, written: dict[str, Written]) -> None:
        model = self.make().train()
        before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        loaded = asymswap.load(self.path(written), model=model)
        assert type(loaded) is type(model)
        assert model.training
        assert model.state_dict().keys() == before.keys()
        assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())

    def test_a_model_of_another_width_does_not_fit(self, written: dict[str, Written]) -> None:
        with pytest.raises(CheckpointError, match=r"does not fit asymswap_user_nets:make: .* is 16x.*, the model's 8"):
            asymswap.load(self.path(written), model=self.make(8))

    def test_a_model_without_the_layers_does_not_fit(self, written: dict[str, Written]) -> None:
        with pytest.raises(CheckpointError, match=r"rebuilt: .*; the model given is not the one that was converted$"):
            asymswap.load(self.path(written), model=nn.Sequential(nn.Conv2d(3, 3, 3)))

    def test_it_can_be_converted_again_with_arch(self, written: dict[str, Written]) -> None:
        again = asymswap.convert(
            asymswap.open_model(self.path(written), arch="asymswap_user_nets:make"), plan={"swaps": []}
        )
        assert len(again.header.plans) == 2
        assert again.header.origin.reference == "asymswap_user_nets:make"


@pytest.fixture(scope="module", params=SUFFIXES)
def twice(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """digits-resnet, its second stage separated by one conversion, its first by another."""
    tmp_path = tmp_path_factory.mktemp("twice")
    stages = []
    for stage in ("layer2", "layer1"):
        recipe = tmp_path / f"{stage}.toml"
        recipe.write_text(
            f"""
            [[rules]]
            match = {{ names = "{stage}.*", kernel = "3x3" }}
            swap = {{ kind = "separable", rank = 4 }}
            """
        )
        stages.append(recipe)
    first, second = (tmp_path / f"digits.{mark}.{request.param}" for mark in ("asym", "asym2"))
    asymswap.save(asymswap.convert("digits-resnet", stages[0]), first)
    asymswap.save(asymswap.convert(first, stages[1]), second)
    return second


class TestConvertedTwice:
    def test_the_plans_stand_in_order(self, twice: Path) -> None:
        plans = read_checkpoint(twice).header.plans
        starts = [{swap.site.split(".")[0] for swap in plan.swaps} for plan in plans]
        assert starts == [{"layer2"}, {"layer1"}]

    def test_it_loads_with_both_conversions_in_it(self, twice: Path) -> None:
        loaded, state = asymswap.load(twice), read_checkpoint(twice).state
        assert {"layer1.0.conv1.vertical.weight", "layer2.0.conv2.vertical.weight"} <= state.keys()
        assert all(torch.equal(tensor, state[key]) for key, tensor in loaded.state_dict().items())

    def test_the_second_report_starts_from_the_first_result(self, twice: Path) -> None:
        first = read_checkpoint(twice.with_name(twice.name.replace("asym2", "asym"))).header.provenance["report"]
        second = read_checkpoint(twice).header.provenance["report"]
        assert second["before"] == first["after"]
        assert any(note == "converted before, once" for note in second["model"]["notes"])


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_shared_conv_is_swapped_once_and_stays_shared(suffix: str, written: dict[str, Written]) -> None:
    item = written["shared convs"]
    assert [swap.site for swap in item.conversion.plan.swaps] == ["0", "1"]
    for model in (item.conversion.model, asymswap.load(item.paths[suffix])):
        assert isinstance(model[1], nn.Sequential)
        assert model[1] is model[3]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_convs_with_one_weight_are_kept_and_stay_tied(suffix: str, written: dict[str, Written]) -> None:
    item = written["shared weights"]
    reasons = {keep.site: keep.reason for keep in item.conversion.plan.keeps}
    assert reasons == {"0": "rule 1, but shares its weights with 2", "2": "rule 1, but shares its weights with 0"}
    for model in (item.conversion.model, asymswap.load(item.paths[suffix])):
        assert model[0].weight is model[2].weight


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_dtype_is_kept(dtype: torch.dtype, suffix: str, tmp_path: Path) -> None:
    conversion = asymswap.convert(
        asymswap.open_model(every_field().to(dtype), input_size=(3, 24, 24)), "all-spatial", overrides={"rank": 1}
    )
    asymswap.save(conversion, tmp_path / f"out.{suffix}")
    for model in (conversion.model, asymswap.load(tmp_path / f"out.{suffix}")):
        assert {t.dtype for t in model.state_dict().values() if t.is_floating_point()} == {dtype}


def test_a_state_dict_in_bfloat16_is_loaded_as_such(tmp_path: Path) -> None:
    torch.save(BUILDERS["resnet20"]().bfloat16().state_dict(), tmp_path / "half.pt")
    conversion = asymswap.convert(asymswap.open_model(tmp_path / "half.pt", arch="cifar:resnet20"), "3x3-only")
    asymswap.save(conversion, tmp_path / "out.pt")
    loaded = asymswap.load(tmp_path / "out.pt")
    x = torch.randn(2, 3, 32, 32).bfloat16()
    assert torch.equal(output_of(loaded, x), output_of(conversion.model, x))
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}


def test_memory_format_survives(tmp_path: Path) -> None:
    model = every_field().to(memory_format=torch.channels_last)
    conversion = asymswap.convert(
        asymswap.open_model(model, input_size=(3, 24, 24)), "all-spatial", overrides={"rank": 2}
    )
    asymswap.save(conversion, tmp_path / "out.pt")
    pairs = zip(conversion.model.parameters(), asymswap.load(tmp_path / "out.pt").parameters(), strict=True)
    assert all(one.stride() == other.stride() for one, other in pairs)
    assert conversion.model[1][0].weight.is_contiguous(memory_format=torch.channels_last)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Path]]:
    tmp_path, found = tmp_path_factory.mktemp("runs"), []
    for number in range(2):
        conversion = asymswap.convert("digits-resnet", "3x3-only")
        paths = {suffix: tmp_path / f"run{number}.{suffix}" for suffix in SUFFIXES}
        for path in paths.values():
            asymswap.save(conversion, path)
        found.append(paths)
    return found


class TestEqualRuns:
    """Equal runs write equal contents; the files' own bytes may differ, in the order of metadata, say."""

    def test_safetensors_hold_the_same_header_and_the_same_bytes(self, runs: list[dict[str, Path]]) -> None:
        one, other = (header_and_data(paths["safetensors"]) for paths in runs)
        assert one == other

    def test_the_records_of_pt_files_are_the_same_bytes(self, runs: list[dict[str, Path]]) -> None:
        one, other = (records(paths["pt"]) for paths in runs)
        assert one == other


def records(path: Path) -> dict[str, bytes]:
    """What a torch.save file holds, by names inside of it; its serial number, a hash of all names, is left out."""
    with zipfile.ZipFile(path) as archive:
        names = {name.partition("/")[2]: name for name in archive.namelist()}
        return {short: archive.read(name) for short, name in names.items() if "serialization_id" not in short}


def header_and_data(path: Path) -> tuple[Any, bytes]:
    """The JSON and the tensors of a safetensors file."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


@pytest.fixture
def small(written: dict[str, Written], tmp_path: Path) -> Path:
    """A small checkpoint to be damaged."""
    return Path(shutil.copy(written["digits-resnet"].paths["safetensors"], tmp_path / "small.safetensors"))


def rewrite(path: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """The same checkpoint as a .pt file with another header."""
    stored = read_checkpoint(path)
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["asymswap"])
    out = path.with_suffix(".pt")
    torch.save({"asymswap": json.dumps(change(header)), "state_dict": stored.state}, out)
    return out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: {**h, "format": 3}, r"is of format 3, newer than 2; upgrade asymswap"),
        (lambda h: {**h, "colour": "red"}, "has a damaged header: .*colour"),
        (lambda h: {k: v for k, v in h.items() if k != "plans"}, "has a damaged header: plans: "),
        (lambda h: [h], "has a damaged header: "),
        (lambda h: {**h, "skeleton": "!"}, "has a damaged structure: "),
        (lambda h: {**h, "aliases": {"x": "nowhere"}}, "is damaged: 'x' is an alias of 'nowhere', which it lacks"),
        (lambda h: {**h, "plans": [{"swaps": [{"site": "conv1"}]}]}, "the plan in .* is not a plan: "),
        (
            lambda h: {**h, "origin": {"reference": "cifar:resnet20"}},
            "does not fit cifar:resnet20: |cannot be rebuilt: ",
        ),
    ],
)
def test_a_damaged_header_is_told(small: Path, change: Callable[[dict[str, Any]], Any], message: str) -> None:
    with pytest.raises(asymswap.AsymswapError, match=message):
        asymswap.load(rewrite(small, change))


def test_a_changed_tensor_shape_is_told(small: Path, tmp_path: Path) -> None:
    stored = read_checkpoint(small)
    state = {**stored.state, "conv1.weight": torch.zeros(1)}
    path = tmp_path / "other.pt"
    with safe_open(small, framework="pt") as file:
        torch.save({"asymswap": file.metadata()["asymswap"], "state_dict": state}, path)
    with pytest.raises(CheckpointError, match=r"does not fit digits-resnet: conv1\.weight is 1, the model's 24x1x3x3"):
        asymswap.load(path)


def test_another_file_is_no_checkpoint(tmp_path: Path) -> None:
    torch.save(nn.Conv2d(1, 1, 1).state_dict(), tmp_path / "plain.pt")
    with pytest.raises(CheckpointError, match="is not an asymswap checkpoint; `asymswap convert` writes them"):
        asymswap.load(tmp_path / "plain.pt")
    # Neither is a model's name.
    with pytest.raises(CheckpointError, match="no file digits-resnet; give an asymswap checkpoint, as `asymswap conv"):
        asymswap.load("digits-resnet")


def test_an_ending_that_means_no_form_is_refused(small: Path, tmp_path: Path) -> None:
    header = read_checkpoint(small).header
    with pytest.raises(OutputError, match=r"out\.onnx must end in \.pt, \.pth, \.safetensors"):
        save_checkpoint(tmp_path / "out.onnx", nn.Conv2d(1, 1, 1), header)


def test_the_header_is_plain_data(small: Path) -> None:
    header: Header = read_checkpoint(small).header
    data = json.loads(json.dumps(header_to_json(header)))
    assert data.keys() == {"format", "origin", "plans", "preprocessing", "provenance"}
    assert data["provenance"].keys() == {"versions", "recipe", "overrides", "seed", "report"}


@pytest.mark.parametrize("verb", ["fuse", "export"])
def test_what_only_the_users_code_can_build_is_told_with_the_file_and_what_to_do(verb: str, tmp_path: Path) -> None:
    conversion = asymswap.convert(asymswap.open_model(OwnNet().eval(), input_size=(3, 8, 8)), "acnet")
    asymswap.save(conversion, tmp_path / "x.pt")
    with pytest.raises(
        CheckpointError,
        match=r"x\.pt cannot be rebuilt: .*OwnNet.*; .*model=OwnNet\(\)\) or give `arch=",
    ):
        getattr(asymswap, verb)(tmp_path / "x.pt", *([tmp_path / "x.onnx"] if verb == "export" else []))


class OwnNet(nn.Module):
    """A class that no file may build."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).mean((2, 3))
