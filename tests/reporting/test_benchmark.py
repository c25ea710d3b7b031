"""What is shown of a benchmark, at every width."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from asymswap.reporting.benchmark import benchmark_view
from asymswap.results.benchmark import Benchmark, BenchmarkedModel, Gain, LayerRow, Layers, Result, Setting
from asymswap.types import Cost, Ratio, Seconds

NCHW, NHWC = Setting("torch", 1, 2, "contiguous"), Setting("torch", 1, 2, "channels-last")
ONNX = Setting("onnxruntime", 8, 1, None)
TOLD, UNTOLD, VAGUE = Ratio(0.6, 0.58, 0.62), Ratio(0.99, 0.97, 1.01), Ratio(0.7, 0.6, 0.8)


def result(model: int, setting: int, milliseconds: float, ratio: Ratio | None = None, spread: float = 0.01) -> Result:
    seconds = Seconds(milliseconds / 1e3, 1.1 * milliseconds / 1e3, spread)
    return Result(model, setting, seconds, 1 / seconds.median, ratio, 12.34 if setting == 2 else None, (0.1,))


LAYERS = Layers(
    1,
    0,
    (
        LayerRow("layer1.0.conv1", 0.004, 0.005, 100, 50),
        LayerRow("layer2.0.conv1", 0.002, 0.0015, 100, 50),
        LayerRow("layer1.0.bn1", 0.001, 0.001),
    ),
    LayerRow("outside of them", 0.003, 0.002, 20, 30),
)
MADE = Benchmark(
    asymswap="0.1.0",
    models=(
        BenchmarkedModel("a|b", "x", "y", "3x8x8", Cost(1000, 200)),
        BenchmarkedModel("models/a-converted-network.asym.pt", "x", "y", "3x8x8", Cost(500, 50), ("a note",)),
    ),
    settings=(NCHW, NHWC, ONNX),
    results=(
        result(0, 0, 20),
        result(1, 0, 12, TOLD),
        result(0, 1, 10),
        result(1, 1, 9.9, UNTOLD),
        result(0, 2, 100),
        Result(1, 2, failure="ONNX cannot express this model: no"),
    ),
    layers=(LAYERS,),
    gains=(Gain(0, 1, 2.0), Gain(1, 1, 1.2121)),
    dtype="float32",
    machine="Some Processor",
    cores=4,
    rounds=20,
    others=1.5,
    versions=("torch 2.0",),
)


def shown(benchmark: Benchmark, width: int, layers: int = 5) -> str:
    screen = Console(file=io.StringIO(), width=width)
    screen.print(benchmark_view(benchmark, width, layers), highlight=False, markup=False)
    text = screen.file.getvalue()  # type: ignore[attr-defined]
    assert all(len(line) <= width for line in text.splitlines())
    return str(text)


def joined(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize("width", [80, 120, 200])
def test_a_table_for_each_setting(width: int) -> None:
    text = shown(MADE, width)
    for words in ("PyTorch, batch 1, contiguous, 2 threads", "ONNX Runtime, batch 8, 1 thread\n"):
        assert words in text
    assert "…" not in text
    rows = [line.split() for line in text.splitlines() if line.startswith("a|b")]
    assert rows[0][:5] == ["a|b", "20.0", "22.0", "1.0", "%"]
    assert "60.0 %" in text
    assert "99.0 % ?" in text
    assert "50.0 %" in text
    assert ("58.0 to 62.0" in text) == (width >= 120)
    assert "12.3" in text


def test_what_could_not_be_run_is_told_once_with_its_reason() -> None:
    text = joined(shown(MADE, 80))
    name = MADE.models[1].model
    assert f"ONNX Runtime, {name}: ONNX cannot express this model: no." in text
    both = replace(MADE, results=(*MADE.results[:4], *(replace(MADE.results[5], model=number) for number in (0, 1))))
    text = joined(shown(both, 80))
    assert f"ONNX Runtime, a|b, {name}: ONNX cannot express this model: no." in text
    assert "batch 8" not in text
    assert f"ONNX Runtime, a|b, {name}" in benchmark_view(both, None).markdown()


def test_what_cannot_be_told_is_said() -> None:
    name = MADE.models[1].model
    text = joined(shown(MADE, 80))
    untold = f"Not significantly different from a|b, or within 2 % of its time (95 % confidence): {name}"
    assert f"{untold} (PyTorch, batch 1, channels-last, 2 threads) 0.97 to 1.01." in text
    assert "too busy" not in text
    assert "Other programs kept 1.5 of 4 cores busy meanwhile." in text
    vague = replace(MADE, results=(MADE.results[0], result(1, 0, 12, VAGUE)), settings=(NCHW,), gains=())
    text = joined(shown(vague, 80))
    assert "The machine was too busy to measure times to within 5 %" in text
    assert f"{name} (PyTorch, batch 1, contiguous, 2 threads) 0.60 to 0.80." in text
    assert "Not significantly different from a|b" not in text


def test_a_quiet_machine_is_no_news() -> None:
    quiet = replace(MADE, results=MADE.results[:2], settings=(NCHW,), gains=())
    assert "Other programs" not in shown(quiet, 80)


def test_which_memory_format_is_faster() -> None:
    text = joined(shown(MADE, 80))
    assert "a|b: channels-last is 2.00 x as fast here: model.to(memory_format=torch.channels_last)" in text
    assert "channels-last is 1.21 x as fast here" in text
    several = replace(MADE, gains=(Gain(0, 1, 2.0), Gain(0, 1, 1.5)))
    assert "a|b: channels-last is 1.50 to 2.00 x as fast here" in joined(shown(several, 80))
    mixed = replace(MADE, gains=(Gain(0, 1, 2.0), Gain(0, 0, 1.5)))
    text = joined(shown(mixed, 80))
    assert "a|b: contiguous is 1.50 x as fast here (PyTorch, batch 1, 2 threads): PyTorch's default" in text


def test_one_model_has_a_line_for_each_setting_and_no_ratio() -> None:
    alone = replace(
        MADE,
        models=MADE.models[:1],
        results=(result(0, 0, 20), result(0, 1, 10, spread=0.3)),
        settings=(NCHW, NHWC),
        layers=(),
        gains=(),
    )
    text = shown(alone, 80)
    settings = [f"PyTorch, batch 1, {form}, 2 threads" for form in ("contiguous", "channels-last")]
    assert [line.split("  ")[0] for line in text.splitlines()[:4]] == ["a|b", "Setting", *settings]
    assert "of 1st" not in text
    assert f"The machine was busy: the middle half of the rounds spreads over 30.0 % ({settings[1]})." in joined(text)


def test_layers_and_their_sum() -> None:
    text = shown(MADE, 80, layers=1)
    rows = {line[:16].strip(): line[16:].split() for line in text.splitlines() if line[:16].strip()}
    assert rows["layer1.0.conv1"] == ["4.000", "5.000", "125.0", "%", "50.0", "%", "+3.000"]
    # Half a millisecond above its MACs, and nothing where there are none.
    assert rows["2 others"] == ["3.000", "2.500", "83.3", "%", "50.0", "%", "+0.500"]
    assert rows["outside of them"] == ["3.000", "2.000", "66.7", "%", "150.0", "%", "-2.500"]
    assert rows["together"] == ["10.000", "9.500", "95.0", "%", "59.1", "%", "+1.000"]
    assert "together" not in shown(MADE, 80, layers=0)


def test_markdown_is_one_table_of_everything() -> None:
    lines = benchmark_view(MADE, None).markdown().splitlines()
    assert lines[0] == "| Model | Setting | ms | Median | Spread | Images/s | of 1st | 95 % | MACs | Ready s |"
    assert lines[2] == (
        "| `a\\|b` | PyTorch, batch 1, contiguous, 2 threads | 20.0 | 22.0 | 1.0 % | 45.5 | 100.0 % | - | 100.0 % | - |"
    )
    assert "| 12.0 | 13.2 | 1.0 % | 75.8 | 60.0 % | 58.0 to 62.0 | 50.0 % | - |" in lines[3]
    assert lines[6].endswith(
        "| ONNX Runtime, batch 8, 1 thread | 100 | 110 | 1.0 % | 9.09 | 100.0 % | - | 100.0 % | 12.3 |"
    )
    # What could not be run has no row, but a line.
    assert lines[7] == ""
    text = "\n".join(lines)
    for words in (
        "cannot express",
        "| `layer1.0.conv1` |",
        "| **together** |",
        "- Random inputs of 3x8x8",
        ": a note.",
    ):
        assert words in text
