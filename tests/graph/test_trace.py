from __future__ import annotations

import math
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import weight_norm
from torchvision.models import googlenet, resnet18

import asymswap
from asymswap.errors import TraceError
from asymswap.graph.graphs import whole_graph
from asymswap.graph.trace import NORM_ACT, node_operation, trace
from asymswap.types import Call, Site


def sites(model: nn.Module, *sizes: tuple[int, ...]) -> dict[str, Site]:
    return {site.name: site for site in trace(model, tuple(torch.empty(size) for size in sizes)).sites}


class Residual(nn.Module):
    """conv -> BN -> ReLU -> conv -> BN, added to its input, which a 1x1 conv projects."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.two = nn.Conv2d(8, 8, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(8)
        self.project = nn.Conv2d(3, 8, 1, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.two(torch.relu(self.bn1(self.one(x)))))
        return torch.cat([y + self.project(x), y], 1)


def test_neighbours_are_seen_through_batch_norm() -> None:
    found = sites(Residual(), (1, 3, 9, 9))
    one, two, project = found["one"], found["two"], found["project"]
    assert [(n.op, n.direct) for n in one.before or ()] == [("input", True)]
    assert [(n.op, n.name, n.direct) for n in one.after or ()] == [
        ("batch_norm", "bn1", True),
        ("relu", "relu", False),
    ]
    assert [n.op for n in two.before or ()] == ["relu"]
    assert {n.op for n in two.after or ()} == {"batch_norm", "add", "concat"}
    assert [n.op for n in project.after or ()] == ["add"]


def test_sizes_and_costs_follow_the_convolution_formula() -> None:
    one = sites(Residual(), (2, 3, 9, 9))["one"]
    assert one.calls == (Call((9, 9), (5, 5), 2),)
    assert one.cost.macs == 2 * 5 * 5 * 8 * 3 * 3 * 3
    assert one.cost.params == 8 * 3 * 3 * 3


class Twice(nn.Module):
    """One conv under two names, called at two sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.same = self.conv
        self.unused = nn.Conv2d(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.same(nn.functional.max_pool2d(self.conv(x), 2))


def test_a_shared_conv_is_one_site_whose_calls_are_summed() -> None:
    found = sites(Twice(), (1, 4, 8, 8))
    assert found.keys() == {"conv", "unused"}
    shared = found["conv"]
    assert shared.aliases == ("same",)
    assert [call.output for call in shared.calls] == [(8, 8), (4, 4)]
    assert shared.cost.macs == (64 + 16) * 4 * 4 * 9
    assert found["unused"].calls == ()
    assert found["unused"].cost.macs == 0
    assert found["unused"].feature_map is None


class Branching(nn.Module):
    """Looks at values, so that neither torch.fx nor meta tensors can run it; its body can be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) if bool(x.sum() >= 0) else self.body(-x)


def test_what_does_not_trace_whole_is_traced_in_parts() -> None:
    result = trace(Branching(), (torch.zeros(1, 3, 8, 8),))
    assert result.by == "torch.fx in 1 part"
    (site,) = result.sites
    assert [n.op for n in site.after or ()] == ["batch_norm", "relu"]
    assert site.before == ()  # what feeds the part is outside of it, and so unknown


class Wild(nn.Module):
    """Its only conv is called in a forward that torch.fx cannot follow at all."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) * (1 if x.shape[0] == int(x.abs().sum()) else 2)


def test_hooks_are_the_last_resort() -> None:
    result = trace(Wild(), (torch.zeros(1, 3, 8, 8),))
    assert result.by == "forward hooks"
    assert [(s.name, s.before, s.after) for s in result.sites] == [("conv", None, None)]
    assert result.sites[0].calls == (Call((8, 8), (6, 6)),)


class ReadsWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) * self.conv.weight.mean()


class Own(nn.Conv2d):
    pass


class StdConv2d(nn.Conv2d):
    pass


class OwnStandardised(StdConv2d):
    pass


def tied() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3))
    model[1].weight = model[0].weight
    return model


def tied_memory() -> nn.Module:
    """Two parameters with the same numbers in memory."""
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3))
    model[1].weight = nn.Parameter(model[0].weight.detach())
    return model


def with_weight_norm() -> nn.Module:
    with pytest.warns(FutureWarning, match="weight_norm"):
        return nn.Sequential(weight_norm(nn.Conv2d(4, 4, 3)))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: nn.Sequential(Own(4, 4, 3)), "is a Own, a subclass of Conv2d that may compute something else"),
        (lambda: nn.Sequential(StdConv2d(4, 4, 3)), "is a StdConv2d: weights standardised at every run$"),
        (lambda: nn.Sequential(OwnStandardised(4, 4, 3)), "is a OwnStandardised: weights standardised at"),
        (
            lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3))),
            "is a ParametrizedConv2d: weights computed again at every run",
        ),
        (with_weight_norm, "has hooks"),
        (tied, "shares its weights with 1"),
        (tied_memory, "shares its weights with 1"),
        (lambda: nn.Sequential(nn.Conv2d(4, 4, 1), ReadsWeightOf4()), "reads without calling"),
        (lambda: nn.Conv2d(4, 4, 3), "is the whole model"),
    ],
)
def test_reasons_against_any_swap(make: object, reason: str) -> None:
    found = sites(make(), (1, 4, 8, 8))  # type: ignore[operator]
    assert any(re.search(reason, site.refusal or "") for site in found.values())


