"""Solving layer by layer in networks whose graph is not what runs, or whose calls are not plain."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from planned import in_batches
from torch import Tensor, nn
from torch.nn import functional as F

import asymswap
from asymswap.calibration.gather import Images, PatchSums, gather, output_kind
from asymswap.calibration.sequential import refine_
from asymswap.errors import AsymswapError
from asymswap.graph.trace import trace
from asymswap.types import Plan, Swap

X = torch.rand(48, 3, 10, 10, generator=torch.Generator().manual_seed(3))
RANK = {"order": "vertical-first", "rank": 5, "bias": True}


def conv(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU())


class Base(nn.Module):
    """A stem, two branches of which one runs, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.right, self.wrong, self.last = conv(3, 8), conv(8, 8), conv(8, 8), conv(8, 8)
        self.head = nn.Linear(8, 4)

    def end(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(self.last(x).mean((2, 3)))
        return scores

    def forward(self, x: Tensor) -> Any:
        return self.end(self.right(self.stem(x)))


class IsTensor(Base):
    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        return self.end(self.right(x) if isinstance(x, Tensor) else self.wrong(x))


class AddsWhereTensor(Base):
    def forward(self, x: Tensor) -> Any:
        x = self.right(self.stem(x))
        return self.end(x + 1 if isinstance(x, Tensor) else x)


class LooksAtValues(Base):
    def forward(self, x: Tensor) -> Any:
        return self.end(self.right(self.stem(x)) if float(x.detach().sum()) > -1e9 else x)


class NoneGiven(Base):
    def forward(self, x: Tensor, state: Tensor | None = None, *, wrong: bool = False) -> Any:
        x = self.stem(x)
        return self.end(self.right(x) if state is None and not wrong else self.wrong(x))


class Targets(Base):
    def forward(self, x: Tensor, targets: Tensor | None = None) -> Any:
        scores = super().forward(x)
        return scores if targets is None else F.cross_entropy(scores, targets)


class Star(Base):
    def forward(self, *inputs: Tensor, **_: Any) -> Any:
        return super().forward(inputs[0])


class Normalises(Base):
    def forward(self, x: Tensor) -> Any:
        return super().forward((x - torch.tensor([0.4, 0.5, 0.6])[:, None, None]) / torch.full((3, 1, 1), 0.25))


class AddsSize(Base):
    def forward(self, x: Tensor) -> Any:
        return self.end(self.right[0](self.stem(x)) + x.shape[1])


class NoGradient(Base):
    @torch.no_grad()
    def forward(self, x: Tensor) -> Any:
        return super().forward(x)


class Frozen(Base):
    def forward(self, x: Tensor) -> Any:
        with torch.no_grad():
            x = self.right(self.stem(x))
        return self.end(x)


class ArgMax(Base):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x).argmax(1)


GRAPHS = (Base, NoneGiven, Targets, Star, Normalises, AddsSize, NoGradient, Frozen, ArgMax)
RUNS = (IsTensor, AddsWhereTensor, LooksAtValues)


def make(form: type[Base]) -> Base:
    torch.manual_seed(0)
    return form().eval()


def solved(net: nn.Module, images: Tensor = X, **options: Any) -> tuple[nn.Module, Any]:
    """Every conv that runs as a pair, refined layer by layer, and how that went."""
    from asymswap.planning.apply import apply_plan

    sites = trace(net, (images[:1],)).sites
    chosen = [site for site in sites if site.calls]
    plan = Plan(tuple(Swap(site.name, "separable", RANK) for site in chosen))
    batches = in_batches(images, 16)
    statistics = gather(net, chosen, Images(batches, len(images)), outputs="values")
    converted = apply_plan(net, plan, statistics=statistics, unset={site.name for site in chosen})
    return converted, refine_(
        net, converted, sites, plan, statistics, Images(batches, len(images), **options), (images[:1],)
    )


@functools.cache
def of_base() -> dict[str, Tensor]:
    return solved(make(Base))[0].state_dict()


