"""The commands as a user types them: what they print, write and leave alone when all goes well."""

from __future__ import annotations

import importlib
import inspect
import io
import json
import os
import pkgutil
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import asymswap
import asymswap.cli
from asymswap.cli.commands import SUMMARIES, function
from asymswap.cli.failures import reporting_errors
from asymswap.cli.main import main
from asymswap.cli.options import default_output
from asymswap.models.networks import BUILDERS
from asymswap.planning.recipe import GROUPS
from asymswap.planning.shipped import shipped_names

ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
COMMANDS = ("convert", "candidates", "recipes", "show", "compare", "fuse")
CONVERT = ("convert", "digits-resnet", "--recipe", "3x3-only")


@dataclass(frozen=True)
class Ran:
    """What a command did: exit code, and the text on both streams."""

    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        """What a person sees of the output, colours aside."""
        return ANSI.sub("", self.out).splitlines()

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Command = Callable[..., Ran]


@pytest.fixture
def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, one_thread: None
) -> Command:
    """Runs a command line in this process and in an empty folder, its output piped."""
    monkeypatch.chdir(tmp_path)
    for name in ("FORCE_COLOR", "COLUMNS", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)

    def run(*arguments: str | Path) -> Ran:
        monkeypatch.setattr(sys, "argv", ["asymswap", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        captured = capsys.readouterr()
        return Ran(int(stop.value.code or 0), captured.out, captured.err)

    return run


@pytest.fixture
def terminal(command: Command, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Command]:
    """The same as in a terminal of a given width."""

    def wide(columns: int) -> Command:
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("TERM", "xterm-256color")
        monkeypatch.setenv("COLUMNS", str(columns))
        return command

    return wide


@pytest.fixture
def converted(command: Command) -> Path:
    """digits-resnet.asym.pt in the working directory."""
    assert command(*CONVERT, "--quiet").code == 0
    return Path("digits-resnet.asym.pt")


def files() -> set[str]:
    return {path.name for path in Path().iterdir()}


class TestConvert:
    def test_it_writes_a_model_that_loads_and_tells_what_changed(self, command: Command) -> None:
        done = command(*CONVERT)
        assert (done.code, done.err) == (0, "")
        assert files() == {"digits-resnet.asym.pt"}
        loaded = asymswap.load("digits-resnet.asym.pt")
        assert isinstance(loaded.get_submodule("layer1.0.conv1"), nn.Sequential)
        for words in (
            "digits-resnet by 3x3-only: 7 of 9 convs swapped",
            "MACs",
            "FLOPs",
            "parameters",
            "layer1.0.conv1",
            "Kept: ",
            "Output of the whole model: ",
            "separable: approximate",
            "Budget: 0.5 of the matched convs' MACs.",
            "digits-resnet.asym.pt: ",
            "Time: ",
        ):
            assert words in done.out

    def test_json_is_the_whole_report(self, command: Command) -> None:
        done = command(*CONVERT, "--json")
        assert done.json["model"]["reference"] == "digits-resnet"
        assert sum(row["action"] == "swap" for row in done.json["sites"]) == 7
        assert done.json["after"]["macs"] < 0.51 * done.json["before"]["macs"]

    def test_quiet_prints_nothing(self, command: Command) -> None:
        done = command(*CONVERT, "--quiet")
        assert (done.code, done.out, done.err) == (0, "", "")
        assert files() == {"digits-resnet.asym.pt"}

    def test_dry_run_writes_nothing_and_minds_no_file_that_exists(self, command: Command) -> None:
        Path("digits-resnet.asym.pt").write_text("mine")
        done = command(*CONVERT, "--dry-run")
        assert (done.code, files()) == (0, {"digits-resnet.asym.pt"})
        assert Path("digits-resnet.asym.pt").read_text() == "mine"
        assert "7 of 9 convs swapped" in done.out

    @pytest.mark.parametrize(
        "name", ["out.safetensors", *(pytest.param(name, marks=pytest.mark.nightly) for name in ("out.pt", "out.pth"))]
    )
    def test_the_output_can_be_named(self, name: str, command: Command) -> None:
        assert command(*CONVERT, "-o", name).code == 0
        assert files() == {name}
        asymswap.load(name)

    def test_force_replaces(self, command: Command, converted: Path) -> None:
        before = converted.read_bytes()
        assert command(*CONVERT, "--set", "rank=3", "--force").code == 0
        assert converted.read_bytes() != before

    def test_report_files(self, command: Command) -> None:
        command(*CONVERT, "--report", "report.json", "--quiet")
        done = command(*CONVERT, "--report", "report.md", "--json", "--force")
        written = json.loads(Path("report.json").read_text())
        assert {**written, "seconds": None} == {**done.json, "seconds": None}
        markdown = Path("report.md").read_text()
        assert markdown.startswith("# digits-resnet by 3x3-only: 7 of 9 convs swapped\n")
        for row in written["sites"]:
            assert f"| `{row['site']}` |" in markdown
        lines = markdown.splitlines()
        start = next(number for number, line in enumerate(lines) if line.startswith("| Layer |"))
        header, _, *table = [line.strip("|").split("|") for line in lines[start:] if line.startswith("|")]
        sums = [number for number, title in enumerate(header) if title.strip() in ("MACs", "Params", "after")]
        assert len(sums) == 4
        *rows, total = [[int(row[number].strip(" *").replace(",", "")) for number in sums] for row in table]
        assert [sum(column) for column in zip(*rows, strict=True)] == total

    def test_evaluate(self, command: Command) -> None:
        done = command(*CONVERT, "--evaluate", "digits", "--json")
        assert done.json["accuracy"]["images"] == 360
        assert done.json["accuracy"]["scores"][0]["before"] >= 0.985
        text = command(*CONVERT, "--evaluate", "digits", "--force").out
        assert re.search(r"^top-1 +99\.\d\d % +9\d\.\d\d % +-\d\.\d\d points$", text, re.MULTILINE)

    def test_a_written_plan_can_be_replayed(self, command: Command) -> None:
        command(*CONVERT, "--write-plan", "plan.json", "--quiet")
        done = command("convert", "digits-resnet", "--plan", "plan.json", "-o", "again.pt")
        assert done.code == 0
        assert "digits-resnet by a plan: 7 of 9 convs swapped" in done.out
        one, other = (asymswap.load(name).state_dict() for name in ("digits-resnet.asym.pt", "again.pt"))
        assert one.keys() == other.keys()
        assert all(torch.equal(tensor, other[key]) for key, tensor in one.items())

    def test_set_and_macs_change_the_recipe(self, command: Command) -> None:
        ranks = command(*CONVERT, "--set", "rank=5", "--set", "order=vertical-first", "--dry-run", "--json").json
        settings = [row["settings"] for row in ranks["sites"] if row["action"] == "swap"]
        assert settings == 8 * [{"rank": 5, "order": "vertical-first"}]
        line = ("convert", "digits-resnet", "--recipe", "half-macs", "--macs", "0.7", "--dry-run", "--json")
        budget = command(*line).json
        assert 0.69 < budget["after"]["macs"] / budget["before"]["macs"] <= 0.7

    def test_a_model_can_be_converted_twice(self, command: Command, converted: Path) -> None:
        done = command("convert", converted, "--recipe", "all-spatial", "--set", "rank=2")
        assert done.code == 0
        assert files() == {"digits-resnet.asym.pt", "digits-resnet.asym2.pt"}
        shown = command("show", "digits-resnet.asym2.pt", "--json").json
        assert len(shown["plans"]) == 2

    def test_random_weights_need_no_download(self, command: Command) -> None:
        assert command("convert", "cifar:resnet20", "--weights", "none", "--recipe", "3x3-only", "-q").code == 0
        assert files() == {"resnet20.asym.pt"}

    def test_a_state_dict_needs_its_architecture_only(self, command: Command) -> None:
        torch.save({"model": BUILDERS["resnet20"]().state_dict()}, "mine.pth")
        assert command("convert", "mine.pth", "--arch", "cifar:resnet20", "--recipe", "3x3-only", "-q").code == 0
        assert "mine.asym.pt" in files()


@pytest.mark.parametrize(
    ("reference", "name"),
    [
        ("resnet18", "resnet18.asym.pt"),
        ("torchvision:resnet18@IMAGENET1K_V1", "resnet18.asym.pt"),
        ("cifar:resnet20", "resnet20.asym.pt"),
        ("package.module:factory", "factory.asym.pt"),
        ("me@home/net.py:Net", "Net.asym.pt"),
        (r"C:\nets\net.py:Net", "Net.asym.pt"),
        ("timm:resnet50@a1_in1k", "resnet50.asym.pt"),
        ("timm:resnet50.a1_in1k", "resnet50.a1_in1k.asym.pt"),
        ("/somewhere/model.pt", "model.asym.pt"),
        ("model.safetensors", "model.asym.pt"),
        ("checkpoint.pth.tar", "checkpoint.asym.pt"),
        ("v1.5.ckpt", "v1.5.asym.pt"),
        ("model.asym.pt", "model.asym2.pt"),
        ("model.asym9.safetensors", "model.asym10.pt"),
        ("model.asymmetric.pt", "model.asymmetric.asym.pt"),
    ],
)
def test_the_default_output(reference: str, name: str) -> None:
    assert default_output(reference) == Path(name)


class TestCandidates:
    def test_the_verdict_stands_first(self, command: Command) -> None:
        lines = command("candidates", "resnet18", "--weights", "none").lines
        assert lines[0] == (
            "resnet18: 20 of 20 convs are candidates; they hold 100.0 % of the MACs and 95.5 % of the parameters"
        )
        assert sum("128 1x1 s2" in line and "rank" in line for line in lines) == 1

    def test_where_little_can_be_gained_it_says_so(self, command: Command) -> None:
        lines = command("candidates", "vit_b_16", "--weights", "none").lines
        assert lines[1] == "Little can be gained here."

    def test_json(self, command: Command) -> None:
        data = command("candidates", "digits-resnet", "--json").json
        assert data.keys() >= {"schema", "model", "traced_by", "input", "total", "candidates", "sites"}
        held = [site["cost"]["macs"] for site in data["sites"] if site["candidate"]]
        assert len(held) == data["candidates"]["convs"] == 9
        assert sum(held) == data["candidates"]["macs"]
        assert data["candidates"]["macs_share"] == sum(held) / data["total"]["macs"]

    def test_a_recipe_narrows_it_down(self, command: Command) -> None:
        data = command("candidates", "resnet18", "--weights", "none", "--recipe", "inception-7x7", "--json").json
        assert [site["name"] for site in data["sites"] if site["candidate"]] == ["conv1"]

    def test_it_writes_nothing(self, command: Command) -> None:
        assert command("candidates", "digits-resnet").code == 0
        assert files() == set()


class TestRecipes:
    def test_all_shipped_ones_are_listed(self, command: Command) -> None:
        listed = command("recipes", "--json").json
        assert [item["name"] for item in listed] == shipped_names()
        assert all(item["summary"] and item["group"] and item["preserves"] for item in listed)
        lines = command("recipes").lines
        for group in GROUPS:
            start = lines.index(group) + 1
            named = [line for line in lines[start : lines.index("", start)] if not line.startswith(" ")]
            names = [line.split()[0] for line in named]
            assert names == [item["name"] for item in listed if item["group"] == group]
        assert len({line.index("kept") for line in lines if line.split()[1:2] == ["kept"]}) == 1

    @pytest.mark.parametrize("name", shipped_names())
    def test_one_is_shown_so_that_it_can_be_edited(self, name: str, command: Command) -> None:
        Path("mine.toml").write_text(command("recipes", name).out)
        assert re.match(r"mine\.toml is a valid recipe: [12] rules?[.,]", command("recipes", "mine.toml").out)
        assert command("recipes", name, "--json").json == command("recipes", "mine.toml", "--json").json

    def test_the_schema_is_json(self, command: Command) -> None:
        schema = command("recipes", "--schema").json
        assert schema["$schema"].endswith("2020-12/schema")
        assert "rules" in schema["properties"]


class TestShow:
    def test_it_tells_where_a_model_comes_from(self, command: Command, converted: Path) -> None:
        text = command("show", converted).out
        for words in ("digits-resnet", "3x3-only", "50.3 %", "Conversion 1: 7 convs swapped, 2 kept", "layer1.0.conv1"):
            assert words in text

    def test_json_is_the_header(self, command: Command, converted: Path) -> None:
        data = command("show", converted, "--json").json
        assert data.keys() == {"format", "origin", "plans", "preprocessing", "provenance"}
        assert data["origin"] == {"reference": "digits-resnet", "arguments": {}}
        assert 'kernel = "3x3"' in data["provenance"]["recipe"]

    def test_its_plan_can_be_replayed(self, command: Command, converted: Path) -> None:
        Path("plan.json").write_text(command("show", converted, "--plan").out)
        assert command("convert", "digits-resnet", "--plan", "plan.json", "-o", "again.pt", "-q").code == 0
        one, other = (asymswap.load(name).state_dict() for name in (converted, "again.pt"))
        assert all(torch.equal(tensor, other[key]) for key, tensor in one.items())


class TestHelp:
    @pytest.mark.parametrize("name", COMMANDS)
    @pytest.mark.parametrize("option", ["--help", "-h"])
    def test_every_command_shows_an_example(self, name: str, option: str, command: Command) -> None:
        done = command(name, option)
        assert done.code == 0
        assert f"Example: asymswap {name} " in done.out

    def test_the_first_page_names_the_commands_and_what_to_try(self, command: Command) -> None:
        done = command("--help")
        assert done.code == 0
        assert all(name in done.out for name in COMMANDS)
        assert "Try: asymswap convert digits-resnet --recipe 3x3-only" in done.out

    def test_version(self, command: Command) -> None:
        assert command("--version").out == f"asymswap {asymswap.__version__}\n"


# The names of a DenseNet-121's last block, and a conv for each of them.
LONG_NAMES = """
from collections import OrderedDict
from torch import nn

def layer():
    return nn.Sequential(OrderedDict(conv1=nn.Conv2d(8, 8, 1), conv2=nn.Conv2d(8, 8, 3, padding=1)))

def net():
    block = nn.Sequential(OrderedDict((f"denselayer{number}", layer()) for number in range(1, 17)))
    features = nn.Sequential(OrderedDict(conv0=nn.Conv2d(3, 8, 3), denseblock4=block))
    return nn.Sequential(OrderedDict(features=features))
"""
DENSE = ("dense.py:net", "--input", "3x12x12")

# With long names, many columns, or text that has to be folded.
TABLES = {
    "convert": CONVERT,
    "convert long names": ("convert", *DENSE, "--recipe", "last-block.toml", "--dry-run"),
    "candidates": ("candidates", "resnet18", "--weights", "none"),
    "candidates long names": ("candidates", *DENSE),
    "recipes": ("recipes",),
    "show": ("show", "digits-resnet.asym.pt"),
}
LAST_BLOCK = """
[[rules]]
match = { names = "features.denseblock4.*", kernel = "3x3" }
swap = { kind = "separable", rank = 4 }
"""


def first_column(lines: list[str]) -> str:
    """The cells of a table's first column one after the other, as if they had not been folded."""
    start, header = next((number, line) for number, line in enumerate(lines) if line.startswith("Layer "))
    width = header.index("Conv")
    return "".join(line[:width].strip() for line in lines[start + 1 :])


class TestLayout:
    @pytest.fixture(autouse=True)
    def _files(self, command: Command) -> None:
        Path("last-block.toml").write_text(LAST_BLOCK)
        Path("dense.py").write_text(LONG_NAMES)

    @pytest.mark.parametrize("name", TABLES)
    def test_a_terminal_of_80_columns_is_enough(
        self, name: str, command: Command, terminal: Callable[[int], Command]
    ) -> None:
        if name == "show":
            command(*CONVERT, "--quiet")
        done = terminal(80)(*TABLES[name])
        assert done.code == 0
        assert [line for line in done.lines if len(line.rstrip()) > 80] == []

    @pytest.mark.parametrize("name", ["convert long names", "candidates long names"])
    def test_120_columns_show_everything(self, name: str, terminal: Callable[[int], Command]) -> None:
        lines = terminal(120)(*TABLES[name]).lines
        names = first_column(lines)
        assert all(f"features.denseblock4.denselayer{number}.conv2" in names for number in range(1, 17))
        wanted = ("Params", "Kernel error", "Error") if name.startswith("convert") else ("Params", "Map")
        assert all(title in "\n".join(lines) for title in wanted)
        assert "…" not in "\n".join(lines)

    @pytest.mark.parametrize("name", ["convert", "candidates", "recipes"])
    def test_no_colours_in_a_pipe(self, name: str, command: Command) -> None:
        done = command(*TABLES[name])
        assert "\x1b" not in done.out + done.err
        assert done.err == ""

    def test_colours_in_a_terminal(self, terminal: Callable[[int], Command]) -> None:
        assert "\x1b[" in terminal(80)("recipes").out

    def test_progress_is_shown_on_stderr_of_a_terminal_only(self, terminal: Callable[[int], Command]) -> None:
        done = terminal(80)(*CONVERT)
        assert "writing" in ANSI.sub("", done.err)
        assert "writing" not in done.out

    def test_json_has_no_colours_even_in_a_terminal(self, terminal: Callable[[int], Command]) -> None:
        assert terminal(80)("candidates", "digits-resnet", "--json").json["model"] == "digits-resnet"


class TestThreads:
    """Threads of torch that wait for each other must not keep the cores busy: see asymswap.cli.main."""

    @pytest.mark.parametrize(("given", "found"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
    def test_they_wait_asleep_unless_the_user_wants_otherwise(
        self, given: str | None, found: str, command: Command, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("OMP_WAIT_POLICY", given or "")
        if given is None:
            monkeypatch.delenv("OMP_WAIT_POLICY")
        command("--version")
        assert os.environ["OMP_WAIT_POLICY"] == found


def test_python_m_is_the_command(command: Command, tmp_path: Path) -> None:
    line = [sys.executable, "-m", "asymswap", "recipes", "3x3-only"]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=120)
    assert (done.stdout, done.stderr) == (command("recipes", "3x3-only").out, "")


def test_a_factory_named_again_is_called_as_before(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its arguments are in the checkpoint; a subclass of its own keeps the model from being stored as a skeleton."""
    (tmp_path / "nets_of_mine.py").write_text(
        "from torch import nn\n\n\nclass Own(nn.Conv2d):\n    pass\n\n\ndef make(width=4):\n"
        "    return nn.Sequential(nn.Conv2d(1, width, 3), nn.Conv2d(width, width, 3), Own(width, 1, 1))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    size = ("--input", "1x16x16")
    recipe = ("--recipe", "all-spatial", "--set", "rank=2")
    assert run("convert", "nets_of_mine:make", "--arg", "width=12", *recipe, "-o", "a.pt", *size).code == 0
    outcome = run("candidates", "a.pt", "--arch", "nets_of_mine:make", "--json", *size)
    assert outcome.code == 0, outcome.err
    assert 12 in {site["conv"]["in_channels"] for site in json.loads(outcome.out)["sites"]}


@pytest.mark.parametrize(("name", "text"), [("convert", "(<stem>.asym.pt)"), ("fuse", "(<stem>.fused.pt)")])
def test_help_names_the_default_output(command: Command, name: str, text: str) -> None:
    assert text in command(name, "--help").out


@pytest.mark.parametrize(
    ("arguments", "policy"),
    [
        (["--latency", "0.6"], None),
        (["--set", "budget.latency=0.6"], None),
        (["--recipe", "timed.toml"], None),
        (["--macs", "0.6", "--time"], None),
        (["--recipe", "counted.toml"], "PASSIVE"),
        (["--recipe", "gone.toml"], "PASSIVE"),
        (["--macs", "0.6"], "PASSIVE"),
    ],
)
def test_waiting_threads_sleep_unless_latency_is_measured(
    arguments: list[str], policy: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("timed.toml").write_text("[budget]\nlatency = 0.6\n")
    Path("counted.toml").write_text("[budget]\nmacs = 0.6\n")
    seen: list[str | None] = []

    def app() -> None:
        seen.append(os.environ.get("OMP_WAIT_POLICY"))
        raise SystemExit

    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setattr("asymswap.cli.main.app", app)
    monkeypatch.setattr(sys, "argv", ["asymswap", "convert", "x", *arguments])
    with pytest.raises(SystemExit):
        main()
    assert seen == [policy]
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)


@pytest.mark.parametrize(
    ("typed", "place", "offered"),
    [
        ("asymswap con", 1, ["convert"]),
        ("asymswap convert x --max", 3, ["--max-drop"]),
        ("asymswap convert x --recipe half", 4, ["half-macs"]),
        ("asymswap recipes acnet-", 2, ["acnet-branch-bn"]),
        ("asymswap export x --to p", 4, ["pt2"]),
        ("asymswap convert x --recipe mine", 4, []),
    ],
)
def test_the_shell_completes(typed: str, place: int, offered: list[str]) -> None:
    """As the script of --show-completion asks; where nothing is offered, bash takes files."""
    done = installed({"_ASYMSWAP_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(place)})
    assert done.stdout.split() == offered, done.stderr


def test_the_list_of_commands_holds_each_with_the_first_line_of_its_help() -> None:
    """They stand in one place, so that the list imports none of them; none is forgotten there."""
    modules = (f"asymswap.cli.{module.name}" for module in pkgutil.iter_modules(asymswap.cli.__path__))
    functions = {name.rpartition(".")[2]: vars(importlib.import_module(name)) for name in modules}
    told = {
        name: inspect.cleandoc(function(name).__doc__ or "").split("\n\n")[0]
        for name, found in functions.items()
        if name != "main" and callable(found.get(name))
    }
    assert told == SUMMARIES


def installed(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command called by its name, as an installed one is."""
    code = "import sys; sys.argv[0] = 'asymswap'; from asymswap.cli.main import main; main()"
    line = [sys.executable, "-c", code, *arguments]
    return subprocess.run(
        line, env={**os.environ, **environment}, capture_output=True, text=True, check=False, timeout=60
    )


def test_the_script_of_completion_is_told() -> None:
    text = installed({}, "--show-completion", "bash").stdout
    assert "_ASYMSWAP_COMPLETE=complete_bash" in text
    assert "-F _asymswap_completion asymswap" in text


@pytest.mark.filterwarnings("default")
def test_a_warning_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def command(debug: bool = False) -> None:
        warnings.warn("a copy\nmay be made (Triggered internally at /src/aten/Convolution.cpp:1104.)", stacklevel=1)

    reporting_errors(command)()
    assert capsys.readouterr().err == "warning: a copy may be made\n"
    with pytest.warns(UserWarning, match="Triggered internally"):
        reporting_errors(command)(debug=True)


def test_what_the_encoding_of_the_terminal_lacks_is_a_question_mark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    recipe = tmp_path / "größe.toml"
    recipe.write_text('summary = "größe"\n[[rules]]\nmatch = {}\nswap = { kind = "acb" }\n', encoding="utf-8")
    written = io.BytesIO()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["asymswap", "convert", "digits-resnet", "--recipe", recipe.name, "--dry-run"])
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    with pytest.raises(SystemExit) as stop:
        main()
    sys.stdout.flush()
    assert not stop.value.code
    assert b"gr??e" in written.getvalue()
