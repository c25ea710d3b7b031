"""The examples of README.md, CONTRIBUTING.md and docs/: where they are, whether they are valid, how to run them.

The language and the first line of a fenced block say what it is:

- `bash`: commands; `console`: commands after `$ `, each followed by its output, in which numbers may differ;
- `python` runs in the page's folder, `toml` is a recipe or a part of one;
- `# NAME.toml` or `# NAME.py` as the first line: the block is that file, which exists when the next block runs;
- `# needs …` as the first line: the block is checked but not run, because a small machine without a network cannot.

The blocks of a page run in order, in one folder, with the files of `prepared.py`.
"""

from __future__ import annotations

import functools
import re
import shlex
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from asymswap import replacements
from asymswap.cli.commands import SUMMARIES, command
from asymswap.cli.main import app, fill_in
from asymswap.planning.recipe import Rule, parse_recipe

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
SHELL = ("bash", "console")
LANGUAGES = (*SHELL, "python", "toml", "text", "mermaid")

_FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
_NUMBER = re.compile(r"[-+]?\d[\d,]*(\.\d+)?(e[-+]?\d+)?")
# Options in the text that no command has: of all commands, of our benchmarks, of accelerate's launcher, and of the
# scripts of timm and torchvision.
_FURTHER = {
    *("--help", "--version", "--check", "--cpu", "--multi_gpu", "--num_processes"),
    *("--num-classes", "--input-size", "--crop-pct", "--grad-checkpointing", "--torchscript"),
    *("--head-init-scale", "--head-init-bias"),
    "--recipie",  # a mistake whose answer is timed
    *("--train-crop-size", "--val-resize-size", "--val-crop-size", "--norm-weight-decay"),
}


@dataclass(frozen=True)
class Step:
    """One line of a shell, its parts joined by `&&`, and the lines that it is said to print."""

    text: str
    shown: tuple[str, ...] = ()

    @property
    def commands(self) -> list[tuple[list[str], str | None]]:
        """Words of each command, and the file into which its output goes."""
        lexer = shlex.shlex(self.text, posix=True, punctuation_chars="&>|;")
        lexer.whitespace_split = True
        found: list[tuple[list[str], str | None]] = [([], None)]
        words = iter(lexer)
        for word in words:
            if word == "&&":
                found.append(([], None))
            elif word == ">":
                found[-1] = (found[-1][0], next(words))
            else:
                found[-1][0].append(word)
        return found


@dataclass(frozen=True)
class Block:
    """A fenced block: on which page and line it begins, its language, its text."""

    page: Path
    line: int
    language: str
    text: str

    @property
    def needs(self) -> str | None:
        """What it takes beyond a small machine without a network."""
        found = re.match(r"# needs (.+)\n", self.text)
        return found[1] if found else None

    @property
    def file(self) -> str | None:
        """The file that the block is."""
        found = re.match(r"# (\w[\w-]*\.(?:py|toml))\n", self.text)
        return found[1] if found else None

    @property
    def steps(self) -> list[Step]:
        """What is typed into a shell, line by line."""
        lines = self.text.replace("\\\n", " ").splitlines()
        if self.language == "bash":
            return [Step(line) for line in lines if line.strip() and not line.startswith("#")]
        steps: list[Step] = []
        for line in lines:
            if line.startswith("$ "):
                steps.append(Step(line[2:]))
            elif steps:
                steps[-1] = Step(steps[-1].text, (*steps[-1].shown, line))
        return steps

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """Every fenced block of a page."""
    text = page.read_text(encoding="utf-8")
    return [Block(page, text.count("\n", 0, found.start()) + 1, found[1], found[2]) for found in _FENCE.finditer(text)]


def inline_options(page: Path) -> Iterator[str]:
    """The options that a page's text names between backticks."""
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    for span in _INLINE.findall(text):
        yield from re.findall(r"(?<![\w-])--[a-z][a-z_-]*[a-z]", span)


@functools.cache
def known_options() -> frozenset[str]:
    """Every long option of every command."""
    every = (part for name in SUMMARIES for part in command(name).params)
    return frozenset(name for part in every for name in _names(part)) | _FURTHER