@pytest.mark.parametrize("form", [*GRAPHS, *RUNS])
def test_every_way_solves_what_runs_and_nothing_else(form: type[Base]) -> None:
    """All these networks compute what Base does, some on other inputs: solved on those, all weights are the same."""
    net = make(form)
    converted, how = solved(net)
    assert how.solved == {"stem.0", "right.0", "last.0"}
    assert (how.by_graph, how.one_pass) == (form in GRAPHS, {})
    assert "wrong.0" not in how.solved
    assert all(bool(tensor.isfinite().all()) for tensor in converted.state_dict().values())
    with torch.no_grad():
        outputs = [one(X).double() for one in (net, converted)]
    assert form is ArgMax or float((outputs[0] - outputs[1]).norm() / outputs[0].norm()) < 0.05
    if form in (LooksAtValues, IsTensor, NoneGiven, Targets, Star):
        for key, value in of_base().items():
            torch.testing.assert_close(converted.state_dict()[key], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("form", [*GRAPHS, *RUNS])
def test_neighbours_are_those_of_the_branch_that_runs(form: type[Base]) -> None:
    traced = trace(make(form), (X[:1],))
    sites = {site.name: site for site in traced.sites}
    assert sites["wrong.0"].calls == ()
    assert not sites["wrong.0"].after
    assert [one.op for one in sites["right.0"].after or ()] in ([], ["add"] if form is AddsSize else ["relu"])
    whole = form in GRAPHS
    assert (traced.parts == ("",)) == whole


class Projects(Base):
    """A sum of two branches, both of which end in a conv."""

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        return self.end(self.right[0](x) + self.wrong[0](x))


def test_a_sum_of_two_convs_is_made_right_by_the_later_one() -> None:
    net = make(Projects)
    converted, how = solved(net)
    assert how.by_graph
    assert how.solved == {"stem.0", "right.0", "wrong.0", "last.0"}
    with torch.no_grad():
        outputs = [one(X) for one in (net, converted)]
    assert float((outputs[0] - outputs[1]).norm() / outputs[0].norm()) < 0.05


def test_a_branch_that_starts_at_zero_is_solved_and_leaves_the_network_finite() -> None:
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=10, zero_init_residual=True).eval()
    data = asymswap.Calibration(torch.randn(16, 3, 32, 32))
    conversion = asymswap.convert(model, "half-macs", macs=0.6, calibration=data, input_size=(3, 32, 32))
    assert conversion.report.calibration.sequential
    assert all(parameter.isfinite().all() for parameter in conversion.model.parameters())


@pytest.mark.parametrize("form", [GRAPHS[0], RUNS[0]])
def test_a_layer_whose_input_is_no_longer_finite_keeps_its_one_pass_solution(
    form: type[Base], monkeypatch: pytest.MonkeyPatch
) -> None:
    net, add = make(form), PatchSums.add

    def overflown(sums: PatchSums, patches: Tensor, targets: Tensor | None = None) -> None:
        add(sums, patches * torch.inf if targets is not None and sums.conv is net.right[0] else patches, targets)

    monkeypatch.setattr(PatchSums, "add", overflown)
    _, how = solved(net)
    assert how.one_pass == {"right.0": "its input in the converted network is not finite"}
    assert how.solved == {"stem.0", "right.0", "last.0"}


def test_memory_decides_how_often_the_original_runs_and_not_what_comes_out() -> None:
    kept = [solved(make(IsTensor), memory_gib=limit)[0].state_dict() for limit in (4.0, 1e-6)]
    assert all(torch.equal(value, kept[1][key]) for key, value in kept[0].items())


class Boxes(Base):
    """As a detector: its second stage looks at what the values of the first say, in another order after any change."""

    def forward(self, x: Tensor) -> Any:
        x = self.right(self.stem(x))
        if not isinstance(x, Tensor):
            return x
        order = (x.detach().mean((1, 2, 3)) * 1e6).long() % 97
        shuffled = x[order.argsort()].roll(int(order.sum()) % len(x), 0)
        return self.end(shuffled + torch.randn(shuffled.shape, generator=torch.Generator().manual_seed(int(order[0]))))


