"""Models timed in many settings, by a clock that moves when the work says so, and not with the machine's speed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import asymswap
from asymswap.api.benchmark import shared_layers
from asymswap.errors import AsymswapError, TraceError
from asymswap.measure import latency, runtimes
from asymswap.results.benchmark import Benchmark, Result
from asymswap.results.records import to_json

DIGITS = "digits-resnet"


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The network of the digits at half of its MACs."""
    path = tmp_path_factory.mktemp("models") / "half.pt"
    asymswap.save(asymswap.convert(DIGITS, "half-macs"), path)
    return path


class Clock:
    """Stands still until somebody works; there is only this one, whoever is copied."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def __deepcopy__(self, _: Any) -> Clock:
        return self


Takes = Callable[[Tensor, nn.Conv2d], float]


class Work(nn.Module):
    """A conv that takes the seconds that are said of it."""

    def __init__(self, clock: Clock, takes: Takes, channels: int = 4) -> None:
        super().__init__()
        self.clock, self.takes = clock, takes
        self.conv = nn.Conv2d(3, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_meta:
            self.clock.now += self.takes(x, self.conv)
        return self.conv(x)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> Clock:
    clock = Clock()
    monkeypatch.setattr(latency.time, "perf_counter", clock)
    return clock


def constant(seconds: float) -> Takes:
    return lambda *_: seconds


def run(*models: nn.Module | str, **options: Any) -> Benchmark:
    size = options.pop("input_size", (3, 8, 8))
    opened = [asymswap.open_model(model, input_size=size) for model in models]
    return asymswap.benchmark(opened, **{"layers": False, **options})


def of(found: Benchmark, model: int, setting: int = 0) -> Result:
    (result,) = [one for one in found.results if (one.model, one.setting) == (model, setting)]
    return result


class TestFigures:
    def test_time_beside_macs(self, clock: Clock) -> None:
        found = run(Work(clock, constant(2)), Work(clock, constant(1.5), channels=2), batches=[6])
        first, other = of(found, 0), of(found, 1)
        assert first.seconds is not None
        assert (first.seconds.minimum, first.seconds.median, first.seconds.spread) == (2, 2, 0)
        assert (first.images_per_second, first.ratio) == (3, None)
        assert other.ratio is not None
        assert (other.ratio.value, other.ratio.is_significant) == (0.75, True)
        assert found.models[1].cost.macs * 2 == found.models[0].cost.macs == 3 * 4 * 64

    def test_every_combination_has_a_row_of_its_own(self, clock: Clock) -> None:
        def takes(x: Tensor, conv: nn.Conv2d) -> float:
            last = x.is_contiguous(memory_format=torch.channels_last)
            assert last == conv.weight.is_contiguous(memory_format=torch.channels_last) or conv.weight.shape[2:] == (
                1,
                1,
            )
            return len(x) * (1 if last else 3) / torch.get_num_threads()

        found = run(Work(clock, takes), batches=[1, 4], threads=[1, 2], rounds=5)
        assert len(found.settings) == len(found.results) == 8
        for result in found.results:
            setting = found.settings[result.setting]
            assert result.seconds is not None
            expected = setting.batch * (1 if setting.memory_format == "channels-last" else 3) / setting.threads
            assert result.seconds.minimum == expected
            assert result.images_per_second == setting.batch / expected
            assert result.rounds == (expected,) * 5
        assert torch.get_num_threads() == 1
        # Every one of the four pairs tells the same.
        assert [(gain.model, gain.times) for gain in found.gains] == [(0, 3)] * 4
        assert {found.settings[gain.setting].memory_format for gain in found.gains} == {"channels-last"}

    def test_contiguous_may_be_faster_and_where_nothing_is_told_nothing_is_advised(self, clock: Clock) -> None:
        def takes(x: Tensor, _: nn.Conv2d) -> float:
            return 1 if x.is_contiguous() else 2

        (gain,) = (found := run(Work(clock, takes), rounds=5)).gains
        assert (found.settings[gain.setting].memory_format, gain.times) == ("contiguous", 2)
        assert run(Work(clock, constant(1)), rounds=5).gains == ()

    def test_models_stay_as_they_are_and_are_run_in_eval_mode(self, clock: Clock) -> None:
        modes: list[bool] = []
        model = Work(clock, lambda *_: 1.0).train()
        model.conv.register_forward_hook(lambda module, *_: modes.append(module.training))
        run(model, rounds=1)
        assert model.training
        assert model.conv.weight.is_contiguous()
        assert modes
        assert not any(modes)

    def test_another_dtype(self, clock: Clock) -> None:
        seen: set[torch.dtype] = set()

        def takes(x: Tensor, conv: nn.Conv2d) -> float:
            seen.update((x.dtype, conv.weight.dtype))
            return 1

        found = run(Work(clock, takes), rounds=1, precision="bf16")
        assert seen == {torch.bfloat16}
        assert found.dtype == "bfloat16"
        assert run(Work(clock, constant(1)), rounds=1).dtype == "float32"

    def test_json_has_every_number(self, clock: Clock) -> None:
        data = json.loads(json.dumps(to_json(run(Work(clock, constant(2)), Work(clock, constant(1)), rounds=5))))
        assert data["schema"] == 1
        assert data["results"][1]["ratio"] == {"value": 0.5, "low": 0.5, "high": 0.5, "confidence": 0.9375}
        assert data["results"][1]["rounds"] == [1.0] * 5
        assert data["settings"][0] == {
            "runtime": "torch", "batch": 1, "threads": 1, "memory_format": "channels-last", "device": "cpu",
        }  # fmt: skip


class TestFailures:
    def test_what_fails_is_told_in_its_row_and_the_others_go_on(self, clock: Clock) -> None:
        def takes(x: Tensor, _: nn.Conv2d) -> float:
            if len(x) > 2:
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
            return 1

        found = run(Work(clock, constant(1)), Work(clock, takes), batches=[1, 8], memory_formats=["contiguous"])
        assert of(found, 1, 0).failure is None
        assert of(found, 1, 1) == Result(1, 1, failure="there is not enough memory")
        assert of(found, 0, 1).seconds is not None

    def test_without_the_first_there_is_no_ratio(self, clock: Clock) -> None:
        def fail(*_: Any) -> float:
            raise ValueError("of no use\nto anybody")

        found = run(Work(clock, fail), Work(clock, constant(1)))
        assert of(found, 0).failure == "the model fails with ValueError: of no use to anybody"
        assert of(found, 1).ratio is None
        assert of(found, 1).seconds is not None

    def test_where_nothing_can_be_run_it_is_an_error(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(runtimes.ONNX_RUNTIME, "no_such_module", (1,))
        with pytest.raises(AsymswapError, match=r"^ONNX Runtime needs no_such_module; pip install 'asymswap\[onnx\]'$"):
            asymswap.benchmark([DIGITS, DIGITS], runtimes=["onnxruntime"])

    def test_a_missing_runtime_leaves_the_others(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(runtimes.ONNX_RUNTIME, "no_such_module", (1,))
        found = asymswap.benchmark([DIGITS], runtimes=["torch", "onnxruntime"], rounds=1, memory_formats=["contiguous"])
        assert of(found, 0, 0).seconds is not None
        assert "no_such_module" in (of(found, 0, 1).failure or "")

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ({"runtimes": ["trch"]}, "the runtime 'trch' is unknown; did you mean torch"),
            ({"memory_formats": ["nhwc"]}, "the memory format 'nhwc' is unknown; choose channels-last, contiguous"),
            ({"batches": [0]}, r"batches of 0 in 20 rounds on 1 threads measure nothing; give 1 or more"),
            ({"batches": []}, r"1 models in 0 settings and 60 s measure nothing; give one model and setting or more"),
            ({"threads": [-1]}, r"batches of 1 in 20 rounds on -1 threads measure nothing"),
            ({"rounds": 0}, r"batches of 1 in 0 rounds on 1 threads measure nothing"),
            ({"seconds": 0}, r"1 models in 2 settings and 0 s measure nothing"),
        ],
    )
    def test_wrong_settings(self, options: dict[str, Any], said: str, one_thread: None) -> None:
        with pytest.raises(AsymswapError, match=said):
            asymswap.benchmark([DIGITS], **options)

    def test_an_input_that_a_model_does_not_take(self) -> None:
        said = r"^digits-resnet does not run on an input of 1x3x8x8: Given groups=1.*; give another .*input.*$"
        with pytest.raises(TraceError, match=said):
            asymswap.benchmark([asymswap.open_model(DIGITS, input_size=(3, 8, 8))])
        with pytest.raises(TraceError, match=said):
            asymswap.compare(
                [asymswap.open_model(DIGITS, input_size=(3, 8, 8)), asymswap.open_model(DIGITS, input_size=(3, 8, 8))]
            )

    def test_no_model(self) -> None:
        with pytest.raises(AsymswapError, match="0 models in 2 settings and 60 s measure nothing; give one model"):
            asymswap.benchmark([])

    def test_one_model(self) -> None:
        """Alone, a name is not read letter by letter, nor an nn.Sequential layer by layer."""
        chain = asymswap.open_model(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval(), input_size=(3, 8, 8))
        for model in (DIGITS, chain.model, chain):
            size = (3, 8, 8) if isinstance(model, nn.Module) else None
            found = asymswap.benchmark(model, rounds=5, seconds=1, layers=False, input_size=size)
            assert len(found.models) == 1


class TestLayers:
    def test_time_and_macs_of_each_and_of_the_rest(self, clock: Clock) -> None:
        def network(*seconds: float, hidden: int) -> nn.Module:
            layers = [Work(clock, constant(one)) for one in seconds]
            layers[1].conv = nn.Conv2d(4, hidden, 1)
            layers[2].conv = nn.Conv2d(hidden, 4, 1)
            return nn.Sequential(*layers)

        found = run(network(3, 4, 1, hidden=8), network(3, 3, 2, hidden=4), batches=[2], layers=True)
        (layers,) = found.layers
        assert (layers.model, found.settings[layers.setting].runtime) == (1, "torch")
        # The seconds pass in Work, outside of the convs, which are all that the two have in common below it.
        assert {row.layer for row in layers.rows} <= {"0.conv", "1.conv", "2.conv"}
        assert (layers.rest.first, layers.rest.own) == (8, 8)

    def test_the_greatest_difference_from_the_promise_comes_first(self, clock: Clock) -> None:
        class Slow(nn.Conv2d):
            def __init__(self, seconds: float, *sizes: int) -> None:
                super().__init__(*sizes)
                self.seconds = seconds

            def forward(self, x: Tensor) -> Tensor:
                if not x.is_meta:
                    clock.now += self.seconds
                return super().forward(x)

        first = nn.Sequential(Slow(4, 3, 8, 1), Slow(6, 8, 8, 1), Slow(1, 8, 4, 1))
        # A pair at half of the MACs takes the place of the second, nearly as slow; the third is faster by itself.
        pair = nn.Sequential(Slow(2, 8, 2, 1), Slow(3.5, 2, 8, 1))
        other = nn.Sequential(Slow(4, 3, 8, 1), pair, Slow(0.5, 8, 4, 1))
        found = run(first, other, batches=[2], layers=True)
        rows = found.layers[0].rows
        assert [(row.layer, row.first, row.own) for row in rows] == [("1", 6, 5.5), ("2", 1, 0.5), ("0", 4, 4)]
        assert rows[0].first_macs == 2 * 64 * 64
        assert rows[0].macs == 2 * 32 * 64
        assert rows[0].excess == pytest.approx(5.5 - 3)
        assert rows[1].excess == pytest.approx(-0.5)
        total = sum(row.macs for row in rows) + found.layers[0].rest.macs
        assert total == 2 * found.models[1].cost.macs

    def test_names_that_both_have_of_which_none_lies_within_another(self) -> None:
        def conv() -> nn.Module:
            return nn.Conv2d(1, 1, 1)

        plain = nn.Sequential(nn.Sequential(conv(), nn.ReLU()), conv(), nn.ReLU())
        pairs = [nn.Sequential(conv(), conv()) for _ in range(2)]
        swapped = nn.Sequential(nn.Sequential(pairs[0], nn.ReLU()), pairs[1])
        assert shared_layers(plain, swapped) == ["0.0", "0.1", "1"]
        assert shared_layers(swapped, plain) == ["0.0", "0.1", "1"]

    def test_no_layers_without_eager_or_when_they_are_not_wanted(self, clock: Clock) -> None:
        assert run(Work(clock, constant(1)), Work(clock, constant(1))).layers == ()
        assert run(Work(clock, constant(1)), layers=True).layers == ()


class TestRuntimes:
    def test_compiling_is_timed_apart_and_threads_are_set(self, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
        threads: list[int] = []

        def compiled(model: nn.Module, dynamic: bool) -> Any:
            clock.now += 48  # the first pass takes 2 more
            threads.append(torch.get_num_threads())
            return model

        monkeypatch.setattr(torch, "compile", compiled)
        model = Work(clock, constant(2))
        found = run(model, runtimes=["torch", "compile"], threads=[1, 2], memory_formats=["contiguous"])
        assert [result.ready for result in found.results] == [None, None, 50, 50]
        assert all(result.seconds is not None and result.seconds.minimum == 2 for result in found.results)
        assert threads == [1, 2]

    def test_what_computes_something_else_is_not_timed(self, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch, "compile", lambda model, dynamic: lambda *inputs: model(*inputs) + 1)
        found = run(Work(clock, constant(2)), runtimes=["torch", "compile"], memory_formats=["contiguous"])
        assert "computes something else than PyTorch: 1.0e+00" in (of(found, 0, 1).failure or "")

    def test_onnx_runtime_has_no_memory_format_and_one_file_for_all(
        self, monkeypatch: pytest.MonkeyPatch, one_thread: None
    ) -> None:
        written: list[Path] = []
        write = runtimes.write_onnx

        def noted(model: nn.Module, inputs: Any, shapes: Any, path: Path) -> None:
            written.append(path)
            write(model, inputs, shapes, path)

        monkeypatch.setattr(runtimes, "write_onnx", noted)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
        found = run(model, runtimes=["onnxruntime"], batches=[1, 4], threads=[1, 2], rounds=2)
        assert [(one.batch, one.threads, one.memory_format) for one in found.settings] == [
            (1, 1, None), (1, 2, None), (4, 1, None), (4, 2, None),
        ]  # fmt: skip
        assert all(result.failure is None and (result.ready or 0) > 0 for result in found.results)
        (path,) = written
        assert not path.parent.exists()
        assert any(version.startswith("onnxruntime ") for version in found.versions)


class TestCommand:
    QUICK = ("--rounds", "1", "--layers", "0", "--memory-format", "contiguous")

    def test_a_table(self, run: Callable[..., Any], half: Path) -> None:
        outcome = run("benchmark", DIGITS, half, "--rounds", "2", "--batch", "1,2")
        assert (outcome.code, outcome.err) == (0, "")
        for words in (
            "PyTorch, batch 1, channels-last, 1 thread",
            "PyTorch, batch 2, contiguous, 1 thread",
            "Images/s",
            "Layers of ",
            "together",
            "Random inputs of 1x8x8, float32; all in turn, 2 rounds",
        ):
            assert words in outcome.out

    def test_json_and_markdown(self, run: Callable[..., Any], half: Path) -> None:
        data = json.loads(run("benchmark", DIGITS, half, "--json", *self.QUICK).out)
        assert [result["model"] for result in data["results"]] == [0, 1]
        assert 0.49 < data["models"][1]["cost"]["macs"] / data["models"][0]["cost"]["macs"] <= 0.5
        lines = run("benchmark", DIGITS, half, "--markdown", *self.QUICK).out.splitlines()
        assert lines[0].startswith("| Model | Setting | ms | Median |")
        assert lines[2].startswith(f"| `{DIGITS}` | PyTorch, batch 1, contiguous, 1 thread |")

    def test_it_is_timed_with_threads_that_wait_awake(
        self, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
        assert run("benchmark", DIGITS, *self.QUICK).code == 0
        assert "OMP_WAIT_POLICY" not in os.environ

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["--batch", "1,x"], "--batch '1,x' is no list of whole numbers from 1, such as 1,8"),
            (["--batch", "0"], "--batch '0' is no list of whole numbers from 1, such as 1,8"),
            (["--threads", "1;2"], "--threads '1;2' is no list of whole numbers from 1, such as 1,8"),
            (["--json", "--markdown"], "--json and --markdown are two forms of the same; give one of them"),
            (["digits-resnte"], "did you mean digits-resnet"),
        ],
    )
    def test_what_is_wrong_is_one_line(self, refusal: Callable[..., str], arguments: list[str], said: str) -> None:
        assert said in refusal("benchmark", DIGITS, *arguments)
