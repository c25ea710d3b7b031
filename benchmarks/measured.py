"""Shared by the benchmarks: run commands in their own processes, measure time and peak memory, make tables.

Nothing here imports torch unasked: what a process inherits from its parent would count as memory of its own.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ASYMSWAP = str(Path(sys.executable).with_name("asymswap"))
"""The command, as it is installed beside this interpreter."""


QUIET = 0.15
"""A run counts as undisturbed where other processes kept less than this many cores busy."""


@dataclass(frozen=True)
class Run:
    """One finished process: exit code, wall time, processor time, largest resident memory, and what it wrote.

    `others` is how many cores other processes kept busy meanwhile.
    """

    code: int
    seconds: float
    cpu_seconds: float
    peak_mb: float
    others: float
    out: str
    err: str


def run(command: Sequence[str], folder: Path | None = None, timeout: float | None = None, **environment: str) -> Run:
    """Run a command to its end, or kill it after `timeout` seconds, when its exit code is -9."""
    everything = {**os.environ, **environment}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        start, busy = time.perf_counter(), _busy_seconds()
        process = subprocess.Popen(
            command, cwd=folder, env=everything, stdin=subprocess.DEVNULL, stdout=out, stderr=err
        )
        deadline = None if timeout is None else start + timeout
        pid = 0
        while pid == 0:
            # Without a deadline this blocks; with one the end is seen some 20 ms late.
            pid, status, usage = os.wait4(process.pid, 0 if deadline is None else os.WNOHANG)
            if pid == 0:
                time.sleep(0.02)
                if deadline is not None and time.perf_counter() > deadline:
                    process.kill()
                    deadline = None
        seconds = time.perf_counter() - start
        cpu_seconds = usage.ru_utime + usage.ru_stime
        others = max(0.0, _busy_seconds() - busy - cpu_seconds) / seconds
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        err.seek(0)
        peak_mb = usage.ru_maxrss * 1024 / 1e6
        return Run(process.returncode, seconds, cpu_seconds, peak_mb, others, out.read(), err.read())


def run_well(command: Sequence[str], folder: Path | None = None, codes: Sequence[int] = (0,)) -> Run:
    """Run a command that must succeed, or end with one of other exit codes."""
    done = run(command, folder)
    if done.code not in codes:
        sys.exit(f"{' '.join(command)} ended with {done.code}:\n{done.err}")
    return done


def apart(work: Callable[[], Any], timeout: float) -> dict[str, Any]:
    """What `work` returns (a dict for JSON), done in a fork of this process, with the fork's peak memory.

    For many small pieces of work that need the same imports: these are done once, by this process, and count in every
    peak. It must not have run any of torch's parallel code. Where the fork fails, `failed` says how.
    """
    start, busy = time.perf_counter(), _busy_seconds()
    with tempfile.TemporaryFile("w+") as answer:
        pid = os.fork()
        if pid == 0:
            # The fork must never continue as its parent.
            code = 1
            try:
                answer.write(_told(work))
                answer.flush()
                code = 0
            finally:
                os._exit(code)
        done, status, usage = 0, 0, None
        while done == 0:
            done, status, usage = os.wait4(pid, os.WNOHANG)
            if done == 0:
                time.sleep(0.02)
                if time.perf_counter() > start + timeout:
                    os.kill(pid, signal.SIGKILL)
        assert usage is not None
        seconds = time.perf_counter() - start
        answer.seek(0)
        code = os.waitstatus_to_exitcode(status)
        found = json.loads(answer.read()) if code == 0 else {"failed": f"ended by {code} after {seconds:.0f} s"}
    others = max(0.0, _busy_seconds() - busy - usage.ru_utime - usage.ru_stime) / seconds
    return {**found, "peak_mb": round(usage.ru_maxrss * 1024 / 1e6), "others": round(others, 2)}


def _told(work: Callable[[], Any]) -> str:
    try:
        return json.dumps(work())
    except BaseException as error:
        return json.dumps({"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"})


def import_everything() -> None:
    """Import what every fork of this process needs; timm too, where it is installed."""
    # Threads that wait do so asleep, as in the command: see asymswap.cli.main.
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    for module in ("torch", "torchvision", "asymswap.api.convert"):
        importlib.import_module(module)
    if importlib.util.find_spec("timm") is not None:
        importlib.import_module("timm")


def interleaved(
    commands: dict[str, Sequence[str]], rounds: int, folder: Path | None = None, codes: Sequence[int] = (0,)
) -> dict[str, list[Run]]:
    """Run all commands in turn until each has `rounds` runs, after one round that only warms the disk's cache up.

    In turn, so that whatever else the machine does falls upon all of them alike. Runs that other processes disturbed
    are done again, up to ten times as many in all; if that is not enough, the least disturbed ones are taken.
    """
    runs: dict[str, list[Run]] = {name: [] for name in commands}
    for number in range(10 * rounds + 1):
        for name, command in commands.items():
            done = run_well(command, folder, codes)
            if number:
                runs[name].append(done)
        if all(sum(done.others < QUIET for done in each) >= rounds for each in runs.values()):
            break
    return {name: sorted(each, key=lambda done: max(done.others, QUIET))[:rounds] for name, each in runs.items()}


def summary(runs: Sequence[Run]) -> dict[str, float]:
    """Minimum and median wall time, and the largest peak memory."""
    seconds = [done.seconds for done in runs]
    return {
        "min_s": round(min(seconds), 3),
        "median_s": round(statistics.median(seconds), 3),
        "peak_mb": round(max(done.peak_mb for done in runs)),
        "others": round(max(done.others for done in runs), 2),
    }


def machine() -> dict[str, Any]:
    """What the figures depend on: cores, the processor, and versions."""
    names = ("asymswap", "torch", "torchvision")
    return {
        "cores": len(os.sched_getaffinity(0)),
        "processor": _processor(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in names},
    }


def machine_text() -> str:
    """`machine()` in one line."""
    return ", ".join(f"{name} {value}" for name, value in machine().items())


def state() -> str:
    """The measured commit and the processor, in one line: kept with each row of results that take several days."""
    root = Path(__file__).parents[1]
    described = run_well(["git", "describe", "--always", "--dirty", "--abbrev=7"], root).out.strip()
    return f"{described} on {_processor()}"


def states(rows: Sequence[dict[str, Any]]) -> str:
    """The states that the rows were measured with, and the number of rows of each."""
    counted = Counter(row["state"] for row in rows)
    return "; ".join(f"{name}: {number} rows" for name, number in counted.most_common())


def disturbance(found: dict[str, dict[str, float]]) -> str:
    """A line that says whether the machine was quiet enough for the times to mean something."""
    most = max(each["others"] for each in found.values())
    verdict = "undisturbed" if most < QUIET else "DISTURBED: the times are too long"
    return f"other processes kept at most {most:.2f} cores busy: {verdict}"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A plain table: the first column to the left, the others to the right."""
    widths = [max(len(row[n]) for row in (columns, *rows)) for n in range(len(columns))]
    return "\n".join(_line(row, widths) for row in (columns, *rows))


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    first, *others = zip(row, widths, strict=True)
    return "  ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]).rstrip()


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A table in Markdown; the first `left` columns are left-aligned."""
    rule = ["---"] * left + ["---:"] * (len(columns) - left)
    return "\n".join(f"| {' | '.join(row)} |" for row in (columns, rule, *rows))


def read_json(path: Path, empty: dict[str, Any]) -> dict[str, Any]:
    """The content of a JSON file, or `empty` if there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else empty


def write_json(path: Path, value: Any) -> None:
    """Write JSON completely or not at all, and make its folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.part")
    draft.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    draft.replace(path)


def _busy_seconds() -> float:
    """Seconds that all cores together have been busy since the machine started."""
    user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
