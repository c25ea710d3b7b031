"""Accuracy over MACs kept: asymswap's ways to choose ranks and weights, and its peers, on the same network and images.

    python benchmarks/studies/accuracy_at_budget.py [--model digits-resnet] [--arch REF] [--data digits]
        [--budgets 0.5 0.4 …] [--calibration-images 512] [--seeds 0 1 2] [--methods NAME …]
        [--markdown FILE] [--picture FILE]

    python benchmarks/studies/accuracy_at_budget.py --model resnet20-cifar10-jpg.pt --arch cifar:resnet20
        --data cifar10-jpg --polish-minutes 10 --out benchmarks/studies/results/accuracy.json
        --markdown docs/results/accuracy.md --picture docs/results/accuracy.svg

The second is that of docs/results/accuracy.md, whose results are kept in the repository.

Prints tables, and writes JSON, Markdown and a picture (which needs matplotlib). What is in the JSON already is not
done again, so an interrupted run goes on where it was; failed entries are tried again. Peers run in an environment of
their own, made on the first run (`--peer-env`), each in a process of its own; one that cannot is a row that says why.

At each budget the first seed of our methods runs before the peers and the others after them, so that a change of the
machine's load falls upon both. Times are of the method alone: without importing, and without evaluating at the end.
Ours include loading the model, reading and decoding the calibration images, and measuring the report's figures; the
peers are given model and images in memory.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from fractions import Fraction
from pathlib import Path
from statistics import mean
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # for what it shares with the checks of a release

from measured import machine, markdown_table, table, write_json
from torch import Tensor, nn
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.v2.functional import to_dtype

import asymswap
from asymswap import PreprocessingOptions
from asymswap.calibration.gather import images_hash, model_hash
from asymswap.data.datasets import LabelledImages, Part, open_data
from asymswap.data.metrics import predict
from asymswap.measure.macs import count_costs
from asymswap.models.opened import OpenedModel
from asymswap.models.opening import open_model
from asymswap.replacements._pairs import full_rank
from asymswap.replacements.separable import Separable
from asymswap.types import Site

PEERS = Path(__file__).with_name("peers")


@dataclass(frozen=True)
class Method:
    """One line of the tables. `run` for ours; a peer has a `script`, the `packages` it needs, perhaps a `variant`."""

    title: str
    labels: bool = False
    seeded: bool = False
    run: Callable[[Bench, float, int], asymswap.Conversion] | None = None
    script: str = ""
    variant: str = ""
    packages: tuple[str, ...] = ()
    keeps_scores: bool = False


class Bench:
    """The network and the images of this run."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        # A denoiser takes pixels from 0 to 1; a network of one's own says nothing of how images are prepared.
        how = "none" if args.noise is not None else args.normalize
        self.opened: OpenedModel = open_model(
            args.model,
            arch=args.arch,
            input_size=args.input,
            preprocessing=None if how is None else PreprocessingOptions(normalize=how),
        )
        self.macs = count_costs(self.opened.model, self.opened.example()).total.macs
        self.quality = "Top-1 accuracy in %" if args.noise is None else "PSNR in dB"
        self.has_norms = any(isinstance(module, nn.BatchNorm2d) for module in self.opened.model.modules())
        if args.noise is None:
            self.test = in_memory(self._open("test"), None if args.test_images is None else args.test_images)
            self.train = self._open("train")
            self.pairs = [self.test.tensors]
            self.about = f"{len(self.test)} images of {len(self.test.classes)} classes", f"{len(self.train)} images"
        else:
            files = [sorted((Path(args.data) / part).glob("*.png")) for part in ("train", "test")]
            self.clean, tested = ([read_grey(file) for file in some] for some in files)
            self.pairs = [with_noise(image[None], args.noise, seed) for seed, image in enumerate(tested)]
            self.about = f"{len(tested)} noisy images", f"{len(self.clean)} images, in patches of {args.patch} pixels"
        self.original = self.score(self.opened.model)
        self._sites: list[Site] | None = None

    def _open(self, part: Part) -> LabelledImages:
        return open_data(self.args.data, self.opened.preprocessing, part)

    def score(self, model: nn.Module) -> float:
        """Return top-1 accuracy in %, or the mean PSNR in dB, on the test images."""
        if self.args.noise is None:
            return round(100 * predict(model, self.test).top1, 6)
        with torch.inference_mode():
            return mean(psnr(model(noisy).clamp(0, 1), clean) for noisy, clean in self.pairs)

    def chosen(self, seed: int) -> tuple[Tensor, Tensor]:
        """Return the calibration inputs of a seed with their labels, or noisy patches with the clean ones."""
        count, side = self.args.calibration_images, self.args.patch
        if self.args.noise is None:
            return in_memory(self.train, count, seed).tensors
        draw = torch.Generator().manual_seed(seed)
        patches = []
        for image in random.Random(seed).choices(self.clean, k=count):
            top, left = (int(torch.randint(size - side + 1, (), generator=draw)) for size in image.shape[-2:])
            patches.append(image[:, top : top + side, left : left + side])
        return with_noise(torch.stack(patches), self.args.noise, seed)

    @property
    def setting(self) -> dict[str, Any]:
        """What all results of one file have in common."""
        source = self.opened
        return {
            "network": Path(source.origin.reference).name,  # without the folder of a network of one's own
            "weights": source.weights,
            "model": model_hash(self.opened.model),
            "macs": self.macs,
            "original": self.original,
            "quality": self.quality,
            "test": self.about[0],
            "train": self.about[1],
            "calibration_images": self.args.calibration_images,
        }

    def convert(self, recipe: str, overrides: Mapping[str, Any], calibration: Any = None) -> asymswap.Conversion:
        """Convert the model, read anew from its file."""
        return asymswap.convert(self.opened, recipe, overrides=overrides, calibration=calibration)

    def calibration(self, seed: int, **options: Any) -> asymswap.Calibration:
        """The calibration images of a seed."""
        data = self.args.data if self.args.noise is None else self.chosen(seed)[0]
        return asymswap.Calibration(**{"data": data, "images": self.args.calibration_images, "seed": seed, **options})

    def sites(self) -> list[Site]:
        """The convs that recipe 3x3-only swaps."""
        if self._sites is None:
            rows = asymswap.candidates(self.opened, recipe="3x3-only").rows
            self._sites = [row.site for row in rows if row.reason is None]
        return self._sites


