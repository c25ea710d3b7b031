"""What a network is fed: what the user says, and what its batch norms say where nobody does."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import asymswap
from asymswap import AsymswapError, Calibration, PreprocessingOptions
from asymswap.cli.main import main
from asymswap.data.datasets import image_transform, open_data
from asymswap.data.normalization import hellinger, settle
from asymswap.errors import SourceError, TraceError
from asymswap.models.opening import open_model
from asymswap.models.preprocessing import COLOUR, GREY, Normalization, usual


class Net(nn.Module):
    """A small network of a user's own."""

    def __init__(self, channels: int = 3, width: int = 16, norm: type[nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs in (channels, width):
            layers += [nn.Conv2d(inputs, width, 3, padding=1), norm(width), nn.ReLU()]
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)))  # type: ignore[no-any-return]


class Flat(nn.Module):
    """One that takes images of 12x12 and no others."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.head = nn.Linear(8 * 12 * 12, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).flatten(1))  # type: ignore[no-any-return]


def pictures(count: int, channels: int, seed: int) -> Tensor:
    """Smooth pictures, darker and lighter ones, whose channels have means and deviations of their own."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, channels, 3, 3, generator=generator)
    smooth = nn.functional.interpolate(coarse, (8, 8), mode="bilinear") + 0.5 * torch.randn(
        count, 1, 1, 1, generator=generator
    )
    shift, scale = (torch.tensor(v[:channels])[:, None, None] for v in ((0.47, 0.45, 0.38), (0.2, 0.21, 0.23)))
    return (shift + scale * smooth).clamp(0, 1)


def normalized(images: Tensor, how: Normalization) -> Tensor:
    mean, std = (torch.tensor(values)[:, None, None] for values in (how.mean, how.std))
    return ((images.flip(1) if how.bgr else images) - mean) / std


def trained_on(how: Normalization, seed: int, build: type[Net] | None = None) -> Net:
    """A network whose batch norms have seen pictures that were normalised so; its weights are random."""
    torch.manual_seed(seed)
    net = (build or Net)(len(how.mean)).train()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
    with torch.no_grad():
        net(normalized(pictures(256, len(how.mean), 1000 + seed), how))
    return net.eval()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    """Files of pictures of one and of three channels, with labels."""
    files = {}
    for channels in (1, 3):
        path = tmp_path_factory.mktemp("pictures") / f"{channels}.npz"
        np.savez(path, images=(255 * pictures(96, channels, 7)).round().byte().numpy(), labels=np.arange(96) % 10)
        files[channels] = str(path)
    return files


def fed(net: nn.Module, reference: str, **options: Any) -> Any:
    prepare = PreprocessingOptions(**options) if options else None
    return settle(open_model(net, preprocessing=prepare), reference, "test")


@pytest.mark.parametrize(("channels", "name"), [*((3, name) for name in COLOUR), *((1, name) for name in GREY)])
def test_the_batch_norms_tell_how_images_were_normalised(data: dict[int, str], channels: int, name: str) -> None:
    how = usual(channels)[name]
    for seed in range(2):
        found = fed(trained_on(how, seed), data[channels])
        taken = found.preprocessing
        # Those that give the network nearly the same cannot always be told apart, and need not be.
        alike = {"imagenet", "cifar10", "cifar10-kuangliu", "cifar100"} if channels == 3 else set()
        assert found.fed.normalization == name or {found.fed.normalization, name} <= alike, (seed, found.fed.distances)
        assert (taken.normalization_from, taken.size_from) == ("asked", "images")
        assert min(found.fed.distances.values()) < 0.02
        assert re.match(
            rf"Net is fed images normalised as {found.fed.normalization} \(mean .*nobody said", found.fed_warnings[0]
        )
        # Held against what it was asked, it says nothing more.
        assert fed(trained_on(how, seed), data[channels], normalize=name, size=(8, 8)).fed_warnings == ()


def test_alike_normalisations_are_taken_for_the_most_usual_unless_the_figures_are_clear(data: dict[int, str]) -> None:
    found = [fed(trained_on(COLOUR[name], 3), data[3]).fed.normalization for name in ("imagenet", "cifar10-kuangliu")]
    assert found[0] == "imagenet"
    assert found[1] in ("imagenet", "cifar10-kuangliu")


