"""The page that benchmarks/fuzz.py, kill.py and mutate.py write together: docs/robustness.md.

The first two share a file of results and write everything before the mark; mutate.py writes what follows it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from measured import markdown_table

BAD = ("traceback", "files left behind", "code executed", "crash", "hang")
MUTATION_MARK = "\n<!-- benchmarks/mutate.py -->\n"
GOOD = ("accepted", "refused", "refused, out of memory")

HEAD = """# Damaged files, hostile files, and killed processes

Written by `make fuzz` (`benchmarks/fuzz.py`, `benchmarks/kill.py`) and `make mutate` (`benchmarks/mutate.py`). What is
promised, and what not, says [SECURITY.md](../SECURITY.md).
"""

FUZZ = """
## Files

A small sound file of every kind that asymswap reads is changed: bytes (cut, bits flipped, overwritten, moved, wrong
lengths), entries of archives (swapped, renamed, doubled, left out, compressed, false sizes and offsets), operations of
pickles (numbers, names and words replaced, operations left out, doubled and put in between, with a right checksum),
values of JSON headers and plans, words of recipes. More are made up by hypothesis, and traps are written by hand:
pickles that would run code, in zip archives, in the old form, plain, and as the stored structure of a checkpoint, and
claims of sizes that are not there. Each is read by `convert`, `candidates`, `show`, `fuse` or `recipes` in a worker
process.

Accepted: the command did its work, for what was changed did not matter or made another sound file (`show` looks at no
stored structure). Refused: exit code 1, one line on stderr, no output, no file. Faults, of which there must be none: a
traceback or an error that is not ours (traceback), a file that stays although the command was refused (files), code of
the file that ran, told by a file that every trap makes and by Python's audit events (executed), a worker that died
(crash), more than 10 s of processor time (hang). Memory: refused because 3 GB did not suffice. Seconds and MB: the most
processor time and memory that a case took.
"""

KILL = """
## Killed at random moments

`asymswap convert` of a ResNet-18 was killed (SIGKILL) {kills} times: half of the times anywhere between start and end,
half of them after the draft of the output had appeared, within the time that writing it took before; the output was a
`.pt` and a `.safetensors` file in turn. Afterwards it was absent, or loaded as a whole model.

{table}

- Faults: {faults}.
- Machine: {machine}.
- {drafts} of the processes left a draft, a hidden folder `.NAME.XXXXXXXX.part` beside the output. The next command that
  writes into that folder removes it, once nobody holds its lock; after the last kill a run that was let alone left its
  output and nothing else.
"""


def write_page(path: Path, found: dict[str, Any]) -> None:
    """Write the page from the results of both scripts, as far as there are any."""
    parts = [HEAD]
    if "fuzz" in found:
        parts += [_fuzz_totals(found), FUZZ, _fuzz_table(found["fuzz"])]
        parts.append(f"\nMachine: {_in_words(found['machine'])}.\n")
    if "kill" in found:
        kill = found["kill"]
        rows = [[name, str(count)] for name, count in kill["ends"].items()]
        shown = markdown_table(["killed", "times"], rows)
        parts.append(
            KILL.format(
                kills=kill["kills"],
                table=shown,
                faults="; ".join(kill["faults"]) or "none",
                drafts=kill["drafts_left"],
                machine=_in_words(kill.get("machine", found["machine"])),
            )
        )
    old = path.read_text(encoding="utf-8") if path.exists() else ""
    path.write_text("".join(parts) + old.removeprefix(page_without_mutation(path)), encoding="utf-8")


def page_without_mutation(path: Path) -> str:
    """What fuzz.py and kill.py have written of the page."""
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
  refused for want of memory; faults: {faults} (seed {found["fuzz_seed"]}).
"""


def _fuzz_table(fuzz: dict[str, Any]) -> str:
    columns = ["kind", "files", "accepted", "refused", "memory", "traceback", "files", "executed", "crash", "hang"]
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
