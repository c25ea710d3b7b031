"""Where taps have gone: what is set into a model is what is told of it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from torch import Tensor, nn

import asymswap
from asymswap.api.fuse import read_offsets
from asymswap.reporting.offsets import arrows, draw, offsets_view
from asymswap.results.convert import OffsetReport, OffsetRow
from asymswap.results.records import to_json

RECIPE = '[[rules]]\nmatch = {{ kernel = "3x3", in_channels = {{ min = 8 }} }}\nswap = {{ {swap} }}\n'


def converted(folder: Path, swap: str, change: Any = None) -> Path:
    (folder / "recipe.toml").write_text(RECIPE.format(swap=swap))
    conversion = asymswap.convert("digits-resnet", folder / "recipe.toml")
    if change is not None:
        with torch.no_grad():
            change(conversion.model)
    asymswap.save(conversion, folder / "model.pt")
    return folder / "model.pt"


@pytest.mark.parametrize("kind", ["offset", "weighted-offset"])
def test_static_offsets_are_told_as_they_are(kind: str, tmp_path: Path) -> None:
    def move(model: Any) -> None:
        raw = model.layer1[0].conv1.raw_offsets
        raw[0] = torch.tensor([0.3, -0.4])
        raw[4] = torch.tensor([0.0, 0.5])

    report = asymswap.offsets(converted(tmp_path, f'kind = "{kind}", limit = 2.0', move))
    first, *others = report.rows
    assert (first.site, first.kind, first.limit) == ("layer1.0.conv1", kind, 2.0)
    # What is trained goes through limit * tanh(raw / limit).
    expected = [2 * math.tanh(raw / 2) for raw in (0.3, -0.4, 0.5)]
    assert first.mean[0] == pytest.approx(expected[:2], abs=1e-6)
    assert first.mean[4] == pytest.approx((0, expected[2]), abs=1e-6)
    assert first.largest == pytest.approx(max(math.hypot(*expected[:2]), expected[2]), abs=1e-6)
    assert set(first.spread) == {(0.0, 0.0)}
    assert not first.still
    assert others
    assert all(row.still and row.largest == 0 for row in others)


def test_predicted_offsets_are_read_on_inputs(tmp_path: Path) -> None:
    def move(model: Any) -> None:
        predictor = model.layer1[0].conv1.predictor
        predictor.bias[2] = 0.7  # the second tap of the first group, downwards
        predictor.weight.normal_(std=0.01, generator=torch.Generator().manual_seed(0))

    path = converted(tmp_path, 'kind = "predicted-offset", mask = true, offset_groups = 2', move)
    report = asymswap.offsets(path, data="digits")
    row = report.rows[0]
    assert (row.site, row.limit, len(row.mean)) == ("layer1.0.conv1", None, 9)
    # One of the two groups moves by 0.7 on average.
    assert row.mean[1][0] == pytest.approx(0.35, abs=0.1)
    assert row.spread[1][0] > 0.3
    assert row.largest > 0.6
    assert report.probe == "32 images of digits (seed 0)"


class Named(nn.Module):
    """A model that gives its conv the input by name."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(input=x)


def test_offsets_are_read_where_a_model_gives_the_input_by_name(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(
        '[[rules]]\nmatch = { kernel = "3x3" }\nswap = { kind = "predicted-offset" }\n'
    )
    network = Named().eval()
    conversion = asymswap.convert(asymswap.open_model(network, input_size=(3, 8, 8)), tmp_path / "recipe.toml")
    with torch.no_grad():
        conversion.model.conv.predictor.bias[1] = 0.25  # the first tap, to the right
    (row,) = read_offsets(conversion.model, (conversion.plan,), (torch.zeros(2, 3, 8, 8),))
    assert row.mean[0] == pytest.approx((0.0, 0.25))
    with pytest.raises(asymswap.AsymswapError, match=r"it predicts offsets of up to 0\.25 pixels"):
        asymswap.fuse(asymswap.open_model(conversion, arch=network), max_offset=0.1)


def test_outputs_are_compared_on_images_without_labels_too(tmp_path: Path) -> None:
    torch.save(torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(0)), tmp_path / "images.pt")
    data = str(tmp_path / "images.pt")
    asymswap.save(asymswap.convert("digits-resnet", "offset"), tmp_path / "x.pt")
    assert asymswap.offsets(tmp_path / "x.pt", data=data).probe == f"5 images of {data} (seed 0)"
    assert asymswap.fuse(tmp_path / "x.pt", data=data).report.probe == f"5 images of {data} (seed 0)"


def test_the_view_names_layers_in_which_nothing_has_moved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    def move(model: Any) -> None:
        model.layer1[0].conv1.raw_offsets[:] = torch.tensor([0.0, 0.5])

    report = asymswap.offsets(converted(tmp_path, 'kind = "offset"', move))
    Console(width=80).print(offsets_view(report))
    text = capsys.readouterr().out
    flowing = " ".join(text.split())
    assert "taps have moved in 1 of 8 layers that can" in flowing
    assert "→ → →" in text
    assert "No tap has moved by 0.05 pixels: layer1.0.conv2," in flowing
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize(
    ("offset", "sign"),
    [
        ((0.0, 1.0), "→"),
        ((1.0, 1.0), "↘"),
        ((1.0, 0.0), "↓"),
        ((1.0, -1.0), "↙"),
        ((0.0, -1.0), "←"),
        ((-1.0, -1.0), "↖"),
        ((-1.0, 0.0), "↑"),
        ((-1.0, 1.0), "↗"),
        ((0.01, 0.01), "·"),
    ],
)
def test_arrows_point_where_the_tap_has_gone(offset: tuple[float, float], sign: str) -> None:
    row = OffsetRow("conv", "offset", (1, 2), (1, 1), (offset, (0.0, 0.0)), ((0.0, 0.0),) * 2, 1.0)
    assert arrows(row) == [f"{sign} ·"]


@pytest.mark.parametrize("form", ["svg", "png"])
def test_the_picture_can_be_drawn(form: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    report = asymswap.offsets(converted(tmp_path, 'kind = "weighted-offset"'))
    picture = draw(report, form)
    assert picture == draw(report, form)
    if form == "svg":
        assert all(row.site in picture.decode() for row in report.rows)
    assert [row["still"] for row in to_json(report)["rows"]] == [True] * len(report.rows)


def test_names_in_the_picture_are_no_formulas() -> None:
    pytest.importorskip("matplotlib")
    row = OffsetRow("conv$_$\x1b", "offset", (1, 2), (1, 1), ((0.0, 0.0),) * 2, ((0.0, 0.0),) * 2, 1.0)
    texts = "".join(ElementTree.fromstring(draw(OffsetReport("net$_$.pt", (row,), ""), "svg")).itertext())
    assert "conv$_$\ufffd" in texts
    assert "net$_$.pt" in texts


def test_what_has_no_such_layer_is_told(tmp_path: Path) -> None:
    path = converted(tmp_path, 'kind = "separable", rank = 4')
    with pytest.raises(
        asymswap.AsymswapError, match="has no layer whose taps move; the kinds offset, predicted-offset"
    ):
        asymswap.offsets(path)
