"""Make the pictures of docs/guide/gallery.md: run its commands, and take a screenshot of the report.

    python benchmarks/gallery.py [--cifar FOLDER --resnet20 FILE]

Without images of CIFAR-10 and a checkpoint, the commands that name them are left out, and their pictures as they were.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "guide" / "gallery.md"
PICTURES = PAGE.parent / "gallery"
BUILD = PAGE.parents[2] / "build" / "gallery"
GIVEN = {"resnet20.pt": "resnet20", "cifar10": "cifar"}
"""Names in the commands for what a reader must bring, and the option for each."""


def commands(page: str) -> list[list[str]]:
    """The command lines of a page, in order, as lists of words."""
    return [shlex.split(line) for line in re.findall(r"^(asymswap .+)$", page, re.MULTILINE)]


def files(page: str) -> dict[str, str]:
    """The files in a page, by name: code blocks whose first line is a file name."""
    return dict(re.findall(r"^```toml\n# ([\w.-]+)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL))


def pictures(page: str) -> list[str]:
    """The names of the pictures that a page shows."""
    return re.findall(r"!\[[^\]]+\]\(gallery/([\w.-]+)\)", page)


def missing(words: list[str], options: argparse.Namespace) -> str | None:
    """What a command needs and was not given."""
    parts = {part for word in words for part in Path(word).parts}
    return next((name for name, option in GIVEN.items() if name in parts and not getattr(options, option)), None)


def photograph(page: Path, picture: Path) -> None:
    """The top of an HTML page as a PNG file."""
    from playwright.sync_api import sync_playwright

    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        shown = browser.new_page(viewport={"width": 1000, "height": 1040})
        shown.goto(page.as_uri())
        shown.screenshot(path=picture)
        browser.close()


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the pictures of docs/guide/gallery.md again.")
    parser.add_argument("--cifar", type=Path, help="folder with train and test, which hold class folders of images")
    parser.add_argument("--resnet20", type=Path, help="checkpoint of a ResNet-20 that was trained on them")
    options = parser.parse_args()
    for name, option in GIVEN.items():
        given = getattr(options, option)
        if given is not None and not given.exists():
            parser.error(f"--{option} {given}: there is no such file or folder; it is what the page calls {name}")

    shutil.rmtree(BUILD, ignore_errors=True)
    BUILD.mkdir(parents=True)
    page = PAGE.read_text(encoding="utf-8")
    for name, text in files(page).items():
        (BUILD / name).write_text(text, encoding="utf-8")
    for name, option in GIVEN.items():
        if getattr(options, option):
            (BUILD / name).symlink_to(getattr(options, option).resolve())
    here = {**os.environ, "PYTHONPATH": os.pathsep.join([str(PAGE.parents[2]), os.environ.get("PYTHONPATH", "")])}
    for words in commands(page):
        print("$", shlex.join(words), flush=True)
        lacking = missing(words, options)
        if lacking:
            print(f"left out: {lacking} must be given with --{GIVEN[lacking]}")
            continue
        subprocess.run([sys.executable, "-m", *words], cwd=BUILD, env=here, check=True)
    photograph(BUILD / "report.html", BUILD / "report.png")
    PICTURES.mkdir(exist_ok=True)
    made = [name for name in pictures(page) if (BUILD / name).exists()]
    for name in made:
        shutil.copyfile(BUILD / name, PICTURES / name)
    print(f"{len(made)} of {len(pictures(page))} pictures made: {', '.join(made)}")


if __name__ == "__main__":
    main()