def test_what_was_given_is_held_against_the_batch_norms(data: dict[int, str]) -> None:
    net = trained_on(COLOUR["none"], 0)
    (line,) = fed(net, data[3], normalize="imagenet", size=(8, 8)).fed_warnings
    assert re.search(r"as you gave it, but the statistics in its batch norms fit none better \(distance 0\.00", line)
    assert line.endswith('try `normalize="none"`')
    # The user is believed all the same.
    assert fed(net, data[3], normalize="imagenet").preprocessing.mean == COLOUR["imagenet"].mean
    # Numbers without a usual name, which fit: nothing to say.
    own = trained_on(Normalization((0.4, 0.3, 0.2), (0.1, 0.2, 0.3)), 1)
    assert fed(own, data[3], mean=(0.4, 0.3, 0.2), std=(0.1, 0.2, 0.3), size=(8, 8)).fed_warnings == ()


def test_a_dead_channel_and_other_pictures_do_not_matter(tmp_path: Path) -> None:
    net = trained_on(COLOUR["none"], 2)
    conv, norm = net.features[0], net.features[1]
    assert isinstance(conv, nn.Conv2d)
    assert isinstance(norm, nn.BatchNorm2d)
    with torch.no_grad():
        conv.weight[0], conv.bias[0] = 0.0, 0.0  # type: ignore[index]
        norm.running_mean[0], norm.running_var[0] = 0.0, 1e-12  # type: ignore[index]
    torch.save(pictures(64, 3, 99) * 0.85 + 0.03, tmp_path / "other.pt")
    assert fed(net, str(tmp_path / "other.pt")).fed.normalization == "none"


