"""Files as asymswap has written them, in tests/data/specimens: every later version reads them and computes the same.

Where one of these fails the files are right and the code is wrong, unless CHANGELOG.md says what is no longer read.
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import specimen_nets
import torch
from processes import forked
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

import asymswap

Run = Callable[..., Any]
SPECIMENS = Path(__file__).parent / "data" / "specimens"
FOLDERS = sorted(path.parent for path in SPECIMENS.glob("*/expected.safetensors"))
SUFFIXES = (".pt", ".safetensors")
FIRST = {
    *("separable", "separable-relu", "separable-bn", "separable-bn-relu", "cross", "acb", "acb-branch"),
    *("acnet-branch-bn", "offset", "weighted-offset", "predicted-offset", "predicted-offset-mask", "resized"),
    *("twice", "extra-state", "tied", "structure", "fused", "fused-offset", "digits-resnet"),
}
"""The checkpoints of the first folder, each in both forms."""
NOTHING_TO_FUSE = {
    *("separable-relu", "separable-bn", "separable-bn-relu", "predicted-offset", "predicted-offset-mask"),
    *("resized", "fused", "fused-offset"),
}

# Loads the files named in a process that has seen nothing else.
FRESH_PROCESS = """
import json, sys
import torch
from safetensors.torch import load_file, save_file

paths, results = json.loads(sys.argv[1]), {}
# Torch and safetensors alone must be able to read them.
hidden = {name: sys.modules.pop(name) for name in [*sys.modules] if name.partition(".")[0] == "asymswap"}
sys.modules["asymswap"] = None
assert torch.load(paths[0], weights_only=True).keys() == {"asymswap", "state_dict"}
assert load_file(paths[1])
sys.modules.update(hidden)

import asymswap

inputs = load_file(sys.argv[2])
for number, path in enumerate(paths):
    name = path.rpartition("/")[2].partition(".")[0]
    with torch.no_grad():
        results[str(number)] = asymswap.load(path)(inputs[f"{name}/input"])
save_file(results, sys.argv[3])
"""


def found(pattern: str) -> list[Any]:
    """The files of that name in every folder, as parameters of a test."""
    paths = [path for folder in FOLDERS for path in sorted(folder.glob(pattern))]
    return [pytest.param(path, id=path.relative_to(SPECIMENS).as_posix()) for path in paths if path.suffix != ".toml"]


def checkpoints() -> list[Any]:
    return [*found("checkpoints/*"), *found("tuned.run/best.pt"), *found("tuned.run/last.pt")]


def home(path: Path) -> Path:
    """The folder of specimens that a file belongs to."""
    return next(folder for folder in FOLDERS if folder in path.parents)


@functools.cache
def expected(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "expected.safetensors")


@functools.cache
def told(folder: Path) -> dict[str, Any]:
    """What was noted of a folder's specimens when they were written."""
    with safe_open(folder / "expected.safetensors", "pt") as file:
        noted: dict[str, Any] = json.loads(file.metadata()["specimens"])
    return noted


def unconverted(path: Path) -> nn.Module | None:
    """The network that a checkpoint needs, of other weights; None where the file says how it is built."""
    name = told(home(path))["checkpoints"][path.stem]["net"]
    return None if name is None else getattr(specimen_nets, name)()


def header(path: Path) -> dict[str, Any]:
    """The header as it stands in a file."""
    if path.suffix == ".pt":
        return dict(json.loads(torch.load(path, weights_only=True)["asymswap"]))
    with safe_open(path, "pt") as file:
        return dict(json.loads(file.metadata()["asymswap"]))