def test_a_layer_whose_inputs_do_not_belong_together_is_solved_in_one_pass() -> None:
    converted, how = solved(make(Boxes))
    assert how.one_pass == {"last.0": "its inputs in the two networks do not belong together"}
    assert all(bool(tensor.isfinite().all()) for tensor in converted.state_dict().values())


class Sometimes(Base):
    """Its last conv runs on some batches only, and twice on others."""

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        for _ in range(int(x.detach().sum() * 1e3) % 3 if len(x) > 1 else 1):
            x = self.last(x)
        return self.head(x.mean((2, 3)))


def test_a_layer_that_runs_a_varying_number_of_times_is_solved_in_one_pass() -> None:
    _, how = solved(make(Sometimes))
    assert how.one_pass.keys() == {"last.0"}


def test_the_whole_way_says_how(tmp_path: Path) -> None:
    torch.save({"images": X}, tmp_path / "images.pt")
    recipe = tmp_path / "r.toml"
    recipe.write_text('summary = "r"\n[[rules]]\nmatch = { kernel = "3x3" }\nswap = { kind = "separable", rank = 4 }\n')
    for form in (IsTensor, NoGradient):
        calibration = asymswap.Calibration(str(tmp_path / "images.pt"), images=48)
        conversion = asymswap.convert(
            asymswap.open_model(make(form), input_size=(3, 10, 10)), recipe, calibration=calibration
        )
        row = conversion.report.calibration
        assert row is not None
        assert row.sequential
        assert any("real forward passes" in note for note in row.notes) == (form is IsTensor)
        assert any("no gradient" in note for note in row.notes) == (form is NoGradient)
        assert conversion.report.output.relative < 0.2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_solved_and_polished_in_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    torch.save({"images": X}, tmp_path / "images.pt")
    recipe = tmp_path / "r.toml"
    recipe.write_text('summary = "r"\n[[rules]]\nmatch = { kernel = "3x3" }\nswap = { kind = "separable", rank = 2 }\n')
    net = make(Base).to(dtype)
    found = {}
    for steps in (None, 30):
        calibration = asymswap.Calibration(str(tmp_path / "images.pt"), images=48, polish_steps=steps)
        given = net if steps is None else copy.deepcopy(net)
        found[steps] = asymswap.convert(
            asymswap.open_model(given, input_size=(3, 10, 10)), recipe, calibration=calibration
        )
        assert {p.dtype for p in found[steps].model.parameters()} == {dtype}
    exact = asymswap.convert(
        asymswap.open_model(copy.deepcopy(net).float(), input_size=(3, 10, 10)), recipe, calibration=calibration
    )
    solved, polished = (
        {key: value.float() for key, value in found[steps].model.state_dict().items()} for steps in (None, 30)
    )
    for key, value in exact.model.state_dict().items():
        torch.testing.assert_close(polished[key], value.to(dtype).float(), rtol=2e-2, atol=2e-2)
    assert max((polished[key] - solved[key]).abs().max() for key in solved) > 3e-4


