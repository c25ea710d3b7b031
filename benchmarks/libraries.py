"""Networks of other libraries, the whole way with the real package: one row for each file in benchmarks/library/.

    python benchmarks/libraries.py [NAME …] [--markdown docs/reference/libraries.md]

In a process and an empty folder of its own, each network is listed by `candidates`, converted by `half-macs` with
calibration, saved, loaded in a new process, trained for a step by the library's own loop and exported to ONNX. The
steps follow each other, and what is wrong in one is told in the table. Exits with 1 where a step fails that is not
known to fail.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from measured import machine_text, markdown_table, state

HERE = Path(__file__).parent
STEPS = ["candidates", "converted", "layer by layer", "loaded again", "trained", "ONNX"]
KNOWN = {
    ("torchvision", "ONNX"): "takes lists of images",
    ("ultralytics", "ONNX"): "its code fixes a size",
}
"""What cannot be done, by the words of the error that says so."""
TEXT = """\
# Networks of other libraries

Written by `benchmarks/libraries.py` (`make test-libraries`), with the real packages: each network goes the whole way
from the library to ONNX, with random weights. *Converted* is by `half-macs` to the share of its MACs that stands there,
calibrated on {images} random images, and how many convs were swapped. *Layer by layer*: each was solved on what the
converted network gives it. *Loaded again*: the largest difference of the outputs, relative to the largest one, in a new
process. *Trained*: a step by the library's own loop (its loss, optimizer or trainer; the files are in
benchmarks/library/), and how many tensors of the swapped layers have moved. *ONNX*: the largest difference between ONNX
Runtime and PyTorch.

{table}

{failures}

