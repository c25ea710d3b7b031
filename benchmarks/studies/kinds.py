"""Every kind in a dozen networks: what it costs, what it preserves, whether it trains, and whether it fuses back.

    python benchmarks/studies/kinds.py [--models resnet18 …] [--kinds separable …] [--threads 2] [--again]
        [--out build/kinds.json] [--markdown docs/results/kind-costs.md]

One process per network tries each kind; rows in the JSON are not measured again, unless they failed. Weights are random
(seed 0); batch norms have the statistics of random images, so that outputs have a usual size. In the Markdown file only
the part after the marker is rewritten.

For each kind the same convs: kernels of 3x3 and larger with at least 8 input channels, grouped and depthwise ones too;
for `low-rank` 1x1 convs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # for what it shares with the checks of a release

from measured import QUIET, machine, machine_text, markdown_table, read_json, run, table, write_json

MATCH = 'match = { kernel = { min = "3x3" }, in_channels = { min = 8 }'
HALF = '\n[budget]\nmacs = 0.5\nover = "matched"\n'
# Without dilation: built without holes, the kernel of a conv of dilation 36 with 2048 channels would take 12 GB.
UNDILATED = ', dilation = "1x1"'
REPVGG = 'branches = ["1x1", "identity?"], bn = "branch", start = "share"'
DBB = 'branches = ["1x1", "1x1-kxk", "avg"], bn = "branch"'
RECIPES = {
    "separable": f'[[rules]]\n{MATCH} }}\nswap = {{ kind = "separable" }}\n{HALF}',
    "low-rank": '[[rules]]\nmatch = { kernel = "1x1", in_channels = { min = 8 } }\nswap = { kind = "low-rank" }\n'
    + HALF,
    "branches, repvgg": f'[[rules]]\n{MATCH} }}\nswap = {{ kind = "branches", {REPVGG} }}\n',
    "branches, dbb": f'[[rules]]\n{MATCH} }}\nswap = {{ kind = "branches", {DBB} }}\n',
    "acb, shared": f'[[rules]]\n{MATCH} }}\nswap = {{ kind = "acb", bn = "shared" }}\n',
    "acb, branch": f'[[rules]]\n{MATCH} }}\nswap = {{ kind = "acb", bn = "branch" }}\n',
    "cross": f'[[rules]]\n{MATCH} }}\nswap = {{ kind = "cross" }}\n',
    "offset": f'[[rules]]\n{MATCH}{UNDILATED} }}\nswap = {{ kind = "offset" }}\n',
    "weighted-offset": f'[[rules]]\n{MATCH}{UNDILATED} }}\nswap = {{ kind = "weighted-offset" }}\n',
    "predicted-offset": f'[[rules]]\n{MATCH} }}\nswap = {{ kind = "predicted-offset" }}\n',
    "predicted-offset, mask": f'[[rules]]\n{MATCH} }}\nswap = {{ kind = "predicted-offset", mask = true }}\n',
}
EXACT = [name for name in RECIPES if name not in ("separable", "low-rank", "cross")]


@dataclass(frozen=True)
class Network:
    """A network as it is measured: sides of its inputs in training and for latency, and arguments of its builder.

    Batch norms are settled, and outputs compared, on images of the side `probed`, or of that in training.
    """

    train: int = 64
    size: int = 224
    probed: int | None = None
    arguments: dict[str, Any] = field(default_factory=dict)


NETWORKS = {
    "resnet18": Network(),
    "resnet50": Network(),
    "vgg16_bn": Network(train=32),
    "densenet121": Network(),
    "googlenet": Network(),
    # Its auxiliary head takes no images below 299 pixels, its stem none below 75.
    "inception_v3": Network(train=96, arguments={"aux_logits": False}),
    "convnext_tiny": Network(),
    # Statistics of 64 x 64 pixels, 2 x 2 at its end, blow up the rounding errors of its last 25 blocks.
    "efficientnet_v2_s": Network(probed=224),
    "deeplabv3_resnet50": Network(),
    "cifar:resnet18": Network(train=32, size=32),
    "cifar:densenet121": Network(train=32, size=32),
    "cifar:se-resnet18": Network(train=32, size=32),
}
STEPS, BATCH, RATE, CLASSES = 20, 4, 0.001, 10
ROUNDS = 10
COLUMNS = [
    "kind",
    "network",
    "swapped",
    "parameters",
    "MACs",
    "latency",
    "at conversion",
    "largest",
    "loss",
    "no gradient",
    "after training",
    "fused",
]


class Bench:
    """One network with everything that its kinds are measured on."""

    def __init__(self, name: str) -> None:
        import torch

        from asymswap.models.opening import open_model

        self.network = NETWORKS[name]
        torch.manual_seed(0)
        size = (3, self.network.size, self.network.size)
        self.opened = open_model(name, weights="none", arguments=self.network.arguments, input_size=size)
        self.model = self.opened.model
        generator = torch.Generator().manual_seed(0)
        side = self.network.train
        self.images = torch.randn(BATCH, 3, side, side, generator=generator)
        self.labels = torch.randint(CLASSES, (BATCH,), generator=generator)
        probed = self.network.probed or side
        self.probe = torch.randn(2, 3, probed, probed, generator=generator)
        self._settle_norms_(torch.randn(8, 3, probed, probed, generator=generator))

    def _settle_norms_(self, images: Any) -> None:
        """Statistics of random images, and weights that are not all alike: else a batch norm would do nothing."""
        import torch
        from torch import nn

        norms = [module for module in self.model.modules() if isinstance(module, nn.BatchNorm2d)]
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.momentum = None
            nn.init.uniform_(norm.weight, 0.8, 1.2)
            nn.init.normal_(norm.bias, std=0.1)
        # The norms alone in train mode: with stochastic depth, they would see other features than in eval mode.
        self.model.eval()
        for norm in norms:
            norm.train()
        with torch.no_grad():
            self.model(images)
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        self.model.eval()

    def convert(self, kind: str) -> Any:
        """The conversion by a kind's recipe."""
        import asymswap

        size = (3, self.network.size, self.network.size)
        with tempfile.TemporaryDirectory() as folder:
            recipe = Path(folder) / "recipe.toml"
            recipe.write_text(RECIPES[kind], encoding="utf-8")
            return asymswap.convert(asymswap.open_model(self.model, input_size=size), recipe)

    def outputs(self, model: Any) -> list[Any]:
        """All outputs on the probe, in eval mode."""
        import torch

        from asymswap.utils.tensors import eval_mode, list_tensors

        with eval_mode(model), torch.no_grad():
            return list_tensors(model(self.probe))

    def train_(self, model: Any, new: Sequence[str]) -> dict[str, Any]:
        """Twenty steps on the same few images; `new` are the modules whose parameters must get gradients."""
        import torch

        from asymswap.utils.tensors import list_tensors

        fresh = {
            f"{name}.{key}": parameter
            for name in new
            for key, parameter in model.get_submodule(name).named_parameters()
        }
        reached = dict.fromkeys(fresh, 0.0)
        optimiser = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9)
        losses = []
        torch.manual_seed(0)
        model.train()
        for _ in range(STEPS):
            optimiser.zero_grad()
            loss = sum(self._loss(output) for output in list_tensors(model(self.images)))
            loss.backward()
            for key, parameter in fresh.items():
                if parameter.grad is not None:
                    reached[key] = max(reached[key], float(parameter.grad.abs().max()))
            optimiser.step()
            losses.append(float(loss.detach()))
        model.eval()
        return {
            "losses": losses,
            "new": len(fresh),
            "unreached": [key for key, most in reached.items() if not most > 0],
        }

    def _loss(self, output: Any) -> Any:
        """Cross-entropy of the first few classes, at every pixel where there are several."""
        from torch.nn import functional as F

        labels = self.labels if output.dim() == 2 else self.labels[:, None, None].expand(-1, *output.shape[2:])
        return F.cross_entropy(output, labels)

    def fuse(self, model: Any, plan: Any) -> tuple[Any, int]:
        """A copy with every swapped site as one conv again, or None; and how many sites can be."""
        from asymswap import replacements
        from asymswap.graph.surgery import swap
        from asymswap.graph.trace import read_conv

        fused = {}
        for entry in plan.swaps:
            kind, settings = replacements.load_swap(entry)
            conv = read_conv(self.model.get_submodule(entry.site))
            fused[entry.site] = kind.fuse(model.get_submodule(entry.site), conv, settings)
        count = sum(conv is not None for conv in fused.values())
        return (swap(model, fused) if count == len(fused) else None), count


