"""Kill and disturb commands, and give them strange names and strange images.

    python benchmarks/kill.py [--kills 30] [--parts convert finetune] [--again] [--markdown docs/results/robustness.md]

convert, finetune and sweep are killed (SIGKILL, which nothing can catch) at random moments; afterwards the output is
absent or whole, and where the command can go on, it comes to what an undisturbed run comes to. The other parts
disturb commands in other ways: two that write one file at once, a reader that goes away, no home, no locale, names
and images that nobody expects. Each part is written to the JSON as soon as it is done; parts that are there are not
run again without --again. Exit code 1 where there are faults.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))

from hostile import BAD, Case, Workers, verdict
from measured import machine, read_json, table, write_json
from robustness import write_page

RESNET18 = ("resnet18", "--weights", "none", "--input", "3x32x32")
CONVERT = ("convert", *RESNET18, "--recipe", "acnet", "-q")
SWEEP = ("sweep", "digits-resnet", "--recipe", "half-macs", "--evaluate", "digits", "--macs", "0.7,0.5,0.4,0.3", "-q")
TRAIN = (
    "--data",
    "digits",
    "--steps",
    "10",
    "--save-every",
    "1",
    "--batch-size",
    "64",
    "--workers",
    "0",
    "--device",
    "cpu",
    "-q",
)
FINETUNE = ("finetune", "c.pt", *TRAIN)

Tell = Callable[[str], object]
Found = dict[str, Any]
"""Results of a part: counts of how it ended, its faults, and the longest time and the most memory of one case."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30, help="of each command")
    parser.add_argument("--images", type=int, default=20_000, help="in the large folder")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2, help="commands that are killed at the same time")
    parser.add_argument("--quick", action="store_true", help="3 kills of each command and 500 images: some minutes")
    parser.add_argument("--again", action="store_true", help="run parts that the JSON holds already, too")
    parser.add_argument("--out", type=Path, default=Path("build/robustness.json"))
    parser.add_argument("--markdown", type=Path)
    args = parser.parse_args()
    if args.quick:
        args.kills, args.images = 3, 500
    results: Found = read_json(args.out, {})
    for name in args.parts:
        known = results.setdefault("kill", {})
        setting = {"seed": args.seed, "kills": args.kills, "images": args.images}
        if not args.again and known.get(name, {}).get("setting") == setting:
            print(f"{name}: known", flush=True)
            continue
        start = time.perf_counter()
        with tempfile.TemporaryDirectory(prefix="asymswap-kill-") as folder:
            found = PARTS[name](Path(folder), args, lambda line, name=name: print(f"{name} {line}", flush=True))
        seconds = round(time.perf_counter() - start)
        known[name] = {**found, "setting": setting, "took": seconds}
        results |= {"kill_machine": machine()}
        write_json(args.out, results)
        print(f"{name}: {seconds} s, {found['ends']}, {len(found['faults'])} faults", flush=True)
    rows = [[part, end, str(count)] for part, row in results["kill"].items() for end, count in row["ends"].items()]
    print(table(["part", "end", "times"], rows))
    if args.markdown:
        write_page(args.markdown, results)
    faults = [f"{part}: {fault}" for part, row in results["kill"].items() for fault in row["faults"]]
    if faults:
        sys.exit("\n".join(faults))


def result(ends: Counter[str], faults: list[str], seconds: float = 0.0, grown_mb: float = 0.0) -> Found:
    """The record of a part."""
    shown = dict(sorted(ends.items()))
    return {"ends": shown, "faults": faults, "most_seconds": round(seconds, 1), "most_mb": round(grown_mb)}


# ---- killed


def start(folder: Path, *arguments: str, **options: Any) -> subprocess.Popen[bytes]:
    """The command line in a process of its own."""
    environment = options.pop("env", os.environ) | {"OMP_NUM_THREADS": "1"}
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    command = [sys.executable, "-m", "asymswap", *arguments]
    return subprocess.Popen(command, cwd=folder, env=environment, **(quiet | options))