def check(block: Block) -> None:
    """Raise what is wrong with a block: an unknown language, command, option or file, or Python that is none."""
    if block.language not in LANGUAGES:
        raise ValueError(f"{block}: say what language it is: {', '.join(LANGUAGES)}")
    if block.language == "python":
        compile(block.text, str(block), "exec")
    elif block.language == "toml":
        _check_toml(block.text)
    elif block.language in SHELL:
        if not block.steps:
            raise ValueError(f"{block} has no command")
        for step in block.steps:
            for words, _ in step.commands:
                _check_command(words, block)


def shapes(lines: Sequence[str]) -> list[str]:
    """Lines of output with every number as `#` and every gap as one space; empty lines are left out."""
    plain = (" ".join(_NUMBER.sub("#", line).split()) for line in lines)
    return [line for line in plain if line]


def not_printed(step: Step, output: str) -> list[str]:
    """The lines that a step is said to print, and did not; `…` stands for any."""
    printed = set(shapes(output.splitlines()))
    return [line for line in shapes([line for line in step.shown if line.strip() != "…"]) if line not in printed]


def _names(part: Any) -> list[str]:
    return [name for name in (*part.opts, *part.secondary_opts) if name.startswith("--")]


def _check_command(words: list[str], block: Block) -> None:
    while words and re.fullmatch(r"[A-Z][A-Z0-9_]*=\S+", words[0]):
        words = words[1:]
    program, arguments = words[0], words[1:]
    if program == "asymswap":
        check_asymswap(arguments)
    elif block.needs is None:
        raise ValueError(f"{block}: {program} is not run by the tests; say what the block needs")
    elif program in ("torchrun", "python", "accelerate"):
        _check_launched(arguments, block)
    elif program == "make":
        _check_targets(arguments)
    elif program == "pip":
        _check_extras(arguments)
    elif program not in ("git", "cd", "python3", "yolo", ".venv/bin/pre-commit"):
        raise ValueError(f"{block}: unknown program {program}")


def check_asymswap(arguments: Sequence[str]) -> None:
    """Raise ValueError for a command line that asymswap would not take."""
    if arguments[0].startswith("-"):
        typer.main.get_command(app).make_context("asymswap", list(arguments), resilient_parsing=True)
        return
    name, rest = arguments[0], fill_in(list(arguments[1:]))
    if name not in SUMMARIES:
        raise ValueError(f"there is no command {name!r}; known: {', '.join(SUMMARIES)}")
    try:
        command(name).make_context(name, rest)
    except Exception as error:
        # Click's, whose class depends on Typer's version.
        raise ValueError(getattr(error, "format_message", error.__str__)()) from None


def _check_launched(arguments: list[str], block: Block) -> None:
    """`-m asymswap …`, or a script of the repository or of the page."""
    if "-m" in arguments:
        place = arguments.index("-m")
        if arguments[place + 1] == "asymswap":
            check_asymswap(arguments[place + 2 :])
        return
    script = next(word for word in arguments if word.endswith(".py"))
    if script in {other.file for other in blocks(block.page)}:
        return
    text = (ROOT / script).read_text(encoding="utf-8")
    for option in arguments[arguments.index(script) + 1 :]:
        if option.startswith("--") and f'"{option}"' not in text:
            raise ValueError(f"{block}: {script} knows no {option}")


def _check_targets(targets: list[str]) -> None:
    known = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for target in (each for each in targets if "=" not in each):
        if target not in known:
            raise ValueError(f"the Makefile has no {target!r}; it has {', '.join(known)}")


def _check_extras(arguments: list[str]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for wanted in re.findall(r"\[([\w,]+)\]", " ".join(arguments)):
        for extra in wanted.split(","):
            if extra not in project["optional-dependencies"]:
                raise ValueError(f"there is no extra {extra!r}")


def _check_toml(text: str) -> None:
    value = tomllib.loads(text)
    given = [value["swap"]] if "swap" in value else [rule.get("swap", []) for rule in value.get("rules", ())]
    swaps = [swap for one in given for swap in (one if isinstance(one, list) else [one])]
    if not {swap["kind"] for swap in swaps} <= {*replacements.names()}:
        return  # of the guide's own kind, which is there when its page runs
    if "swap" in value:
        Rule.model_validate(value)
    else:
        parse_recipe(text, "the example")
