"""What the user has done to a model's modules and weights by hand: kept in the copy, or a reason to refuse a site."""

from __future__ import annotations

import types
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.utils import prune
from torchvision.models.feature_extraction import create_feature_extractor

import asymswap
from asymswap.graph.surgery import swap
from asymswap.graph.trace import trace
from asymswap.types import norm_behind
from asymswap.utils.tensors import deep_copy, meta_copy

X = torch.empty(1, 3, 8, 8)


def two_convs() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)).eval()


def own_forward(conv: nn.Conv2d) -> None:
    conv.forward = types.MethodType(lambda self, x: F.conv2d(x, self.weight), conv)


def tiling(conv: nn.Conv2d) -> None:
    conv._conv_forward = types.MethodType(
        lambda self, x, w, b: F.conv2d(F.pad(x, (1, 1, 1, 1), "circular"), w, b), conv
    )


def own_class(conv: nn.Conv2d) -> None:
    conv.__class__ = type("Doubled", (nn.Conv2d,), {"forward": lambda self, x: 2 * nn.Conv2d.forward(self, x)})


PATCHES: dict[str, tuple[Callable[[nn.Conv2d], object], str]] = {
    "forward": (own_forward, "has its forward replaced on the instance"),
    "_conv_forward": (tiling, "has its _conv_forward replaced on the instance"),
    "extra_repr": (lambda conv: setattr(conv, "extra_repr", lambda: "mine"), "has its extra_repr replaced"),
    "class": (own_class, "is a Doubled, a subclass of Conv2d"),
    "attribute": (lambda conv: setattr(conv, "gain", 2.0), r"has an attribute of yours \(gain\)"),
    "buffer": (lambda conv: conv.register_buffer("mask", torch.ones(1)), r"has an attribute of yours \(mask\)"),
    "module": (lambda conv: conv.add_module("adapter", nn.ReLU()), r"has an attribute of yours \(adapter\)"),
    "gradient hook": (lambda conv: conv.weight.register_hook(lambda g: g * 0), "has a hook on its weight"),
    "hook of an accumulated gradient": (
        lambda conv: conv.bias.register_post_accumulate_grad_hook(lambda p: None),
        "has a hook on its bias",
    ),
    "attribute of a weight": (
        lambda conv: setattr(conv.weight, "lr_mult", 0.1),
        r"has an attribute of yours on its weight \(lr_mult\)",
    ),
    "class of a weight": (
        lambda conv: setattr(conv, "bias", type("Scaled", (nn.Parameter,), {})(torch.zeros(8))),
        "has a Scaled as its bias",
    ),
    "pruning": (lambda conv: prune.l1_unstructured(conv, "weight", 0.5), "has hooks"),
    "hook of the state dict": (lambda conv: conv.register_state_dict_post_hook(lambda *_: None), "has hooks"),
}


@pytest.mark.parametrize("name", PATCHES)
def test_a_conv_that_was_changed_by_hand_is_refused_by_what_was_changed(name: str) -> None:
    patch, reason = PATCHES[name]
    model = two_convs()
    patch(model[2])
    untouched, changed = trace(model, (X,)).sites
    assert untouched.refusal is None
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(changed.refusal)


def test_marks_that_libraries_leave_on_every_module_change_nothing() -> None:
    model = two_convs()
    for module in model:
        module._is_hf_initialized = True
    model[0].weight._is_hf_initialized = True
    handle = model[0].register_forward_hook(lambda *_: None)
    handle.remove()
    assert [site.refusal for site in trace(model, (X,)).sites] == [None, None]


def test_a_forward_replaced_in_the_class_refuses_every_conv(monkeypatch: pytest.MonkeyPatch) -> None:
    def doubled(self: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return 2 * F.conv2d(x, weight, bias, self.stride, self.padding)

    monkeypatch.setattr(nn.Conv2d, "_conv_forward", doubled)
    for site in trace(two_convs(), (X,)).sites:
        assert site.refusal == (f"is an nn.Conv2d whose _conv_forward {__name__} has replaced, which a swap would drop")


def test_what_the_user_put_on_other_weights_is_in_the_copy() -> None:
    model = two_convs()
    model[2].weight.lr_mult = 0.1
    model[2].bias.requires_grad_(False)
    model[2].weight.register_hook(lambda gradient: gradient * 0)
    seen: list[Tensor] = []
    model[2].weight.register_post_accumulate_grad_hook(seen.append)
    copied = swap(model, {"0": nn.Conv2d(3, 8, 3, padding=1)})
    copied(torch.randn(1, 3, 8, 8)).sum().backward()
    assert copied[2].weight.lr_mult == 0.1
    assert not copied[2].bias.requires_grad
    assert not copied[2].weight.grad.any()
    assert copied[0].weight.grad.any()
    assert seen == [copied[2].weight]


class Mixed(nn.Module):
    """Parts in several modes, a hook, a buffer that is not stored, and a part that torch.fx has traced."""

    def __init__(self) -> None:
        super().__init__()
        body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Dropout(0.5))
        self.graph = fx.symbolic_trace(body)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.register_buffer("offset", torch.ones(1), persistent=False)
        self.graph.register_forward_hook(lambda module, args, out: out + 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.graph(x)) + self.offset