@pytest.mark.parametrize(
    "register",
    [
        "register_forward_pre_hook",
        "register_forward_hook",
        "register_full_backward_pre_hook",
        "register_full_backward_hook",
    ],
)
def test_hooks_of_every_kind_are_a_reason(register: str) -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3))
    assert sites(model, (1, 4, 8, 8))["0"].refusal is None
    getattr(model[0], register)(lambda *_: None)
    assert "has hooks" in (sites(model, (1, 4, 8, 8))["0"].refusal or "")


class OneByOne(nn.Module):
    """Gives its conv the images of a batch each for itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.conv = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.conv(image) for image in self.first(x).unbind()])


def test_convs_of_unbatched_images_are_not_swapped() -> None:
    found = sites(OneByOne(), (2, 3, 9, 8))
    assert found["first"].refusal is None
    assert found["conv"].calls == (Call((7, 6), (5, 4), 1, batched=False),) * 2
    assert found["conv"].refusal == "is called on one image without a batch (C x H x W); give it 1 x C x H x W"


class ReadsWeightOf4(ReadsWeight):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3)


def test_tied_weights_are_noted() -> None:
    x = (torch.empty(1, 4, 8, 8),)
    assert trace(tied(), x).notes == (
        "2 convs share their weights with another layer, and nothing is swapped there: 0 with 1, 1 with 0",
    )
    assert trace(nn.Sequential(nn.Conv2d(4, 4, 3)), x).notes == ()


class NormAct(nn.BatchNorm2d):
    """As timm's BatchNormAct2d: a batch norm by its class that also activates."""

    def __init__(self, channels: int, act: nn.Module | None) -> None:
        super().__init__(channels)
        if act is not None:
            self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(super().forward(x)) if hasattr(self, "act") else super().forward(x).abs()


def between(norm: nn.Module) -> tuple[Site, Site]:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5), nn.Tanh())
    found = sites(model, (1, 3, 9, 9))
    return found["0"], found["2"]


def test_a_batch_norm_that_activates_is_two_operations() -> None:
    first, second = between(NormAct(4, nn.SiLU()))
    assert [(n.op, n.direct) for n in first.after or ()] == [("batch_norm", True), ("silu", False)]
    assert [(n.op, n.direct) for n in second.before or ()] == [("silu", True), ("batch_norm", False)]
    assert first.norm_behind is None
    assert second.norm_behind == "3"


def test_a_batch_norm_whose_activation_does_nothing_is_looked_through() -> None:
    first, _ = between(NormAct(4, nn.Identity()))
    assert [n.op for n in first.after or ()] == ["batch_norm", "conv"]


def test_a_batch_norm_with_a_forward_of_its_own_is_not_looked_through() -> None:
    first, _ = between(NormAct(4, None))
    assert [n.op for n in first.after or ()] == ["batch_norm", "norm_act"]
    assert first.norm_behind is None


@pytest.mark.parametrize(
    ("norm", "operation"),
    [
        (nn.BatchNorm2d(4), "batch_norm"),
        (NormAct(4, nn.Identity()), "batch_norm"),
        (NormAct(4, nn.ReLU()), NORM_ACT),
        (NormAct(4, None), NORM_ACT),
    ],
)
def test_only_what_is_linear_is_called_a_batch_norm(norm: nn.Module, operation: str) -> None:
    """Calibration undoes the scale of what goes by that name."""
    graph, root = whole_graph(nn.Sequential(nn.Conv2d(3, 4, 3), norm), (torch.zeros(1, 3, 8, 8),))
    assert [node_operation(root, node) for node in graph.nodes] == ["input", "conv", operation, "output"]


@pytest.mark.parametrize("make", [lambda: NormAct(4, nn.ReLU()), lambda: NormAct(4, nn.Identity())])
def test_no_kind_takes_over_a_batch_norm_of_another_class(make: Callable[[], nn.Module]) -> None:
    """The branches of acb must not lose the activation behind them, and the block must compute the same."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), make(), nn.Conv2d(4, 5, 3, padding=1)).eval()
    conversion = asymswap.convert(asymswap.open_model(model, input_size=(3, 9, 9)), "acnet-branch-bn")
    assert [swap.absorbs for swap in conversion.plan.swaps] == [None, None]
    assert type(conversion.model.get_submodule("1")) is NormAct
    x = torch.randn(2, 3, 9, 9)
    torch.testing.assert_close(conversion.model.eval()(x), model(x), rtol=1e-4, atol=1e-5)


def test_an_input_of_the_wrong_size() -> None:
    with pytest.raises(TraceError, match="does not run on an input of 1x4x8x8: "):
        trace(nn.Sequential(nn.Conv2d(3, 4, 3)), (torch.empty(1, 4, 8, 8),))


def test_layers_of_several_dtypes_are_named() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3).half(), nn.Conv2d(4, 4, 3))
    with pytest.raises(TraceError, match=r"several dtypes, float16 \(0\.\w+\), float32 \(1\.\w+\): give them one"):
        trace(net, (torch.empty(1, 3, 8, 8),))


def test_tracing_leaves_the_model_alone() -> None:
    model = resnet18().train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.get_rng_state()
    trace(model, (torch.empty(1, 3, 64, 64),))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_auxiliary_heads_are_sites_that_never_run() -> None:
    found = sites(googlenet(init_weights=False), (1, 3, 224, 224))
    idle = [name for name, site in found.items() if not site.calls]
    assert idle == ["aux1.conv.conv", "aux2.conv.conv"]


def test_sites_stand_in_the_order_of_their_calls() -> None:
    names = list(sites(Residual(), (1, 3, 9, 9)))
    assert names == ["one", "two", "project"]
    resnet = sites(resnet18(), (1, 3, 224, 224))
    assert math.isclose(sum(s.cost.macs for s in resnet.values()), 1.8136e9, rel_tol=1e-4)
