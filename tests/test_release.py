"""What is published: one version, whole archives, and a wheel that works where nothing else of the project is."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
import yaml

import asymswap
from asymswap.planning.shipped import shipped_names

ROOT = Path(__file__).parents[1]


def script(name: str) -> ModuleType:
    """A script of .ci/, which is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / ".ci" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("release")


@pytest.fixture(scope="module")
def release() -> ModuleType:
    return script("release_check")


@pytest.fixture(scope="module")
def built(folder: Path, release: ModuleType) -> tuple[Path, Path]:
    built = release.build(folder)
    return built.wheel, built.sdist


@pytest.fixture(scope="module")
def programs(folder: Path, release: ModuleType, built: tuple[Path, Path]) -> Path:
    found: Path = release.install(built[0], folder / "environment", borrow=True)
    return found


def call(*command: object, cwd: Path) -> str:
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=kept, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_it_holds_the_package_the_recipes_and_the_weights(built: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(built[0]) as archive:
        names = {*archive.namelist()}
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        assert f"\nVersion: {asymswap.__version__}\n" in archive.read(metadata).decode()
    assert {f"asymswap/recipes/{name}.toml" for name in shipped_names()} <= names
    own = {path.relative_to(ROOT).as_posix() for path in (ROOT / "asymswap").rglob("*") if path.is_file()}
    assert {name for name in own if "__pycache__" not in name} <= names
    assert {"asymswap/py.typed", "asymswap/models/digits-resnet.safetensors"} <= names
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"asymswap"}


@pytest.mark.slow
@pytest.mark.programs
def test_the_sdist_holds_what_it_takes_to_test_and_to_document(built: tuple[Path, Path]) -> None:
    with tarfile.open(built[1]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    missing = {*tracked.stdout.split()} - names
    assert missing <= {".gitignore"}


CONVERT_AND_LOAD = """
import asymswap, sys
from asymswap.cli.main import main

sys.argv = ["asymswap", "convert", "digits-resnet", "--recipe", "3x3-only"]
try:
    main()
except SystemExit as stop:
    assert not stop.code
print(type(asymswap.load("digits-resnet.asym.pt").layer1[0].conv1).__name__)
print(asymswap.__file__)
"""


@pytest.mark.slow
def test_the_command_converts_from_it(programs: Path, tmp_path: Path) -> None:
    assert call(programs / "asymswap", "--version", cwd=tmp_path) == f"asymswap {asymswap.__version__}\n"
    printed = call(programs / "python", "-c", CONVERT_AND_LOAD, cwd=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["digits-resnet.asym.pt"]
    assert "7 of 9 convs swapped" in printed
    kind, where = printed.splitlines()[-2:]
    assert kind == "Sequential"
    assert where.startswith(str(programs.parent))


@pytest.mark.nightly
def test_its_types_reach_those_who_use_it(programs: Path, tmp_path: Path) -> None:
    (tmp_path / "use.py").write_text(
        'import asymswap\n\nreveal_type(asymswap.load("x.pt"))\nasymswap.load(path=3)\n', encoding="utf-8"
    )
    python = f"--python-executable={programs / 'python'}"
    command = [sys.executable, "-m", "mypy", "--strict", python, "--no-incremental", "use.py"]
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MYPYPATH")}
    done = subprocess.run(command, cwd=tmp_path, env=kept, capture_output=True, text=True, check=False)
    assert 'Revealed type is "torch.nn.modules.module.Module"' in done.stdout
    assert re.search(r'use\.py:4: error: Argument "path" to "load" has incompatible type "int"', done.stdout)
    assert "import-untyped" not in done.stdout


def test_the_version_stands_in_one_place() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert "version" not in project["project"]
    assert project["tool"]["hatch"]["version"]["path"] == "asymswap/__init__.py"
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+|rc\d+)?", asymswap.__version__)


def test_the_citation_names_what_a_citation_must() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation.keys() >= {"cff-version", "title", "message", "type", "authors", "license"}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert citation["license"] == project["license"]
    assert "version" not in citation  # it would be a second place


def test_the_changelog_speaks_of_what_is_to_come_or_of_this_version() -> None:
    headings = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert headings[0] in ("Unreleased", asymswap.__version__)


def test_the_hooks_before_a_commit_are_what_lint_runs() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"][0]["hooks"]
    entries = " ".join(hook["entry"] for hook in hooks)
    lint = re.search(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert lint is not None
    for line in lint[1].splitlines():
        program = line.strip().removeprefix("$(RUN)/").removesuffix(" .")
        assert program in entries


def test_every_dependency_has_a_lower_bound_that_can_be_tried(tmp_path: Path) -> None:
    bounds = script("lower_bounds")
    found = dict(line.split("==") for line in bounds.lower_bounds())
    assert found.keys() >= {"torch", "torchvision", "typer", "rich", "pydantic", "onnxruntime", "timm"}
    path = tmp_path / "pyproject.toml"
    path.write_text('[project]\ndependencies = ["torch~=2.9"]\noptional-dependencies = {}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"'torch~=2\.9' is not of the form name>=bound"):
        list(bounds.lower_bounds(path))
