"""What loading the package costs, and which part may know which."""

from __future__ import annotations

import ast
import functools
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "asymswap"

# Ground floor first: a file imports only from its own layer or from those before it. `asymswap` itself (the version and
# the lazy public names) may be imported by all, and stands above all that it names lazily.
LAYERS = (
    ("errors", "types"),
    ("utils", "results"),
    ("fileformats", "factorize"),
    ("replacements", "graph"),
    ("measure",),
    ("planning",),
    ("checkpoint",),
    ("models",),
    ("data", "reporting"),
    ("training", "calibration"),
    ("api",),
    ("cli", "__main__"),
)
FLOOR = {name: number for number, names in enumerate(LAYERS) for name in names}

FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@functools.cache
def nodes(path: Path) -> list[ast.AST]:
    return [*ast.walk(ast.parse(path.read_text(encoding="utf-8")))]


def imported(path: Path) -> Iterator[str]:
    """Dotted names of everything that a file imports, also inside of functions and for type checkers alone."""
    for node in nodes(path):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def parts_imported(path: Path) -> set[str]:
    names = [name.split(".") for name in imported(path)]
    own = {name[1] for name in names if name[0] == "asymswap" and len(name) > 1}
    return own - {"__version__"}


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    return done.stdout


def test_a_file_imports_only_from_its_own_layer_or_from_below() -> None:
    above = {
        f"{path.relative_to(PACKAGE)} must not know {name}"
        for path in FILES
        for name in parts_imported(path)
        if FLOOR[name] > FLOOR[part_of(path)]
    }
    assert above == set()


def test_rooms_of_one_layer_do_not_know_each_other() -> None:
    beside = {
        f"{path.relative_to(PACKAGE)} must not know {name}"
        for path in FILES
        for name in parts_imported(path) - {part_of(path)}
        if FLOOR[name] == FLOOR[part_of(path)] and part_of(path) != "__main__"
    }
    assert beside == set()


def test_every_part_of_the_package_has_a_layer() -> None:
    assert {part_of(path) for path in FILES} <= FLOOR.keys()


def test_reporting_takes_numbers_and_text_only() -> None:
    for path in (path for path in FILES if part_of(path) == "reporting"):
        roots = {name.split(".")[0] for name in imported(path)}
        assert not roots & {"torch", "torchvision", "numpy"}, path.name


def test_reporting_loads_without_torch() -> None:
    modules = [f"asymswap.reporting.{path.stem}" for path in (PACKAGE / "reporting").glob("*.py")]
    code = f"import importlib, sys; [importlib.import_module(m) for m in {modules!r}]; print('torch' in sys.modules)"
    assert run_python(code) == "False\n"


def test_importing_the_package_loads_nothing_else() -> None:
    code = "import sys; import asymswap; asymswap.AsymswapError; print({'torch', 'rich', 'pydantic'} & {*sys.modules})"
    assert run_python(code) == "set()\n"


@pytest.mark.parametrize(
    "arguments", [["--help"], ["convert", "--help"], ["finetune", "--help"], ["--version"], ["recipes"]], ids=" ".join
)
def test_what_needs_no_model_never_loads_torch(arguments: list[str]) -> None:
    code = f"""
import sys
import tokenize
from asymswap.cli.main import main
sys.argv = ["asymswap", *{arguments!r}]
try:
    main()
except SystemExit as stop:
    print(stop.code, "torch" in sys.modules)
"""
    assert run_python(code).splitlines()[-1] == "0 False"


def test_an_unknown_public_name_is_an_attribute_error() -> None:
    import asymswap

    with pytest.raises(AttributeError, match=r"module 'asymswap' has no attribute 'covnert'"):
        asymswap.covnert  # noqa: B018


def test_the_public_names_can_all_be_had() -> None:
    import asymswap

    assert dir(asymswap) == sorted(asymswap.__all__)
    assert all(getattr(asymswap, name) is not None for name in asymswap.__all__)


def test_the_architecture_page_has_these_layers() -> None:
    page = (PACKAGE.parent / "docs" / "reference" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| ([^|]+) \|", page, re.MULTILINE)
    assert [int(floor) for floor, _ in rows] == [*range(1, len(LAYERS) + 1)]
    assert [set(re.findall(r"`(\w+)`", parts)) for _, parts in rows] == [set(names) for names in LAYERS]


def test_no_function_takes_more_than_eight_arguments() -> None:
    """But the public verbs, and the commands, whose arguments are their options."""
    import asymswap

    for path in FILES:
        for node in nodes(path):
            if not isinstance(node, ast.FunctionDef):
                continue
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            number = len([argument for argument in arguments if argument.arg not in ("self", "cls")])
            allowed = node.name in asymswap.__all__ and part_of(path) in ("api", "models", "cli")
            allowed = allowed or (part_of(path) == "cli" and node.name == path.stem)
            assert number <= 8 or allowed, f"{path.relative_to(PACKAGE)}: {node.name} takes {number} arguments"


def test_results_and_types_know_nothing_else() -> None:
    known = {"errors", "types", "results"}
    assert {part for path in FILES if part_of(path) in ("results", "types") for part in parts_imported(path)} <= known


def test_only_the_command_line_names_its_options() -> None:
    """The library names Python's arguments, which the command line replaces by its own options."""
    option = re.compile(r"(?<![\w-])--[a-z][a-z-]+")
    others = {"--max-restarts"}  # torchrun's
    found = set()
    for path in (path for path in FILES if part_of(path) != "cli"):
        text = path.read_text(encoding="utf-8")
        said = [(node.lineno, node.value) for node in nodes(path) if isinstance(node, ast.Constant)]
        tokens = tokenize.generate_tokens(io.StringIO(text).readline)
        said += [(token.start[0], token.string) for token in tokens if token.type == tokenize.COMMENT]
        for line, words in said:
            names = set(option.findall(str(words))) - others
            found |= {f"{path.relative_to(PACKAGE)}:{line} {name}" for name in names}
    assert found == set()
