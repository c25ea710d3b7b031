"""What runs models beside eager PyTorch, and that it is what it says."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from asymswap.errors import AsymswapError
from asymswap.measure import runtimes
from asymswap.measure.runtimes import check_same, compiled, session_on, write_for_runtime


class Net(nn.Module):
    """One conv; any number of channels is the same class, and so the same code."""

    def __init__(self, channels: int = 2) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).relu()


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, ...]]]:
    """torch.compile without its compiler; tells the input's size of every graph that it was given."""
    graphs: list[tuple[int, ...]] = []
    compile_ = torch.compile

    def note(graph: Any, examples: list[Tensor]) -> Any:
        graphs.append(next(tuple(one.shape) for one in examples if one.dim() == 4 and one.shape[-1] > 3))
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda model, **options: compile_(model, backend=note, **options))
    torch._dynamo.reset()
    yield graphs
    torch._dynamo.reset()


def test_every_model_size_and_number_of_threads_is_compiled_for_itself(
    backend: list[tuple[int, ...]], one_thread: None
) -> None:
    """Beyond eight of one class torch would, by default, run the others as they are."""
    before = torch.get_num_threads()
    with torch.inference_mode():
        for channels in range(1, 6):
            model = Net(channels).eval()
            for batch, threads in ((1, 1), (2, 1), (2, 2)):
                torch.set_num_threads(threads)
                x = torch.randn(batch, 3, 8, 8)
                run = compiled(model, (x,))
                assert torch.equal(run(), model(x))
    torch.set_num_threads(before)
    assert backend == [(1, 3, 8, 8), (2, 3, 8, 8), (2, 3, 8, 8)] * 5


def test_what_cannot_be_compiled_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(reason: str) -> None:
        def fail(*_: Any) -> None:
            raise RuntimeError(reason)

        monkeypatch.setattr(torch, "compile", lambda model, **_: fail)

    refuse("InvalidCxxCompiler: No working C++ compiler found in\n\ntorch._inductor")
    with pytest.raises(AsymswapError, match=r"^torch\.compile finds no C\+\+ compiler; install g\+\+"):
        compiled(Net(), (torch.zeros(1, 3, 8, 8),))
    refuse("the graph\n\nis torn")
    with pytest.raises(AsymswapError, match=r"^torch\.compile cannot compile it: the graph is torn$"):
        compiled(Net(), (torch.zeros(1, 3, 8, 8),))


@pytest.mark.slow
@pytest.mark.programs
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler (apt install g++)")
def test_torch_compile_computes_the_same(one_thread: None) -> None:
    model, x = Net().eval(), torch.randn(2, 3, 8, 8)
    with torch.inference_mode():
        check_same(compiled(model, (x,))(), model(x), "compile")
    torch._dynamo.reset()


def test_one_onnx_file_serves_all_batches_and_threads(tmp_path: Path) -> None:
    model = Net().eval()
    write_for_runtime(model, (torch.randn(2, 3, 8, 8),), tmp_path / "net.onnx")
    for batch, threads in ((1, 1), (4, 1), (4, 2)):
        x = torch.randn(batch, 3, 8, 8)
        with torch.no_grad():
            (found,) = session_on(tmp_path / "net.onnx", (x,), threads)()
            assert found.shape == (batch, 2, 6, 6)
            assert torch.allclose(found, model(x), atol=1e-5)


def test_sessions_have_the_threads_that_are_asked_for(tmp_path: Path) -> None:
    write_for_runtime(Net().eval(), (torch.randn(2, 3, 8, 8),), tmp_path / "net.onnx")
    session = runtimes.open_session(tmp_path / "net.onnx", 2)
    assert session.get_session_options().intra_op_num_threads == 2


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        (([torch.zeros(3, 8, 8)],), r"lists of images are not exported"),
        ((torch.zeros(2, 3, 8, 8, dtype=torch.bfloat16),), r"ONNX Runtime is not given bfloat16"),
    ],
)
def test_what_onnx_runtime_does_not_take(inputs: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(AsymswapError, match=said):
        write_for_runtime(Net(), inputs, tmp_path / "net.onnx")
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(runtimes._NEEDED, "no_such_module", (1,))
    with pytest.raises(AsymswapError, match=r"ONNX needs no_such_module; pip install 'asymswap\[onnx\]'"):
        write_for_runtime(Net(), (torch.zeros(2, 3, 8, 8),), tmp_path / "net.onnx")


def test_other_outputs_are_an_error_and_rounding_is_none() -> None:
    wanted = {"scores": torch.tensor([100.0, 1.0])}
    check_same([torch.tensor([100.009, 1.0])], wanted, "onnx")
    for found in (torch.tensor([100.02, 1.0]), torch.tensor([float("nan"), 1.0])):
        with pytest.raises(
            AsymswapError, match=r"ONNX Runtime computes something else than PyTorch: (2\.0e-02|nan) at"
        ):
            check_same([found], wanted, "onnx")
    with pytest.raises(AsymswapError, match=r"ONNX Runtime computes something else than PyTorch: inf at"):
        check_same([torch.tensor([100.0])], wanted, "onnx")
    # bfloat16 has eight bits.
    half = torch.tensor([100.0, 1.0], dtype=torch.bfloat16)
    check_same(half + 1, half, "compile")
    with pytest.raises(AsymswapError, match=r"torch\.compile computes something else"):
        check_same(half + 50, half, "compile")
