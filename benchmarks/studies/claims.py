"""Do asymmetric convolutions converge faster, recognise better, and need fewer parameters and less computation?

    python benchmarks/studies/claims.py [--data digits cifar10] [--cifar10 DATA] [--networks …] [--kinds …] [--ways …]
        [--minutes M] [--out benchmarks/studies/results/claims.json] [--work build/claims]
        [--markdown docs/results/claims.md]

Every kind in three networks, (a) trained from scratch: a network with random weights is converted, then trained, and
(b) converted from the trained plain network of the same seed, then fine-tuned; beside the plain network, trained
equally long on the same images in the same order. All with asymswap's own `convert`, `finetune`, `evaluate` and `fuse`.

Each seed is trained in a process of its own, one at a time (on digits all kinds of a network, way and seed in one, for
there the imports would take longer than the training), and each result is in --out as soon as it is there: what is
there is not done again, so that the command goes on where it was interrupted; that file is kept in the repository. The
trained plain networks, from which others are converted, are below --work; where one is needed that is not there, it is
trained again. `--minutes` ends the command after the run that is being made then; `--markdown` and the pictures are
made of what there is.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # for what it shares with the checks of a release

from claims_page import read, write_page
from measured import read_json, state, write_json

NETWORKS = ("resnet18", "se-resnet18", "densenet")
KINDS = ("plain", "separable", "acb", "offset", "weighted-offset", "predicted-offset")
WAYS = ("scratch", "converted")
FUSED = ("acb", "offset", "weighted-offset")

RULE = "[[rules]]\nmatch = {{ kernel = '3x3', position = ['inner', 'last']{more} }}\nswap = {{ {swap} }}\n"
RECIPES = {
    "separable": RULE.format(more="", swap="kind = 'separable', ratio = 0.5"),
    "acb": RULE.format(more="", swap="kind = 'acb', bn = 'branch'"),
    "offset": RULE.format(more="", swap="kind = 'offset'"),
    "weighted-offset": RULE.format(more="", swap="kind = 'weighted-offset'"),
    # As detectors have it, where feature maps are small: its backward pass takes 100 ns a sample on a CPU, so that all
    # convs of a network would take an hour an epoch.
    "predicted-offset": RULE.format(more=", feature_map = '4x4'", swap="kind = 'predicted-offset'"),
}
# AdamW moves a parameter by its rate at most in a step: at the rate of the weights, offsets would not get anywhere.
OFFSET_SCALE = {"offset": 10.0, "weighted-offset": 10.0, "predicted-offset": 1.0}


@dataclass(frozen=True)
class Setting:
    """How all networks are trained on some data, which `images` says in words."""

    images: str
    test: int
    size: tuple[int, int, int]
    epochs: dict[str, int]
    lr: dict[str, float]
    batch: int
    precision: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    together: bool
    seeds: int


SETTINGS = {
    "digits": Setting(
        images="scikit-learn's digits, 1,437 training and 360 test images",
        test=360,
        size=(1, 8, 8),
        epochs={"scratch": 10, "converted": 5},
        lr={"scratch": 2e-3, "converted": 1e-3},
        batch=128,
        precision="fp32",
        mean=(0.3054,),
        std=(0.3761,),
        together=True,
        seeds=5,
    ),
    "cifar10": Setting(
        images="10,000 training and 2,000 test images, averaged down to half the width and height",
        test=2000,
        size=(3, 16, 16),
        epochs={"scratch": 5, "converted": 3},
        lr={"scratch": 3e-3, "converted": 1e-3},
        batch=128,
        precision="fp32",
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        together=False,
        seeds=3,
    ),
}

ABOUT = (
    "Networks: narrow versions of `cifar:resnet18`, `cifar:se-resnet18` and `cifar:densenet` "
    "(benchmarks/studies/claims_networks.py): the ResNets have 8, 16, 32 and 64 channels, an eighth of their width, "
    "squeeze-and-excitation by 4; the DenseNet has growth 8 and four blocks of three layers.",
    "Every 3x3 conv but the first is replaced; `predicted-offset` replaces only those whose input is 4x4 (in the "
    "second half of the network, as in detectors), because its backward pass takes a hundred times that of a conv.",
    "`separable` at half of each conv's MACs; `acb` with a batch norm per branch, as in ACNet, its strips starting "
    "with no effect. Offsets learn at ten times the rate of the weights, because AdamW would hardly move them in so "
    "few steps; predictors at the rate of the weights.",
    "From scratch: a network with random weights is converted, then trained. Converted: the plain network trained "
    "from scratch with this seed is converted, `separable` and `acb` with 256 of its training images (no labels), "
    "then fine-tuned; so is the plain network.",
    "Accuracy is measured on the test part at the end of each epoch; it chooses nothing: the last epoch counts.",
)


@dataclass(frozen=True)
class Run:
    """One training."""

    data: str
    network: str
    way: str
    kind: str
    seed: int

    @property
    def name(self) -> str:
        """Its key among the results."""
        return f"{self.data}/{self.network}-{self.way}-{self.kind}-{self.seed}"

    @property
    def plain(self) -> Run:
        """The training of the plain network from scratch, with this seed."""
        return Run(self.data, self.network, "scratch", "plain", self.seed)


class Bench:
    """Where results are, where networks are, and from what images."""

    def __init__(self, out: Path, work: Path, references: Mapping[str, str]) -> None:
        self.out, self.work, self.references = out, work, references

    def lacking(self, runs: Sequence[Run]) -> set[Run]:
        """Those that have no result, and the plain networks that these need and that are not there."""
        done = {Run(one.data, one.network, one.way, one.kind, one.seed) for one in read(self.out)}
        lacking = set(runs) - done
        return lacking | {run.plain for run in lacking if run.way == "converted" and not self.weights(run).exists()}

    def weights(self, run: Run) -> Path:
        """The checkpoint of the plain network of its seed, from which others are converted."""
        return self.work / f"{run.plain.name}.pt"

    def train(self, run: Run) -> None:
        """Convert, train, measure, and write the result."""
        import torch

        import asymswap

        setting = SETTINGS[run.data]
        code = {"arguments": {"in_channels": setting.size[0]}}
        network = f"{Path(__file__).with_name('claims_networks.py')}:{run.network.replace('-', '_')}"
        start = time.process_time()
        torch.manual_seed(run.seed)
        model = self._start(run, network, code)
        converted = time.process_time() - start
        stopwatch = Stopwatch()
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            tuned = asymswap.finetune(
                asymswap.open_model(
                    model,
                    input_size=setting.size,
                    preprocessing=asymswap.PreprocessingOptions(mean=setting.mean, std=setting.std),
                    **({"arch": network, **code} if isinstance(model, Path) else {}),
                ),
                self.references[run.data],
                self._training(run),
                run=folder,
                callback=stopwatch,
            )
            # The weights of the last epoch: the best are chosen by the images that they are measured on here.
            trained = asymswap.load(folder / "last.pt", model=_built(network, code))
            after = self._measured(run, folder / "last.pt", trained, network, code)
            if run.kind == "plain" and run.way == "scratch":
                self.weights(run).parent.mkdir(parents=True, exist_ok=True)
                self.weights(run).write_bytes((folder / "last.pt").read_bytes())
        assert tuned.report.before is not None
        curve = [tuned.report.before, *stopwatch.scores]
        result = {
            "top1": [scores["top1"] for scores in curve],
            "loss": [scores["loss"] for scores in curve],
            "train_loss": stopwatch.train_losses,
            "cpu_seconds_per_epoch": stopwatch.seconds,
            "convert_cpu_seconds": converted,
            **after,
            "state": state(),
        }
        results = read_json(self.out, {})
        write_json(self.out, {**results, run.name: result})
        print(
            f"{run.name}: {100 * result['top1'][-1]:.2f} % after {len(stopwatch.scores)} epochs, "
            f"{min(stopwatch.seconds):.1f} processor seconds an epoch",
            flush=True,
        )

    def _start(self, run: Run, network: str, code: dict[str, Any]) -> Any:
        """What is trained: a module, a conversion, or the file of the plain network."""
        import asymswap

        if run.way == "converted":
            source: Any = self.weights(run)
        else:
            source = _built(network, code)
        if run.kind == "plain":
            return source
        opening: dict[str, Any] = {}
        options: dict[str, Any] = {}
        if run.way == "converted":
            opening = {"arch": network, **code}
            if run.kind in ("separable", "acb"):
                # Without labels; for the pairs' weights, and for the statistics of new batch norms.
                options["calibration"] = asymswap.Calibration(self.references[run.data], images=256, seed=run.seed)
        with tempfile.TemporaryDirectory() as name:
            recipe = Path(name) / "recipe.toml"
            recipe.write_text(RECIPES[run.kind], encoding="utf-8")
            return asymswap.convert(
                asymswap.open_model(source, input_size=SETTINGS[run.data].size, **opening),
                recipe,
                seed=run.seed,
                **options,
            )

    def _training(self, run: Run) -> Any:
        import asymswap

        setting = SETTINGS[run.data]
        return asymswap.Training(
            epochs=setting.epochs[run.way],
            lr=setting.lr[run.way],
            batch_size=setting.batch,
            precision=setting.precision,
            augment=("none",),
            offset_lr_scale=OFFSET_SCALE.get(run.kind, 0.1),
            validation="test",
            seed=run.seed,
        )

    def _measured(self, run: Run, path: Path, model: Any, network: str, code: dict[str, Any]) -> dict[str, Any]:
        """Cost and memory, offsets where there are some, and the same of the fused network where there is one."""
        import torch

        import asymswap
        from asymswap.measure.macs import count_costs

        setting = SETTINGS[run.data]
        cost = count_costs(model, (torch.empty(1, *setting.size, device="meta"),)).total
        found: dict[str, Any] = {"params": cost.params, "macs": cost.macs, "memory": kept_bytes(model, setting)}
        if run.kind in OFFSET_SCALE:
            rows = asymswap.offsets(
                asymswap.open_model(path, arch=network, **code), data=self.references[run.data]
            ).rows
            taps = [tap for row in rows for tap in row.mean]
            found["offset"] = sum((down**2 + right**2) ** 0.5 for down, right in taps) / len(taps)
            found["largest_offset"] = max(row.largest for row in rows)
        if run.kind in FUSED:
            found["fused"] = self._fused(run, path, model, network, code)
        return found

    def _fused(self, run: Run, path: Path, model: Any, network: str, code: dict[str, Any]) -> dict[str, Any]:
        import torch

        import asymswap
        from asymswap.measure.latency import Turn, best_of, take_turns, time_once

        setting = SETTINGS[run.data]
        fusion = asymswap.fuse(asymswap.open_model(path, arch=network, **code))
        fed = asymswap.PreprocessingOptions(mean=setting.mean, std=setting.std)
        report = asymswap.evaluate(
            [asymswap.open_model(one, input_size=setting.size, preprocessing=fed) for one in (model, fusion.model)],
            self.references[run.data],
        )
        first, second = report.models
        assert second.classifier is not None
        assert second.classifier.against_first is not None
        inputs = (torch.randn(32, *setting.size, generator=torch.Generator().manual_seed(0)),)
        networks = {"converted": model, "fused": fusion.model, "plain": _built(network, code).eval()}
        turns = {name: Turn(partial(time_once, one, inputs, ())) for name, one in networks.items()}
        return {
            "params": fusion.report.after.params,
            "macs": fusion.report.after.macs,
            "top1": second.scores[0].value,
            "top1_before": first.scores[0].value,
            "agreement": second.classifier.against_first.agreement,
            "output_change": fusion.report.relative,
            "as_original": fusion.report.as_original,
            "ms": {name: 1000 * best_of(passes).whole for name, passes in take_turns(turns, rounds=20).items()},
        }


class Stopwatch:
    """Processor seconds of each epoch's training, without its validation, and how the epochs came out."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.scores: list[Any] = []
        self.train_losses: list[float] = []
        self._start = self._last = 0.0

    def begin(self, start: Any) -> None:  # noqa: ARG002
        """Training begins."""
        self._start = time.process_time()

    def step(self, row: Any) -> None:  # noqa: ARG002
        """A step is done."""
        self._last = time.process_time()

    def epoch(self, row: Any) -> None:
        """An epoch is done and validated."""
        self.seconds.append(self._last - self._start)
        self.scores.append(row.validation)
        self.train_losses.append(row.train.loss)
        self._start = time.process_time()


