"""A file of each of torchvision's classifiers, converted by the shortest command.

    python benchmarks/files.py [--models resnet18 vgg16] [--again] [--out benchmarks/results/files.json]
        [--folder build/files] [--markdown docs/reference/files.md]

For each classifier with random weights (seed 0): its state_dict by torch.save, and `torch.save(model)`. Of both,

    asymswap convert FILE.pt --recipe 3x3-only

in its own process. Another process, forked from one that has only done the imports, loads the result and compares it,
tensor by tensor and at the output, with a conversion of the module in memory, whose architecture is known. The files
are made in --folder and deleted after each model: that needs room for four times the largest model's weights
(regnet_y_128gf: 2.6 GB), and as much memory. Models in the JSON are skipped, unless --again, or they failed; the JSON
is kept in the repository.
"""

from __future__ import annotations

import argparse
import functools
import shutil
import sys
from pathlib import Path
from typing import Any

from measured import (
    ASYMSWAP,
    apart,
    import_everything,
    machine,
    machine_text,
    markdown_table,
    read_json,
    run,
    run_well,
    state,
    states,
    table,
    write_json,
)

RECIPE = "3x3-only"
TIMEOUT = 1800.0
KINDS = {"state dict": "state.pt", "pickled module": "module.pt"}
STRUCTURE = "skeleton:"
"""A checkpoint's reference of a pickled module: its stored structure, by the name of its class."""

COLUMNS = ["model", "file", "exit", "taken for", "swapped", "tensors", "output", "seconds", "peak MB"]


def prepare(name: str, folder: Path) -> dict[str, Any]:
    """Write both files of a model."""
    import torch
    from torchvision import models

    torch.manual_seed(0)
    model = models.get_model(name, weights=None)
    torch.save(model.state_dict(), folder / KINDS["state dict"])
    torch.save(model, folder / KINDS["pickled module"])
    return {}


def check(folder: Path) -> dict[str, Any]:
    """How each result in the folder differs from a conversion in memory."""
    import torch

    import asymswap
    from asymswap.checkpoint import read_checkpoint
    from asymswap.utils.inputs import probe

    # Our own file; a class needs no guess.
    original = torch.load(folder / KINDS["pickled module"], weights_only=False).eval()
    found, conversions = {}, {}
    with torch.no_grad():
        for kind, file in KINDS.items():
            path = folder / result(file)
            if not path.exists():
                continue
            header, model = read_checkpoint(path).header, asymswap.load(path)
            # A module does not know its input size: Inception would get other ranks at the usual size than at its own.
            size = (header.preprocessing.channels, *header.preprocessing.size)
            if size not in conversions:
                conversions[size] = asymswap.convert(asymswap.open_model(original, input_size=size), RECIPE).model
            args, state = conversions[size], model.state_dict()
            tensors = args.state_dict()
            inputs = probe(header.preprocessing, torch.float32, images=1, seed=1)
            found[kind] = {
                "taken_for": header.origin.reference,
                "class": f"{type(original).__module__}.{type(original).__qualname__}",
                "swapped": sum(len(plan.swaps) for plan in header.plans),
                "same_keys": list(state) == list(tensors),
                "tensors": max(gap(tensor, state[key]) for key, tensor in tensors.items() if key in state),
                "output": gap(args(*inputs), model(*inputs)),
            }
            del model, state
    return found


def gap(one: Any, other: Any) -> float:
    """The largest difference of two tensors, relative to the first's largest value."""
    if one.shape != other.shape:
        return float("inf")
    if not one.numel():
        return 0.0
    most = float((one.double() - other.double()).abs().max())
    return most / float(one.double().abs().max()) if most else 0.0


def result(file: str) -> str:
    """The command's default output name."""
    return f"{Path(file).stem}.asym.pt"


def measure(name: str, folder: Path) -> dict[str, Any]:
    """Both files of a model: made, converted, compared."""
    made = apart(functools.partial(prepare, name, folder), TIMEOUT)
    if "failed" in made:
        sys.exit(f"{name} could not be prepared: {made['failed']}")
    rows: dict[str, Any] = {}
    for kind, file in KINDS.items():
        done = run([ASYMSWAP, "convert", file, "--recipe", RECIPE], folder)
        rows[kind] = {
            "exit": done.code,
            "said": (done.err.strip().splitlines() or [""])[-1][:300],
            "seconds": round(done.seconds, 2),
            "peak_mb": round(done.peak_mb),
            "others": round(done.others, 2),
        }
    found = apart(functools.partial(check, folder), TIMEOUT)
    if "failed" in found:
        sys.exit(f"what was made of {name} could not be compared: {found['failed']}")
    return {kind: {**row, **found.get(kind, {})} for kind, row in rows.items()}


def good(name: str, row: dict[str, Any]) -> bool:
    """Whether a file was recognised, and its conversion equals that of the module in memory."""
    if row["exit"] or "taken_for" not in row:
        return False
    same = row["same_keys"] and row["tensors"] <= 1e-5 and row["output"] <= 1e-4
    return bool(same) and row["taken_for"] in (f"torchvision:{name}", f"{STRUCTURE}{row['class']}")


