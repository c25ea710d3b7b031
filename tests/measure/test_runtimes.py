"""What runs networks once they are deployed, and that it is what it says."""

from __future__ import annotations

import itertools
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from processes import forked
from torch import Tensor, nn

from asymswap.errors import AsymswapError
from asymswap.measure import runtimes
from asymswap.measure.latency import REST, best_of, take_turns
from asymswap.measure.runtimes import RUNTIMES, Network, installed, layers_of, prepare_all
from asymswap.results.benchmark import TITLES, Setting
from asymswap.utils.tensors import list_tensors


class Net(nn.Module):
    """One conv; any number of channels is the same class, and so the same code."""

    def __init__(self, channels: int = 2) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).relu()


def compiled(model: nn.Module, inputs: tuple[Tensor, ...]) -> Callable[[], Any]:
    """What torch.compile makes of a network that is placed as it is."""
    network: Any = SimpleNamespace(placed=lambda _: (model, inputs))
    return RUNTIMES["compile"].open(network, setting("compile"))[0]


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


class Residual(nn.Module):
    """Convs of different sizes, with batch norms, activations, a shortcut, and a pair in the place of one conv."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.pair = nn.Sequential(nn.Conv2d(8, 4, (3, 1), padding=(1, 0)), nn.Conv2d(4, 8, (1, 3), padding=(0, 1)))
        self.norm = nn.BatchNorm2d(8)
        self.last = nn.Conv2d(8, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.last((x + self.norm(self.pair(x))).relu()).mean((2, 3))


@pytest.fixture
def residual() -> nn.Module:
    torch.manual_seed(0)
    model = Residual().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean = torch.randn(8)
            module.running_var = torch.rand(8) + 0.5
    return model


@pytest.fixture
def network(residual: nn.Module, tmp_path: Path) -> Network:
    return Network(residual, (torch.empty(1, 3, 8, 8, device="meta"),), tmp_path)


def setting(runtime: str, batch: int = 1, threads: int = 1) -> Setting:
    return Setting(runtime, batch, threads, "contiguous" if RUNTIMES[runtime].has_formats else None)


needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ (apt install g++)")
EVERY = [
    pytest.param(name, marks=[pytest.mark.slow, pytest.mark.programs, needs_compiler] if name == "compile" else [])
    for name in RUNTIMES
    if "cpu" in RUNTIMES[name].devices
]
WITH_LAYERS = ["torch", "onnxruntime", "openvino"]


def test_every_runtime_has_a_title() -> None:
    assert RUNTIMES.keys() == TITLES.keys()


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", EVERY)
def test_it_computes_what_pytorch_computes_at_every_batch_and_number_of_threads(
    name: str, network: Network, residual: nn.Module
) -> None:
    if name not in installed([name]):
        pytest.skip(f"{name} is not installed")
    network.dtype = torch.float32
    for batch, threads in itertools.product((1, 3), (1, 2)):
        one = setting(name, batch, threads)
        run = RUNTIMES[name].prepare(network, one)
        assert run.threads == threads
        assert (run.ready is None) == (name == "torch")
        with torch.inference_mode():
            (found,) = list_tensors(RUNTIMES[name].open(network, one)[0]())
            # By the network as it is, not as it was folded.
            torch.testing.assert_close(found, residual(network.placed(one)[1][0]), atol=1e-4, rtol=1e-4)
        assert run.measure() > 0


def test_outputs_of_another_network_are_an_error(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    torch_ = RUNTIMES["torch"]

    def other(found: Any) -> None:
        monkeypatch.setattr(type(torch_), "open", lambda *_: ((lambda: found), ""))

    with torch.inference_mode():
        module, inputs = network.placed(setting("torch"))
        right = module(*inputs)
    other([right + 5e-5])
    torch_.prepare(network, setting("torch"))
    for wrong in (right + 1, right * float("nan"), right[:, :2]):
        other([wrong])
        with pytest.raises(
            AsymswapError, match=r"^PyTorch computes something else than PyTorch: (1\.0e\+00|nan|inf) at"
        ):
            torch_.prepare(network, setting("torch"))


def test_batch_norms_are_folded_and_weights_are_shared(network: Network, residual: nn.Module) -> None:
    placed, _ = network.placed(setting("torch"))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in placed.modules())
    assert placed.get_parameter("last.weight") is residual.get_parameter("last.weight")
    assert isinstance(residual.get_submodule("norm"), nn.BatchNorm2d)
    last, _ = network.placed(Setting("torch", 1, 1, "channels-last"))
    assert last.get_parameter("pair.0.weight").is_contiguous(memory_format=torch.channels_last)
    assert residual.get_parameter("pair.0.weight").is_contiguous()


def test_where_folding_would_compute_something_else_the_network_runs_as_it_is(
    network: Network, residual: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("asymswap.measure.runtimes.fold_norms", lambda *_: nn.Flatten())
    placed, inputs = network.placed(setting("torch"))
    assert torch.equal(placed(*inputs), residual(*inputs))


@pytest.mark.parametrize("name", WITH_LAYERS)
def test_layers_are_timed_in_the_running_network(name: str, network: Network, one_thread: None) -> None:
    """Every layer has a time of its own, whatever the runtime has fused it with."""
    if name not in installed([name]):
        pytest.skip(f"{name} is not installed")
    names = ["stem.0", "pair", "last"]
    # Larger than the others, so that a profiler that counts whole microseconds sees every conv.
    network._example = (torch.empty(1, 3, 96, 96, device="meta"),)
    rounds = take_turns({"": RUNTIMES[name].probe(network, setting(name), names)}, rounds=3)[""]
    whole = min(sum(parts.values()) for passes in rounds for parts in passes)
    found = best_of(rounds)
    assert found.keys() == {*names, REST}
    assert all(0 < found[name] < whole for name in names)


@pytest.mark.skipif("onnxruntime" not in installed(["onnxruntime"]), reason="ONNX Runtime is not installed")
def test_nodes_of_a_file_belong_to_the_modules_that_they_are_from(network: Network, residual: nn.Module) -> None:
    import onnx

    names = ["stem.0", "pair", "last"]
    path = network.onnx()
    owners = layers_of(path, names)
    graph = onnx.load(str(path)).graph
    shapes = {item.name: tuple(item.dims) for item in graph.initializer}
    convs = [node for node in graph.node if node.op_type == "Conv"]
    assert len(convs) == 4
    for node in convs:
        owner = residual.get_submodule(owners[node.name])
        # By the shape of its weight, which every conv here has for itself.
        assert shapes[node.input[1]] in {tuple(p.shape) for p in owner.parameters()}
    relu = next(node for node in graph.node if node.op_type == "Relu" and owners.get(node.output[0]))
    assert owners[relu.output[0]] == "stem.0"
    assert relu.name not in owners


def test_the_precision_that_a_runtime_chooses_is_told(network: Network, one_thread: None) -> None:
    if "openvino" not in installed(["openvino"]):
        pytest.skip("openvino is not installed")
    version = RUNTIMES["openvino"].version()
    chosen = RUNTIMES["openvino"].prepare(network, setting("openvino")).version
    assert chosen in (version, f"{version} (in bfloat16)", f"{version} (in float16)")
    network.dtype = torch.float32
    assert RUNTIMES["openvino"].prepare(network, setting("openvino")).version == version


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_one_file_serves_all_and_what_cannot_be_written_is_told_each_time(
    name: str, network: Network, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if name not in installed([name]):
        pytest.skip(f"{name} is not installed")
    calls = []

    def fail(*_: Any) -> None:
        calls.append(1)
        raise AsymswapError("no such operator")

    monkeypatch.setattr(runtimes, "write_onnx", fail)
    for _ in range(2):
        with pytest.raises(AsymswapError, match=r"^no such operator$"):
            RUNTIMES[name].prepare(network, setting(name))
    assert calls == [1]
    lists = Network(Net(), ([torch.zeros(3, 8, 8)],), tmp_path)
    with pytest.raises(AsymswapError, match="lists of images are not exported"):
        lists.onnx()
    half = Network(Net(), (torch.zeros(2, 3, 8, 8),), tmp_path, torch.bfloat16)
    with pytest.raises(AsymswapError, match="ONNX is not given bfloat16 here"):
        half.onnx()


@pytest.mark.parametrize(("name", "extra"), [("onnxruntime", "onnx"), ("openvino", "openvino")])
def test_a_missing_package_is_named_and_what_lacks_it_is_not_installed(
    name: str, extra: str, network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(RUNTIMES[name]), "needs", {"no_such_module": (1,)})
    said = f"{TITLES[name]} needs no_such_module; pip install 'asymswap[{extra}]'"
    with pytest.raises(AsymswapError, match=f"^{re.escape(said)}$"):
        RUNTIMES[name].prepare(network, setting(name))
    assert installed(["torch", name]) == ["torch"]
    runs, failures = prepare_all([network], [setting("torch"), setting(name)])
    assert (list(runs), failures) == ([(0, 0)], {(0, 1): said})


def test_compiled_networks_tell_no_layers(network: Network) -> None:
    with pytest.raises(AsymswapError, match=r"^torch\.compile does not tell the time of single layers.*`runtime=…`$"):
        RUNTIMES["compile"].probe(network, setting("compile"), ["last"])


@pytest.mark.skipif("onnxruntime" not in installed(["onnxruntime"]), reason="ONNX Runtime is not installed")
def test_what_cannot_be_exported_names_its_operator(tmp_path: Path) -> None:
    class Odd(Net):
        def forward(self, x: Tensor) -> Tensor:
            return torch.special.bessel_j0(super().forward(x))

    said = r"^ONNX cannot express this model, at the operator prims\.bessel_j0\.default: No ONNX function found"
    with pytest.raises(AsymswapError, match=said):
        Network(Odd(), (torch.empty(1, 3, 8, 8, device="meta"),), tmp_path).onnx()


def test_openvino_is_imported_without_its_telemetry(tmp_path: Path) -> None:
    """Which forks the process that imports it, to tell the makers of OpenVINO; a user's own import may."""
    pytest.importorskip("openvino")
    code = """
import sys
from asymswap.measure.runtimes import imported
assert imported("openvino").Core().available_devices
print([name for name in sys.modules if name.startswith("openvino_telemetry")])
import openvino_telemetry
"""
    done = forked(code, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr
