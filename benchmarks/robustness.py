"""docs/results/robustness.md, which benchmarks/fuzz.py, kill.py and mutate.py write together.

The first two share a file of results and write everything before the mark; mutate.py writes what follows it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from measured import markdown_table

BAD = ("traceback", "files left behind", "code executed", "crash", "hang", "more than 1 GiB")
MUTATION_MARK = "\n<!-- benchmarks/mutate.py -->\n"
GOOD = ("accepted", "refused", "refused, out of memory")

HEAD = """# Damaged files, hostile files, and killed processes

Written by `make fuzz` (`benchmarks/fuzz.py`), `make kill` (`benchmarks/kill.py`) and `make mutate`
(`benchmarks/mutate.py`). [SECURITY.md](../../SECURITY.md) says what is promised and what is not.
"""

FUZZ = """
## Files

A small valid file of every kind that asymswap reads is damaged: bytes (cut off, bits flipped, overwritten, moved,
wrong lengths), entries of archives (swapped, renamed, doubled, left out, compressed, false sizes and offsets),
operations of pickles (numbers, names and words replaced, operations left out, doubled and inserted, with a correct
checksum), values of JSON headers and plans, words of recipes. Hypothesis generates more files. Traps are written by
hand: pickles that would run code (in zip archives, in the old form, plain, and as the stored structure of a
checkpoint), and sizes that the file does not have. Other hand-written files are small but expensive to read: shared
structure walked repeatedly, keys with one hash, loops controlled by a number in the file, one text made into bytes
thousands of times, archives of zeros, tensors of unusual kinds as images, labels, names of classes and weights. A
worker process reads each by `convert`, `candidates`, `show`, `fuse`, `recipes`, `evaluate`, `finetune --resume` or
`sweep`.

Accepted: the command succeeded, because the change did not matter or made another valid file (`show` does not look at
the stored structure). Refused: exit code 1, one line on stderr, no output, no file. Faults, of which there must be
none: a traceback or an error that is not ours (traceback), a file left behind by a refused command (files), code of
the file that ran, detected by a file that every trap creates and by Python's audit events (executed), a worker that
died (crash), more than 10 s of processor time (hang), more than 1 GiB of memory (GiB). Memory: refused because 3 GB
were not enough. Seconds and MB: the most processor time and memory that a case took, on top of PyTorch's own.
"""

KILL = """
## Killed and disturbed commands

Killed with SIGKILL at random moments: `convert` of a ResNet-18 (half of the times while the output was written;
`.pt` and `.safetensors` alternating), `finetune`, and `sweep` of the digits network. Afterwards there is no output, or
it loads as a complete model. `finetune --resume` then writes the same bytes as an uninterrupted run, and the next
`sweep` has the same points. A killed process may leave a hidden folder `.NAME.XXXXXXXX.part` beside the output; the
next command that writes into that folder removes it.

The other parts: two commands that write one file at the same time; a closed output pipe (`| head -1`); no HOME, an
unwritable one, LANG=C and ASCII output; strange file names (spaces, a newline, a leading dash, 200 characters, not
UTF-8); folders of images with a strange one among them (cut off, empty, 16 bits, CMYK, a palette, animated, rotated,
1 x 1, 10,000 x 10,000); a folder of 20,000 images.

{table}

- Faults: {faults}.
- Machine: {machine}.
"""


def write_page(path: Path, found: dict[str, Any]) -> None:
    """Write the sections that there are results for; the others stay as they are."""
    new = {}
    if "fuzz" in found:
        new[FUZZ] = (
            f"{FUZZ}{_fuzz_totals(found)}{_fuzz_table(found['fuzz'])}\nMachine: {_in_words(found['machine'])}.\n"
        )
    if "kill" in found:
        rows = [
            [part, end, f"{count:,}", *(shown if number == 0 else ("", ""))]
            for part, row in found["kill"].items()
            for shown in [(f"{row['most_seconds'] or ''}", f"{row['most_mb'] or ''}")]
            for number, (end, count) in enumerate(row["ends"].items())
        ]
        faults = [f"{part}: {fault}" for part, row in found["kill"].items() for fault in row["faults"]]
        shown = markdown_table(["part", "end", "times", "seconds", "MB"], rows)
        machine = _in_words(found.get("kill_machine", found.get("machine", {})))
        new[KILL] = KILL.format(table=shown, faults="; ".join(faults) or "none", machine=machine)
    ours = page_without_mutation(path)
    mutation = path.read_text(encoding="utf-8").removeprefix(ours) if path.exists() else ""
    parts = re.split(r"(?m)^(?=## )", ours)[1:]
    old = {part.splitlines()[0]: "\n" + part.rstrip("\n") + "\n" for part in parts}
    sections = [new.get(text) or old.get(text.splitlines()[1], "") for text in (FUZZ, KILL)]
    path.write_text(HEAD + "".join(sections) + mutation, encoding="utf-8")


def page_without_mutation(path: Path) -> str:
    """The part of the page that fuzz.py and kill.py have written."""
    return path.read_text(encoding="utf-8").partition(MUTATION_MARK)[0] if path.exists() else ""


def _in_words(machine: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in machine.items())


def _fuzz_totals(found: dict[str, Any]) -> str:
    rows = found["fuzz"].values()
    total = sum(row["cases"] for row in rows)
    counts = {name: sum(row["verdicts"].get(name, 0) for row in rows) for name in (*GOOD, *BAD)}
    faults = ", ".join(f"{counts[name]} {name}" for name in BAD)
    return f"""
- {total:,} files: {counts["accepted"]:,} accepted, {counts["refused"]:,} refused, {counts["refused, out of memory"]:,}
  refused for lack of memory; faults: {faults} (seed {found["fuzz_seed"]}).
"""


def _fuzz_table(fuzz: dict[str, Any]) -> str:
    columns = [
        "kind",
        "files",
        "accepted",
        "refused",
        "memory",
        "traceback",
        "files",
        "executed",
        "crash",
        "hang",
        "GiB",
    ]
    rows = [
        [
            kind,
            f"{row['cases']:,}",
            *(f"{row['verdicts'].get(name, 0):,}" for name in (*GOOD, *BAD)),
            f"{row['most_seconds']:.1f}",
            f"{row['most_mb']:,}",
        ]
        for kind, row in fuzz.items()
    ]
    return "\n" + markdown_table([*columns, "seconds", "MB"], rows) + "\n"