@dataclass(frozen=True)
class Decoded(LabelledImages):
    """Images that are network inputs already, N x C x H x W, with their labels."""

    tensors: tuple[Tensor, Tensor] = ()  # type: ignore[assignment]

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.tensors[0][index], int(self.tensors[1][index])


def read_grey(file: Path) -> Tensor:
    """Read an image as 1 x H x W, from 0 to 1."""
    return to_dtype(decode_image(str(file), ImageReadMode.GRAY), torch.float32, scale=True)


def with_noise(clean: Tensor, deviation: float, seed: int) -> tuple[Tensor, Tensor]:
    """Return images with noise, and without."""
    return clean + deviation * torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed)), clean


def psnr(image: Tensor, clean: Tensor) -> float:
    return -10 * math.log10(float((image - clean).square().mean()))


def in_memory(data: LabelledImages, count: int | None, seed: int = 0) -> Decoded:
    """All images, or so many drawn as calibration draws them, decoded once."""
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen = range(len(data)) if count is None else order[:count]
    some = data.some(chosen, data.description)
    images, labels = zip(*(some[index] for index in range(len(chosen))), strict=True)
    return Decoded(**vars_of(some), tensors=(torch.stack(images), torch.tensor(labels)))


def vars_of(data: LabelledImages) -> dict[str, Any]:
    """Its fields by name."""
    return {field.name: getattr(data, field.name) for field in fields(LabelledImages)}