class Standardised(Net):
    """It normalises by itself, so that nothing that is done before shows in its batch norms."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward((x - x.mean((1, 2, 3), True)) / x.std((1, 2, 3), keepdim=True))


def seen_nothing_usual() -> nn.Module:
    """Its batch norms have seen what no usual normalisation makes of pictures."""
    return trained_on(Normalization((-40.0,) * 3, (0.01,) * 3), 0)


def standardised() -> nn.Module:
    return trained_on(COLOUR["none"], 0, Standardised)


@pytest.mark.parametrize(
    ("net", "reason"),
    [
        (lambda: Net(norm=nn.Identity), "it has no batch norm with statistics of its training"),
        (lambda: Net(norm=lambda width: nn.GroupNorm(2, width)), "it has no batch norm"),
        (lambda: Net(norm=lambda width: nn.BatchNorm2d(width, track_running_stats=False)), "it has no batch norm"),
        (lambda: Net(), "it has no batch norm with statistics of its training"),
        (standardised, "its batch norms fit two alike: "),
        (seen_nothing_usual, "fit none of the usual ones: "),
    ],
)
def test_what_cannot_be_told_stops(data: dict[int, str], net: Any, reason: str) -> None:
    torch.manual_seed(0)
    made = net()
    said = rf"nobody said how images are normalised for \w+, and it cannot be found out .*{reason}.*\(normalize=…\)`"
    with pytest.raises(SourceError, match=said):
        fed(made, data[3])
    for calibration, evaluate in ((Calibration(data[3], images=8), None), (None, data[3])):
        with pytest.raises(SourceError, match="nobody said how images are normalised"):
            asymswap.convert(made, "3x3-only", calibration=calibration, evaluate=evaluate)
    assert fed(made, data[3], normalize="half").fed.normalization_from == "given"
    # Without images there is nothing to be normalised.
    report = asymswap.convert(asymswap.open_model(made, input_size=(3, 8, 8)), "3x3-only").report
    assert report.fed is None
    assert not any("normalis" in line for line in report.warnings)


def test_numbers_of_the_users_own_are_fed_as_they_are(tmp_path: Path) -> None:
    """They are images only if they are bytes; the batch norms still object to what does not suit them."""
    net, images = trained_on(COLOUR["imagenet"], 0), pictures(96, 3, 7)
    np.savez(tmp_path / "a.npz", images=images.numpy())
    as_they_are = fed(net, str(tmp_path / "a.npz"))
    assert (as_they_are.preprocessing.mean, as_they_are.preprocessing.std) == ((0.0,) * 3, (1.0,) * 3)
    assert len(as_they_are.fed_warnings) == 3, as_they_are.fed_warnings
    first, second, _ = as_they_are.fed_warnings
    assert "as the tensors are, but the statistics in its batch norms fit imagenet better" in first
    assert "as they are: give `PreprocessingOptions(normalize=…)`" in second
    asked = fed(net, str(tmp_path / "a.npz"), normalize="imagenet")
    assert (asked.fed.normalization, asked.fed_warnings[1:]) == ("imagenet", ())


def test_the_distance_is_hellingers() -> None:
    points = torch.linspace(-60, 60, 200_001, dtype=torch.float64)
    for mean, variance, other, others in ((0.0, 1.0, 0.0, 1.0), (0.5, 2.0, -1.0, 0.3), (-3.0, 0.1, 4.0, 5.0)):
        densities = [
            torch.exp(-((points - m) ** 2) / (2 * v)) / math.sqrt(2 * math.pi * v)
            for m, v in ((mean, variance), (other, others))
        ]
        expected = 1 - torch.trapezoid((densities[0] * densities[1]).sqrt(), points)
        found = hellinger(*(torch.tensor([v], dtype=torch.float64) for v in (mean, variance, other, others)))
        torch.testing.assert_close(found[0], expected, atol=1e-9, rtol=0)


def test_what_was_given_is_stored_and_used_by_what_comes_after(
    data: dict[int, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = trained_on(COLOUR["half"], 0)
    opened = open_model(net, preprocessing=PreprocessingOptions(normalize="half"))
    calibration = Calibration(data[3], images=16)
    conversion = asymswap.convert(opened, "half-macs", calibration=calibration, evaluate=data[3])
    assert conversion.report.fed is not None
    assert conversion.report.fed.normalization_from == "given"
    asymswap.save(conversion, tmp_path / "half.pt")
    monkeypatch.syspath_prepend(Path(__file__).parent)
    scores = asymswap.evaluate(
        asymswap.open_model(tmp_path / "half.pt", arch="test_normalization:Net"), data[3]
    ).models[0]
    assert scores.fed is not None
    assert (scores.fed.mean, scores.fed.normalization_from) == ((0.5,) * 3, "file")
    assert conversion.report.accuracy is not None
    assert scores.scores[0].value == conversion.report.accuracy.scores[0].after


def test_what_was_asked_is_stored_and_gives_what_it_gives_when_it_is_given(
    data: dict[int, str], tmp_path: Path
) -> None:
    net = trained_on(COLOUR["bytes"], 0)
    given = PreprocessingOptions(normalize="bytes", size=(8, 8))
    made = [
        asymswap.convert(
            asymswap.open_model(net, preprocessing=prepare), "half-macs", calibration=Calibration(data[3], images=32)
        )
        for prepare in (None, given)
    ]
    for one, other in zip(made[0].model.state_dict().values(), made[1].model.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    assert [conversion.header.preprocessing.normalization_from for conversion in made] == ["asked", "given"]
    assert made[0].report.warnings[0].startswith("Net is fed images normalised as bytes")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"normalize": "imagnet"}, r"`normalize=…` 'imagnet' is unknown; did you mean imagenet"),
        ({"normalize": "half", "mean": (0.5,)}, '`normalize="half"` says the mean already: leave out `mean=…`'),
        ({"normalize": "half", "bgr": True}, "says the bgr already"),
        ({"mean": (0.5,)}, "`mean=…` and `std=…` go together"),
        ({"std": (0.5,)}, "`mean=…` and `std=…` go together"),
        ({"mean": (0.5,), "std": (0.0,)}, "`std=0` must be above 0"),
        ({"mean": (math.nan,), "std": (1.0,)}, "`mean=nan` is no list of numbers"),
        ({"size": (0, 8)}, "`size=0x8` is not height x width"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(AsymswapError, match=message):
        PreprocessingOptions(**options)


def test_options_that_do_not_suit_the_network_are_refused(
    data: dict[int, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    net = trained_on(COLOUR["half"], 0)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"mean": (0.5, 0.5), "std": (1.0,)}, "`mean=…` has 2 numbers for 3 channels"),
        ({"normalize": "mnist"}, '`normalize="mnist"` is not for 3 channels; give one of imagenet, none, half'),
        ({"bgr": True}, "`bgr=…` with both"),
        ({"resize": 100}, r"`resize=100` is shorter than what is cut out \(224x224\)"),
        ({"size": (300, 300), "resize": 100}, r"`resize=100` is shorter than what is cut out \(300x300\)"),
        ({"normalize": "half", "interpolation": "cubic"}, "`interpolation=…` 'cubic' is unknown; did you mean bicubic"),
    ]
    for options, message in wrong:
        with pytest.raises(AsymswapError, match=message):
            fed(net, data[3], **options)
    with pytest.raises(AsymswapError, match="`input_size=3x8x8` and `size=9x9` contradict each other"):
        open_model(net, input_size=(3, 8, 8), preprocessing=PreprocessingOptions(size=(9, 9)))
    for arguments in (
        ("compare", "digits-resnet", "digits-resnet"),
        ("fuse", "digits-resnet"),
        ("show", "digits-resnet", "--offsets"),
    ):
        monkeypatch.setattr("sys.argv", ["asymswap", *arguments, "--normalize", "half"])
        with pytest.raises(SystemExit, match="1"):
            main()
        assert "how images are prepared was said, but there are none: give " in capsys.readouterr().err


def test_blue_green_red_is_fed_so(data: dict[int, str]) -> None:
    opened = open_model(trained_on(COLOUR["caffe"], 0), preprocessing=PreprocessingOptions(normalize="caffe"))
    opened = settle(opened, data[3], "test")
    image = open_data(data[3], opened.preprocessing, "test")[5][0]
    original = torch.from_numpy(np.load(data[3])["images"][5]) / 255
    means = torch.tensor([103.939, 116.779, 123.68])[:, None, None]
    torch.testing.assert_close(image, 255 * original[[2, 1, 0]] - means, atol=1e-3, rtol=0)
    assert image_transform(opened.preprocessing)(original).shape == (3, 8, 8)


def test_a_size_that_nobody_gave_is_that_of_the_images_or_said_first(data: dict[int, str], tmp_path: Path) -> None:
    conversion = asymswap.convert(trained_on(COLOUR["none"], 0), "3x3-only", evaluate=data[3])
    assert conversion.report.model.input == "3x8x8"
    assert (
        "input 3x8x8 is the size of the images, for nobody said another: give `input_size=…`"
        in conversion.report.warnings[1]
    )
    # 16 channels, 3x3, 64 pixels; and the head.
    assert conversion.report.before.macs == 64 * 9 * (3 * 16 + 16 * 16) + 160
    assumed = "Net: input 3x224x224 is assumed, and all figures follow from it: give `input_size=…` to say the size"
    net = Net()
    assert asymswap.candidates(net).warnings == (assumed,)
    assert asymswap.convert(net, "3x3-only").report.warnings[0] == assumed
    assert asymswap.compare([net, net]).warnings == (assumed,)
    assert asymswap.candidates(asymswap.open_model(net, input_size=(3, 8, 8))).warnings == ()
    path = tmp_path / "net.asym.pt"
    asymswap.save(asymswap.convert(nn.Sequential(nn.Conv2d(3, 32, 3), nn.Conv2d(32, 32, 3)), "acnet"), path)
    report = asymswap.export(path, tmp_path / "net.safetensors")
    line = report.warnings[0]
    assert line.endswith(assumed.removeprefix("Net: "))


def test_a_size_that_does_not_suit_names_the_option(data: dict[int, str]) -> None:
    torch.manual_seed(0)
    for run in (
        asymswap.candidates,
        lambda net: asymswap.convert(net, "3x3-only"),
        lambda net: asymswap.compare([net, net]),
    ):
        with pytest.raises(TraceError, match=r"does not run on an input of 1x3x224x224: .*; give another .*input"):
            run(Flat())
    prepare = PreprocessingOptions(normalize="none")
    for run in (
        lambda: asymswap.evaluate(asymswap.open_model(Flat(), preprocessing=prepare), data[3]),
        lambda: asymswap.convert(
            asymswap.open_model(Flat(), preprocessing=prepare), "3x3-only", calibration=Calibration(data[3])
        ),
    ):
        with pytest.raises(TraceError, match=r"Flat does not run on images of 3x8x8: .*; give another `input_size=…`"):
            run()
    assert (
        asymswap.evaluate(asymswap.open_model(Flat(), preprocessing=prepare, input_size=(3, 12, 12)), data[3]).images
        == 96
    )


def test_every_report_says_what_was_fed(data: dict[int, str], tmp_path: Path) -> None:
    net = trained_on(COLOUR["none"], 0)
    conversion = asymswap.convert(net, "half-macs", evaluate=data[3])
    said = "3x8x8 (the size of the images), images resized to it (bilinear); pixels from 0 to 1, "
    said += "mean 0, 0, 0, std 1, 1, 1 (none, asked of the network)"
    for name in ("r.md", "r.html", "r.json"):
        asymswap.write_report(conversion, tmp_path / name)
        text = (tmp_path / name).read_text(encoding="utf-8")
        if name == "r.json":
            found = json.loads(text)["fed"]
            assert (found["normalization"], found["normalization_from"], found["size_from"]) == (
                "none",
                "asked",
                "images",
            )
            assert (found["low"], found["high"], found["distances"]["none"] < 0.02) == (0.0, 1.0, True)
        else:
            assert said in text, name
            assert text.index("Net is fed images normalised as none") < text.index("Weights")