def check_outputs(model: nn.Module, folder: Path, name: str, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    """Raise AssertionError where a model computes anything but what the specimen of that name did."""
    noted = expected(folder)
    with torch.no_grad():
        found = model(noted[f"{name}/input"])
    torch.testing.assert_close(found, noted[f"{name}/output"], rtol=rtol, atol=atol)


@pytest.fixture
def work(run: Run, tmp_path: Path) -> Callable[[Path], Path]:
    """Copies a folder of specimens to where the command line runs, which may then write beside them."""

    def copy(path: Path) -> Path:
        shutil.copytree(home(path), tmp_path, dirs_exist_ok=True)
        return tmp_path

    return copy


def test_the_first_folder_is_whole() -> None:
    first = SPECIMENS / "0.1.0"
    assert {path.name for path in (first / "checkpoints").iterdir()} == {f"{n}{s}" for n in FIRST for s in SUFFIXES}
    assert {path.name for path in (first / "tuned.run").iterdir()} == {
        "best.pt",
        "last.pt",
        "state.pt",
        "metrics.jsonl",
    }
    assert {"plan.json", "evidence.safetensors", "sweep.json"} <= {path.name for path in first.iterdir()}
    assert {path.name for path in SPECIMENS.iterdir() if path.is_dir() and path.name != "__pycache__"} == {
        folder.name for folder in FOLDERS
    }


def test_there_is_a_specimen_of_every_kind(run: Run) -> None:
    """For a new kind: `python tests/data/specimens/make.py`, with a line for it in SWAPS."""
    rule = json.loads(run("recipes", "--schema").out)["$defs"]["Swap"]["oneOf"]
    kinds = {swap["properties"]["kind"]["const"] for swap in rule}
    for suffix in SUFFIXES:
        headers = [header(case.values[0]) for case in found(f"checkpoints/*{suffix}")]
        assert {swap["kind"] for head in headers for plan in head["plans"] for swap in plan["swaps"]} == kinds


def test_there_are_files_of_both_formats_with_every_field() -> None:
    headers = {case.values[0].name: header(case.values[0]) for case in found("checkpoints/*")}
    assert {head["format"] for head in headers.values()} == {1, 2}
    assert headers["tied.safetensors"]["aliases"]
    assert headers["structure.pt"]["skeleton"]
    assert headers["extra-state.pt"]["extra_state"]
    assert {head["origin"]["reference"].partition(":")[0] for head in headers.values()} == {
        "class", "skeleton", "digits-resnet",
    }  # fmt: skip
    assert [len(headers[f"{name}.pt"]["plans"]) for name in ("fused", "separable", "twice")] == [0, 1, 2]


@pytest.mark.parametrize("path", checkpoints())
def test_a_checkpoint_loads_and_computes_what_it_did(path: Path) -> None:
    loaded = asymswap.load(path, model=unconverted(path))
    assert list(loaded.state_dict()) == told(home(path))["checkpoints"][path.stem]["keys"]
    assert not loaded.training
    check_outputs(loaded, home(path), path.stem)


@pytest.mark.parametrize("path", checkpoints())
def test_every_tensor_of_a_checkpoint_comes_back_to_the_bit(path: Path) -> None:
    state = asymswap.load(path, model=unconverted(path)).state_dict()
    stored = torch.load(path, weights_only=True)["state_dict"] if path.suffix == ".pt" else load_file(path)
    common = [key for key in stored if isinstance(state.get(key), Tensor)]
    assert all(torch.equal(state[key], stored[key]) and state[key].dtype == stored[key].dtype for key in common)
    # What remains are tensors in extra state, which have names of their own.
    assert all("_extra_state" in key for key in stored.keys() - {*common})


@pytest.mark.parametrize("path", checkpoints())
def test_the_plans_of_a_checkpoint_are_shown_as_they_stand_in_it(path: Path, run: Run) -> None:
    shown = run("show", path, "--json")
    assert shown.code == 0, shown.err
    again, stored = json.loads(shown.out), header(path)
    assert len(again["plans"]) == len(stored["plans"])
    for one, other in zip(again["plans"], stored["plans"], strict=True):
        assert [{key: row[key] for key in swap} for row, swap in zip(one["swaps"], other["swaps"], strict=True)] == (
            other["swaps"]
        )
        assert [row["site"] for row in one["keeps"]] == [row["site"] for row in other["keeps"]]


@pytest.mark.parametrize("path", found("checkpoints/*"))
def test_a_checkpoint_fuses_where_it_can(path: Path) -> None:
    if path.stem in NOTHING_TO_FUSE:
        with pytest.raises(asymswap.AsymswapError, match="has nothing to fuse"):
            asymswap.fuse(asymswap.open_model(path, arch=unconverted(path)), separable=True)
        return
    fusion = asymswap.fuse(asymswap.open_model(path, arch=unconverted(path)), separable=True)
    assert {row.outcome for row in fusion.report.sites} <= {"fused", "resized"}
    # Kernels have been added up, in another order than their outputs were.
    check_outputs(fusion.model, home(path), path.stem, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("path", found("checkpoints/extra-state.*"))
def test_extra_state_comes_back(path: Path) -> None:
    kept = asymswap.load(path, model=specimen_nets.ExtraNet()).scale.kept
    wanted = specimen_nets.extra_state()
    assert list(kept) == list(wanted)
    tensors, wanted_tensors = kept.pop(3), wanted.pop(3)
    assert kept == wanted
    assert type(kept["pair"][1]) is type(wanted["pair"][1])
    assert list(tensors) == list(wanted_tensors)
    assert all(torch.equal(tensors[name], tensor) for name, tensor in wanted_tensors.items())


@pytest.mark.parametrize("path", found("checkpoints/tied.*"))
def test_what_was_tied_is_tied_again(path: Path) -> None:
    layers: Any = asymswap.load(path, model=specimen_nets.TiedNet()).layers
    assert layers[1] is layers[4]
    assert layers[3].weight is layers[5].weight


@pytest.mark.parametrize("folder", [folder for folder in FOLDERS if (folder / "checkpoints/structure.pt").exists()])
def test_a_fresh_process_computes_the_same(folder: Path, tmp_path: Path) -> None:
    paths = [folder / "checkpoints" / name for name in ("structure.pt", "digits-resnet.safetensors")]
    given = [json.dumps([path.as_posix() for path in paths]), str(folder / "expected.safetensors"), "results"]
    done = forked(FRESH_PROCESS, *given, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    results = load_file(tmp_path / "results")
    for number, path in enumerate(paths):
        wanted = expected(folder)[f"{path.stem}/output"]
        torch.testing.assert_close(results[str(number)], wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("path", found("plan.json"))
def test_a_plan_is_carried_out(path: Path) -> None:
    """From another conversion's plan nothing is chosen anew; only the weights are found again."""
    stored = json.loads(path.read_text(encoding="utf-8"))
    for given in (path.read_text(encoding="utf-8"), stored):
        done = asymswap.convert("digits-resnet", plan=given)
        rows = [(swap.site, swap.kind, dict(swap.settings), swap.absorbs) for swap in done.plan.swaps]
        assert rows == [(row["site"], row["kind"], row["settings"], row["absorbs"]) for row in stored["swaps"]]
        assert [keep.site for keep in done.plan.keeps] == [row["site"] for row in stored["keeps"]]
        check_outputs(done.model, home(path), "plan")


@pytest.mark.parametrize("path", found("evidence.safetensors"))
def test_evidence_is_read(path: Path) -> None:
    """The weights found on it are those that were found when it was gathered."""
    recipe = home(path) / "evidence.toml"
    done = asymswap.convert("digits-resnet", recipe, calibration=asymswap.Calibration(cache=path))
    assert done.report.calibration is not None
    assert f"statistics read from {path}" in done.report.calibration.notes
    check_outputs(done.model, home(path), "evidence")
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        check_outputs(asymswap.convert("digits-resnet", recipe).model, home(path), "evidence")


@pytest.mark.parametrize("path", found("sweep.json"))
def test_a_sweep_goes_on(path: Path, run: Run, work: Callable[[Path], Path]) -> None:
    state = work(path) / path.name
    stored = json.loads(state.read_text(encoding="utf-8"))
    assert [point["budget"] for point in stored["points"]] == told(home(path))["sweep"]["budgets"]
    # As no network would have it: what is known is not measured again.
    stored["points"][0]["accuracy"] = 0.125
    state.write_text(json.dumps(stored), encoding="utf-8")
    done = run("sweep", *told(home(path))["sweep"]["options"], "--macs", "0.6,0.5,0.4", "--json")
    assert done.code == 0, done.err
    again = json.loads(done.out)
    points = {point["budget"]: point for point in again["points"]}
    assert list(points) == [0.6, 0.5, 0.4]
    assert again == json.loads(state.read_text(encoding="utf-8"))
    for point in stored["points"]:
        for key in ("cost", "swapped", "seconds", "failed"):
            assert points[point["budget"]][key] == point[key]
        assert points[point["budget"]]["scores"] == {"top-1": point["accuracy"]}
    assert points[0.5]["cost"]["macs"] <= 0.5 * stored["before"]["macs"]
    assert points[0.5]["scores"]["top-1"] > 0.8


@pytest.mark.parametrize("path", found("tuned.run"))
def test_an_interrupted_training_goes_on(path: Path, run: Run, work: Callable[[Path], Path]) -> None:
    here, noted = work(path), told(home(path))["finetune"]
    told_before = (here / "tuned.run/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    # The runs of 0.1.0 were begun with an option that is called otherwise now.
    options = [word for given in noted["options"] for word in (("--device", "cpu") if given == "--cpu" else (given,))]
    done = run("finetune", *options, "--resume")
    assert done.code == 0, done.err
    assert f"resumed after {noted['step']} of 12 steps" in done.err
    metrics = (here / "tuned.run/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    kept = [line for line in told_before if json.loads(line)["step"] <= noted["step"]]
    assert metrics[: len(kept)] == kept
    assert json.loads(metrics[-1])["step"] == 12
    # Four steps on another processor, which may round otherwise: near to what the unbroken run gave.
    check_outputs(asymswap.load("tuned.pt"), home(path), "tuned", rtol=1e-3, atol=1e-3)
    check_outputs(asymswap.load("tuned.run/last.pt"), home(path), "finished", rtol=1e-3, atol=1e-3)
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        check_outputs(asymswap.load(path / "last.pt"), home(path), "finished", rtol=1e-3, atol=1e-3)
