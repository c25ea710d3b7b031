"""YOLO models of ultralytics: their files as data, the network in a YOLO object, and one that trains on with swaps."""

from __future__ import annotations

import logging
import random
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from processes import CLI, forked

import asymswap
from asymswap.errors import AsymswapError
from asymswap.models.ultralytics_models import KeptConv

ultralytics = pytest.importorskip("ultralytics")
from ultralytics import YOLO  # noqa: E402
from ultralytics.utils import LOGGER  # noqa: E402

SIZE = 64


@pytest.fixture(autouse=True)
def quiet() -> None:
    LOGGER.setLevel(logging.ERROR)


def outputs(model: Any, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found = model.eval()(x)
    while isinstance(found, tuple | list):
        found = found[0]
    return found


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    return torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("yolo") / "yolov8n.pt"
    YOLO("yolov8n.yaml").save(path)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make eight images of two classes to train on and to validate."""
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for part in ("train", "val"):
        for kind in ("images", "labels"):
            (root / kind / part).mkdir(parents=True)
        for i in range(8):
            pixels = rng.integers(0, 255, (SIZE, SIZE, 3), dtype=np.uint8)
            pixels[16:40, 16:48] = 200
            Image.fromarray(pixels).save(root / "images" / part / f"{i}.png")
            (root / "labels" / part / f"{i}.txt").write_text(f"{i % 2} 0.5 0.4375 0.5 0.375\n")
    text = f"path: {root}\ntrain: images/train\nval: images/val\nnames: {{0: cat, 1: dog}}\n"
    (root / "data.yaml").write_text(text)
    return root / "data.yaml"


def train(yolo: Any, data: Path, folder: Path, epochs: int = 1) -> Path:
    state = random.getstate()
    yolo.train(
        data=str(data), epochs=epochs, imgsz=SIZE, batch=8, workers=0, device="cpu", plots=False, verbose=False,
        project=str(folder), name="run", exist_ok=True, optimizer="SGD", warmup_epochs=0,
    )  # fmt: skip
    random.setstate(state)
    return Path(yolo.trainer.best)


def kept(model: Any) -> int:
    return sum(isinstance(module, KeptConv) for module in model.modules())


def test_their_file_is_read_as_data(weights: Path, x: torch.Tensor) -> None:
    opened = asymswap.open_model(weights)
    assert torch.equal(outputs(opened.model, x), outputs(YOLO(weights).model, x))
    assert opened.origin.reference == "ultralytics:yolov8n.yaml"
    assert (opened.preprocessing.size, opened.preprocessing.mean) == ((640, 640), (0.0, 0.0, 0.0))


@pytest.mark.parametrize("given", ["file", "YOLO", "module"])
def test_a_block_is_put_in_without_effect(weights: Path, x: torch.Tensor, tmp_path: Path, given: str) -> None:
    yolo = YOLO(weights)
    want = outputs(yolo.model, x)
    model: Any = {"file": weights, "YOLO": yolo, "module": yolo.model}[given]
    conversion = asymswap.convert(model, "acnet", input_size=(3, SIZE, SIZE))
    assert len(conversion.report.swapped) == 39
    assert (outputs(conversion.model, x) - want).abs().max() < 1e-4
    asymswap.save(conversion, tmp_path / "swapped.pt")
    torch.save({"x": x, "want": outputs(conversion.model, x)}, tmp_path / "told.pt")
    code = f"""
import torch, asymswap
told = torch.load({str(tmp_path / "told.pt")!r})
with torch.no_grad():
    found = asymswap.load({str(tmp_path / "swapped.pt")!r})(told["x"])[0]
    assert (found - told["want"]).abs().max() < 1e-3, (found - told["want"]).abs().max()
"""
    done = forked(code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # ultralytics exports by way of TorchScript
def test_a_yolo_predicts_trains_on_and_comes_back(weights: Path, data: Path, x: torch.Tensor, tmp_path: Path) -> None:
    conversion = asymswap.convert(weights, "acnet", input_size=(3, SIZE, SIZE))
    yolo = asymswap.as_yolo(conversion, tmp_path / "swapped.pt")
    image = str(data.parent / "images" / "val" / "0.png")
    options: Any = {"imgsz": SIZE, "conf": 1e-4, "verbose": False}
    before, after = (one.predict(image, **options)[0].boxes.data for one in (YOLO(weights), yolo))
    assert torch.allclose(before, after, atol=1e-3)
    # A plain YOLO reads the file too, and folds all but the swaps.
    plain = YOLO(tmp_path / "swapped.pt")
    plain.fuse()
    assert (outputs(plain.model, x) - outputs(conversion.model, x)).abs().max() < 1e-3

    best = train(asymswap.as_yolo(tmp_path / "swapped.pt"), data, tmp_path, epochs=2)
    trained = YOLO(best)
    assert trained.names == {0: "cat", 1: "dog"}
    assert kept(trained.model) == 39
    want = outputs(trained.model, x)
    assert torch.equal(outputs(asymswap.load(best), x), want)
    own, first = (one.model.state_dict() for one in (trained, conversion))
    alike = [name for name in own if own[name].shape == first[name].shape]
    assert len(alike) > len(own) - 7  # all but the last convs of the classes at three scales
    assert any(not torch.equal(own[name], first[name].half().float()) for name in alike if "conv" in name)
    fused = asymswap.fuse(best)
    assert (outputs(fused.model, x) - want).abs().max() < 1e-3
    assert kept(asymswap.as_yolo(fused, tmp_path / "fused.pt").model) == 0
    program = trained.export(format="onnx", imgsz=SIZE, dynamic=True, simplify=False)
    import onnxruntime

    session = onnxruntime.InferenceSession(program)
    told = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    assert np.abs(told - want.numpy()).max() < 1e-3
    again = train(asymswap.as_yolo(best), data, tmp_path)
    assert kept(YOLO(again).model) == 39


def test_what_ultralytics_has_trained_and_folded(weights: Path, data: Path, x: torch.Tensor, tmp_path: Path) -> None:
    """It keeps the hidden layers of the head for another number of classes, against the yaml in the very file."""
    best = train(YOLO(weights), data, tmp_path)
    trained = YOLO(best)
    opened = asymswap.open_model(best)
    assert torch.equal(outputs(opened.model, x), outputs(trained.model, x))
    assert opened.preprocessing.size == (SIZE, SIZE)
    trained.fuse()
    trained.save(tmp_path / "folded.pt")
    folded = asymswap.open_model(tmp_path / "folded.pt")
    assert any("folded" in note for note in folded.notes)
    assert (outputs(folded.model, x) - outputs(trained.model, x)).abs().max() < 1e-3
    conversion = asymswap.convert(trained, "half-macs", macs=0.6, input_size=(3, SIZE, SIZE))
    asymswap.save(conversion, tmp_path / "half.pt")
    assert torch.equal(outputs(asymswap.load(tmp_path / "half.pt"), x), outputs(conversion.model, x))


@pytest.mark.parametrize("name", ["yolov9t", "yolov10n", "yolo11n", "yolo26n", "yolov8n-seg", "yolov8n-cls"])
def test_others_of_the_family(name: str, x: torch.Tensor, tmp_path: Path) -> None:
    conversion = asymswap.convert(f"ultralytics:{name}", "acnet", input_size=(3, SIZE, SIZE))
    asymswap.save(conversion, tmp_path / "swapped.pt")
    want = outputs(conversion.model, x)
    assert torch.equal(outputs(asymswap.load(tmp_path / "swapped.pt"), x), want)
    yolo = asymswap.as_yolo(conversion, tmp_path / "yolo.pt")
    yolo.fuse()
    assert (outputs(yolo.model, x) - want).abs().max() < 1e-3


def test_the_head_takes_other_classes_only_where_it_is_not_swapped(data: Path, tmp_path: Path) -> None:
    recipe = """
summary = "the last convs of the classes"
preserves = "approximately"
[[rules]]
match = { names = ["*.cv3.*.2"] }
swap = { kind = "low-rank", rank = 8 }
"""
    (tmp_path / "head.toml").write_text(recipe)
    conversion = asymswap.convert("ultralytics:yolov8n", tmp_path / "head.toml", input_size=(3, SIZE, SIZE))
    assert len(conversion.report.swapped) == 3
    with pytest.raises(AsymswapError, match="80 classes and the data 2"):
        train(asymswap.as_yolo(conversion, tmp_path / "half.pt"), data, tmp_path)


@pytest.mark.filterwarnings("ignore")  # ultralytics traces in TorchScript, whose every part warns
def test_the_page_runs(weights: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run every command and every line of Python of docs/guide/yolo.md, in order, as they stand there."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(weights, "yolov8n.pt")
    shutil.copy(data, "pets.yaml")
    shutil.copy(data.parent / "images" / "val" / "0.png", "dog.png")
    shutil.copytree(data.parent / "images" / "train", "photos")
    text = (Path(__file__).parents[2] / "docs" / "guide" / "yolo.md").read_text()
    names: dict[str, Any] = {}
    blocks = re.findall(r"```(bash|python)\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 4
    for language, block in blocks:
        if language == "python":
            exec(compile(block, "yolo.md", "exec"), names)
        for line in block.splitlines() if language == "bash" else ():
            if line.startswith("asymswap "):
                done = forked(CLI, *shlex.split(line)[1:], cwd=tmp_path)
                assert done.returncode == 0, (line, done.stderr)
    assert kept(names["trained"].model) == 0


ROWS = {"backbone": [[-1, 1, "Conv", [16, 3, 2]]], "head": [[-1, 1, "Classify", ["nc"]]], "nc": 3}
DEEPER = [[-1, 1, "Conv", [16, 3, 2]], [-1, 1, "Conv", [32, 3, 2]]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backbone": [[-1, 1, "torch_safe_load", ["evil.pt"]]]}, "'torch_safe_load', which is no layer"),
        ({"backbone": [[-1, 1, "check_requirements", ["evil"]]]}, "which is no layer"),
        ({"backbone": [[-1, 1, "TorchVision", [512, "resnet18", "DEFAULT"]]]}, "which is no layer"),
        ({"backbone": [[-1, 1, "nn.functional.relu", []]]}, "which is no layer"),
        ({"backbone": [[-1, 1, "nn.parallel.DataParallel", []]]}, "which is no layer"),
        ({"backbone": [[-1, 10**9, "Conv", [16, 3, 2]]]}, "more layers or channels"),
        ({"scales": {"n": [1, 1e9, 1024]}, "scale": "n"}, "more layers or channels"),
        ({"backbone": [[-1, 1, "Cnv", [16, 3, 2]]]}, "did you mean Conv"),
        ({"backbone": "no rows"}, "no yaml with a backbone"),
        ({"backbone": [[-1, 1, "Conv"]]}, "a row that is not"),
        ({"activation": "open('sprung', 'w')"}, "must be one of torch.nn's"),
        ({"activation": "nn.ReLU(open('sprung', 'w'))"}, "must be one of torch.nn's"),
    ],
)
def test_a_yaml_names_layers_alone(change: dict[str, Any], message: str) -> None:
    with pytest.raises(AsymswapError, match=message):
        asymswap.open_model("ultralytics:own.yaml", arguments={"yaml": ROWS | change})


def test_an_own_yaml_is_a_model(x: torch.Tensor, tmp_path: Path) -> None:
    arguments = {"yaml": {**ROWS, "backbone": DEEPER, "activation": "nn.ReLU()", "yaml_file": "net-20261130.yaml"}}
    opened = asymswap.open_model("ultralytics:own.yaml", arguments=arguments, input_size=(3, SIZE, SIZE))
    assert any(isinstance(module, torch.nn.ReLU) for module in opened.model.modules())
    conversion = asymswap.convert(opened, "3x3-only")
    asymswap.save(conversion, tmp_path / "own.pt")
    assert torch.equal(outputs(asymswap.load(tmp_path / "own.pt"), x), outputs(conversion.model, x))


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("ultralytics:yolov8nn", "ultralytics has no yolov8nn.yaml.*did you mean"),
        ("ultralytics:yolov8n@coco", "no model|no published weights"),
    ],
)
def test_names_that_there_are_not(reference: str, message: str) -> None:
    with pytest.raises(AsymswapError, match=message):
        asymswap.open_model(reference)


def test_other_networks_are_no_yolo(tmp_path: Path, weights: Path) -> None:
    conversion = asymswap.convert("digits-resnet", "acnet")
    with pytest.raises(AsymswapError, match="no network of ultralytics"):
        asymswap.as_yolo(conversion, tmp_path / "no.pt")
    assert not (tmp_path / "no.pt").exists()
    with pytest.raises(AsymswapError, match="give a `path`"):
        asymswap.as_yolo(conversion)
    with pytest.raises(AsymswapError, match="no file"):
        asymswap.as_yolo(tmp_path / "none.pt")


def test_without_ultralytics_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, weights: Path) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ultralytics.nn.tasks", None)
    with pytest.raises(AsymswapError, match=r"pip install 'asymswap\[ultralytics\]'"):
        asymswap.open_model(weights)
