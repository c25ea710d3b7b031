"""What `asymswap doctor` prints is what is installed here."""

from __future__ import annotations

import json
from typing import Any

import torch

import asymswap


def test_it_tells_what_is_installed(run: Any) -> None:
    told = json.loads(run("doctor", "--json").out)
    assert told["torch"] == torch.__version__.partition("+")[0]
    assert told["asymswap"] == asymswap.__version__
    assert "torch" in told["runtimes"].split(", ")
    assert set(told) >= {"system", "processor", "GPUs", "recipes", "latency cache"}
    printed = run("doctor").out
    assert all(f"{name} " in printed for name in told)
