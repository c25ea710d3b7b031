"""What asymswap makes of thousands of damaged and hostile files: refusals in one line, and nothing else.

    python benchmarks/fuzz.py [--cases 3600] [--kinds recipe plan] [--seed 0] [--again]
        [--markdown docs/results/robustness.md]

Files of every kind are mutated (bytes, entries of archives, operations of pickles, values of JSON, words of TOML), made
up by hypothesis, or written by hand; see tests/helpers/hostile.py and hostile_made.py. Each is given to a command in a
worker process. Counted is how the command ended: accepted (the change did no harm, or is a sound file itself) or
refused; any other end, more than 10 s of processor time or 1 GiB of memory is a fault, exit code 1, and its files and
command are kept in build/fuzz. Time and memory of every case are written to build/fuzz/cases.jsonl. Kinds that the
JSON holds already, of the same seed and number of cases, are not run again without --again.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))

from hostile import BAD, VERDICTS, Case, Ending, Workers, made_up, mutated, sound_files, traps, verdict
from hostile_made import made_by_hand
from measured import machine, read_json, table, write_json
from robustness import write_page

MADE_UP, TRAPS = "made up by hypothesis", "traps"
BY_HAND = ("pickles by hand", "tensors by hand", "arrays by hand")
FAULTS = Path("build/fuzz")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=3600, help="mutations, shared out evenly among the kinds")
    parser.add_argument("--kinds", nargs="+", help="only these kinds of file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="200 mutations, every fifth file by hand: some minutes")
    parser.add_argument("--again", action="store_true", help="run kinds that the JSON holds already, too")
    parser.add_argument("--out", type=Path, default=Path("build/robustness.json"))
    parser.add_argument("--markdown", type=Path)
    wanted = parser.parse_args()
    files = sound_files()
    known = [*files, MADE_UP, TRAPS, *BY_HAND]
    unknown = set(wanted.kinds or ()) - set(known)
    if unknown:
        sys.exit(f"no kind {', '.join(unknown)}; known: {', '.join(known)}")
    wanted.cases = 200 if wanted.quick else wanted.cases
    each, step = -(-wanted.cases // (len(files) + 1)), 5 if wanted.quick else 1
    kinds = wanted.kinds or known
    by_hand = list(made_by_hand(files)) if {*kinds} & {*BY_HAND} else []
    found: dict[str, Any] = read_json(wanted.out, {})
    with Workers(wanted.workers) as workers:
        for kind in kinds:
            setting = {"seed": wanted.seed, "each": each, "step": step}
            done = found.setdefault("fuzz", {})
            if not wanted.again and done.get(kind, {}).get("setting") == setting:
                print(f"{kind}: known", flush=True)
                continue
            if kind == MADE_UP:
                cases = made_up(each, wanted.seed)
            elif kind in BY_HAND:
                cases = [case for case in by_hand if case.kind == kind][::step]
            else:
                cases = list(traps())[::step] if kind == TRAPS else list(mutated(files, kind, each, wanted.seed))
            done[kind] = {**run(kind, cases, workers), "setting": setting}
            found |= {"fuzz_seed": wanted.seed, "machine": machine()}
            write_json(wanted.out, found)
    rows = [[kind, *(str(row["verdicts"].get(name, 0)) for name in VERDICTS)] for kind, row in found["fuzz"].items()]
    print(table(["kind", *VERDICTS], rows))
    if wanted.markdown:
        write_page(wanted.markdown, found)
    if any(row["verdicts"].get(name) for row in found["fuzz"].values() for name in BAD):
        sys.exit(f"there are faults; see {FAULTS}")


def run(kind: str, cases: list[Case], workers: Workers) -> dict[str, Any]:
    """Run all cases of a kind; count how they ended, and keep those that ended as none may."""
    counts: Counter[str] = Counter()
    seconds, grown, start = 0.0, 0.0, time.perf_counter()
    FAULTS.mkdir(parents=True, exist_ok=True)
    with (FAULTS / "cases.jsonl").open("a", buffering=1, encoding="utf-8") as file:
        for case, ending in workers.run(cases):
            name = verdict(case, ending)
            counts[name] += 1
            seconds, grown = max(seconds, ending.seconds), max(grown, ending.grown_mb)
            row = {"kind": kind, "case": case.name, "command": case.arguments, "end": name}
            file.write(json.dumps({**row, "seconds": round(ending.seconds, 2), "mb": round(ending.grown_mb)}) + "\n")
            if name in BAD:
                keep(case, ending, name, counts.total())
            if counts.total() % 100 == 0:
                print(f"  {kind}: {counts.total()} of {len(cases)}, {time.perf_counter() - start:.0f} s", flush=True)
    print(f"{kind}: {len(cases)} in {time.perf_counter() - start:.0f} s: {dict(counts)}", flush=True)
    return {"cases": len(cases), "verdicts": dict(counts), "most_seconds": round(seconds, 2), "most_mb": round(grown)}


def keep(case: Case, ending: Ending, name: str, number: int) -> None:
    """Write a fault down, so that it can be looked into."""
    folder = FAULTS / f"{case.kind}-{number}".replace(" ", "_")
    folder.mkdir(parents=True, exist_ok=True)
    for path, content in case.files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    command = shlex.join(["asymswap", *case.arguments])
    told = f"{name}: {case.name}\n{command}\ncode {ending.code}\n{ending.err}\nleft {ending.left}, did {ending.deeds}\n"
    (folder / "fault.txt").write_text(told)
    print(f"  {name}: {folder}: {case.name}: {(ending.err.strip().splitlines() or [''])[-1][:200]}", flush=True)


if __name__ == "__main__":
    main()