def undisturbed(folder: Path, *arguments: str, seen: str = "") -> tuple[float, float]:
    """Run to the end; the seconds that it took, and those from when the first file `seen` (a pattern) was there.

    Raises SystemExit if it fails.
    """
    begun = time.perf_counter()
    process = start(folder, *arguments)
    first = _wait_for(process, folder, seen) if seen else begun
    _, err = process.communicate()
    if process.returncode:
        sys.exit(f"asymswap {' '.join(arguments)} in {folder} ended with {process.returncode}: {err.decode()}")
    return time.perf_counter() - begun, time.perf_counter() - first


def _wait_for(process: subprocess.Popen[bytes], folder: Path, seen: str) -> float:
    """The time at which a file of this pattern appeared, or at which the process ended without one."""
    while process.poll() is None and not any(folder.glob(seen)):
        time.sleep(0.001)
    return time.perf_counter()


def kill_after(seconds: float, folder: Path, *arguments: str, seen: str = "") -> bool:
    """Start a command and kill it then, counted from when a file `seen` is there; whether it had not ended before."""
    process = start(folder, *arguments, stderr=subprocess.DEVNULL)
    if seen:
        _wait_for(process, folder, seen)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
    process.send_signal(signal.SIGKILL)
    return process.wait() == -signal.SIGKILL


def each_killed(folder: Path, args: Any, one: Callable[[Path, float], tuple[str, list[str]]], tell: Tell) -> Found:
    """Kill a command again and again, each time in a folder of its own, at a share of its time drawn at random."""
    rng = random.Random(args.seed)
    moments = [rng.random() for _ in range(args.kills)]
    ends: Counter[str] = Counter()
    faults: list[str] = []
    with ThreadPoolExecutor(args.workers) as pool:
        jobs = [pool.submit(one, folder / str(number), moment) for number, moment in enumerate(moments)]
        for number, (moment, job) in enumerate(zip(moments, jobs, strict=True), 1):
            end, wrong = job.result()
            ends[end] += 1
            faults += [f"after {moment:.0%}: {fault}" for fault in wrong]
            tell(f"{number}/{args.kills}: after {moment:.0%}: {end} {wrong or ''}")
    return result(ends, faults)


def killed_convert(folder: Path, args: Any, tell: Tell) -> Found:
    """Half of the kills are timed for while the output is written."""
    (folder / "first").mkdir()
    whole, writing = undisturbed(folder / "first", *CONVERT, "-o", "out.pt", seen=".*.part")

    def one(place: Path, moment: float) -> tuple[str, list[str]]:
        place.mkdir()
        number = int(place.name)
        name = ("out.pt", "out.safetensors")[number % 2]
        late = number // 2 % 2 == 1
        seconds, seen = (moment * writing, ".*.part") if late else (moment * whole, "")
        killed = kill_after(seconds, place, *CONVERT, "-o", name, seen=seen)
        output, wrong = place / name, []
        end = "complete output" if output.exists() else "no output"
        if output.exists() and not loads(output):
            wrong.append(f"{name} does not load")
        drafts = [path.name for path in place.iterdir() if path != output]
        wrong += [f"left {path}" for path in drafts if not path.endswith(".part")]
        end += ", a draft beside it" if drafts else ""
        output.unlink(missing_ok=True)
        if drafts:
            undisturbed(place, *CONVERT, "-o", name)
            wrong += [f"the next run left {path.name}" for path in place.iterdir() if path != output]
        shutil.rmtree(place)
        return end if killed else "ended before", wrong

    return each_killed(folder, args, one, tell)