def norm(tensors: Sequence[Any]) -> float:
    return sum(float(tensor.double().square().sum()) for tensor in tensors) ** 0.5


def difference(before: Sequence[Any], after: Sequence[Any]) -> dict[str, float]:
    """Norm of the difference over that of the larger of the two, and the largest single one."""
    gaps = [one.double() - other.double() for one, other in zip(before, after, strict=True)]
    whole = max(norm(before), norm(after))
    return {
        "relative": norm(gaps) / whole if whole else 0.0,
        "largest": max(float(gap.abs().max()) for gap in gaps),
    }


def measure(bench: Bench, kind: str) -> tuple[dict[str, Any], Any]:
    """The row of one kind without its latency, and the converted model."""
    import copy

    start = time.perf_counter()
    conversion = bench.convert(kind)
    report = conversion.report
    converted = time.perf_counter()
    trained = copy.deepcopy(conversion.model)
    at_start = bench.outputs(trained)
    training = bench.train_(trained, [row.site for row in report.swapped])
    at_end = bench.outputs(trained)
    fused, fusable = bench.fuse(trained, conversion.plan)
    row = {
        "swapped": len(report.swapped),
        "absorbed": sum(entry.absorbs is not None for entry in conversion.plan.swaps),
        "kept": sorted({row.reason for row in report.sites if row.action == "keep" and row.reason.startswith("rule")}),
        "params": report.after.params / report.before.params,
        "macs": report.after.macs / report.before.macs,
        "conversion": {"relative": report.output.relative, "largest": report.output.largest},
        "layer": max(row.output_error for row in report.swapped),
        "training": training,
        "moved": difference(at_start, at_end),
        "fusable": fusable,
        "fused": None if fused is None else difference(at_end, bench.outputs(fused)),
        "seconds": {"convert": round(converted - start, 1), "train": round(time.perf_counter() - converted, 1)},
    }
    return row, conversion.model


