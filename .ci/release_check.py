"""Builds wheel and sdist, installs the wheel where nothing else of this folder is, and runs README and tutorial.

    python .ci/release_check.py [--borrow] [--pages README.md tutorial.md] [--folder build/release]

Each command of these pages is typed into bash in a folder of its own, beside the files that a reader would have, and
what the tutorial shows must be what is printed, numbers aside. `--borrow` takes torch and all other packages from this
interpreter instead of installing them once more: the environment holds the wheel alone.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
HELPERS = ROOT / "tests" / "helpers"
EXTRAS = "onnx,plot"
_IS_INSTALLED = "import asymswap; assert asymswap.__file__.startswith({!r})"


@dataclass(frozen=True)
class Built:
    """The two files of a release."""

    wheel: Path
    sdist: Path


@dataclass(frozen=True)
class Ran:
    """A command of a page: how it ended, and how long it took."""

    place: str
    text: str
    seconds: float
    fault: str = ""


def build(folder: Path) -> Built:
    """Build wheel and sdist of this repository, and from the sdist the wheel once more, which must hold the same."""
    wheel, sdist = _hatch(ROOT, folder, "wheel"), _hatch(ROOT, folder, "sdist")
    with tempfile.TemporaryDirectory() as unpacked:
        with tarfile.open(sdist) as archive:
            archive.extractall(unpacked, filter="data")
        (source,) = Path(unpacked).iterdir()
        again = _hatch(source, Path(unpacked) / "again", "wheel")
        if members(again) != members(wheel):
            raise SystemExit(f"the wheel made from the sdist differs: {members(again) ^ members(wheel)}")
    return Built(wheel, sdist)


def members(wheel: Path) -> set[tuple[str, int]]:
    """Name and checksum of every file in a wheel but its own list of them, which has the order of making."""
    with zipfile.ZipFile(wheel) as archive:
        return {(entry.filename, entry.CRC) for entry in archive.infolist() if not entry.filename.endswith("RECORD")}


def install(wheel: Path, place: Path, borrow: bool) -> Path:
    """Make an environment that has the wheel, and return the folder of its programs."""
    shutil.rmtree(place, ignore_errors=True)
    if not borrow:
        _call([sys.executable, "-m", "venv", str(place)])
        _call([str(place / "bin" / "python"), "-m", "pip", "install", "--quiet", f"{wheel}[{EXTRAS}]"])
        return place / "bin"
    _call([sys.executable, "-m", "venv", "--without-pip", str(place)])
    (packages,) = place.glob("lib/python*/site-packages")
    # A folder named in a .pth file is searched last, and .pth files in it (of editable installs) are not followed.
    (packages / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    pip = [sys.executable, "-m", "pip", "--python", str(place / "bin" / "python"), "install", "--quiet"]
    _call([*pip, "--no-deps", "--no-index", "--ignore-installed", str(wheel)])
    return place / "bin"


def run_page(page: Path, programs: Path) -> Iterator[Ran]:
    """Type every example of a page that can run here, in turn, in one new folder."""
    sys.path.insert(0, str(HELPERS))
    from documented import SHELL, blocks, not_printed
    from prepared import yours

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _call([str(programs / "python"), str(HELPERS / "prepared.py"), page.name, name], cwd=folder)
        for block in blocks(page):
            if block.file is not None:
                (folder / block.file).write_text(block.text, encoding="utf-8")
            elif block.needs is not None:
                continue
            elif block.language == "python":
                command = [str(programs / "python"), "-c", yours(page.name) + block.text]
                yield _ran(str(block), "(Python)", command, folder, programs)[0]
            elif block.language in SHELL:
                for step in block.steps:
                    command = ["bash", "-euo", "pipefail", "-c", step.text]
                    ran, output = _ran(str(block), step.text, command, folder, programs)
                    missing = [] if ran.fault else not_printed(step, output)
                    fault = f"not printed: {missing}" if missing else ran.fault
                    yield Ran(ran.place, ran.text, ran.seconds, fault)


def _ran(place: str, text: str, command: Sequence[str], folder: Path, programs: Path) -> tuple[Ran, str]:
    start = time.perf_counter()
    done = subprocess.run(
        command, cwd=folder, env=_environment(programs), capture_output=True, text=True, check=False, timeout=1800
    )
    fault = f"exit code {done.returncode}: {done.stderr.strip()[-500:]}" if done.returncode else ""
    return Ran(place, text, time.perf_counter() - start, fault), done.stdout + done.stderr


def _environment(programs: Path) -> dict[str, str]:
    """Nothing by which this folder could be found instead of what is installed."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "FORCE_COLOR")}
    return {**kept, "PATH": f"{programs}{os.pathsep}{kept['PATH']}", "COLUMNS": "100", "PYTHONNOUSERSITE": "1"}


def _hatch(source: Path, folder: Path, target: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    _call([sys.executable, "-m", "hatchling", "build", "--target", target, "--directory", str(folder)], cwd=source)
    (made,) = (path for path in folder.iterdir() if before.get(path) != path.stat().st_mtime_ns)
    return made


def _call(command: Sequence[str], cwd: Path | None = None) -> None:
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, env=kept, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


def main() -> None:
    """Build, install, run; exit code 1 where something does not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--borrow", action="store_true")
    parser.add_argument("--pages", nargs="+", default=["README.md", "docs/guide/tutorial.md"])
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "release")
    wanted = parser.parse_args()
    folder = wanted.folder.resolve()
    built = build(folder)
    for path in (built.wheel, built.sdist):
        print(f"{path.name}: {path.stat().st_size / 1e3:,.0f} kB", flush=True)
    programs = install(built.wheel, folder / "environment", wanted.borrow)
    _call([str(programs / "python"), "-c", _IS_INSTALLED.format(str(folder))], cwd=folder)
    faults = total = 0
    for name in wanted.pages:
        page = ROOT / name
        for ran in run_page(page, programs):
            print(f"{'FAILED' if ran.fault else 'ok':6} {ran.seconds:6.1f} s  {ran.place:16} {ran.text}", flush=True)
            total += 1
            if ran.fault:
                faults += 1
                print(f"       {ran.fault}", flush=True)
    print(f"{total - faults} of {total} examples of {' and '.join(wanted.pages)} run from the wheel")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