def uniform(bench: Bench, budget: float, _: int) -> asymswap.Conversion:
    """Every 3x3 conv at the same ratio, the largest at which the whole model keeps the budget."""
    kind = Separable()

    def macs_at(ratio: float) -> float:
        spared = 0
        for site in bench.sites():
            costs = [
                [
                    cost
                    for rank in range(1, full_rank(site.conv, form) + 1)
                    if (cost := kind.cost(site, form.model_copy(update={"rank": rank})).macs) <= ratio * site.cost.macs
                ]
                for form in kind.forms(kind.settings())
            ]
            # The order is chosen by the error, so it may be the dearer of the two.
            spared += site.cost.macs - max((max(some) for some in costs if some), default=site.cost.macs)
        return bench.macs - spared

    low, high = 0.0, 1.0
    for _step in range(16):
        middle = (low + high) / 2
        low, high = (middle, high) if macs_at(middle) <= budget * bench.macs else (low, middle)
    return bench.convert("3x3-only", {"ratio": low})


def lagrangian(bench: Bench, budget: float, _: int) -> asymswap.Conversion:
    """Ranks that change the weights least."""
    return bench.convert("half-macs", {"budget.macs": budget})


def one_pass(bench: Bench, budget: float, seed: int) -> asymswap.Conversion:
    """Every conv solved on the original network's statistics."""
    return bench.convert("half-macs", {"budget.macs": budget}, bench.calibration(seed, sequential=False))


def layer_by_layer(bench: Bench, budget: float, seed: int) -> asymswap.Conversion:
    """Then anew, each on what it gets from the converted ones before it."""
    return bench.convert("half-macs", {"budget.macs": budget}, bench.calibration(seed, sequential=True))


def polish_option(args: argparse.Namespace) -> tuple[str, float]:
    """How long to polish, as Calibration takes it."""
    if args.polish_minutes is not None:
        return "polish_minutes", args.polish_minutes
    return "polish_steps", args.polish_steps


def polished(bench: Bench, budget: float, seed: int) -> asymswap.Conversion:
    """Then trained to answer as the original does."""
    args = bench.args
    options = {**dict([polish_option(args)]), "polish_images": args.polish_images}
    return bench.convert("half-macs", {"budget.macs": budget}, bench.calibration(seed, sequential=True, **options))


AIMET = {"script": "aimet_svd.py", "packages": ("aimet-torch==2.42.0",), "labels": True, "keeps_scores": True}
TUCKER = {"script": "tucker.py", "packages": ("tensorly==0.10.0", "tensorly-torch==0.5.0")}
METHODS = {
    "uniform": Method("weights-only SVD, uniform ranks", run=uniform),
    "lagrangian": Method("weights-only SVD, Lagrangian ranks", run=lagrangian),
    "one-pass": Method("calibrated, one pass", seeded=True, run=one_pass),
    "sequential": Method("calibrated, layer by layer", seeded=True, run=layer_by_layer),
    "polish": Method("calibrated + polish", seeded=True, run=polished),
    "aimet": Method("AIMET spatial SVD, auto mode", **AIMET),
    "aimet-bn": Method("AIMET spatial SVD, auto mode + BN re-estimation", variant="+ BN re-estimation", **AIMET),
    "tucker": Method("tensorly-torch, Tucker", **TUCKER),
    "tucker-bn": Method("tensorly-torch, Tucker + BN re-estimation", variant="+ BN re-estimation", **TUCKER),
    "pruning": Method("Torch-Pruning + BN re-estimation", script="pruning.py", packages=("torch-pruning==1.6.1",)),
    "balf": Method("BALF", script="balf.py", packages=("numpy==2.3.2",)),
}


