"""Whether branches beside trained convs help a network to learn on: fine-tuned with them and fused, or without them.

    python benchmarks/studies/branches.py resnet20 WEIGHTS --data TRAIN --test TEST [--recipes acnet repvgg dbb]
        [--steps 395] [--optimizer sgd] [--lr 0.01] [--seeds 0 1 2] [--out …/branches.json]
        [--markdown docs/results/branches.md]
    python benchmarks/studies/branches.py dncnn WEIGHTS --nets nets.py --data IMAGES --metric psnr.py:denoising …

Every run starts from the same trained network, sees the same images in the same order by its seed, and takes as many
steps of the same optimizer at the same rate. Branches are inserted without effect, trained, and fused back into plain
convs, so that all networks that are compared have the same layers. `none` is the network without branches. What is in
the JSON is not done again.
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
from torch.nn import functional as F
from torchvision.io import ImageReadMode, read_image

sys.path.insert(0, str(Path(__file__).parents[1]))  # for what it shares with the checks of a release

from measured import machine_text, markdown_table, read_json, state, write_json

import asymswap
from asymswap.data.metrics import evaluator_of, read_metric

HERE = Path(__file__).parent
COLUMNS = ["network", "branches", "before", "after", "gain over none", "processor s", "seeds"]
TEXT = """\
# Branches beside trained convs

Written by `benchmarks/studies/branches.py`, which says how: a trained network gets branches by a recipe, which at first
change nothing, is fine-tuned, and its branches are fused into plain convs; compared with the same fine-tuning without
branches (*none*). All networks have the same layers in the end. Mean over seeds, which draw the order of the images,
the patches and the noise, ± the standard deviation; the gain is that of each seed over *none* of the same seed.

{table}

{lengths}

State: {state}. Machine: {machine}.
"""


def noisy_patches(folder: Path, steps: int, batch: int, seed: int, side: int = 48) -> list[tuple[Any, Any]]:
    """Draw all batches of a run: grey patches with noise of 25/255, and the patches."""
    made = torch.Generator().manual_seed(seed)
    images = [read_image(str(path), ImageReadMode.GRAY).float() / 255 for path in sorted(folder.iterdir())]
    found = []
    for _ in range(steps):
        patches = []
        for _ in range(batch):
            image = images[int(torch.randint(len(images), (), generator=made))]
            top, left = (int(torch.randint(size - side + 1, (), generator=made)) for size in image.shape[1:])
            patches.append(image[:, top : top + side, left : left + side])
        clean = torch.stack(patches)
        found.append((clean + 25 / 255 * torch.randn(clean.shape, generator=made), clean))
    return found


def run(args: argparse.Namespace, recipe: str, seed: int) -> dict[str, Any]:
    length: dict[str, Any] = {"steps": args.steps, "optimizer": args.optimizer, "lr": args.lr, "seed": seed}
    started = time.process_time()
    if args.network == "resnet20":
        start = asymswap.open_model(args.weights, arch="cifar:resnet20")
        length |= {"batch_size": args.batch, "validation": "none"}
        options: dict[str, Any] = {"data": str(args.data)}
    else:
        size = (1, 48, 48)
        given = asymswap.PreprocessingOptions(normalize="none")
        start = asymswap.open_model(args.weights, arch=f"{args.nets}:DnCNN", input_size=size, preprocessing=given)
        options = {"data": noisy_patches(args.data, args.steps, args.batch, seed)}
        options["loss"] = lambda outputs, batch: F.mse_loss(outputs, batch[1])
    before = score(args, start)
    model: Any = start if recipe == "none" else asymswap.convert(start, recipe, progress=False)
    tuned = asymswap.finetune(model, training=asymswap.Training(**length), progress=False, **options)
    after = score(args, tuned if recipe == "none" else asymswap.fuse(tuned, progress=False))
    return {"before": before, "after": after, "cpu": time.process_time() - started, "state": state()}


def score(args: argparse.Namespace, model: Any) -> float:
    if args.metric:
        opened = asymswap.open_model(model)
        return float(evaluator_of(read_metric(args.metric), opened)(opened.model, lambda *_: None)[0].value)
    return 100 * float(asymswap.evaluate(model, str(args.test), progress=False).models[0].scores[0].value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", choices=["resnet20", "dncnn"])
    parser.add_argument("weights", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="training images")
    parser.add_argument("--test", type=Path, help="test images by class")
    parser.add_argument("--nets", type=Path, help="the Python file with DnCNN")
    parser.add_argument("--metric", help="FILE.py:function of the model, on test images")
    parser.add_argument("--recipes", nargs="+", default=["acnet", "repvgg", "dbb"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=395)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--optimizer", default="sgd")
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "branches.json")
    parser.add_argument("--markdown", type=Path)
    args = parser.parse_args()
    results = read_json(args.out, {"rows": {}, "lengths": {}})
    name = {"resnet20": "ResNet-20, CIFAR-10 JPEG, %", "dncnn": "DnCNN 25/255, Set12, dB"}[args.network]
    results["lengths"][name] = f"{args.steps} steps of {args.batch} by {args.optimizer} at {args.lr:g}"
    for seed in args.seeds:
        for recipe in ["none", *args.recipes]:
            key = json.dumps([name, recipe, seed])
            if key not in results["rows"]:
                results["rows"][key] = run(args, recipe, seed)
                write_json(args.out, results)
            print(key, results["rows"][key], flush=True)
    if args.markdown is not None:
        args.markdown.write_text(page(results), encoding="utf-8")


def page(results: dict[str, Any]) -> str:
    grouped: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    for key, row in results["rows"].items():
        network, recipe, seed = json.loads(key)
        grouped.setdefault((network, recipe), {})[seed] = row
    lines, best = [], dict[str, float]()
    for (network, recipe), rows in grouped.items():
        plain = grouped[network, "none"]
        gains = [row["after"] - plain[seed]["after"] for seed, row in rows.items() if seed in plain]
        after = [row["after"] for row in rows.values()]
        if recipe != "none" and gains:
            best[network] = max(best.get(network, -100.0), mean(gains))
        lines.append(
            [network, recipe, f"{mean(row['before'] for row in rows.values()):.2f}", spread(after),
             "-" if recipe == "none" else spread(gains, "+"), f"{mean(row['cpu'] for row in rows.values()):.0f}",
             str(len(rows))]
        )  # fmt: skip
    lengths = results["lengths"]
    return TEXT.format(
        table=markdown_table(COLUMNS, lines, left=2),
        lengths="\n".join(f"- {network}: {length}; {verdict(best[network])}" for network, length in lengths.items()),
        state="; ".join(dict.fromkeys(row["state"] for row in results["rows"].values())),
        machine=machine_text(),
    )


def verdict(gain: float) -> str:
    return (
        f"the best gains {gain:.2f}"
        if gain > 0
        else "nothing is gained by branches: without them it is as good or better"
    )


def spread(values: list[float], sign: str = "") -> str:
    return f"{mean(values):{sign}.2f}" + (f" ±{stdev(values):.2f}" if len(values) > 1 else "")


if __name__ == "__main__":
    main()
