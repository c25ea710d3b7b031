"""Change the code in many small ways and see whether the tests notice: mutation testing by mutmut.

    pip install mutmut
    python benchmarks/mutate.py [asymswap/factorize ...] [--tests tests/factorize ...] [--out build/mutants]
        [--sample 40] [--markdown docs/results/robustness.md]

Folders or files, and tests, are those of `[tool.mutmut]` in pyproject.toml where none are given. mutmut works on a copy
of the tracked files in the folder `--out` and goes on where a run before was cut off. The table counts what was run,
and says what was not.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

from measured import machine_text, markdown_table, state
from robustness import MUTATION_MARK, page_without_mutation

ROOT = Path(__file__).parent.parent
SURVIVED, NO_TESTS, INTERRUPTED = 0, (5, 33), 2
COLUMNS = ["file", "mutants", "noticed", "survived", "without a test", "not run", "score"]

TEXT = """
## Mutation testing

[mutmut](https://mutmut.readthedocs.io) changes one operator, number, argument or string at a time, and runs the tests
that reach the changed function:

```bash
# needs mutmut, and up to hours
{command}
```

Noticed: a test failed or timed out. The score is the share of the mutants that were run and noticed. Files that are
not in the table were not run.

{table}

State {state}; machine: {machine}.
"""


def copy_tracked(folder: Path) -> None:
    """Copy the tracked files of the repository; earlier results of mutmut stay."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in listed.splitlines():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target)


def narrow(project: Path, key: str, values: list[str]) -> None:
    """Replace values in `[tool.mutmut]` of the copy."""
    before, mark, after = project.read_text(encoding="utf-8").partition("[tool.mutmut]")
    changed = [f"{key} = {json.dumps(values)}" if line.startswith(f"{key} ") else line for line in after.split("\n")]
    project.write_text(before + mark + "\n".join(changed), encoding="utf-8")


def counts(folder: Path, folders: list[str]) -> dict[str, Counter[str]]:
    """For each file of the folders, the fates of its mutants."""
    found: dict[str, Counter[str]] = {}
    for meta in sorted((folder / "mutants").rglob("*.py.meta")):
        name = str(meta.relative_to(folder / "mutants")).removesuffix(".meta")
        codes = json.loads(meta.read_text(encoding="utf-8"))["exit_code_by_key"].values()
        if codes and any(name.startswith(part) for part in folders):
            found[name] = Counter(_fate(code) for code in codes)
    return found


def drawn(folder: Path, folders: list[str], most: int) -> list[str]:
    """Names of at most so many mutants of each file, always the same."""
    found: list[str] = []
    for meta in sorted((folder / "mutants").rglob("*.py.meta")):
        names = sorted(json.loads(meta.read_text(encoding="utf-8"))["exit_code_by_key"])
        if any(str(meta.relative_to(folder / "mutants")).startswith(part) for part in folders):
            found += random.Random(0).sample(names, min(most, len(names)))
    return found


def _fate(code: int | None) -> str:
    if code is None or code == INTERRUPTED:
        return "not run"
    if code == SURVIVED:
        return "survived"
    return "without a test" if code in NO_TESTS else "noticed"


def rows(found: dict[str, Counter[str]]) -> list[list[str]]:
    """A row for each file and one for all."""
    shown = []
    for name, fates in [*found.items(), ("all", sum(found.values(), Counter[str]()))]:
        run = fates.total() - fates["not run"]
        score = f"{100 * fates['noticed'] / run:.0f} %" if run else "-"
        shown.append([name, f"{fates.total()}", *(f"{fates[column]}" for column in COLUMNS[2:-1]), score])
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "folders",
        nargs="*",
        default=["asymswap/factorize", "asymswap/calibration", "asymswap/planning", "asymswap/measure"],
    )
    parser.add_argument("--tests", nargs="+", default=[])
    parser.add_argument("--out", type=Path, default=Path("build/mutants"))
    parser.add_argument("--markdown", type=Path)
    parser.add_argument(
        "--sample", type=int, help="run at most this many mutants of each file, drawn at random (seed 0)"
    )
    parser.add_argument("--count", action="store_true", help="run nothing, count what is there")
    args = parser.parse_args()
    if not args.count:
        copy_tracked(args.out)
        narrow(args.out / "pyproject.toml", "only_mutate", [f"{folder}*" for folder in args.folders])
        if args.tests:
            narrow(args.out / "pyproject.toml", "pytest_add_cli_args_test_selection", args.tests)
        mutmut = [sys.executable, "-m", "mutmut", "run"]
        if args.sample is None:
            subprocess.run(mutmut, cwd=args.out, check=True)
        else:
            # A name that no mutant has: the mutants are made, and none is run.
            subprocess.run([*mutmut, "none"], cwd=args.out, check=False)
            subprocess.run([*mutmut, *drawn(args.out, args.folders, args.sample)], cwd=args.out, check=True)
    found = counts(args.out, args.folders)
    table = markdown_table(COLUMNS, rows(found))
    print(table)
    if args.markdown is not None:
        tests = ["--tests", *args.tests] if args.tests else []
        tests += ["--sample", str(args.sample)] if args.sample else []
        command = " ".join(["python benchmarks/mutate.py", *args.folders, *tests])
        text = TEXT.format(command=command, table=table, state=state(), machine=machine_text())
        args.markdown.write_text(page_without_mutation(args.markdown) + MUTATION_MARK + text, encoding="utf-8")


if __name__ == "__main__":
    main()
