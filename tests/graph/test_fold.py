"""Folding batch norms computes the same, and leaves what it cannot fold."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import asymswap
from asymswap.graph.surgery import fold_norms

X = (torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)),)


def unsettled(model: nn.Module) -> nn.Module:
    """Give batch norms statistics and scales, so that leaving one out shows."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.track_running_stats:
            module.running_mean, module.running_var = torch.randn(module.num_features), torch.rand(module.num_features)
            if module.affine:
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
    return model


def norms(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)]


class Shared(nn.Module):
    """A norm behind two convs, one whose input is read twice, and one that stands before its conv."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
        self.behind_both, self.beside, self.before = (nn.BatchNorm2d(3) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.behind_both(self.a(x)) + self.behind_both(self.b(x))
        y = self.c(self.before(x))
        return y + self.beside(y)


class Branching(nn.Module):
    """torch.fx cannot follow it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) if x.sum() > -1e9 else x


@pytest.mark.parametrize(
    ("model", "left"),
    [
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4, affine=False), nn.ReLU()), []),
        (lambda: nn.Sequential(nn.Conv2d(3, 6, 3, groups=3, stride=2), nn.BatchNorm2d(6)), []),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4)), ["2"]),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)), ["1"]),
        (Shared, ["behind_both", "beside", "before"]),
        (Branching, ["norm"]),
    ],
)
def test_it_computes_the_same(model: Callable[[], nn.Module], left: list[str]) -> None:
    original = unsettled(model()).train()
    folded = fold_norms(original, X)
    assert norms(folded) == left
    assert original.training
    assert not any(module.training for module in folded.modules())
    with torch.no_grad():
        torch.testing.assert_close(folded(*X), original.eval()(*X), atol=1e-5, rtol=1e-4)


def test_before_and_after_a_conversion_are_folded_alike() -> None:
    """Otherwise the one would be timed with batch norms that the other lacks."""
    original = asymswap.open_model("digits-resnet")
    converted = asymswap.convert(original, "half-macs").model
    kept = [norms(fold_norms(model, original.example())) for model in (original.model, converted)]
    assert kept == [[], []]
    assert len(norms(converted)) == len(norms(original.model)) > 5


def test_a_hook_stays_where_it_is() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    seen: list[int] = []
    model[1].register_forward_hook(lambda *_: seen.append(1))
    fold_norms(model, X)(*X)
    assert seen