@pytest.mark.parametrize(("offset", "spread"), [(0.0, 1.0), (1e4, 1.0), (1e3, 1e-3), (0.0, 0.0), (5.0, 0.0)])
def test_sums_are_exact_whatever_the_mean(offset: float, spread: float) -> None:
    """Against float64, in batches of which the first is far from the others, and shared among two processes."""
    generator = torch.Generator().manual_seed(0)
    patches = [
        offset + spread * torch.randn(2, 18, n, generator=generator) + (7 * spread * (n == 5)) for n in (5, 40, 1)
    ]
    targets = [offset + patch[:, :3] * 2 for patch in patches]
    layer = nn.Conv2d(4, 6, 3, groups=2)
    sums = PatchSums(layer, targets=True)
    for one, other in zip(patches, targets, strict=True):
        sums.add(one, other)
    x, y = torch.cat(patches, 2).double(), torch.cat(targets, 2).double()
    centred, moved = x - x.mean(2, keepdim=True), y - y.mean(2, keepdim=True)
    mean, covariance = sums.moments()
    wanted = centred @ centred.mT / x.shape[2]
    near = {"rtol": 1e-4, "atol": 1e-5 * spread**2 + 1e-20}
    torch.testing.assert_close(mean, x.mean(2), rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(covariance, wanted, **near)
    torch.testing.assert_close(sums.targets()[1], moved @ centred.mT / x.shape[2], **near)
    assert float(torch.linalg.eigvalsh(covariance).min()) >= -1e-6 * float(wanted.diagonal(dim1=1, dim2=2).max())


def test_what_no_kernel_explains_is_told_from_what_one_does() -> None:
    generator = torch.Generator().manual_seed(0)
    layer = nn.Conv2d(2, 4, 3)
    x = torch.randn(1, 18, 4000, generator=generator)
    kernel = torch.randn(1, 4, 18, generator=generator)
    related, unrelated = kernel @ x, torch.randn(1, 4, 4000, generator=generator)
    half = related + float(kernel.square().mean()) ** 0.5 * 18**0.5 * unrelated
    for target, share in ((related, 0.0), (unrelated, 1.0), (half, 0.5)):
        sums = PatchSums(layer, targets=True)
        sums.add(x, target)
        _, covariance = sums.moments()
        best = torch.linalg.solve(covariance, sums.targets()[1].mT).mT
        assert sums.unexplained(best, covariance) == pytest.approx(share, abs=0.03)


def dead() -> nn.Module:
    """A batch norm that was slimmed away: what follows sees zeros."""
    torch.manual_seed(0)
    net = nn.Sequential(*conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), *conv(8, 8), *conv(8, 8), nn.AdaptiveAvgPool2d(1))
    net = nn.Sequential(net, nn.Flatten(), nn.Linear(8, 4)).eval()
    with torch.no_grad():
        net[0][2].weight.zero_()
        net[0][2].bias.fill_(-1)
    return net


FLAT = {
    "white": torch.ones(24, 3, 8, 8),
    "bright": 1 - 1e-4 * torch.rand(24, 3, 8, 8, generator=torch.Generator().manual_seed(0)),
    "one picture": X[:1, :, :8, :8].repeat(24, 1, 1, 1),
    "noise": X[:24, :, :8, :8],
}


@pytest.mark.parametrize(("data", "sequential"), [*((name, True) for name in FLAT), ("white", False)])
def test_inputs_that_hardly_vary_are_converted_and_noted(data: str, sequential: bool, tmp_path: Path) -> None:
    torch.save({"images": FLAT[data]}, tmp_path / "images.pt")
    recipe = tmp_path / "r.toml"
    recipe.write_text(
        'summary = "r"\n[[rules]]\nmatch = { kernel = "3x3" }\nswap = { kind = "separable" }\n[budget]\nmacs = 0.8\n'
    )
    for net in (dead(), make(Base)):
        calibration = asymswap.Calibration(str(tmp_path / "images.pt"), images=24, sequential=sequential)
        conversion = asymswap.convert(asymswap.open_model(net, input_size=(3, 8, 8)), recipe, calibration=calibration)
        assert all(bool(tensor.isfinite().all()) for tensor in conversion.model.state_dict().values())
        assert conversion.report.calibration is not None
        told = [
            note for note in conversion.report.calibration.notes if "hardly varies" in note or "fewer than two" in note
        ]
        assert bool(told) or (data in ("noise", "bright", "one picture") and isinstance(net, Base))


