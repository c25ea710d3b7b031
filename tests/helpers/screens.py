"""What a command leaves on a terminal: it runs on a real pseudo-terminal, whose output a small emulator reads."""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import pty
import re
import struct
import sys
import termios
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

_CONTROL = re.compile(r"\x1b\[(\??[0-9;]*)([A-Za-z])")
_STYLES = {"1": "bold", "2": "dim", "3": "italic", "4": "underlined"}
_COLOURS = ("black", "red", "green", "yellow", "blue", "magenta", "cyan", "white")


@dataclass
class Screen:
    """The lines of a terminal after all that was sent to it, transient progress gone.

    `sent` is all of it, `styles` are those of what is left; `runs_over` are the lines that did not fit and went on in
    the next one.
    """

    width: int
    sent: str
    lines: list[str] = field(default_factory=lambda: [""])
    styles: set[str] = field(default_factory=set)
    runs_over: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """What a person sees; blanks at a line's end show nowhere."""
        return "\n".join(line.rstrip() for line in self.lines).rstrip() + "\n"


def read_screen(sent: str, width: int) -> Screen:
    """What stands on a terminal of so many columns. Raises ValueError for control codes that no command should use."""
    screen, row, column, styles = Screen(width, sent), 0, 0, set[str]()
    drawn: dict[int, set[str]] = {}

    def down(row: int) -> int:
        if row + 1 == len(screen.lines):
            screen.lines.append("")
        return row + 1

    place = 0
    while place < len(sent):
        control = _CONTROL.match(sent, place)
        if control is not None:
            value, code = control.groups()
            if code == "m":
                styles = _styled(styles, value)
            elif code == "K" and value == "2":
                screen.lines[row] = ""
                drawn.pop(row, None)
            elif code == "A":
                row -= int(value or 1)
            elif code not in "hl":
                raise ValueError(f"a control code that is not known here: {control[0]!r}")
            place = control.end()
            continue
        char, place = sent[place], place + 1
        if char == "\r":
            column = 0
        elif char == "\n":
            row, column = down(row), 0
        else:
            if column == width:
                screen.runs_over.append(screen.lines[row])
                row, column = down(row), 0
            line = screen.lines[row].ljust(column)
            screen.lines[row] = line[:column] + char + line[column + 1 :]
            drawn.setdefault(row, set()).update(styles if char != " " else ())
            column += 1
    screen.styles = set().union(*drawn.values())
    return screen


def _styled(styles: set[str], value: str) -> set[str]:
    """The styles after a code; colours of a larger palette are told by their number."""
    if value in ("", "0"):
        return set()
    found, codes = set(styles), iter(value.split(";"))
    for code in codes:
        if code in _STYLES:
            found.add(_STYLES[code])
        elif code == "38":
            found.add("colour " + ";".join(codes))
        elif len(code) == 2 and code[0] in "39" and code[1] in "01234567":
            found.add(_COLOURS[int(code[1])])
        else:
            raise ValueError(f"a style that is not known here: {value!r}")
    return found


def on_terminal(width: int, action: Callable[[], None]) -> str:
    """Do something with a pseudo-terminal of so many columns as stdout and stderr; all that was sent to it."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, width, 0, 0))
    sent: list[bytes] = []
    reader = threading.Thread(target=_read_all, args=(ours, sent))
    reader.start()
    try:
        with _as_standard(theirs):
            os.close(theirs)
            action()
    finally:
        reader.join(timeout=10)
        os.close(ours)
    return b"".join(sent).decode().replace("\r\n", "\n")


def _read_all(descriptor: int, into: list[bytes]) -> None:
    # Linux ends the reading of a pseudo-terminal that nobody has open any longer with an error.
    with contextlib.suppress(OSError):
        while part := os.read(descriptor, 65536):
            into.append(part)


@contextlib.contextmanager
def _as_standard(terminal: int) -> Iterator[None]:
    """The terminal in the place of the process's own output, for Python and for all below it."""
    kept = [os.dup(number) for number in (1, 2)]
    streams = sys.stdout, sys.stderr
    for stream in streams:
        stream.flush()
    for number in (1, 2):
        os.dup2(terminal, number)
    sys.stdout, sys.stderr = (io.TextIOWrapper(io.FileIO(number, "w", closefd=False), "utf-8") for number in (1, 2))
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.close()
        sys.stdout, sys.stderr = streams
        for number, old in zip((1, 2), kept, strict=True):
            os.dup2(old, number)
            os.close(old)


_VARYING = (
    # Time; the line that tells it may break anywhere.
    (re.compile(r"Time: \d+\.\d s( \([^)]*\))?\.", re.DOTALL), "Time: #."),
    (re.compile(r"\d+ images/s$", re.MULTILINE), "# images/s"),
    (re.compile(r"(\d\.\d{4}) +\d+$", re.MULTILINE), r"\1  #"),
    # What is installed, and the bytes of files and the hashes in which that stands.
    (re.compile(r"\b(asymswap|torch|torchvision) \d[\w.+]*"), r"\1 #"),
    (re.compile(r"\d(?=[\d.]* kB\b)"), "#"),
    (re.compile(r"\b[0-9a-f]{64}\b"), 64 * "#"),
    # The noise of floating point, where outputs are the same.
    (re.compile(r"\b\d(\.\d)?e[-+]\d\d\b"), "#e-##"),
    (re.compile(r"^Outputs: \S+ relative difference, \S+ at", re.MULTILINE), "Outputs: # relative difference, # at"),
)


def masked(text: str) -> str:
    """The text of a screen without the figures that vary from machine to machine."""
    for pattern, put in _VARYING:
        text = pattern.sub(put, text)
    return text


_DECIMAL = re.compile(r"\d+\.\d+")


def same(one: str, other: str) -> bool:
    """Whether texts are equal, but for the last digit of decimals: another processor may round another way."""
    if _DECIMAL.sub("", one) != _DECIMAL.sub("", other):
        return False
    pairs = zip(_DECIMAL.findall(one), _DECIMAL.findall(other), strict=True)
    return all(_close(*pair) for pair in pairs)


def _close(one: str, other: str) -> bool:
    digits = [len(text.partition(".")[2]) for text in (one, other)]
    return digits[0] == digits[1] and abs(float(one) - float(other)) <= 1.01 * 10 ** -digits[0]
