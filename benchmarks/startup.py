"""How long a person waits before anything happens: `--help`, `import asymswap`, and the first command that needs torch.

    python benchmarks/startup.py [--runs 10] [--out build/startup.json]

Each is a process of its own, in turn with the others, with the files in the disk's cache. Targets, on 2 cores: `--help`
within 0.25 s; `candidates resnet18` within 1.3 x the time of importing torch and torchvision.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from measured import ASYMSWAP, disturbance, interleaved, machine, machine_text, summary, table, write_json

HELP, IMPORT, TORCH = "asymswap --help", "import asymswap", "import torch, torchvision"
CANDIDATES = "asymswap candidates resnet18 --weights none"
COMMANDS = {
    "python -c pass": [sys.executable, "-c", "pass"],
    HELP: [ASYMSWAP, "--help"],
    IMPORT: [sys.executable, "-c", IMPORT],
    TORCH: [sys.executable, "-c", TORCH],
    CANDIDATES: [ASYMSWAP, *CANDIDATES.split()[1:]],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("build/startup.json"))
    wanted = parser.parse_args()
    found = {name: summary(runs) for name, runs in interleaved(COMMANDS, wanted.runs).items()}
    ratio = found[CANDIDATES]["median_s"] / found[TORCH]["median_s"]
    rows = [[name, f"{f['min_s']:.3f}", f"{f['median_s']:.3f}", f"{f['peak_mb']:.0f}"] for name, f in found.items()]
    print(
        machine_text(), "", table(["command", "min s", "median s", "peak MB"], rows), "", disturbance(found), sep="\n"
    )
    print(f"--help: {found[HELP]['median_s']:.3f} s (target 0.25)")
    print(f"candidates over importing torch and torchvision: {ratio:.2f} x (target 1.3)")
    write_json(wanted.out, {"machine": machine(), "runs": wanted.runs, "commands": found, "candidates_ratio": ratio})


if __name__ == "__main__":
    main()
