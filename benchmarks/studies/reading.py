"""Seconds to read files of torchvision's classifiers, beside an earlier state of asymswap.

    git worktree add ../before COMMIT
    python benchmarks/studies/reading.py ../before [--models resnet18 vgg16] [--rounds 5] [--out build/reading.json]
        [--markdown docs/results/reading.md]

Each classifier with random weights (seed 0) is written as a state dict by torch.save, the same in torch's legacy form,
and as a pickled module. Two long-lived processes, one of each state, read each file alternately; the shortest time of
each counts. Models in the JSON are skipped.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # for what it shares with the checks of a release

from measured import machine_text, markdown_table, read_json, write_json

FORMS = ("state dict", "legacy", "module")

TEXT = """\
# Seconds to read a model file

Written by `python benchmarks/studies/reading.py ../before --markdown docs/results/reading.md`.

torchvision's {count} classifiers with random weights, each as a state dict by `torch.save`, as the same in torch's
legacy form, and as a pickled module. Two processes, one of each state of the code, read each file alternately; the
shortest of {rounds} times counts, one thread. The ratio is the time of this state over that of {before}, which used
torch's unpickler behind three checks of its own; this state has one reader of pickles.

| file | median ratio | largest | model |
| --- | ---: | ---: | --- |
{summary}

{table}

Machine: {machine}.
"""

READER = """
import sys, time
from pathlib import Path
import torch, torchvision
torch.set_num_threads(1)
try:
    from asymswap.fileformats.model_file import read_raw
except ImportError:
    from asymswap.sources.references import read_raw
for line in sys.stdin:
    start = time.perf_counter()
    value = read_raw(Path(line.rstrip("\\n")), False).value
    state = value.state_dict() if isinstance(value, torch.nn.Module) else value
    for tensor in state.values():
        # A number of each page: a file that is only mapped into memory has not been read yet.
        tensor.flatten()[::1024].sum()
    print(time.perf_counter() - start, flush=True)
"""


def reader(root: Path) -> subprocess.Popen[str]:
    """A process that reads the files named on its stdin, and prints the seconds."""
    command = [sys.executable, "-c", READER]
    environment = os.environ | {"PYTHONPATH": str(root)}
    # `python -c` looks into the current folder first.
    return subprocess.Popen(
        command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )


def seconds(process: subprocess.Popen[str], path: Path) -> float:
    assert process.stdin is not None
    assert process.stdout is not None
    print(path, file=process.stdin, flush=True)
    return float(process.stdout.readline())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="a checkout of the earlier state")
    parser.add_argument("--models", nargs="+")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("build/reading.json"))
    parser.add_argument("--markdown", type=Path, help="write this page as well")
    args = parser.parse_args()
    import torch
    from torchvision import models

    found: dict[str, Any] = read_json(args.out, {})
    states = [reader(args.before.resolve()), reader(Path(__file__).resolve().parents[2])]
    for name in args.models or models.list_models(models):
        if name in found:
            continue
        with tempfile.TemporaryDirectory() as folder:
            torch.manual_seed(0)
            model = models.get_model(name, weights=None)
            files = {form: Path(folder, f"{form}.pt") for form in FORMS}
            torch.save(model.state_dict(), files["state dict"])
            torch.save(model.state_dict(), files["legacy"], _use_new_zipfile_serialization=False)
            torch.save(model, files["module"])
            del model
            row = {}
            for form, path in files.items():
                times = [[seconds(state, path) for state in states] for _ in range(args.rounds)]
                row[form] = [min(column) for column in zip(*times, strict=True)]
        found[name] = row
        write_json(args.out, found)
        print(name, {form: round(new / old, 2) for form, (old, new) in row.items()}, flush=True)
    cells = [
        [name, *(f"{new / old:.2f} ({1000 * old:.0f} -> {1000 * new:.0f} ms)" for old, new in row.values())]
        for name, row in found.items()
    ]
    page = markdown_table(["model", *FORMS], cells)
    print(page)
    if args.markdown is None:
        return
    lines = []
    for form in FORMS:
        ratios = {name: row[form][1] / row[form][0] for name, row in found.items()}
        worst = max(ratios, key=lambda name: ratios[name])
        lines.append(f"| {form} | {statistics.median(ratios.values()):.2f} | {ratios[worst]:.2f} | {worst} |")
    before = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=args.before, text=True).strip()
    text = TEXT.format(
        count=len(found),
        rounds=args.rounds,
        before=before,
        summary="\n".join(lines),
        table=page,
        machine=machine_text(),
    )
    args.markdown.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
