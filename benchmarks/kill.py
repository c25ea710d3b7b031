"""`asymswap convert`, killed at random moments: the output is absent or whole, and nothing of a draft stays for long.

    python benchmarks/kill.py [--kills 100] [--seed 0] [--out build/robustness.json] [--markdown docs/robustness.md]

Half of the processes are killed (SIGKILL, which nothing can catch) at a moment anywhere between start and end, half
while the draft of the output is there, as far as can be foreseen. After each, the output must be absent, or load as
a whole model; at last one process is let run, and must write the output and leave nothing beside it.
"""

from __future__ import annotations

import argparse
import contextlib
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

CONVERT = ("resnet18", "--weights", "none", "--recipe", "3x3-only", "--macs", "0.9", "--input", "3x32x32")
NAMES = ("out.pt", "out.safetensors")
MOMENTS = ("anywhere", "while writing")


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
    results |= {"kill": {**found, "machine": machine()}}
    write_json(wanted.out, results)
    if wanted.markdown:
        write_page(wanted.markdown, results)
    if found["faults"]:
        sys.exit("\n".join(found["faults"]))


def measure(folder: Path, kills: int, seed: int, tell: Callable[[str], object] = lambda _: None) -> dict[str, Any]:
    """Kill so many processes; count what they left, and list what they must not have left.

    One that had ended before it was killed is no kill, and tells that they are faster than was thought.
    """
    rng = random.Random(seed)
    longest = dict(zip(MOMENTS, _undisturbed(folder, NAMES[0]), strict=True))
    (folder / NAMES[0]).unlink()
    ends: Counter[str] = Counter()
    drafts: set[str] = set()
    faults = []
    while ends.total() < kills:
        moment, name = MOMENTS[ends.total() // 2 % 2], NAMES[ends.total() % 2]
        output, wait = folder / name, rng.uniform(0, longest[moment])
        process = _start(folder, name)
        if moment == MOMENTS[1]:
            _until_draft(process, folder)
        start = time.perf_counter()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(wait)
        process.send_signal(signal.SIGKILL)
        killed = process.wait() == -signal.SIGKILL
        left = [path.name for path in folder.iterdir() if path.name.endswith(".part")]
        end = "output whole" if output.exists() else "output absent"
        if output.exists() and not _loads(output):
            end = "OUTPUT HALF"
            faults.append(f"{moment}, {wait:.3f} s: {name} does not load")
        strange = {path.name for path in folder.iterdir()} - {name, *left}
        if strange:
            faults.append(f"{moment}, {wait:.3f} s: left {strange}")
        output.unlink(missing_ok=True)
        if killed:
            drafts |= set(left)
            ends[f"{moment}: {end}"] += 1
            tell(f"{ends.total()}/{kills} {moment}, after {wait:.3f} s: {end}, drafts left: {left or 'none'}")
        else:
            longest[moment] = min(longest[moment], time.perf_counter() - start)
    for name in NAMES:
        _undisturbed(folder, name)
        (folder / name).unlink()
    rest = [path.name for path in folder.iterdir()]
    if rest:
        faults.append(f"a run that was not killed left {rest} beside its output")
    return {"kills": kills, "ends": dict(sorted(ends.items())), "drafts_left": len(drafts), "faults": faults}


def _start(folder: Path, name: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "asymswap", "convert", *CONVERT, "-o", name, "--quiet"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=folder, env=environment, stdin=subprocess.DEVNULL)


def _undisturbed(folder: Path, name: str) -> tuple[float, float]:
    """Seconds that a whole run takes, and that its draft is there."""
    start = time.perf_counter()
    process = _start(folder, name)
    _until_draft(process, folder)
    draft = time.perf_counter()
    while process.poll() is None and not (folder / name).exists():
        time.sleep(0.001)
    written = time.perf_counter()
    if process.wait() != 0 or not _loads(folder / name):
        sys.exit(f"a run that was not killed ended with {process.returncode}")
    return time.perf_counter() - start, written - draft


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
