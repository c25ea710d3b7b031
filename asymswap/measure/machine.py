"""The machine that measures: what it is, and how much others use it meanwhile."""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path
from typing import Any

import torch

_STAT = Path("/proc/stat")


def machine() -> dict[str, Any]:
    """Return what measured times depend on beside the work."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
        processor = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), processor)
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "waiting": os.environ.get("OMP_WAIT_POLICY", "ACTIVE"),
        "torch": torch.__version__,
        "system": platform.system(),
    }


class Bystanders:
    """Counts the cores that other programs keep busy from now on."""

    def __init__(self) -> None:
        self._start = self._now()

    def cores(self) -> float | None:
        """Return their average until now; None where the system does not report it."""
        if self._start is None:
            return None
        now = self._now()
        assert now is not None
        busy, own, passed = (after - before for after, before in zip(now, self._start, strict=True))
        return max(0.0, (busy - own) / passed) if passed > 0 else 0.0

    def _now(self) -> tuple[float, float, float] | None:
        """Return the busy seconds of all cores, those of this process, and the clock."""
        try:
            user, nice, system, _, _, irq, softirq, steal = map(int, _STAT.read_text().split()[1:9])
            busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
        except (OSError, ValueError):
            return None
        return busy, time.process_time(), time.perf_counter()
