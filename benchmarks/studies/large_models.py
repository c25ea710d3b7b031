"""Converting large models within memory: time and peak of `asymswap convert`, per model and per kind of source.

    python benchmarks/studies/large_models.py [--models vgg19 …] [--sources "state dict" …] [--again]
                                      [--out build/large_models.json] [--markdown docs/results/large-models.md]

Every conversion is a process of its own. The target: its peak is at most that of a process which only imports what the
command imports, and 2.2 x the model's weights. Models and sources that are in the JSON already are skipped, unless
--again. With --threads, instead: whether solving several layers at a time beats one layer after the other.

The files to convert are made in --folder, each model's when its turn comes, and deleted after it: room for four times
the largest model's weights is needed there (regnet_y_128gf: 2.6 GB), and as much memory as that model takes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # for what it shares with the checks of a release

from measured import ASYMSWAP, QUIET, machine, machine_text, markdown_table, read_json, run, table, write_json

MODELS = (
    "regnet_y_128gf",
    "vit_h_14",
    "convnext_large",
    "vgg19",
    "vgg16",
    "wide_resnet101_2",
    "efficientnet_v2_l",
    "resnext101_64x4d",
    "densenet161",
)
TARGET = 2.2
THREADED = ("vgg16", "resnet50")

RECIPE = """\
summary = "Every spatial conv becomes a pair; all together keep half of their MACs"

[[rules]]
match = { kernel = { min = "2x2" }, in_channels = { min = 16 } }
swap = { kind = "separable" }

[budget]
macs = 0.5
over = "matched"
"""

SOURCES: dict[str, list[str]] = {
    "reference": ["{name}", "--weights", "none"],
    "state dict": ["state.pt", "--arch", "{name}"],
    "state dict, identified": ["state.pt"],
    "pickled module": ["module.pt"],
    "safetensors": ["state.safetensors", "--arch", "{name}"],
    "safetensors to safetensors": ["state.safetensors", "--arch", "{name}", "-o", "out.safetensors"],
    "asymswap checkpoint": ["half.asym.pt"],
}
"""Arguments of `asymswap convert` besides the recipe."""
LAST = "asymswap checkpoint"

IMPORTS = "import torch, torchvision, asymswap.api.convert, asymswap.cli.main, asymswap.reporting.convert"

COLUMNS = ["model", "source", "weights MB", "seconds", "loading", "solving", "peak MB", "x weights", "target"]


def prepare(name: str, folder: Path, earlier: bool) -> None:
    """Write the files of a model with random weights (seed 0); runs in a process of its own.

    With `earlier`, an asymswap checkpoint as well: every second swap of the plan, so that the others are left.
    """
    import safetensors.torch
    import torch
    from torchvision import models

    import asymswap

    (folder / "recipe.toml").write_text(RECIPE, encoding="utf-8")
    torch.manual_seed(0)
    model = models.get_model(name, weights=None).eval()
    state = model.state_dict()
    torch.save(state, folder / "state.pt")
    safetensors.torch.save_file(state, folder / "state.safetensors")
    torch.save(model, folder / "module.pt")
    facts = {
        "bytes": sum(tensor.nbytes for tensor in state.values()),
        "params": sum(parameter.numel() for parameter in model.parameters()),
    }
    del model, state
    if earlier:
        plan = asymswap.plan(asymswap.open_model(folder / "state.pt", arch=name), folder / "recipe.toml")
        some = [dataclasses.asdict(swap) for swap in plan.swaps[::2]]
        half = asymswap.convert(asymswap.open_model(folder / "state.pt", arch=name), plan={"swaps": some})
        asymswap.save(half, folder / "half.asym.pt")
    print(json.dumps(facts))


def measure(name: str, source: str, folder: Path) -> dict[str, Any]:
    """Time and peak memory of one conversion."""
    what = [word.format(name=name) for word in SOURCES[source]]
    done = run([ASYMSWAP, "convert", *what, "--recipe", "recipe.toml", "--force", "--json"], folder)
    row: dict[str, Any] = {
        "seconds": round(done.seconds, 2),
        "peak_mb": round(done.peak_mb),
        "others": round(done.others, 2),
        "said": done.err.strip()[-300:] if done.code else "",
    }
    if done.code == 0 and done.out.lstrip().startswith("{"):
        row["stages"] = json.loads(done.out)["seconds"]
    return row


def floor(folder: Path) -> dict[str, Any]:
    """Peak of a process that imports what the command imports, and ends: the largest of three."""
    runs = [run([sys.executable, "-c", IMPORTS], folder) for _ in range(3)]
    failed = next((done for done in runs if done.code), None)
    if failed is not None:
        sys.exit(f"the imports failed:\n{failed.err}")
    return {"peak_mb": round(max(done.peak_mb for done in runs)), "seconds": round(min(r.seconds for r in runs), 2)}


def survey(args: argparse.Namespace) -> dict[str, Any]:
    """Measure what is missing in the JSON, and write it after each row."""
    data = read_json(args.out, {"models": {}})
    data["machine"] = machine()
    args.folder.mkdir(parents=True, exist_ok=True)
    data["floor"] = floor(args.folder)
    for name in args.models:
        found = data["models"].setdefault(name, {"rows": {}})
        todo = [source for source in args.sources if args.again or source not in found["rows"]]
        if not todo:
            continue
        folder = args.folder / name
        folder.mkdir(exist_ok=True)
        try:
            made = run(
                [sys.executable, __file__, "--prepare", name, "--folder", str(folder), *["--earlier"] * (LAST in todo)]
            )
            if made.code:
                sys.exit(f"{name} could not be prepared:\n{made.err}")
            found |= json.loads(made.out.splitlines()[-1])
            for source in todo:
                found["rows"][source] = measure(name, source, folder)
                write_json(args.out, data)
                print("  ".join(cells(name, source, data)), file=sys.stderr)
        finally:
            shutil.rmtree(folder)
    return data


def models_over(name: str, source: str, data: dict[str, Any]) -> float:
    """Peak memory above the floor, in multiples of the model's weights."""
    found = data["models"][name]
    return (found["rows"][source]["peak_mb"] - data["floor"]["peak_mb"]) * 1e6 / found["bytes"]


