"""New processes that have torch loaded already: forks of a server that has imported it and computed nothing."""

from __future__ import annotations

import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch", "torchvision", "asymswap.cli.main", "asymswap.training.trainer"])

CLI = "from asymswap.cli.main import main\nmain()\n"
"""The code of `python -m asymswap`."""


class Forked:
    """A process that runs this code in a folder, with these arguments, on one thread."""

    def __init__(self, code: str, *arguments: object, cwd: Path, env: Mapping[str, str] | None = None) -> None:
        self.outputs = [tempfile.NamedTemporaryFile("r", suffix=".txt") for _ in range(2)]  # noqa: SIM115  # closed at the end
        argv = ["asymswap", *map(str, arguments)]
        names = [file.name for file in self.outputs]
        self.process = _CONTEXT.Process(target=_work, args=(code, argv, str(cwd), dict(env or {}), names))
        self.process.start()

    def end(self, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        """Wait for its end; how it ended, and what it printed."""
        self.process.join(timeout)
        out, err = (file.read() for file in self.outputs)
        for file in self.outputs:
            file.close()
        if self.process.exitcode is None:
            self.process.kill()
            raise TimeoutError(f"still running after {timeout} s: {err}")
        return subprocess.CompletedProcess(self.process.name, self.process.exitcode, out, err)


def forked(code: str, *arguments: object, cwd: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run this code in a new process, and wait for its end."""
    return Forked(code, *arguments, cwd=cwd, **options).end()


def team(code: str, *arguments: object, cwd: Path, size: int = 2) -> list[subprocess.CompletedProcess[str]]:
    """Run this code in several processes that find each other as `torchrun` would let them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]
    processes = [Forked(code, *arguments, cwd=cwd, env=env) for env in ranks]
    return [process.end() for process in processes]


def _work(code: str, argv: list[str], cwd: str, env: dict[str, str], outputs: Sequence[str]) -> None:
    import torch

    torch.set_num_threads(1)
    for number, name in enumerate(outputs, start=1):
        descriptor = os.open(name, os.O_WRONLY | os.O_APPEND)
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.chdir(cwd)
    os.environ.update(env)
    sys.argv, sys.path = argv, [cwd, *sys.path]
    exec(compile(code, "forked.py", "exec"), {"__name__": "__main__"})
