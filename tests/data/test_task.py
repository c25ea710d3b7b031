"""Task files: which functions of a file are taken, and what in it is a mistake."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from asymswap.cli.options import calibration_of
from asymswap.data.task import FUNCTIONS, Task, read_task
from asymswap.errors import AsymswapError, SourceError
from asymswap.planning.shipped import shipped_folder
from asymswap.utils.distributed import ALONE

TEMPLATE = (shipped_folder() / "my_task.py").read_text(encoding="utf-8")

Run = Callable[..., Any]
Refusal = Callable[..., str]


def read(folder: Path, text: str) -> Task:
    path = folder / "my_task.py"
    path.write_text(text)
    return read_task(path)


def test_the_template_runs_as_it_is(tmp_path: Path) -> None:
    task = read(tmp_path, TEMPLATE)
    assert all(getattr(task, name) is not None for name in FUNCTIONS)
    assert task.calibration is not None
    assert task.inputs is not None
    assert task.evaluate is not None
    assert task.training is not None
    assert task.loss is not None
    model = nn.Conv2d(1, 1, 3, padding=1)
    for read_again in range(2):
        batches = list(task.calibration())
        assert sum(len(task.inputs(batch)) for batch in batches) == 256, read_again
    scores = task.evaluate(model)
    assert set(task.lower_is_better) < set(scores)
    batch = next(iter(task.training()))
    loss = task.loss(model(task.inputs(batch)), batch)
    loss.backward()
    assert model.weight.grad is not None
    assert loss.shape == torch.Size([])
    # A denoiser that leaves the noise alone: 25/255 is 20.2 dB.
    assert task.evaluate(nn.Sequential(nn.Identity(), _Same()))["psnr"] == pytest.approx(20.17, abs=0.1)


class _Same(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def test_the_command_prints_it_without_torch(tmp_path: Path) -> None:
    code = "import sys; from asymswap.cli.main import app; app(['task'], standalone_mode=False); "
    code += "print('torch' in sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert (done.stdout, done.stderr) == (TEMPLATE, "False\n")


def test_each_function_is_optional_and_helpers_are_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "beside_task.py").write_text("def evaluated(model): return 1\ndef loss(outputs, batch): ...\n")
    task = read(
        tmp_path,
        "from beside_task import evaluated, loss\nimport torch\nprint('run')\n"
        "def evaluate(model): return 0.5\ndef evaluate_all(model): ...\ndef _calibrate(): ...\n"
        "def psnr(a, b): ...\nclass Training: ...\nSIGMA = 25\nLOWER_IS_BETTER = 'error'\n",
    )
    assert (task.calibration, task.inputs, task.training) == (None, None, None)
    assert task.evaluate is not None
    assert task.evaluate(None) == 0.5
    assert task.loss is not None
    assert task.lower_is_better == "error"
    assert capsys.readouterr() == ("", "run\n")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("def evalute(model): ...", r"my_task\.py has 'evalute', which no command asks for; did you mean evaluate\?"),
        ("def calibrate(): ...", r"'calibrate', which .*; did you mean calibration\? A helper's name begins with _$"),
        ("def train(): ...\ndef loss(o, b): ...", r"'train', which .*; did you mean training\?"),
        ("def input(batch): ...", r"'input', which .*; did you mean inputs\?"),
        (
            "def evaluate(model): ...\nLOWER_IS_BETER = ()",
            r"'LOWER_IS_BETER', which .*; did you mean LOWER_IS_BETTER\?",
        ),
        ("x = 1", r"has none of the functions of a task: calibration, inputs, evaluate, training, loss$"),
        ("training = [1]", r"my_task\.py: training is called as training\(\): \[1\] is not a callable object$"),
        ("loss = 0.1", r"loss is called as loss\(outputs, batch\): 0\.1 is not a callable object$"),
        (
            "def evaluate(model, data): ...",
            r"evaluate is called as evaluate\(model\): missing a required argument: 'data'$",
        ),
        ("def calibration(n): ...", r"calibration is called as calibration\(\): missing"),
        ("def loss(outputs): ...", r"loss is called as loss\(outputs, batch\): too many"),
        ("1 / 0", r"^cannot run \S*my_task\.py: ZeroDivisionError: division by zero"),
        ("def loss(:", r"^cannot run \S*my_task\.py: SyntaxError"),
        ("from .other import loss", r"^cannot run \S*my_task\.py: ImportError: attempted relative import"),
    ],
)
def test_mistakes(text: str, expected: str, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=expected) as caught:
        read(tmp_path, text)
    assert "\n" not in str(caught.value)


def test_there_is_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"^\S*no\.py does not exist; give PATH\.py$"):
        read_task(tmp_path / "no.py")
    with pytest.raises(SourceError, match=r"is a folder, not a Python file"):
        read_task(tmp_path)


def test_a_task_calibrates_unless_data_is_given(tmp_path: Path) -> None:
    task = read(tmp_path, TEMPLATE)
    made = calibration_of({"images": 64}, 0, ALONE, task)
    assert made is not None
    assert (made.data, made.inputs, made.images) == (task.calibration, task.inputs, 64)
    with pytest.raises(
        AsymswapError, match=r"--calibrate and calibration\(\) of .*my_task\.py both say what to calibrat"
    ):
        calibration_of({"images": 64, "data": "digits"}, 0, ALONE, task)
    only = Task("t.py", inputs=task.inputs)
    own = calibration_of({"images": 64, "data": "digits"}, 0, ALONE, only)
    assert own is not None
    assert (own.data, own.inputs) == ("digits", task.inputs)
    assert calibration_of({}, 0, ALONE, only) is None


@pytest.mark.usefixtures("one_thread")
def test_the_command_line_reads_it_once_and_tells_its_mistakes(
    tmp_path: Path, refusal: Refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my_task.py").write_text("def evalute(model): ...")
    line = refusal("convert", "digits-resnet", "--recipe", "3x3-only", "--task", "my_task.py")
    assert "my_task.py has 'evalute', which no command asks for; did you mean evaluate?" in line
    assert [path.name for path in Path().iterdir()] == ["my_task.py"]