def measure_latency(bench: Bench, models: dict[str, Any]) -> dict[str, float]:
    """Milliseconds of each model, alternating, in channels_last, in which they stay afterwards."""
    import torch

    from asymswap.measure.latency import Turn, inputs_like, seconds_of, stopwatch, take_turns
    from asymswap.utils.tensors import eval_mode

    # Not copies: nine of a VGG-16 hold 5 GB as it is.
    models = {key: model.to(memory_format=torch.channels_last) for key, model in models.items()}
    inputs = inputs_like(bench.opened.example(), "channels-last")
    with eval_mode(*models.values()):
        turns = {key: Turn(stopwatch(partial(model, *inputs))) for key, model in models.items()}
        timed = take_turns(turns, rounds=ROUNDS)
    return {key: 1e3 * seconds_of(rounds).minimum for key, rounds in timed.items()}


def work(name: str, kinds: Sequence[str], threads: int) -> dict[str, Any]:
    """All requested kinds of one network; runs in a process of its own."""
    import torch

    torch.set_num_threads(threads)
    bench = Bench(name)
    rows: dict[str, Any] = {}
    models = {"original": bench.model}
    for kind in kinds:
        try:
            rows[kind], models[kind] = measure(bench, kind)
        except Exception as error:
            # The other kinds are measured all the same.
            rows[kind] = {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    start = time.perf_counter()
    timed = measure_latency(bench, models)
    for kind in models.keys() - {"original"}:
        rows[kind] |= {"ms": timed[kind], "original_ms": timed["original"]}
        rows[kind]["seconds"]["latency"] = round((time.perf_counter() - start) / len(models), 1)
    return rows


def survey(args: argparse.Namespace) -> dict[str, Any]:
    """Measure what is missing in the JSON, and write it after each network."""
    data = {**read_json(args.out, {"rows": {}}), "machine": machine()}
    for number, name in enumerate(args.models, start=1):
        rows = data["rows"].setdefault(name, {})
        lacking = [kind for kind in args.kinds if args.again or "ms" not in rows.get(kind, {})]
        if name in ("vgg16_bn", "convnext_tiny") and "low-rank" in lacking:
            lacking.remove("low-rank")  # they have no 1x1 convs
        if not lacking:
            continue
        command = [sys.executable, __file__, "--worker", name, "--threads", f"{args.threads}", "--kinds", *lacking]
        # Threads that wait do so asleep, as in the command: see asymswap.cli.main.
        done = run(command, timeout=args.timeout, OMP_WAIT_POLICY="PASSIVE")
        if done.code:
            last = (done.err.strip().splitlines() or ["no message"])[-1]
            reason = f"killed after {done.seconds:.0f} s" if done.code == -9 else last
            found = {kind: {"failed": reason} for kind in lacking}
        else:
            found = json.loads(done.out.splitlines()[-1])
        about = {"threads": args.threads, "others": round(done.others, 2), "peak_mb": round(done.peak_mb)}
        rows |= {kind: {**row, **about} for kind, row in found.items()}
        write_json(args.out, data)
        print(f"{number}/{len(args.models)} {name}: {done.seconds:.0f} s", file=sys.stderr)
        print(table(COLUMNS, [[kind, name, *cells(found[kind])] for kind in lacking]), file=sys.stderr)
    return data


def ordered(data: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    """All rows by kind, then by network: a kind's own behaviour is read off one block."""
    pairs = itertools.product(RECIPES, NETWORKS)
    return [(name, kind, data["rows"][name][kind]) for kind, name in pairs if kind in data["rows"].get(name, {})]


def cells(row: dict[str, Any]) -> list[str]:
    if "failed" in row:
        return [f"failed: {row['failed']}", *[""] * (len(COLUMNS) - 3)]
    losses, training = row["training"]["losses"], row["training"]
    return [
        f"{row['swapped']}",
        f"{row['params']:.2f}",
        f"{row['macs']:.2f}",
        f"{row['ms'] / row['original_ms']:.2f}" if "ms" in row else "",
        f"{row['conversion']['relative']:.0e}",
        f"{row['conversion']['largest']:.0e}",
        f"{losses[0]:.2f} -> {losses[-1]:.2f}",
        f"{len(training['unreached'])} of {training['new']}",
        f"{row['moved']['relative']:.2f}",
        "-" if row["fused"] is None else f"{row['fused']['relative']:.0e}",
    ]


def findings(data: dict[str, Any]) -> Iterator[str]:
    """Summarise the table in sentences."""
    every = ordered(data)
    done = [item for item in every if "failed" not in item[2]]
    yield f"{len(done)} of {len(every)} pairs of kind and network were converted, trained and timed."
    exact = [item for item in done if item[1] in EXACT]
    if exact:
        worst = max(exact, key=lambda item: item[2]["conversion"]["relative"])
        yield (
            f"Kinds that promise the function: greatest relative difference of a network's output at conversion "
            f"{worst[2]['conversion']['relative']:.1e} ({worst[1]} in {worst[0]})."
        )
    fused = [item for item in done if item[2]["fused"] is not None]
    if fused:
        worst = max(fused, key=lambda item: item[2]["fused"]["relative"])
        yield (
            f"Trained and fused back to one conv a site: greatest relative difference of the output "
            f"{worst[2]['fused']['relative']:.1e} ({worst[1]} in {worst[0]})."
        )
    yield from _oddities(done)
    disturbed = [item for item in done if item[2]["others"] >= QUIET]
    if disturbed:
        yield f"DISTURBED: other programs were busy while {len(disturbed)} of the rows were measured."


def _oddities(done: Sequence[tuple[str, str, dict[str, Any]]]) -> Iterator[str]:
    """List what went wrong, or say that nothing did."""
    before = len(done)
    odd = []
    for name, kind, row in done:
        training = row["training"]
        losses = training["losses"]
        first, last = losses[0], losses[-1]
        if training["unreached"]:
            odd.append(f"{kind} in {name}: {', '.join(training['unreached'][:3])} … never got a gradient.")
        if not last < first:
            odd.append(
                f"{kind} in {name}: the loss did not fall ({first:.2f} -> {last:.2f}, {min(losses):.2f} in between)."
            )
        if not row["moved"]["relative"] > 0:
            odd.append(f"{kind} in {name}: the outputs did not change.")
    yield from odd or [f"In all {before} the loss fell, every new parameter got a gradient, and the outputs changed."]


EXPLANATION = f"""\
Weights, images and labels are random (seed 0): this measures costs and whether everything works, not accuracy. Each
kind gets the same convs: 3x3 and larger with at least 8 input channels, grouped and depthwise ones too; `low-rank` the
1x1 convs with as many, of which vgg16_bn and convnext_tiny have none. A kind may refuse some (even kernels), and
dilated convs were excluded from the offset kinds. `separable` and `low-rank` keep half of the MACs of their convs,
`predicted-offset` has one offset group, `branches` are those of the recipes of that name; all other settings are
defaults.

- swapped: number of convs. Parameters, MACs: of the whole network, x the original's.
- latency: x the original's, one image of 224 x 224 (CIFAR networks: 32 x 32), channels_last, networks alternating, the
  minimum of {ROUNDS} rounds or of half a minute of them.
- at conversion, largest: difference of the network's outputs from the original's, relative (norm over norm) and the
  largest absolute difference, on two random images. Random kernels have no structure for `separable` or `cross` to
  keep.
- loss: before the first and the last of {STEPS} training steps (SGD, rate {RATE}, momentum 0.9, the same {BATCH} images
  in every step, {{sides}}); no gradient: parameters of the replacements that never got one.
- after training: difference of the outputs, in eval mode, from those at conversion, relative to the larger of the two;
  batch norms' statistics have changed as well.
- fused: relative difference of the trained network's outputs after fusing every replacement to one conv; `-` if the
  kind does not fuse once it is trained."""

MARKER = "<!-- What follows is written by benchmarks/studies/kinds.py; change that, not this. -->"


def sides(names: Sequence[str]) -> str:
    """At which sizes networks were trained."""
    by_side: dict[int, list[str]] = {}
    for name in names:
        by_side.setdefault(NETWORKS[name].train, []).append(name)
    usual = max(by_side, key=lambda side: len(by_side[side]))
    others = [f"{', '.join(some)} {side} x {side}" for side, some in sorted(by_side.items()) if side != usual]
    return f"{usual} x {usual}" + "".join(f"; {text}" for text in others)


def markdown(data: dict[str, Any]) -> str:
    """What follows the marker."""
    every = ordered(data)
    facts = ", ".join(f"{name} {value}" for name, value in data["machine"].items())
    explanation = EXPLANATION.format(sides=sides([name for name in NETWORKS if name in data["rows"]]))
    threads = sorted({row["threads"] for _, _, row in every})
    lines = [
        MARKER,
        "",
        *(f"- {line}" for line in findings(data)),
        f"- Machine: {facts}; {' or '.join(map(str, threads))} threads.",
        "",
        explanation,
        "",
        markdown_table(COLUMNS, [[kind, name, *cells(row)] for name, kind, row in every], left=2),
        "",
    ]
    return "\n".join(lines)


def page_head(path: Path) -> str:
    """The page up to the marker."""
    kept, marker, _ = path.read_text(encoding="utf-8").partition(MARKER) if path.exists() else ("", "", "")
    if not marker:
        sys.exit(f"error: {path} is no page with the line {MARKER!r}")
    return kept


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=NETWORKS, default=list(NETWORKS), metavar="MODEL")
    parser.add_argument("--kinds", nargs="+", choices=RECIPES, default=list(RECIPES), metavar="KIND")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--again", action="store_true", help="also what is in the JSON already")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds that one network may take")
    parser.add_argument("--out", type=Path, default=Path("build/kinds.json"))
    parser.add_argument("--markdown", type=Path, help="write the table into this page, after its marker")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = parse()
    if args.worker:
        print(json.dumps(work(args.worker, args.kinds, args.threads)))
        return
    head = "" if args.markdown is None else page_head(args.markdown)
    data = survey(args)
    print(
        machine_text(), "", table(COLUMNS, [[kind, name, *cells(row)] for name, kind, row in ordered(data)]), sep="\n"
    )
    print("", *findings(data), sep="\n")
    if args.markdown is not None:
        args.markdown.write_text(head + markdown(data), encoding="utf-8")


if __name__ == "__main__":
    main()
