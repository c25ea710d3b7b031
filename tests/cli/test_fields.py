"""Options made from the fields of a dataclass."""

from __future__ import annotations

import dataclasses
import inspect
import subprocess
import sys
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from asymswap.calibration.config import Calibration
from asymswap.cli.commands import Group, with_options
from asymswap.training.config import Training
from asymswap.utils.options import option

Settings = dataclasses.make_dataclass(
    "Settings",
    [
        ("rank", int, option(3, "The rank.", "Panel")),
        ("cut", float | None, option(None, "Where to cut.", "Panel", flags=("--cut-at",))),
        ("names", tuple[str, ...] | None, option(None, "Names.", None, text=True)),
        ("strict", bool, option(False, "Be strict.", None)),
        ("order", bool, option(True, "Keep the order.", None)),
        ("inner", int, 7),
    ],
)
GROUP: Any = Group(Settings)


def run(*arguments: str, given_only: bool = False) -> dict[str, Any]:
    seen: dict[str, Any] = {}

    group: Any = Group(Settings, given_only=given_only)

    def command(first: str, settings: Any = group, strict: Any = None, last: int = 0) -> None:
        seen.update(first=first, last=last, settings=settings)

    app = typer.Typer()
    app.command()(with_options(command))
    done = CliRunner().invoke(app, ["a", *arguments])
    assert done.exit_code == 0, done.output
    return seen


def test_values_come_by_the_names_of_fields() -> None:
    defaults = {"rank": 3, "cut": None, "names": None, "strict": False, "order": True}
    assert run() == {"first": "a", "last": 0, "settings": defaults}
    given = run("--rank", "5", "--cut-at", "0.5", "--names", "x,y", "--strict", "--no-order", "--last", "2")
    assert given["settings"] == {"rank": 5, "cut": 0.5, "names": "x,y", "strict": True, "order": False}
    assert given["last"] == 2


def test_what_is_not_given_can_be_told_from_a_default() -> None:
    assert run(given_only=True)["settings"] == {}
    assert run("--rank", "3", given_only=True)["settings"] == {"rank": 3}


def test_a_parameter_named_like_a_field_is_where_its_option_stands() -> None:
    def command(first: str, settings: Any = GROUP, last: int = 0, rank: Any = None) -> None: ...

    made = inspect.signature(with_options(command)).parameters
    assert list(made) == ["first", "cut", "names", "strict", "order", "last", "rank"]


@pytest.mark.parametrize("config", [Training, Calibration])
def test_every_field_without_help_is_set_by_the_command_itself(config: type) -> None:
    assert {field.name for field in dataclasses.fields(config)} - Group(config).parameters.keys() <= {
        "channels_last", "deterministic", "polish_minutes", "seed", "team", "preprocessing", "inputs",
    }  # fmt: skip


def test_the_settings_load_without_torch() -> None:
    code = "import sys, asymswap; asymswap.Training, asymswap.Calibration; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