def cells(name: str, source: str, data: dict[str, Any]) -> list[str]:
    found = data["models"][name]
    row, over = found["rows"][source], models_over(name, source, data)
    stages = row.get("stages", {})
    return [
        name,
        source,
        f"{found['bytes'] / 1e6:.0f}",
        f"{row['seconds']:.1f}",
        f"{stages['load']:.1f}" if stages else "",
        f"{stages['plan'] + stages['convert']:.1f}" if stages else "",
        f"{row['peak_mb']}",
        f"{over:.2f}",
        "met" if over <= TARGET else "MISSED",
    ]


def every_row(data: dict[str, Any]) -> list[tuple[str, str]]:
    order = [*MODELS, *sorted(set(data["models"]) - set(MODELS))]
    return [
        (name, source) for name in order for source in SOURCES if source in data["models"].get(name, {}).get("rows", {})
    ]


def totals(data: dict[str, Any]) -> list[str]:
    """Summarise all rows."""
    rows = every_row(data)
    over = {row: models_over(*row, data) for row in rows}
    missed = [row for row in rows if over[row] > TARGET]
    lines = [
        f"The floor, a process that only imports: {data['floor']['peak_mb']} MB, {data['floor']['seconds']:.1f} s.",
        f"Peak at most the floor + {TARGET} x the weights: met by {len(rows) - len(missed)} of {len(rows)} conversions"
        + "".join(f"; {name} from {source}: {over[name, source]:.2f}" for name, source in missed)
        + ".",
    ]
    if rows:
        worst = max(rows, key=over.__getitem__)
        lines.append(f"Most: {over[worst]:.2f} x the weights ({worst[0]}, {worst[1]}).")
    for name in dict.fromkeys(name for name, _ in rows):
        said = {row["said"] for row in data["models"][name]["rows"].values()} - {""}
        lines += [f"{name} cannot be converted, and the command says why: `{one}`" for one in sorted(said)]
    if any(data["models"][name]["rows"][source]["others"] >= QUIET for name, source in rows):
        lines.append("Other programs were busy: the seconds are too long. Memory does not depend on that.")
    return lines