class Book:
    """The results so far, in a file: an entry for each method, budget and seed."""

    def __init__(self, path: Path, setting: dict[str, Any]) -> None:
        self.path = path
        self.data: dict[str, Any] = {"setting": setting, "machine": machine(), "entries": {}}
        if path.exists():
            found = json.loads(path.read_text(encoding="utf-8"))
            other = [key for key in setting if found["setting"].get(key) != setting[key]]
            if other:
                sys.exit(f"error: {path} holds results of another {other[0]}; give another --out, or remove it")
            self.data["entries"] = found["entries"]

    @staticmethod
    def key(method: str, budget: float, seed: int) -> str:
        return f"{method}|{budget:g}|{seed}"

    def get(self, method: str, budget: float, seed: int) -> dict[str, Any] | None:
        found: dict[str, Any] | None = self.data["entries"].get(self.key(method, budget, seed))
        return found

    def lacks(self, method: str, budget: float, seed: int) -> bool:
        """Whether this is still to be done."""
        found = self.get(method, budget, seed)
        return found is None or "failed" in found

    def put(self, method: str, budget: float, seed: int, entry: dict[str, Any]) -> None:
        """Note a result, in the file as well."""
        entry["load_after"] = round(os.getloadavg()[0], 2)
        self.data["entries"][self.key(method, budget, seed)] = entry
        write_json(self.path, self.data)
        what = f"failed: {entry['failed']}" if "failed" in entry else f"{entry['score']:.2f}"
        took = f", {entry['seconds']:.1f} s" if "seconds" in entry else ""
        print(f"{METHODS[method].title}, {budget:g}, seed {seed}: {what}{took} (load {entry['load']})", flush=True)


def run_ours(bench: Bench, book: Book, name: str, budget: float, seed: int) -> None:
    """One conversion, timed, and its accuracy."""
    method = METHODS[name]
    assert method.run is not None
    entry: dict[str, Any] = {"load": round(os.getloadavg()[0], 2)}
    wall, cpu = time.perf_counter(), time.process_time()
    try:
        conversion = method.run(bench, budget, seed)
    except asymswap.AsymswapError as error:
        entry["failed"] = str(error)
    else:
        entry["seconds"] = round(time.perf_counter() - wall, 3)
        entry["cpu_seconds"] = round(time.process_time() - cpu, 3)
        entry["threads"] = torch.get_num_threads()
        entry["stages"] = conversion.report.seconds
        if name == "polish":
            option, value = polish_option(bench.args)
            entry["note"] = f"{option} {value:g} on {bench.args.polish_images} images"
        entry["macs"] = count_costs(conversion.model, bench.opened.example()).total.macs / bench.macs
        entry["score"] = bench.score(conversion.model)
        if conversion.report.calibration is not None:
            entry["images"] = conversion.report.calibration.sha256
    book.put(name, budget, seed, entry)