State: {state}. Machine: {machine}.
"""
IMAGES = 24
SHARES = (0.5, 0.6, 0.7, 0.8, 0.9)


def tensors(found: Any) -> Iterator[Any]:
    """Yield every tensor in nested outputs, in order."""
    import torch

    if isinstance(found, torch.Tensor):
        yield found
    elif isinstance(found, dict):
        for value in found.values():
            yield from tensors(value)
    elif isinstance(found, list | tuple):
        for value in found:
            yield from tensors(value)


def outputs(model: Any, x: Any) -> list[Any]:
    import torch

    with torch.no_grad():
        return [one.float() for one in tensors(model.eval()(x))]


def difference(first: list[Any], second: list[Any]) -> float:
    pairs = [(a, b) for a, b in zip(first, second, strict=True) if a.numel()]
    assert pairs
    return max(float((a - b).abs().max() / a.abs().max().clamp(min=1e-6)) for a, b in pairs)


def go(name: str) -> dict[str, Any]:
    """Take the network of a library the whole way, in this process and folder; return what each step gave."""
    import torch

    import asymswap

    torch.manual_seed(0)
    home = HERE / "library" / f"with_{name}.py"
    spec = importlib.util.spec_from_file_location("network", home)
    assert spec is not None
    assert spec.loader is not None
    own: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(own)
    network = own.build().eval()
    found: dict[str, Any] = {"network": own.NETWORK}
    reference, options = getattr(own, "REFERENCE", None), {}
    if reference is None:
        # As users have it: a class or a function in their code, and a file of weights.
        torch.save(network.state_dict(), "weights.pt")
        reference, options = "weights.pt", {"arch": f"{home}:build"}
    if name == "torchvision":
        torch.save(network.state_dict(), "weights.pt")
        reference, options = "weights.pt", {"arch": reference, "arguments": {"box_score_thresh": 0.0}}
    x = torch.rand(2, *own.INPUT)
    torch.save(x, "x.pt")
    opened = asymswap.open_model(reference, input_size=own.INPUT, **options)
    listed = asymswap.candidates(opened, progress=False)
    found["candidates"] = f"{sum(row.reason is None for row in listed.rows)} of {len(listed.rows)}"
    calibration = asymswap.Calibration(torch.rand(IMAGES, *own.INPUT))
    conversion: Any = None
    for share in SHARES:
        try:
            conversion = asymswap.convert(opened, "half-macs", macs=share, calibration=calibration, progress=False)
            break
        except asymswap.AsymswapError as error:
            reason = str(error)
    assert conversion is not None, reason
    report = conversion.report
    found["converted"] = f"{share:g}: {len(report.swapped)}"
    found["layer by layer"] = "yes" if report.calibration.sequential else "no"
    asymswap.save(conversion, "swapped.pt")
    fed = [*x] if name == "torchvision" else x
    want = outputs(conversion.model, fed)
    torch.save(want, "want.pt")
    command = [sys.executable, str(Path(__file__).resolve()), "--load", name, *options.get("arch", "").split()]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr.strip().splitlines()[-1]
    found["loaded again"] = f"{difference(want, torch.load('loaded.pt')):.0e}"
    for step, work in {"trained": lambda: train(own, conversion, x), "ONNX": lambda: to_onnx(conversion)}.items():
        try:
            found[step] = work()
        except Exception as error:
            known = KNOWN.get((name, step))
            found[step] = f"no: {known}" if known and known in str(error) else "failed"
            if found[step] == "failed":
                found["error"] = f"{step}: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return found


def train(own: Any, conversion: Any, x: Any) -> str:
    import torch

    sites = tuple(f"{row.site}." for row in conversion.report.swapped)
    after = copy.deepcopy(conversion.model).train()
    after = own.step(after if own.NETWORK != "yolov8n" else conversion, x) or after
    first, second = (dict(model.named_parameters()) for model in (conversion.model, after))
    names = [name for name in first if name.startswith(sites)]
    moved = sum(not torch.equal(first[name], second[name].cpu()) for name in names)
    assert moved, "no swapped layer has moved"
    return f"{moved} of {len(names)} tensors"


def to_onnx(conversion: Any) -> str:
    import asymswap

    report = asymswap.export(conversion, "swapped.onnx", progress=False)
    return f"{max(check.largest for check in report.checks):.0e}"


def load(name: str, arch: str | None) -> None:
    import torch

    import asymswap

    x = torch.load("x.pt")
    opened = asymswap.open_model("swapped.pt", arch=arch)
    torch.save(outputs(opened.model, [*x] if name == "torchvision" else x), "loaded.pt")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="files in benchmarks/library/; all by default")
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--go", help=argparse.SUPPRESS)
    parser.add_argument("--load", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.load:
        return load(args.load[0], args.load[1] if len(args.load) > 1 else None)
    if args.go:
        print(json.dumps(go(args.go)))
        return None
    rows = {name: apart(name) for name in args.names or sorted(map(stem, (HERE / "library").glob("with_*.py")))}
    for name, row in rows.items():
        print(name, row, flush=True)
    if args.markdown is not None:
        first = ["version", "network"]
        lines = [[name, *(row.get(column, "-") for column in first + STEPS)] for name, row in rows.items()]
        failures = [f"- {name}: {row['error']}" for name, row in rows.items() if "error" in row]
        text = TEXT.format(
            images=IMAGES,
            table=markdown_table(["library", "version", "network", *STEPS], lines, left=3),
            failures="\n".join(failures) or "Nothing failed that is not told in the table.",
            state=state(),
            machine=machine_text(),
        )
        args.markdown.write_text(text, encoding="utf-8")
    raise SystemExit(any("error" in row for row in rows.values()))


def stem(path: Path) -> str:
    return path.stem.removeprefix("with_")  # a file by the name of its package would stand in the package's way


def apart(name: str) -> dict[str, Any]:
    """Run one library in a process and a folder of its own."""
    try:
        version = importlib.metadata.version(name.replace("_", "-"))
    except importlib.metadata.PackageNotFoundError:
        return {"version": "-", "error": f"not installed; pip install {name.replace('_', '-')}"}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-W", "ignore", str(Path(__file__).resolve()), "--go", name]
        environment = {**os.environ, "YOLO_CONFIG_DIR": folder, "YOLO_VERBOSE": "false"}
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)
    try:
        return {"version": version, **json.loads(done.stdout.strip().splitlines()[-1])}
    except (ValueError, IndexError):
        said = [line for line in done.stderr.strip().splitlines() if line.strip()] or ["no reason given"]
        return {"version": version, "error": said[-1][:300]}


if __name__ == "__main__":
    main()