def killed_finetune(folder: Path, args: Any, tell: Tell) -> Found:
    """--resume continues each, and must write the same bytes as the run that was not killed.

    Half of the kills come after a first saving: without that, most would meet the imports.
    """
    whole, saved = folder / "whole", "y.run/state.pt"
    _with_checkpoint(whole)
    time_whole, time_saving = undisturbed(whole, *FINETUNE, "-o", "y.pt", seen=saved)
    expected = (whole / "y.pt").read_bytes()

    def one(place: Path, moment: float) -> tuple[str, list[str]]:
        place.mkdir()
        shutil.copyfile(whole / "c.pt", place / "c.pt")
        late = int(place.name) % 2 == 1
        seconds, seen = (moment * time_saving, saved) if late else (moment * time_whole, "")
        killed = kill_after(seconds, place, *FINETUNE, "-o", "y.pt", seen=seen)
        begun, done = (place / "y.run" / "state.pt").exists(), (place / "y.pt").exists()
        wrong = ["y.pt is another"] * (done and (place / "y.pt").read_bytes() != expected)
        process = start(place, *FINETUNE, "-o", "y.pt", "--resume")
        err = process.communicate()[1].decode()
        if process.returncode:
            wrong.append(f"--resume ended with {process.returncode}: {err}")
        elif (place / "y.pt").read_bytes() != expected:
            wrong.append("what --resume wrote is not what an undisturbed run writes")
        left = {path.name for path in place.iterdir()} - {"c.pt", "y.pt", "y.run"}
        left |= {path.name for path in (place / "y.run").glob(".*")}
        wrong += [f"left {sorted(left)}"] * bool(left)
        shutil.rmtree(place)
        end = (
            "when it was done" if done else "between two steps, resumed" if begun else "before the first step was saved"
        )
        return end if killed else "ended before", wrong

    return each_killed(folder, args, one, tell)


def _with_checkpoint(folder: Path) -> None:
    import asymswap

    folder.mkdir()
    asymswap.save(asymswap.convert("digits-resnet", "3x3-only"), folder / "c.pt")


def killed_sweep(folder: Path, args: Any, tell: Tell) -> Found:
    """Each is started again, and must reach the same points as the sweep that was not killed.

    Half of the kills come after a first point.
    """
    whole = folder / "whole"
    whole.mkdir()
    time_whole, time_points = undisturbed(whole, *SWEEP, "-o", "s.json", seen="s.json")
    expected = _points(whole / "s.json")

    def one(place: Path, moment: float) -> tuple[str, list[str]]:
        place.mkdir()
        late = int(place.name) % 2 == 1
        seconds, seen = (moment * time_points, "s.json") if late else (moment * time_whole, "")
        killed, wrong = kill_after(seconds, place, *SWEEP, "-o", "s.json", seen=seen), []
        try:
            points = len(_points(place / "s.json")) if (place / "s.json").exists() else 0
        except (ValueError, KeyError) as error:
            points, wrong = 0, [f"half of a file: {error}"]
        process = start(place, *SWEEP, "-o", "s.json")
        err = process.communicate()[1].decode()
        if process.returncode:
            wrong.append(f"the next ended with {process.returncode}: {err}")
        elif _points(place / "s.json") != expected:
            wrong.append("the points are not those of an undisturbed sweep")
        left = {path.name for path in place.iterdir()} - {"s.json"}
        wrong += [f"left {sorted(left)}"] * bool(left)
        shutil.rmtree(place)
        end = f"after {points} of {len(expected)} points" if points else "before the first point"
        return end if killed else "ended before", wrong

    return each_killed(folder, args, one, tell)


def _points(path: Path) -> list[Any]:
    found = json.loads(path.read_text(encoding="utf-8"))["points"]
    return sorted(({**point, "seconds": None} for point in found), key=str)


def loads(path: Path) -> bool:
    """Whether a file is a complete converted model."""
    import asymswap

    try:
        asymswap.load(path)
    except asymswap.AsymswapError:
        return False
    return True


# ---- disturbed


