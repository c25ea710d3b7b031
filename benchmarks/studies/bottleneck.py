"""A trained network of bottlenecks, most of whose convs are 1x1, at half of its MACs, beside ResNet-20 at that share.

    python benchmarks/studies/bottleneck.py DATA [--epochs 20] [--shares 0.7 0.5] [--seeds 0 1 2] [--resnet FILE]
        [--weights build/bottleneck.pt] [--out benchmarks/studies/results/bottleneck.json]
        [--markdown docs/results/bottleneck.md]

DATA has `train` and `test` with class folders of 32 x 32 images. The network is trained here, with labels; conversion
then gets 512 unlabelled images. Agreement is with each original, over all test images.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))  # for what it shares with the checks of a release

from measured import machine_text, markdown_table, read_json, state, write_json

import asymswap
from asymswap.data.datasets import open_data
from asymswap.data.metrics import predict
from asymswap.models.opened import OpenedModel

HERE = Path(__file__).parent
COLUMNS = ["network", "accuracy before", "share of MACs", "accuracy after", "agreement", "1x1 convs swapped", "seeds"]
TEXT = """\
# Networks of bottlenecks

Written by `benchmarks/studies/bottleneck.py`, which says how: a ResNet of six bottlenecks (He et al., 2015) on CIFAR-10
as JPEG, trained for {epochs} epochs, then converted by `half-macs` on 512 unlabelled images, layer by layer, without
polish; and ResNet-20, whose convs are all 3x3. Mean over the draws of images, ± their standard deviation.

{table}

State: {state}. Machine: {machine}.
"""


class Bottleneck(nn.Module):
    """1x1 to a quarter of the channels, 3x3, and 1x1 back, beside a shortcut."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)
        self.shortcut = nn.Sequential()
        if inputs != 4 * width or stride != 1:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return F.relu(self.bn3(self.conv3(y)) + self.shortcut(x))


class BottleneckNet(nn.Module):
    """Three stages of two bottlenecks, 32 x 32 images."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        blocks, inputs = [], 16
        for width, stride in ((16, 1), (16, 1), (32, 2), (32, 1), (64, 2), (64, 1)):
            blocks.append(Bottleneck(inputs, width, stride))
            inputs = 4 * width
        self.blocks, self.linear = nn.Sequential(*blocks), nn.Linear(inputs, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.blocks(self.stem(x)).mean((2, 3)))


def train(data: str, epochs: int, weights: Path) -> nn.Module:
    """Train by `asymswap.finetune`, which trains any network; what is trained already is read."""
    torch.manual_seed(0)
    net = BottleneckNet()
    if not weights.exists():
        settings = asymswap.Training(epochs=epochs, optimizer="sgd", lr=0.1, weight_decay=5e-4, validation="none")
        opened = opened_of(net)
        trained = asymswap.finetune(opened, data, settings, progress=False).model
        weights.parent.mkdir(parents=True, exist_ok=True)
        torch.save(trained.state_dict(), weights)
    net.load_state_dict(torch.load(weights, weights_only=True))
    return net.eval()


def opened_of(net: nn.Module) -> OpenedModel:
    return asymswap.open_model(
        net, input_size=(3, 32, 32), preprocessing=asymswap.PreprocessingOptions(normalize="imagenet")
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.7, 0.5])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--resnet", help="a checkpoint of ResNet-20, to compare with")
    parser.add_argument("--weights", type=Path, default=Path("build/bottleneck.pt"))
    parser.add_argument("--out", type=Path, default=HERE / "results" / "bottleneck.json")
    parser.add_argument("--markdown", type=Path)
    args = parser.parse_args()
    results = read_json(args.out, {"rows": {}})
    start = time.perf_counter()
    networks: dict[str, OpenedModel] = {"bottlenecks": opened_of(train(args.data, args.epochs, args.weights))}
    print(f"trained in {time.perf_counter() - start:.0f} s", file=sys.stderr)
    if args.resnet:
        networks["ResNet-20"] = asymswap.open_model(args.resnet, arch="cifar:resnet20")
    for name, opened in networks.items():
        test = open_data(args.data, opened.preprocessing, "test")
        before = predict(opened.model, test)
        for share in args.shares:
            for seed in args.seeds:
                key = json.dumps([name, share, seed])
                if key in results["rows"]:
                    continue
                calibration = asymswap.Calibration(args.data, images=512, seed=seed)
                found = asymswap.convert(opened, "half-macs", macs=share, calibration=calibration, progress=False)
                after = predict(found.model, test)
                results["rows"][key] = {
                    "before": before.top1,
                    "after": after.top1,
                    "agreement": float((before.guesses == after.guesses).double().mean()),
                    "macs": found.report.after.macs / found.report.before.macs,
                    "low_rank": sum(swap.kind == "low-rank" for swap in found.plan.swaps),
                    "state": state(),
                }
                write_json(args.out, results)
                print(key, results["rows"][key], flush=True)
    table: list[list[str]] = []
    groups: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for key, one in results["rows"].items():
        groups.setdefault((json.loads(key)[0], json.loads(key)[1]), []).append(one)
    for (name, _), some in groups.items():
        spread = [stdev(one[key] for one in some) if len(some) > 1 else 0.0 for key in ("after", "agreement")]
        after, agreed = (100 * mean(one[key] for one in some) for key in ("after", "agreement"))
        cells = [f"{after:.2f} ±{100 * spread[0]:.2f}", f"{agreed:.2f} ±{100 * spread[1]:.2f}"]
        swapped = str(some[0]["low_rank"])
        table.append(
            [name, f"{100 * some[0]['before']:.2f}", f"{some[0]['macs']:.3f}", *cells, swapped, str(len(some))]
        )
    text = markdown_table(COLUMNS, table)
    print(text)
    if args.markdown is not None:
        page = TEXT.format(table=text, epochs=args.epochs, state=state(), machine=machine_text())
        args.markdown.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