class Peers:
    """The peers' environment, and what is handed to their scripts."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.folder: Path = bench.args.peer_env
        self.python = self.folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
        self._refused: dict[tuple[str, ...], str | None] = {}
        self._bundle: str | None = None
        self.images = ""
        self._work = tempfile.TemporaryDirectory()

    def prepare(self, method: Method) -> str | None:
        """Make the environment and install what the method needs, where that is not done yet; the reason if not."""
        if method.packages not in self._refused:
            self._refused[method.packages] = self._install(method.packages) or self._write_bundle()
        return self._refused[method.packages]

    def _install(self, packages: Sequence[str]) -> str | None:
        check = (
            "import sys, importlib.metadata as m; "
            "sys.exit(any(m.version(p.split('==')[0]) != p.split('==')[1] for p in sys.argv[1:]))"
        )
        if not self.python.exists():
            print(f"making the peers' environment {self.folder}", flush=True)
            venv.create(self.folder, with_pip=True)
        elif subprocess.run([self.python, "-c", check, *packages], capture_output=True).returncode == 0:
            return None
        print(f"installing {', '.join(packages)}", flush=True)
        ours = [
            f"{name}=={version.partition('+')[0]}" for name, version in machine().items() if name.startswith("torch")
        ]
        # The peers' scripts build the network by asymswap's own code, which needs the last two.
        command = [self.python, "-m", "pip", "install", "--quiet", *packages, *ours, "pydantic", "safetensors"]
        done = subprocess.run(command, capture_output=True, text=True)
        return None if done.returncode == 0 else f"{packages[0]} cannot be installed: {last_line(done.stderr)}"

    def _write_bundle(self) -> str | None:
        if self._bundle is not None:
            return None
        bench = self.bench
        origin = bench.opened.origin
        reference = bench.args.arch or origin.reference.partition("@")[0]
        chosen = bench.chosen(bench.args.seeds[0])
        self.images = images_hash(lambda: iter([(0, (chosen[0],))]))
        self._bundle = str(Path(self._work.name) / "bundle.pt")
        torch.save(
            {
                "reference": reference,
                "arguments": dict(origin.arguments),
                "state_dict": bench.opened.model.state_dict(),
                "calibration": chosen,
                "test": bench.pairs,
            },
            self._bundle,
        )
        return None

    def scores(self) -> Path:
        """Where a peer keeps what it learned of this network on these images, whatever the budget."""
        mark = f"{self.bench.setting['model'][:12]}-{self.images[:12]}"
        return self.folder.with_name(f"{self.folder.name}-scores-{mark}.pkl")

    def run(self, book: Book, script: str, budget: float) -> None:
        """One run of a script, which gives a row for each of its variants."""
        seed = self.bench.args.seeds[0]
        names = variants(self.bench, script)
        method = METHODS[names[0]]
        entry: dict[str, Any] = {"load": round(os.getloadavg()[0], 2)}
        reason = self.prepare(method)
        rows: dict[str, Any] = {}
        if reason is None:
            rows, reason = self._call(method, budget)
        for name in names:
            row = rows.get(METHODS[name].variant)
            if row is None:
                book.put(name, budget, seed, {**entry, "failed": reason or "it gave no result"})
            else:
                macs = row.pop("macs") / self.bench.macs
                book.put(name, budget, seed, {**entry, **row, "macs": macs, "images": self.images})

    def _call(self, method: Method, budget: float) -> tuple[dict[str, Any], str | None]:
        out = Path(self._work.name) / "rows.json"
        out.unlink(missing_ok=True)
        command = [str(self.python.absolute()), str(PEERS / method.script), str(self._bundle), str(budget), str(out)]
        if method.keeps_scores and self.bench.args.reuse_scores:
            command += ["--scores", str(self.scores().absolute())]
        reason = None
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=self.bench.args.peer_timeout)
            if done.returncode < 0:
                reason = f"killed by signal {-done.returncode}"
            elif done.returncode:
                reason = last_line(done.stderr)
        except subprocess.TimeoutExpired as error:
            reason = f"not done after {error.timeout:.0f} s"
        rows = json.loads(out.read_text(encoding="utf-8")) if out.exists() else []
        return {row["variant"]: row for row in rows}, reason


def variants(bench: Bench, script: str) -> list[str]:
    """Return the methods of one script; what re-estimates batch norms only where there are any."""
    own = [name for name, method in METHODS.items() if method.script == script]
    return [name for name in own if bench.has_norms or not METHODS[name].variant]


def last_line(text: str) -> str:
    """What a program said last."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "no reason given")[:300]


def run_all(bench: Bench, book: Book) -> None:
    """Everything that is still lacking, budget by budget."""
    args = bench.args
    peers = Peers(bench)
    first, *rest = args.seeds
    ours = [name for name in args.methods if METHODS[name].run is not None]
    for budget in args.budgets:
        for name in ours:
            if book.lacks(name, budget, first):
                run_ours(bench, book, name, budget, first)
        scripts = dict.fromkeys(METHODS[name].script for name in args.methods if METHODS[name].script)
        for script in scripts:
            names = variants(bench, script)
            if any(book.lacks(name, budget, first) for name in names):
                peers.run(book, script, budget)
        for seed in rest:
            for name in ours:
                if METHODS[name].seeded and book.lacks(name, budget, seed):
                    run_ours(bench, book, name, budget, seed)


@dataclass(frozen=True)
class Cell:
    """A method at a budget: means over the seeds, or the reason why there are none."""

    score: float | None = None
    macs: float | None = None
    seconds: float | None = None
    cpu_seconds: float | None = None
    load: float | None = None
    spread: float = 0.0
    seeds: int = 0
    failed: str = ""