def survey(names: list[str], args: argparse.Namespace) -> dict[str, Any]:
    """Measure what is missing in the JSON, and write it after each model."""
    data = read_json(args.out, {"models": {}})
    data["machine"] = machine()
    measured_with = state()
    import_everything()
    for number, name in enumerate(names, start=1):
        rows = data["models"].get(name)
        if rows and not args.again and all(good(name, row) for row in rows.values()):
            continue
        folder = (args.folder / name).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        try:
            rows = measure(name, folder)
        finally:
            shutil.rmtree(folder)
        data["models"][name] = {kind: {**row, "state": measured_with} for kind, row in rows.items()}
        data["models"] = dict(sorted(data["models"].items()))
        write_json(args.out, data)
        for kind, row in data["models"][name].items():
            print(f"{number}/{len(names)}", "  ".join(cells(name, kind, row)), file=sys.stderr, flush=True)
    return data


def cells(name: str, kind: str, row: dict[str, Any]) -> list[str]:
    found = "taken_for" in row
    return [
        name,
        kind,
        f"{row['exit']}" + (f": {row['said']}" if row["exit"] else ""),
        taken_for(row["taken_for"]) if found else "",
        f"{row['swapped']}" if found else "",
        ("other keys" if not row["same_keys"] else f"{row['tensors']:.0e}" if row["tensors"] else "equal")
        if found
        else "",
        (f"{row['output']:.0e}" if row["output"] else "equal") if found else "",
        f"{row['seconds']:.1f}",
        f"{row['peak_mb']}",
    ]


def taken_for(reference: str) -> str:
    if reference.startswith(STRUCTURE):
        return f"its class, {reference.rpartition('.')[2]}"
    return reference.removeprefix("torchvision:")


def every_row(data: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    return [(name, kind, row) for name, rows in data["models"].items() for kind, row in rows.items()]


def totals(data: dict[str, Any]) -> list[str]:
    """Summarise all rows."""
    rows = every_row(data)
    if not rows:
        return []
    lines = []
    for kind in KINDS:
        names = [name for name, one, _ in rows if one == kind]
        failed = [name for name, one, row in rows if one == kind and not good(name, row)]
        line = f"`asymswap convert FILE.pt --recipe {RECIPE}` of a {kind}: {len(names) - len(failed)} of {len(names)}"
        line += " classifiers of torchvision recognised, converted, and loaded again"
        lines.append(line + (f"; failed: {', '.join(failed)}." if failed else "."))
    loaded = [(name, row) for name, _, row in rows if "taken_for" in row]
    for key, what in (("tensors", "every tensor"), ("output", "the output")):
        worst, row = max(loaded, key=lambda pair: pair[1][key])
        equal = sum(not row[key] for _, row in loaded)
        line = (
            f"Compared with a conversion of the module in memory, {what} is bit-identical in {equal} of {len(loaded)}"
        )
        lines.append(line + (f"; it differs by at most {row[key]:.1e} ({worst})." if row[key] else "."))
    none = sorted({name for name, row in loaded if not row["swapped"]})
    lines.append(
        f"{len(none)} classifiers have no conv that {RECIPE} matches: reported, exit code 0, written unchanged."
    )
    lines.append(f"Measured with {states([row for _, _, row in rows])}.")
    return lines


def markdown(data: dict[str, Any]) -> str:
    """The page: the totals, then a row for each file."""
    shown = markdown_table(COLUMNS, [cells(*row) for row in every_row(data)], left=4)
    facts = ", ".join(f"{name} {value}" for name, value in data["machine"].items())
    summary = "\n".join(f"- {line}" for line in totals(data))
    return f"""# Supported files

Written by `python benchmarks/files.py --markdown docs/reference/files.md`.

{summary}
- Machine: {facts}.

Every classifier of torchvision with random weights (seed 0), as a state_dict and as a `torch.save(model)`. A process
runs `asymswap convert FILE.pt --recipe {RECIPE}`, with no other flag. Another process loads the result and compares it
with a conversion of the module in memory, whose architecture is known. Tensors, output: the largest difference
relative to the largest value, of any tensor and of the output for one random image. Seconds and peak memory: of the
command.

{shown}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+")
    parser.add_argument("--again", action="store_true", help="measure again what is in the JSON")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/files.json"))
    parser.add_argument("--folder", type=Path, default=Path("build/files"))
    parser.add_argument("--markdown", type=Path, help="write this page as well")
    args = parser.parse_args()
    # In another process, to keep torch out of this one until the environment is set.
    code = "from torchvision import models; print(*models.list_models(models))"
    names = args.models or run_well([sys.executable, "-c", code]).out.split()
    data = survey(names, args)
    shown = table(COLUMNS, [cells(*row) for row in every_row(data)])
    print(machine_text(), "", *totals(data), "", shown, sep="\n")
    if args.markdown:
        args.markdown.write_text(markdown(data), encoding="utf-8")


if __name__ == "__main__":
    main()