def test_a_conv_that_runs_on_no_image_is_kept() -> None:
    class Rare(Base):
        def forward(self, x: Tensor) -> Any:
            return self.end(self.right(self.stem(x)) if float(x.detach().mean()) < 0.9 else self.stem(x))

    net = make(Rare)
    with torch.no_grad():
        net(X)
    sites = [site for site in trace(net, (X[:1],)).sites if site.calls]
    bright = torch.ones_like(X)
    found = gather(net, sites, Images(in_batches(bright, 16), len(bright)), outputs="values")
    assert found.keys() == {"stem.0", "last.0"}


def fields_after(padding: Any, dilation: Any, mode: str = "zeros") -> nn.Conv2d:
    made = nn.Conv2d(3, 8, 3, padding=1, padding_mode=mode)
    made.padding, made.dilation = padding, dilation
    return made


@pytest.mark.parametrize(
    ("padding", "dilation"), [((0, 0), (1, 1)), ((2, 2), (2, 2)), (0, 2), ("same", (1, 2)), ("valid", 1)]
)
def test_fields_set_after_construction_are_the_ones_that_count(padding: Any, dilation: Any) -> None:
    torch.manual_seed(0)
    changed = nn.Sequential(fields_after(padding, dilation), nn.ReLU())
    built = nn.Sequential(nn.Conv2d(3, 8, 3, padding=padding, dilation=dilation), nn.ReLU())
    built.load_state_dict(changed.state_dict())
    torch.testing.assert_close(changed(X), built(X))
    first, second = (solved(net.eval())[0].state_dict() for net in (changed, built))
    for key, value in first.items():
        torch.testing.assert_close(second[key], value, rtol=1e-4, atol=1e-5)


def test_weights_put_in_afterwards_say_the_channels() -> None:
    net = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU()).eval()
    net[0].weight = nn.Parameter(torch.randn(8, 3, 5, 5))
    (site,) = trace(net, (X[:1],)).sites
    assert (site.conv.in_channels, site.conv.kernel) == (3, (5, 5))


def test_a_padding_that_the_forward_does_not_see_is_refused() -> None:
    net = nn.Sequential(fields_after((2, 2), (1, 1), "reflect"), nn.ReLU()).eval()
    (site,) = trace(net, (X[:1],)).sites
    assert "padding changed after construction" in (site.refusal or "")


def outputs(values: Tensor) -> nn.Module:
    """A model that gives those outputs, whatever it sees."""

    class Gives(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return values[: len(x)]

    return Gives()


def test_outputs_are_told_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(64, 10, generator=generator)
    sure = noise + 8 * F.one_hot(torch.randint(0, 10, (64,), generator=generator), 10)
    sure = sure - sure.mean(1, keepdim=True)
    boxes = torch.rand(64, 4, generator=generator) * 200
    cases = {
        "logits": (sure, None, "scores"),
        "probabilities": (sure.softmax(1), None, "scores"),
        "boxes in pixels": (boxes, None, "values"),
        "landmarks": (torch.rand(64, 136, generator=generator), None, "values"),
        "a unit embedding": (F.normalize(30 * noise), None, "values"),
        "an embedding": (noise, None, "values"),
        "untrained, but the data has as many classes": (noise, 10, "scores"),
        "one number": (noise[:, :1], None, "values"),
        "images": (torch.rand(64, 3, 4, 4), None, "values"),
    }
    for name, (values, classes, kind) in cases.items():
        found, why = output_kind(outputs(values), lambda: [(0, (X[:1].repeat(64, 1, 1, 1),))], classes)
        assert (name, found) == (name, kind), why


def test_a_normalised_embedding_is_values() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(300, 6), nn.BatchNorm1d(6)).eval()
    with torch.no_grad():
        net[2].weight.fill_(50)
    assert output_kind(net, lambda: [(0, (X,))]) == ("values", "they are normalised")


def test_an_unknown_kind_of_outputs_is_refused() -> None:
    with pytest.raises(AsymswapError, match="kind of outputs"):
        asymswap.Calibration("digits", outputs="logits")  # type: ignore[arg-type]