def cell(book: Book, name: str, budget: float, seeds: Sequence[int]) -> Cell | None:
    """None where nothing was tried."""
    found = [entry for seed in seeds if (entry := book.get(name, budget, seed)) is not None]
    done = [entry for entry in found if "failed" not in entry]
    if not done:
        return Cell(failed=found[0]["failed"]) if found else None
    means = {key: mean(entry[key] for entry in done) for key in ("score", "macs", "seconds", "cpu_seconds", "load")}
    scores = [entry["score"] for entry in done]
    return Cell(**means, spread=max(scores) - min(scores), seeds=len(done))


def grid(book: Book, args: argparse.Namespace, show: Callable[[Cell], str]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of one table: methods by budgets."""
    budgets = sorted(args.budgets, reverse=True)
    rows = []
    for name in shown(book):
        method = METHODS[name]
        cells = [cell(book, name, budget, args.seeds) for budget in budgets]
        texts = ["-" if one is None else "failed" if one.failed else show(one) for one in cells]
        rows.append([method.title, "yes" if method.labels else "no", *texts])
    return ["method", "labels", *(f"{budget:g}" for budget in budgets)], rows


def shown(book: Book) -> list[str]:
    """The methods of which there is anything to show."""
    tried = {key.partition("|")[0] for key in book.data["entries"]}
    return [name for name in METHODS if name in tried]


def as_score(one: Cell) -> str:
    assert one.score is not None
    return f"{one.score:.2f}" + (f" ±{one.spread / 2:.2f}" if one.seeds > 1 else "")


def as_seconds(one: Cell) -> str:
    assert one.seconds is not None
    return f"{one.seconds:.1f}"


def as_cpu_seconds(one: Cell) -> str:
    assert one.cpu_seconds is not None
    return f"{one.cpu_seconds:.1f}"


def as_macs(one: Cell) -> str:
    assert one.macs is not None
    return f"{one.macs:.3f}"


def as_load(one: Cell) -> str:
    assert one.load is not None
    return f"{one.load:.1f}"


TABLES: dict[str, Callable[[Cell], str]] = {
    "": as_score,  # its title is the setting's
    "Seconds": as_seconds,
    "Processor seconds": as_cpu_seconds,
    "MACs actually kept": as_macs,
    "Load average of the machine at the start": as_load,
}


def against_aimet(book: Book, args: argparse.Namespace) -> list[str]:
    """How many times faster than AIMET's auto mode, budget by budget."""
    lines = []
    for budget in sorted(args.budgets, reverse=True):
        aimet = cell(book, "aimet", budget, args.seeds)
        if aimet is None or aimet.seconds is None or aimet.cpu_seconds is None:
            continue
        for name in ("one-pass", "sequential", "polish"):
            ours = cell(book, name, budget, args.seeds)
            if ours is not None and ours.seconds and ours.cpu_seconds:
                wall, cpu = aimet.seconds / ours.seconds, aimet.cpu_seconds / ours.cpu_seconds
                lines.append(
                    f"At {budget:g}, {METHODS[name].title}: "
                    f"AIMET takes {wall:.1f} x the time, {cpu:.1f} x the processor time"
                )
    return lines


def failures(book: Book, args: argparse.Namespace) -> list[str]:
    """One line for each method and reason, and one where the peers had other images than we."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for name in shown(book):
        for budget in sorted(args.budgets, reverse=True):
            one = cell(book, name, budget, args.seeds)
            if one is not None and one.failed:
                reasons.setdefault((METHODS[name].title, one.failed), []).append(f"{budget:g}")
    lines = [f"{title} at {', '.join(budgets)} failed: {reason}" for (title, reason), budgets in reasons.items()]
    first = args.seeds[0]
    hashes = {
        entry["images"]
        for name in METHODS
        for budget in args.budgets
        if name != "polish"  # it may have more
        if (entry := book.get(name, budget, first)) is not None and "images" in entry
    }
    return (
        lines
        if len(hashes) < 2
        else [
            *lines,
            "the peers' calibration images are not all the same as ours: asymswap holds some back to measure on",
        ]
    )


def remarks(book: Book, args: argparse.Namespace) -> list[str]:
    """What the entries say of themselves, one line for each method and note; what failed, and what was left out."""
    notes: dict[tuple[str, str], list[str]] = {}
    for name in shown(book):
        method = METHODS[name]
        for budget in sorted(args.budgets, reverse=True):
            entry = book.get(name, budget, args.seeds[0])
            if entry is not None and entry.get("note") and not method.variant:
                notes.setdefault((method.title, entry["note"]), []).append(f"{budget:g}")
            one = cell(book, name, budget, args.seeds)
            if method.seeded and one is not None and one.seeds:
                notes.setdefault((method.title, f"{one.seeds} draw{'s' * (one.seeds > 1)} of images"), []).append(
                    f"{budget:g}"
                )
    lines = [f"{title} at {', '.join(budgets)}: {note}" for (title, note), budgets in notes.items()]
    return [*lines, *left_out(book, args), *failures(book, args)]


def left_out(book: Book, args: argparse.Namespace) -> list[str]:
    """What was not tried, one line for each method."""
    lines = []
    for name in shown(book):
        missing = [budget for budget in sorted(args.budgets, reverse=True) if not cell(book, name, budget, args.seeds)]
        if missing:
            lines.append(f"{METHODS[name].title} at {', '.join(f'{budget:g}' for budget in missing)}: not run")
    return lines


def print_tables(book: Book, args: argparse.Namespace) -> None:
    """Everything, for the terminal."""
    for title, show in TABLES.items():
        print(f"\n{title or book.data['setting']['quality']}, by MACs kept\n{table(*grid(book, args, show))}")
    print("", *against_aimet(book, args), *remarks(book, args), sep="\n")


def markdown(book: Book, args: argparse.Namespace) -> str:
    """The document."""
    setting, on = book.data["setting"], book.data["machine"]
    versions = {"asymswap": on["asymswap"], "torch": on["torch"], "torchvision": on["torchvision"]}
    threads: set[int] = set()
    for entry in book.data["entries"].values():
        versions |= entry.get("versions", {})
        if "threads" in entry:
            threads.add(entry["threads"])
    beside = args.markdown is not None and args.picture.parent == args.markdown.parent
    lines = [
        f"# {args.title}",
        "",
        *([f"![{setting['quality']} over the MACs kept]({args.picture.name})", ""] if beside else []),
        "<!-- Written by benchmarks/studies/accuracy_at_budget.py; change that, not this. -->",
        "",
        f"Network `{setting['network']}` ({setting['weights']}; {setting['macs'] / 1e6:.1f} MMACs), "
        f"{setting['original']:.2f} {setting['quality'].rpartition(' ')[2]} originally, on {setting['test']}. "
        "Calibration images: "
        f"{setting['calibration_images']} of the training part's {setting['train']}; with several draws of them, "
        "the tables have the mean and half of the range. Nothing was fine-tuned with labels.",
        "",
        f"Machine: {on['cores']} cores ({on['processor']}), {' or '.join(map(str, sorted(threads)))} threads, Python "
        f"{on['python']}, " + ", ".join(f"{name} {version}" for name, version in versions.items()) + ".",
        "",
        "All methods got the same weights and were measured on the same images. The peers ran once. "
        "AIMET needs labels: its evaluation callback got those of the calibration images, or the clean ones.",
    ]
    for title, show in TABLES.items():
        lines += ["", f"## {title or setting['quality']}", "", markdown_table(*grid(book, args, show), left=2)]
        if title == "Seconds":
            lines += [
                "",
                "Time of the method alone, at the load in the last table. Ours includes loading the model, decoding "
                "the images and measuring for the report; the peers have model and images in memory.",
                "",
                *(f"- {line}" for line in against_aimet(book, args)),
            ]
    lines += ["", "## Settings", "", *(f"- {line}" for line in remarks(book, args))]
    lines += [
        "- asymswap: recipe `3x3-only` with the same ratio for every conv (uniform ranks), else `half-macs` with the "
        "budget.",
        '- tensorly-torch: `FactorizedConv` with `implementation="factorized"` on the same convs, the same fraction '
        "of both channel ranks everywhere; the spatial modes keep full rank.",
        "- Torch-Pruning: global ranking; the one of four variants that agrees best with the original on the "
        "calibration images.",
        "- BN re-estimation: mean and variance of every batch norm from the calibration images in the compressed "
        "network.",
    ]
    return "\n".join(lines) + "\n"


def draw(book: Book, args: argparse.Namespace) -> str:
    """Draw the picture; returns what there is to say about it."""
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        return f"no picture {args.picture}: it needs matplotlib (pip install matplotlib)"
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    axes.set_prop_cycle(color=colormaps["tab20"].colors)  # more than the usual ten
    budgets = sorted(args.budgets)
    axes.axhline(book.data["setting"]["original"], color="black", linewidth=0.8, linestyle=":", label="original")
    for name in shown(book):
        cells = [cell(book, name, budget, args.seeds) for budget in budgets]
        points = [(one.macs, one.score) for one in cells if one is not None and one.score is not None]
        if points:
            ours = METHODS[name].run is not None
            style = {"marker": "o", "linewidth": 2} if ours else {"marker": "x", "linewidth": 1, "linestyle": "--"}
            axes.plot(*zip(*points, strict=True), label=METHODS[name].title, **style)
    axes.set_xlabel("MACs kept")
    axes.set_ylabel(book.data["setting"]["quality"])
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    args.picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.picture, dpi=150)
    return f"picture: {args.picture}"


def size_of(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split("x")))


def deviation_of(text: str) -> float:
    return float(Fraction(text))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="digits-resnet", help="a reference or a file")
    parser.add_argument("--arch", help="the network of a file that holds weights only")
    parser.add_argument("--data", default="digits", help="digits, or a folder with train and test")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.8, 0.7, 0.6, 0.5, 0.4, 0.3])
    parser.add_argument("--input", type=size_of, help="CxHxW, of a network of one's own")
    parser.add_argument("--normalize", help="how its images are prepared, as `asymswap convert --normalize`")
    parser.add_argument(
        "--noise", type=deviation_of, help="of a denoiser, as 25/255; DATA has PNG files in train, test"
    )
    parser.add_argument("--patch", type=int, default=64, help="side of the patches that a denoiser is calibrated on")
    parser.add_argument("--title", default="Accuracy over MACs kept", help="of the page")
    parser.add_argument("--calibration-images", type=int, default=512)
    parser.add_argument("--test-images", type=int, help="measure on so many of the test images only")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--polish-steps", type=int, default=500)
    parser.add_argument("--polish-minutes", type=float, help="instead of steps")
    parser.add_argument("--polish-images", type=int, default=5000)
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="NAME", help=f"of {', '.join(METHODS)}"
    )
    parser.add_argument("--peer-env", type=Path, default=Path("build/peers/env"))
    parser.add_argument("--balf", type=Path, help="a checkout of github.com/davidgonmar/BALF; else that peer fails")
    parser.add_argument("--peer-timeout", type=float, default=3600, help="seconds for one peer at one budget")
    parser.add_argument(
        "--reuse-scores",
        action="store_true",
        help="measure AIMET's accuracies of single layers once for all budgets (their time is counted)",
    )
    parser.add_argument("--out", type=Path, default=Path("build/accuracy_at_budget.json"))
    parser.add_argument("--markdown", type=Path, help="write the tables here, too")
    parser.add_argument("--picture", type=Path, default=Path("build/accuracy_at_budget.png"), help=".png or .svg")
    return parser.parse_args()


def main() -> None:
    args = parse()
    if args.balf is not None:
        os.environ["BALF"] = str(args.balf.resolve())
    bench = Bench(args)
    book = Book(args.out, bench.setting)
    run_all(bench, book)
    print_tables(book, args)
    if args.markdown is not None:
        args.markdown.parent.mkdir(parents=True, exist_ok=True)
        args.markdown.write_text(markdown(book, args), encoding="utf-8")
    print("", draw(book, args), sep="\n")


if __name__ == "__main__":
    try:
        main()
    except asymswap.AsymswapError as error:
        sys.exit(f"error: {error}")