def _built(network: str, code: dict[str, Any]) -> Any:
    """The plain network, with weights from the current seed."""
    from asymswap.models.factories import UserCode

    return UserCode().build(network, code["arguments"])


def kept_bytes(model: Any, setting: Setting) -> int:
    """Bytes that one training step holds: what autograd keeps of a batch, and weights, gradients and AdamW's moments.

    Counted, not measured, in float32: the resident memory of the process is mostly that of its imports.
    """
    import torch

    storages: dict[int, int] = {}

    def pack(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        kept.append(tensor)
        return tensor

    kept: list[Any] = []
    images = torch.randn(setting.batch, *setting.size)
    # A copy: a step in train mode changes the running statistics.
    model = copy.deepcopy(model).train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(images)
    for parameter in model.parameters():
        storages.pop(parameter.untyped_storage().data_ptr(), None)
    del output
    return sum(storages.values()) + 4 * sum(p.numel() * p.element_size() for p in model.parameters())


def wanted_runs(args: argparse.Namespace) -> Iterator[Run]:
    """All of them; on large images the kind whose training takes longest by far comes at the end."""
    slow = ["predicted-offset"]
    for data in args.data:
        late = [] if SETTINGS[data].together else [kind for kind in args.kinds if kind in slow]
        early = [kind for kind in args.kinds if kind not in late]
        for kinds in (early, late):
            seeds = range(SETTINGS[data].seeds)
            for network, seed, way, kind in itertools.product(args.networks, seeds, args.ways, kinds):
                yield Run(data, network, way, kind, seed)


def main() -> None:
    args = parse()
    end = math.inf if args.minutes is None else time.monotonic() + 60 * args.minutes
    if args.run is None and "cifar10" in args.data and args.minutes != 0:
        args.cifar10 = packed(args.cifar10, args.work)
    bench = Bench(args.out, args.work, {"digits": "digits", "cifar10": args.cifar10})
    if args.run is not None:
        for fields in json.loads(args.run):
            if time.monotonic() < end:
                bench.train(Run(**fields))
        return
    runs = list(wanted_runs(args))
    for group in _processes(runs):
        lacking = bench.lacking(group)
        # A plain network comes before what is converted from it.
        ordered = sorted(lacking, key=lambda run: (run != run.plain, group.index(run) if run in group else -1))
        if ordered and time.monotonic() < end:
            _in_a_process(ordered, args, end)
    print(f"{len(set(runs) - bench.lacking(runs))} of {len(runs)} runs are there")
    if args.markdown is not None:
        write_page(args.markdown, args.out, vars(args) | {"settings": SETTINGS, "about": ABOUT})


def _processes(runs: Sequence[Run]) -> Iterator[list[Run]]:
    """The runs of each process, in order."""
    shared = itertools.groupby(runs, lambda run: (run.data, run.network, run.way, run.seed))
    for _, group in shared:
        some = list(group)
        if SETTINGS[some[0].data].together:
            yield some
        else:
            yield from ([run] for run in some)


def _in_a_process(runs: Sequence[Run], args: argparse.Namespace, end: float) -> None:
    command = [sys.executable, __file__, "--out", str(args.out), "--work", str(args.work)]
    command += ["--cifar10", str(args.cifar10), "--run", json.dumps([vars(run) for run in runs])]
    if math.isfinite(end):
        command += ["--minutes", str((end - time.monotonic()) / 60)]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": str(args.threads)}, check=False)
    if done.returncode:
        sys.exit(f"{runs[0].name} ended with {done.returncode}")


def packed(reference: str, work: Path) -> str:
    """The images of a folder decoded once, in the setting's size, as a file of tensors; others as they are."""
    if not Path(reference).is_dir():
        return reference
    _, height, width = SETTINGS["cifar10"].size
    target = work / f"cifar10-{height}x{width}.npz"
    if not target.exists():
        import numpy as np
        from PIL import Image

        from asymswap.data.datasets import open_data
        from asymswap.models.networks import CIFAR_PREPROCESSING

        arrays: dict[str, Any] = {}
        for part in ("train", "test"):
            data = open_data(reference, CIFAR_PREPROCESSING, part)
            pictures = [data.picture(number) for number in range(len(data))]
            small = [np.asarray(picture.resize((width, height), Image.Resampling.BOX)) for picture in pictures]
            arrays |= {f"images_{part}": np.stack(small), f"labels_{part}": np.array(data.labels)}
            arrays["classes"] = np.array(data.classes)
        target.parent.mkdir(parents=True, exist_ok=True)
        np.savez(target, **arrays)
    return str(target)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--cifar10", default="cifar10:build", help="a data reference: cifar10:PATH, or a folder")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--minutes", type=float, help="begin no run after so many; 0: only make the page")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/studies/results/claims.json"))
    parser.add_argument("--work", type=Path, default=Path("build/claims"), help="where networks and images are kept")
    parser.add_argument("--markdown", type=Path, help="write the page here, and its pictures beside it")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