def modes(model: nn.Module) -> dict[str, bool]:
    return {name: module.training for name, module in model.named_modules()}


@pytest.mark.parametrize("copy", [lambda m: swap(m, {}), deep_copy, meta_copy], ids=["swap", "deep_copy", "meta_copy"])
def test_every_copy_keeps_modes_hooks_and_buffers(copy: Callable[[nn.Module], nn.Module]) -> None:
    for training in (True, False):
        model = Mixed().train(training)
        model.graph.get_submodule("1").eval()
        copied = copy(model)
        assert modes(copied) == modes(model)
        assert {k: p.requires_grad for k, p in copied.named_parameters()} == {
            k: p.requires_grad for k, p in model.named_parameters()
        }
        assert dict(copied.named_buffers()).keys() == dict(model.named_buffers()).keys()
        assert copied.state_dict().keys() == model.state_dict().keys()
        assert len(copied.graph._forward_hooks) == 1
        if copy is not meta_copy and not training:
            x = torch.randn(1, 3, 8, 8)
            assert torch.equal(copied(x), model(x))


class Dropped(nn.Module):
    """Another function in train mode than in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.aux = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        if self.training:
            x = x + self.aux(x)
        return self.conv2(x)


def test_a_feature_extractor_keeps_its_mode_and_both_of_its_graphs() -> None:
    net = Dropped()
    x = torch.randn(1, 3, 8, 8)
    for training in (False, True):
        extractor = create_feature_extractor(net.train(training), ["conv2"], suppress_diff_warning=True)
        extractor.train(training)
        converted = asymswap.convert(asymswap.open_model(extractor, input_size=(3, 8, 8)), "acnet").model
        assert modes(converted)[""] is training
        for mode in (training, not training):
            extractor.train(mode)
            converted.train(mode)
            torch.testing.assert_close(converted(x), extractor(x))


class Norms(nn.Module):
    """A conv and the batch norm behind it, used as `use` says."""

    def __init__(self, use: Callable[[Norms, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.norm, self.other = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self, x)


def plain(net: Norms, x: Tensor) -> Tensor:
    return net.norm(net.conv(x))


def auxiliary(net: Norms, x: Tensor) -> Tensor:
    y = net.norm(net.conv(x))
    return net.norm(y) if net.training else y


def read_in_training(net: Norms, x: Tensor) -> Tensor:
    y = net.conv(x)
    return net.norm(y) + y.mean() if net.training else net.norm(y)


def penalised(net: Norms, x: Tensor) -> Tensor:
    return net.norm(net.conv(x)) + net.norm.weight.sum()


def branch_unseen_by_fx(net: Norms, x: Tensor) -> Tensor:
    y = net.norm(net.conv(x))
    return net.norm(y) if net.training and isinstance(x, torch.Tensor) and x.is_meta and type(x) is Tensor else y


@pytest.mark.parametrize("use", [plain, auxiliary, read_in_training, penalised, branch_unseen_by_fx])
def test_a_batch_norm_used_elsewhere_is_not_taken_over(use: Callable[[Norms, Tensor], Tensor]) -> None:
    (site,) = trace(Norms(use), (X,)).sites
    assert norm_behind(site.after or ()) == ("norm" if use is plain else None)


def test_a_batch_norm_in_another_mode_or_with_shared_weights_is_not_taken_over() -> None:
    class Frozen(Norms):
        def train(self, mode: bool = True) -> nn.Module:
            super().train(mode)
            self.norm.eval()
            return self

    mixed, tied = Norms(plain).train(), Norms(plain)
    mixed.norm.eval()
    tied.other.weight = tied.norm.weight
    for net in (mixed, tied, Frozen(plain)):
        (site,) = trace(net, (X,)).sites
        assert site.norm_behind is None
    hooked = Norms(plain)
    hooked.norm.weight.register_hook(lambda gradient: gradient)
    plan = asymswap.plan(asymswap.open_model(hooked, input_size=(3, 8, 8)), "acnet-branch-bn")
    assert [swap.absorbs for swap in plan.swaps] == [None]
