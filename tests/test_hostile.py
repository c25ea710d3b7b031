"""Damaged and hostile files of every kind: a few here, hundreds in `make test-nightly`, thousands in `make fuzz`."""

from __future__ import annotations

import os
from collections.abc import Iterator

import hostile
import pytest
from hostile import ACCEPTED, MEMORY, REFUSED, Case, Ending, Workers, verdict

KINDS = (
    "state_dict", "training checkpoint", "old torch.save", "pickled module", "pickled torchvision module",
    "safetensors", "asymswap .pt", "asymswap .pt with a structure", "asymswap .safetensors", "TorchScript",
    "torch.export .pt2", "recipe", "plan", "data .pt", "data .npy", "data .npz", "training state", "sweep state",
    "statistics",
)  # fmt: skip


SLOW = ("training state", "sweep state", "statistics")
"""Their commands take a second each where a file is accepted."""
MANY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"


@pytest.fixture(scope="module")
def sound() -> dict[str, bytes]:
    return hostile.sound_files()


PATIENCE = 60.0
"""A process that loads a library or a table for its first file takes 15 s of a slow processor shared with others."""


@pytest.fixture(scope="module")
def workers() -> Iterator[Workers]:
    with Workers(1, PATIENCE) as started:
        yield started


def faults(workers: Workers, cases: list[Case]) -> list[str]:
    """What ended as nothing may, told so that it can be made again."""
    ends = [(case, ending, verdict(case, ending, PATIENCE)) for case, ending in workers.run(cases)]
    assert len(ends) == len(cases)
    # A case that is refused for lack of its own recipe tries nothing.
    return [
        f"{how}: {case}: {ending}"
        for case, ending, how in ends
        if how not in (ACCEPTED, REFUSED, MEMORY) or hostile.ONE_CONV in ending.err
    ]


def quick(case: Case) -> bool:
    """Whether a case looks for no architecture, which takes seconds in a process that has not done it before."""
    return "--arch" in case.arguments or case.kind not in hostile._STATES or case.arguments[0] == "show"


def test_every_kind_is_tried(sound: dict[str, bytes]) -> None:
    assert set(KINDS) == set(sound)


@pytest.mark.parametrize("kind", KINDS)
def test_changed_files_are_read_or_refused(kind: str, sound: dict[str, bytes], workers: Workers) -> None:
    cases = [case for case in hostile.mutated(sound, kind, 40, seed=1) if quick(case)][
        : 10 if MANY else 2 if kind in SLOW else 4
    ]
    assert faults(workers, cases) == []


def test_sound_files_are_read(sound: dict[str, bytes], workers: Workers) -> None:
    cases = []
    for kind in KINDS:
        cases.append(hostile.case_of(sound, kind, "sound", hostile.commands(kind)[0], sound[kind]))
    ends = {case.kind: verdict(case, ending) for case, ending in workers.run(cases)}
    assert set(ends.values()) == {ACCEPTED}, ends


def test_what_hypothesis_makes_up_is_read_or_refused(workers: Workers) -> None:
    assert faults(workers, hostile.made_up(100 if MANY else 25, seed=1)) == []


def test_no_trap_is_sprung(workers: Workers) -> None:
    """In `make test` each pickle in two of its four forms; what is called stands in two pickles, so in all four."""
    cases = [case for case in hostile.traps() if case.arguments[0] == "convert"]
    assert faults(workers, cases if MANY else [case for n, case in enumerate(cases) if (n // 4 + n) % 2 == 0]) == []


def test_a_sprung_trap_would_be_seen(workers: Workers) -> None:
    """The same traps with --trust-pickle: these run, and every watch must tell of it."""
    wanted = ("os.system, zip", "an import, zip", "builtins.exec, zip")
    cases = [
        Case(case.kind, case.name, (*case.arguments, "--trust-pickle"), case.files)
        for case in hostile.traps()
        if case.name in wanted and case.arguments[0] == "convert"
    ]
    assert [verdict(case, ending) for case, ending in workers.run(cases)] == ["code executed"] * 3


@pytest.mark.parametrize(
    ("ending", "expected"),
    [
        (Ending(None), "crash"),
        (Ending(None, seconds=600), "hang"),
        (Ending(1, err="error: no\n", seconds=11), "hang"),
        (Ending(0, left=("y.pt",)), "accepted"),
        (Ending(0, left=("y.pt", ".y.pt.00000000.part")), "files left behind"),
        (Ending(0), "files left behind"),
        (Ending(1, err="error: no\n", left=("y.pt",)), "files left behind"),
        (Ending(1, err="error: no\n"), "refused"),
        (Ending(1, err="error: not enough memory; use\n"), "refused, out of memory"),
        (Ending(1, out="half a table", err="error: no\n"), "traceback"),
        (Ending(1, err="warning\nerror: no\n"), "traceback"),
        (Ending(1, err="error: unexpected KeyError: 'x'; this is a bug: run\n"), "traceback"),
        (Ending(2, err="error: no\n"), "traceback"),
        (Ending(1, err="error: no\n", left=("sprung",)), "code executed"),
        (Ending(1, err="error: no\n", deeds=("os.system",)), "code executed"),
    ],
)
def test_verdicts(ending: Ending, expected: str) -> None:
    assert verdict(Case("k", "n", ("convert", "x.pt", "-o", "y.pt"), {}), ending) == expected
