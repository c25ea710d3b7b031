"""`asymswap convert`, killed at random moments: the output is absent or whole, and nothing of a draft stays for long.

    python benchmarks/kill.py [--kills 100] [--seed 0] [--out build/robustness.json] [--markdown docs/robustness.md]

Half of the processes are killed (SIGKILL, which nothing can catch) at a moment anywhere between start and end, half
within the time that writing takes after the draft has appeared. After each, the output must be absent, or load as a
whole model; at last one process is let run, and must write the output and leave nothing beside it.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from measured import machine, read_json, table, write_json
from robustness import write_page

CONVERT = ("resnet18", "--weights", "none", "--recipe", "all-spatial", "--set", "rank=4", "--input", "3x32x32")
NAMES = ("out.pt", "out.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("build/robustness.json"))
    parser.add_argument("--markdown", type=Path)
    wanted = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        found = measure(Path(name), wanted.kills, wanted.seed, print)
    print(table(["killed", "times"], [[key, str(value)] for key, value in found["ends"].items()]))
    results: dict[str, Any] = read_json(wanted.out, {})
    results |= {"kill": found, "machine": machine()}
    write_json(wanted.out, results)
    if wanted.markdown:
        write_page(wanted.markdown, results)
    if found["faults"]:
        sys.exit("\n".join(found["faults"]))


def measure(folder: Path, kills: int, seed: int, tell: Callable[[str], object] = lambda _: None) -> dict[str, Any]:
    """Kill so many processes; count what they left, and list what they must not have left."""
    rng = random.Random(seed)
    whole, written = _undisturbed(folder, NAMES[0])
    (folder / NAMES[0]).unlink()
    ends: Counter[str] = Counter()
    drafts, faults = 0, []
    for number in range(kills):
        name = NAMES[number % 2]
        output = folder / name
        process = _start(folder, name)
        if number % 4 < 2:
            moment, wait = "anywhere", rng.uniform(0, whole)
            _sleep(process, wait)
        else:
            moment, wait = "while writing", rng.uniform(0, written)
            _until_draft(process, folder)
            _sleep(process, wait)
        process.send_signal(signal.SIGKILL)
        code = process.wait()
        left = [path.name for path in folder.iterdir() if path.name.endswith(".part")]
        drafts += bool(left)
        if code != -signal.SIGKILL:
            end = "had ended before"
        elif output.exists():
            end = "output whole"
        else:
            end = "output absent"
        if output.exists() and not _loads(output):
            end, _ = "OUTPUT HALF", faults.append(f"kill {number} ({moment}, {wait:.3f} s): {name} does not load")
        strange = {path.name for path in folder.iterdir()} - {name, *left}
        if strange:
            faults.append(f"kill {number} ({moment}, {wait:.3f} s) left {strange}")
        ends[f"{moment}: {end}"] += 1
        tell(f"{number + 1}/{kills} {moment} after {wait:.3f} s: {end}, drafts left: {left or 'none'}")
        output.unlink(missing_ok=True)
    for name in NAMES:
        _undisturbed(folder, name)
        (folder / name).unlink()
    rest = [path.name for path in folder.iterdir()]
    if rest:
        faults.append(f"a run that was not killed left {rest} beside its output")
    return {"kills": kills, "ends": dict(sorted(ends.items())), "drafts_left": drafts, "faults": faults}


def _start(folder: Path, name: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "asymswap", "convert", *CONVERT, "-o", name, "--quiet"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=folder, env=environment, stdin=subprocess.DEVNULL)


def _undisturbed(folder: Path, name: str) -> tuple[float, float]:
    """Seconds that a whole run takes, and that it takes after its draft has appeared."""
    start = time.perf_counter()
    process = _start(folder, name)
    _until_draft(process, folder)
    draft = time.perf_counter()
    if process.wait() != 0 or not _loads(folder / name):
        sys.exit(f"a run that was not killed ended with {process.returncode}")
    end = time.perf_counter()
    return end - start, end - draft


def _sleep(process: subprocess.Popen[bytes], seconds: float) -> None:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return


def _until_draft(process: subprocess.Popen[bytes], folder: Path) -> None:
    old = set(folder.glob(".*.part"))
    while process.poll() is None and not set(folder.glob(".*.part")) - old:
        time.sleep(0.001)


def _loads(path: Path) -> bool:
    """Whether a file is a whole converted model."""
    import asymswap

    try:
        asymswap.load(path)
    except asymswap.AsymswapError:
        return False
    return True


if __name__ == "__main__":
    main()