def threads_of(name: str, rounds: int) -> dict[str, Any]:
    """Seconds of planning and solving all layers of a network one by one and two at a time, alternating."""
    import torch

    from asymswap import replacements
    from asymswap.graph.trace import read_conv, trace
    from asymswap.models.opening import open_model
    from asymswap.types import Swap

    torch.manual_seed(0)
    model = open_model(name, weights="none").model
    kind = replacements.load("separable")
    settings = replacements.parse_settings("separable", {})
    sites = trace(model, (torch.empty(1, 3, 224, 224, device="meta"),)).sites
    sites = tuple(site for site in sites if kind.unsupported(site.conv) is None)

    def solve(site: Any) -> list[Any]:
        conv: Any = model.get_submodule(site.name)
        options = list(kind.options(site, replacements.Original(conv), settings))
        _, chosen = replacements.load_swap(Swap(site.name, "separable", options[len(options) // 2].settings))
        pair = kind.build(read_conv(conv), chosen)
        kind.init_(pair, replacements.Original(conv), chosen)
        return [[option.error for option in options], *(tensor.clone() for tensor in pair.state_dict().values())]

    cores = torch.get_num_threads()

    def one_by_one() -> list[Any]:
        return [solve(site) for site in sites]

    def at_a_time() -> list[Any]:
        with ThreadPoolExecutor(cores, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            done = list(pool.map(solve, sites))
        torch.set_num_threads(cores)
        return done

    ways: dict[str, Callable[[], list[Any]]] = {"one by one": one_by_one, f"{cores} at a time": at_a_time}
    results = {way: act() for way, act in ways.items()}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, act in ways.items():
            start = time.perf_counter()
            act()
            seconds[way].append(time.perf_counter() - start)
    one, other = results.values()
    equal = all(
        a == b if isinstance(a, list) else torch.equal(a, b)
        for left, right in zip(one, other, strict=True)
        for a, b in zip(left, right, strict=True)
    )
    return {
        "layers": len(sites),
        "min_s": {way: round(min(each), 3) for way, each in seconds.items()},
        "median_s": {way: round(statistics.median(each), 3) for way, each in seconds.items()},
        "equal_bits": equal,
    }


EXPLANATION = f"""\
Each model with random weights (seed 0), one conversion per process, on the input size of its published weights: every
conv with a kernel of more than one row and column and at least 16 inputs becomes a pair, and together they keep half of
their MACs. x weights: peak memory minus the floor, divided by the bytes of the model's state dict. Target: at most
{TARGET}. Seconds: the whole command; loading and solving (ranks and weights) are parts of it, as in the report.

Sources: a torchvision name with `--weights none`; its state dict by torch.save, with `--arch` and without; the whole
module by torch.save; a safetensors file; the result of an earlier conversion of half of the convs.

## How memory is kept low

- A file's weights are read once and used directly: the network is built on the meta device, then gets memory that is
  never written to, until the file's tensors replace it. No random weights are drawn only to be overwritten.
- Original and converted model share the weights that no swap touches, if asymswap built the original. A module that you
  pass to `asymswap.convert`, or that your own factory makes, is copied, and never changes with the converted one.
- Two layers are solved at once, each on one thread; one of over four million weights (a dense 3x3 conv of more than 683
  channels) alone. A layer's float64 copies are freed before the next one starts.
- Both forms of checkpoint are written without copying the tensors.
- Files are read, not mapped into memory. Mapping would save nothing, since all weights are read anyway (to look for
  NaN, for example), and would tie the process to a file that others may change: truncating a mapped file kills the
  process by a signal, overwriting it changes the weights. So the file may change as soon as it has been read.

What needs more: a training checkpoint is read as a whole, with the state of its optimizer (twice the weights for Adam);
your own network is built with random weights before a file's are copied into it; swaps that grow the model (acb,
offset) need room for what they add. In small models the feature maps dominate, not the weights: outputs are compared on
one image of the usual size at a time, or on as many small ones with the same number of pixels. A network that waits for
its weights gets unset memory from the system, not from malloc, which would keep feature maps in its heap afterwards,
with holes between them: densenet161 took up to 2.35 x its weights with two images and memory from malloc, 1.63 without.
"""


def markdown(data: dict[str, Any]) -> str:
    facts = ", ".join(f"{name} {value}" for name, value in data["machine"].items())
    left = 2
    return "\n".join(
        [
            "# Large models",
            "",
            "Written by `python benchmarks/studies/large_models.py --markdown docs/results/large-models.md`.",
            "",
            *(f"- {line}" for line in totals(data)),
            f"- Machine: {facts}.",
            "",
            markdown_table(COLUMNS, [cells(*row, data) for row in every_row(data)], left),
            "",
            EXPLANATION.rstrip(),
            *threads_text(data),
            "",
        ]
    )


def threads_text(data: dict[str, Any]) -> list[str]:
    """The section on several layers at a time."""
    if "threads" not in data:
        return []
    every = data["threads"].values()
    rows = [
        [name, f"{found['layers']}", way, f"{found['min_s'][way]:.2f}", f"{found['median_s'][way]:.2f}"]
        for name, found in data["threads"].items()
        for way in found["min_s"]
    ]
    busy = max(found["others"] for found in every)
    bits = "equal to the bit" if all(found["equal_bits"] for found in every) else "NOT equal to the bit"
    return [
        "",
        "## Several layers at a time",
        "",
        "Measured by `python benchmarks/studies/large_models.py --threads`: error curves of both orders and one pair,",
        "for each spatial conv of a network. One layer at a time with as many threads as there are cores, against as",
        f"many layers at a time with one thread each, alternating in one process. The results are {bits}. Other",
        f"programs kept {busy:.1f} cores busy meanwhile"
        + (", which favours the way with more threads of its own." if busy >= QUIET else "."),
        "",
        markdown_table(["network", "layers", "way", "min s", "median s"], rows, 1),
        "",
        "Two at a time hold twice the float64 matrices, eigenvectors and workspace of the eigensolver. For the",
        "3072 x 3072 matrices of wide_resnet101_2 these are more than half as much as all its weights, and two of them",
        "would miss the target: asymswap solves layers of over four million weights alone.",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--sources", nargs="+", default=list(SOURCES), choices=list(SOURCES), metavar="SOURCE")
    parser.add_argument("--again", action="store_true", help="also what is in the JSON already")
    parser.add_argument("--threads", action="store_true", help="compare ways to share layers among cores instead")
    parser.add_argument("--rounds", type=int, default=5, help="of --threads")
    parser.add_argument("--folder", type=Path, default=Path("build/large_models"), help="for the files to convert")
    parser.add_argument("--out", type=Path, default=Path("build/large_models.json"))
    parser.add_argument("--markdown", type=Path, help="write the table to this file as well")
    parser.add_argument("--prepare", help=argparse.SUPPRESS)
    parser.add_argument("--earlier", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--threads-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.prepare:
        prepare(args.prepare, args.folder, args.earlier)
        return
    if args.threads_of:
        print(json.dumps(threads_of(args.threads_of, args.rounds)))
        return
    if args.threads:
        data = read_json(args.out, {"models": {}})
        for name in THREADED:
            done = run([sys.executable, __file__, "--threads-of", name, "--rounds", f"{args.rounds}"])
            if done.code:
                sys.exit(f"{name} failed:\n{done.err}")
            found = json.loads(done.out.splitlines()[-1])
            data.setdefault("threads", {})[name] = {**found, "others": round(done.others, 2)}
            write_json(args.out, data)
        print("\n".join(threads_text(data)))
    else:
        data = survey(args)
        print(machine_text(), "", *totals(data), "", sep="\n")
        print(table(COLUMNS, [cells(*row, data) for row in every_row(data)]))
    if args.markdown:
        args.markdown.write_text(markdown(data), encoding="utf-8")


if __name__ == "__main__":
    main()
