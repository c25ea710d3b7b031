"""What converting costs beside the least that any such program has to do.

    python benchmarks/convert_floor.py [--runs 5] [--out build/convert_floor.json]

`asymswap convert vgg16 --weights none --recipe 3x3-only` (138 M parameters, 553 MB in float32) beside its floor: import
torch and torchvision, build the same network with random weights, save its state dict. Each is a process of its own,
in turn. Targets, on 2 cores: 8 s over the floor, peak memory at most the floor's + 2 x the model.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from measured import ASYMSWAP, disturbance, interleaved, machine, machine_text, summary, table, write_json

MODEL_MB = 138_357_544 * 4 / 1e6
FLOOR = """
import torch, torchvision
torch.save(torchvision.models.vgg16(weights=None).state_dict(), "floor.pt")
"""
COMMANDS = {
    "floor: import, build, save": [sys.executable, "-c", FLOOR],
    "asymswap convert": [ASYMSWAP, "convert", "vgg16", "--weights", "none", "--recipe", "3x3-only", "--force"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("build/convert_floor.json"))
    wanted = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runs = interleaved(COMMANDS, wanted.runs, Path(folder))
    found = {name: summary(each) for name, each in runs.items()}
    floor, convert = found.values()
    over = {
        "seconds": round(convert["median_s"] - floor["median_s"], 3),
        "models": round((convert["peak_mb"] - floor["peak_mb"]) / MODEL_MB, 2),
    }
    rows = [[name, f"{f['min_s']:.2f}", f"{f['median_s']:.2f}", f"{f['peak_mb']:.0f}"] for name, f in found.items()]
    print(machine_text(), "", table(["vgg16", "min s", "median s", "peak MB"], rows), "", disturbance(found), sep="\n")
    print(f"over the floor: {over['seconds']:.2f} s (target 8), {over['models']:.2f} x the model (target 2)")
    print(next(line for line in runs["asymswap convert"][-1].out.splitlines() if line.startswith("Time:")))
    write_json(wanted.out, {"machine": machine(), "runs": wanted.runs, "commands": found, "over_floor": over})


if __name__ == "__main__":
    main()