def two_writers(folder: Path, args: Any, tell: Tell) -> Found:
    """Pairs of commands that write the same file at once: one of them writes it, and both report how they ended."""
    ends: Counter[str] = Counter()
    faults: list[str] = []
    for number in range(max(3, args.kills // 5)):
        place = folder / str(number)
        place.mkdir()
        name, options = (("x.pt", "--force"), ("x.safetensors", "--force"), ("x.pt", ""))[number % 3]
        command = ("convert", "digits-resnet", "--recipe", "3x3-only", "-q", "-o", name, *options.split())
        both = [start(place, *command), start(place, *command, "--set", "rank=2")]
        errors = [process.communicate()[1].decode() for process in both]
        codes = [process.returncode for process in both]
        if not loads(place / name):
            faults.append(f"{name} does not load after {codes}")
        if [path.name for path in place.iterdir()] != [name]:
            faults.append(f"left {sorted(path.name for path in place.iterdir())}")
        if codes.count(0) < 1 or any(code and not one_line(err) for code, err in zip(codes, errors, strict=True)):
            faults.append(f"ended with {codes}: {errors}")
        ends[f"{codes.count(0)} of 2 wrote{' over the other' if options else ''}, the file whole"] += 1
        tell(f"{number + 1}: {codes}")
    return result(ends, faults)


def one_line(err: str) -> bool:
    """Whether a command failed as it must."""
    return err.startswith("error: ") and err.count("\n") == 1 and "this is a bug" not in err


PRINTING = (
    ("candidates", "digits-resnet"),
    ("candidates", "digits-resnet", "--json"),
    ("convert", "digits-resnet", "--recipe", "3x3-only", "--dry-run"),
    ("recipes",),
    ("recipes", "--schema"),
    ("show", "c.pt"),
    ("show", "c.pt", "--plan"),
    ("compare", "digits-resnet", "c.pt", "--no-latency"),
    ("evaluate", "digits-resnet", "--data", "digits"),
    ("sweep", "digits-resnet", "--recipe", "half-macs", "--evaluate", "digits", "--macs", "0.5"),
    ("--help",),
    ("--version",),
)


def each_run(tries: Iterable[Any], one: Callable[[Any], tuple[str, str, bool]], args: Any, tell: Tell) -> Found:
    """Run commands, some at a time; each tells what was done, how it ended, and whether that is a fault."""
    ends: Counter[str] = Counter()
    faults: list[str] = []
    with ThreadPoolExecutor(args.workers) as pool:
        for said, end, wrong in pool.map(one, tries):
            ends[end] += 1
            faults += [said] * wrong
            tell(said)
    return result(ends, faults)


def closed_stdout(folder: Path, args: Any, tell: Tell) -> Found:
    """The output pipe is closed, before anything is printed or after the first line (`| head -1`)."""
    _with_checkpoint(folder / "x")

    def one(job: tuple[int, tuple[str, ...], int]) -> tuple[str, str, bool]:
        number, command, lines = job
        place = Path(shutil.copytree(folder / "x", folder / str(number)))
        process = start(place, *command, stdout=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stderr is not None
        for _ in range(lines):
            process.stdout.readline()
        process.stdout.close()
        err = process.stderr.read().decode()
        code = process.wait()
        noise = ("Traceback", "Exception ignored", "this is a bug")
        wrong = any(words in err for words in noise) or code not in (0, 1, -signal.SIGPIPE, 128 + signal.SIGPIPE)
        said = f"{' '.join(command)}, closed after {lines} lines: code {code}: {err[-300:]}"
        return said, "silent" if not err.strip() else "one line" if one_line(err) else "lines of progress", wrong

    jobs = [(command, lines) for command in PRINTING for lines in (0, 1)]
    return each_run(((number, *job) for number, job in enumerate(jobs)), one, args, tell)


ENVIRONMENTS = {
    "no HOME": {},
    "HOME that is not there": {"HOME": "/nowhere/at/all"},
    "HOME that cannot be written": {"HOME": "/proc", "XDG_CACHE_HOME": "/proc"},
    "an empty HOME": {"HOME": ""},
    "LANG=C": {"HOME": "/tmp", "LANG": "C", "LC_ALL": "C"},
    "ASCII alone": {"HOME": "/tmp", "LANG": "C", "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
    "PYTHONIOENCODING=ascii": {"HOME": "/tmp", "PYTHONIOENCODING": "ascii"},
    "no TMPDIR": {"HOME": "/tmp", "TMPDIR": "/nowhere/at/all"},
    "TERM=dumb": {"HOME": "/tmp", "TERM": "dumb"},
}
IN_EACH = (
    ("convert", "digits-resnet", "--recipe", "3x3-only", "-o", "größe.pt", "--report", "größe.html"),
    ("show", "c.pt"),
    ("candidates", "resnet18", "--weights", "none"),
    ("evaluate", "c.pt", "--data", "digits"),
    ("convert", "nowhere-é.pt", "--recipe", "3x3-only"),
)
"""Commands to run in each environment; the last must fail in one line, the others succeed."""


def environments(folder: Path, args: Any, tell: Tell) -> Found:
    """No home, a missing or unwritable one, the C locale, ASCII only."""
    _with_checkpoint(folder / "x")
    plain = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}

    def one(job: tuple[int, str, tuple[str, ...]]) -> tuple[str, str, bool]:
        number, name, command = job
        place = Path(shutil.copytree(folder / "x", folder / str(number)))
        process = start(place, *command, env={**plain, **ENVIRONMENTS[name]}, stdout=subprocess.PIPE)
        out, err = (stream.decode(errors="replace") for stream in process.communicate())
        fails = command == IN_EACH[-1]
        good = process.returncode == fails and (one_line(err) if fails else bool(out)) and "Traceback" not in err
        said = f"{name}: {' '.join(command)}: code {process.returncode}: {err[-400:]}"
        return said, f"{name}: {'as always' if good else 'otherwise'}", not good

    jobs = [(name, command) for name in ENVIRONMENTS for command in IN_EACH]
    return each_run(((number, *job) for number, job in enumerate(jobs)), one, args, tell)


# ---- strange names and images, in worker processes


def in_workers(cases: list[Case], args: Any, tell: Tell) -> Found:
    """Count how the cases ended, and collect the faults."""
    ends: Counter[str] = Counter()
    faults: list[str] = []
    seconds = grown = 0.0
    with Workers(args.workers) as workers:
        for case, ending in workers.run(cases):
            how = verdict(case, ending)
            ends[how] += 1
            seconds, grown = max(seconds, ending.seconds), max(grown, ending.grown_mb)
            if how in BAD:
                faults.append(f"{how}: {case.name}: {' '.join(case.arguments)[:300]}: {ending.err[-300:]}{ending.left}")
            tell(f"{ends.total()}/{len(cases)}: {case.name}: {how}, {ending.seconds:.1f} s, {ending.grown_mb:.0f} MB")
    return result(ends, faults, seconds, grown)


NAMES = {
    "spaces": "my best model .pt",
    "a newline": "one\ntwo.pt",
    "a leading dash": "-x.pt",
    "two leading dashes": "--recipe.pt",
    "200 characters": "x" * 197 + ".pt",
    "250 characters": "x" * 247 + ".pt",
    "wide characters": "模型ä💾.pt",
    "80 wide characters": "模" * 80 + ".pt",
    "markup": "[bold]x[/bold].pt",
    "a colon": "a:b@c.pt",
    "a glob": "*?[a].pt",
    "quotes": "'\"`$(touch sprung)`.pt",
    "percent and braces": "%s{0}{x!r}%n.pt",
    "a control code": "\x1b[2Jx.pt",
    "a tab and a return": "a\t\rb.pt",
    "a leading dot": ".x.pt",
    "a backslash": "a\\nb.pt",
    "no UTF-8": os.fsdecode(b"\xff\xfe.pt"),
    "right to left": "\u202egpj.pt",
}


def names(_: Path, args: Any, tell: Tell) -> Found:
    """Files of every name are read, written and reported; or refused in one line."""
    import asymswap

    with tempfile.TemporaryDirectory() as folder:
        asymswap.save(asymswap.convert("digits-resnet", "3x3-only"), Path(folder) / "c.pt")
        content = (Path(folder) / "c.pt").read_bytes()
    cases = []
    for what, name in NAMES.items():
        dashed = name if not name.startswith("-") else f"./{name}"
        for arguments, files in (
            (("convert", "digits-resnet", "--recipe", "3x3-only", "-o", dashed.removeprefix("./")), {}),
            (("convert", dashed, "--recipe", "all-spatial", "-o", "y.pt"), {name: content}),
            (("show", dashed), {name: content}),
            (("show", "--", name), {name: content}),
            (("show", "-q", "c.pt", "--report", f"./{name}.md"), {"c.pt": content}),
            (("fuse", dashed, "-o", "y.pt"), {name: content}),
            (("evaluate", dashed, "--data", "digits"), {name: content}),
            (("evaluate", "digits-resnet", "--data", f"{dashed}.npz"), {f"{name}.npz": b""}),
            (("convert", "digits-resnet", "--recipe", f"{dashed}.toml", "-o", "y.pt"), {f"{name}.toml": b"x"}),
        ):
            report = (f"{name}.md",) if "--report" in arguments else ()
            cases.append(Case("names", what, arguments, files, may_leave=tuple(map(_literal, report))))
    return in_workers(cases, args, tell)


def _literal(name: str) -> str:
    return "".join(f"[{char}]" if char in "*?[" else char for char in name)


def images(_: Path, args: Any, tell: Tell) -> Found:
    """Folders of classes with one strange image among others, for calibration and evaluation."""
    cases = []
    for what, (name, content) in strange_images().items():
        for arguments in (
            ("evaluate", "digits-resnet", "--data", "photos"),
            (
                "convert",
                "digits-resnet",
                "--recipe",
                "half-macs",
                "--calibrate",
                "photos",
                "--no-sequential",
                "-o",
                "y.pt",
            ),
        ):
            part = "test" if arguments[0] == "evaluate" else "train"
            files = {f"photos/{part}/{label}/{n}.png": _png(8, 8, n) for label in range(10) for n in range(2)}
            cases.append(Case("images", what, arguments, {**files, f"photos/{part}/3/{name}": content}))
    return in_workers(cases, args, tell)


def _png(width: int, height: int, seed: int = 0, **options: Any) -> bytes:
    return _image(width, height, "L", "PNG", seed, **options)


def _image(width: int, height: int, mode: str, form: str, seed: int = 0, **options: Any) -> bytes:
    from PIL import Image

    pixels = random.Random(seed).randbytes(64)
    image = Image.frombytes("L", (8, 8), pixels).resize((width, height)).convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def strange_images() -> dict[str, tuple[str, bytes]]:
    """Name and content of strange images, by what is strange about them."""
    from PIL import Image

    whole = _image(64, 64, "RGB", "JPEG")
    rotated = Image.Exif()
    rotated[0x0112] = 6
    frames = [Image.new("P", (9, 7), number) for number in range(5)]
    animated, animated_png = io.BytesIO(), io.BytesIO()
    frames[0].save(animated, "GIF", save_all=True, append_images=frames[1:])
    frames[0].convert("RGB").save(
        animated_png, "PNG", save_all=True, append_images=[f.convert("RGB") for f in frames[1:]]
    )
    wide = io.BytesIO()
    Image.frombytes("I;16", (8, 8), random.Random(0).randbytes(128)).save(wide, "PNG")
    return {
        "sound": ("x.png", _png(8, 8)),
        "truncated JPEG": ("x.jpg", whole[: len(whole) // 2]),
        "truncated PNG": ("x.png", _png(64, 64)[:-40]),
        "only a header": ("x.png", _png(64, 64)[:33]),
        "0 bytes": ("x.png", b""),
        "text": ("x.png", b"no image at all\n"),
        "a page": ("x.jpg", b"<html>404</html>"),
        "16 bits": ("x.png", wide.getvalue()),
        "32 bits": ("x.tif", _image(9, 9, "F", "TIFF")),
        "one bit": ("x.png", _image(9, 9, "1", "PNG")),
        "CMYK": ("x.jpg", _image(16, 16, "CMYK", "JPEG")),
        "a palette": ("x.png", _image(9, 9, "P", "PNG")),
        "a palette with a transparent colour": ("x.png", _image(9, 9, "P", "PNG", transparency=0)),
        "a palette with transparent bytes": ("x.png", _image(9, 9, "P", "PNG", transparency=bytes(9))),
        "an alpha channel": ("x.png", _image(9, 9, "RGBA", "PNG")),
        "grey with an alpha channel": ("x.png", _image(9, 9, "LA", "PNG")),
        "animated GIF": ("x.gif", animated.getvalue()),
        "animated PNG": ("x.png", animated_png.getvalue()),
        "rotated by EXIF": ("x.jpg", _image(16, 9, "RGB", "JPEG", exif=rotated)),
        "damaged EXIF": ("x.jpg", _image(16, 9, "RGB", "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff" + bytes(9))),
        "1 x 1": ("x.png", _png(1, 1)),
        "1 x 5000": ("x.png", _png(1, 5000)),
        "10,000 x 10,000": ("x.png", _png(10_000, 10_000)),
        "10,000 x 10,000 of one colour": ("x.png", _flat(10_000)),
        "30,000 x 30,000 of one colour": ("x.png", _flat(30_000)),
        "JPEG of 10,000 x 10,000": ("x.jpg", _image(10_000, 10_000, "RGB", "JPEG", quality=20)),
        "claims 2,000,000,000 x 2,000,000,000": ("x.png", _claiming(2_000_000_000)),
        "a name in other letters": ("画像.PNG", _png(8, 8)),
        "a hidden file": (".x.png", b"\0"),
        "a file of the system": ("Thumbs.db", b"\0" * 100),
    }


def _flat(size: int) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("1", (size, size)).save(buffer, "PNG")
    return buffer.getvalue()


def _claiming(size: int) -> bytes:
    import struct
    import zlib

    content = b"IHDR" + struct.pack(">IIBBBBB", size, size, 8, 2, 0, 0, 0)
    head = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + content + struct.pack(">I", zlib.crc32(content))
    return head + _png(8, 8)[33:]


def large_folder(folder: Path, args: Any, tell: Tell) -> Found:
    """Calibration on a few images of a folder that holds many, and evaluation on all of them."""
    for number in range(args.images):
        place = folder / "photos" / str(number % 10)
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number}.png").write_bytes(_png(8, 8, number % 97))
    recipe = ("--recipe", "half-macs", "--no-sequential", "-q")
    ends: Counter[str] = Counter()
    faults: list[str] = []
    longest, most = 0.0, 0.0
    for command in (
        ("convert", "digits-resnet", *recipe, "--calibrate", "photos", "--calibration-images", "64", "-o", "y.pt"),
        ("evaluate", "digits-resnet", "--data", "photos", "-q"),
    ):
        process = start(folder, *command)
        assert process.stderr is not None
        memory = _peak_mb(process)
        err = process.stderr.read().decode()
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = used.ru_utime + used.ru_stime
        longest, most = max(longest, seconds), max(most, memory)
        tell(f"{command[0]}: code {process.returncode}, {seconds:.1f} s, {memory:.0f} MB with PyTorch")
        ends[f"{command[0]}: code {process.returncode}"] += 1
        if process.returncode:
            faults.append(f"{command[0]}: {err[-300:]}")
    return result(ends, faults, longest, most)


def _peak_mb(process: subprocess.Popen[bytes]) -> float:
    """The most memory that a process has held by its end; `ru_maxrss` would count that of the parent before exec."""
    peak = 0.0
    status = Path(f"/proc/{process.pid}/status")
    while True:
        text = status.read_text()
        if "VmHWM" not in text:
            return peak
        peak = int(text.partition("VmHWM:")[2].split()[0]) / 1024
        time.sleep(0.02)


PARTS: dict[str, Callable[[Path, Any, Tell], Found]] = {
    "convert": killed_convert,
    "finetune": killed_finetune,
    "sweep": killed_sweep,
    "two writers": two_writers,
    "closed stdout": closed_stdout,
    "environments": environments,
    "names": names,
    "images": images,
    "a large folder": large_folder,
}


if __name__ == "__main__":
    main()
