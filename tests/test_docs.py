"""Every example of README.md, CONTRIBUTING.md and docs/ is valid, and runs if a small machine can run it."""

from __future__ import annotations

import html
import importlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import documented
import pytest
import torch
from documented import PAGES, ROOT, Block, blocks, check
from prepared import prepare, yours
from processes import forked

import asymswap
from asymswap import replacements
from asymswap.cli.main import main
from asymswap.data.datasets import open_data
from asymswap.data.metrics import predict
from asymswap.models.networks import DIGITS_PREPROCESSING

ALL = [block for page in PAGES for block in blocks(page)]
WITH_EXAMPLES = [page for page in PAGES if any(b.language in (*documented.SHELL, "python") for b in blocks(page))]
# Those whose examples convert a ResNet-18, download nothing, and take longest.
MINUTES = {"reports.md", "after-conversion.md", "models.md", "benchmarking.md", "finetuning.md", "tutorial.md"}
# Those that train another network in the way of one that `make test` runs, finetune-segmenter.md.
ALIKE = {"finetune-denoiser.md", "finetune-embedder.md"}
# Whose commands README.md has too: a ResNet-20 calibrated on photos, and the digits with the loss that is allowed.
REPEATED = {"calibration.md"}
NIGHTLY = MINUTES | ALIKE | REPEATED | {"deploy.md"}

SLOW = {
    "README.md",
    "deploy.md",
    "benchmarking.md",
    "reports.md",
    "models.md",
    "tutorial.md",
    "after-conversion.md",
    "finetuning.md",
}

Capture = pytest.CaptureFixture[str]


@pytest.mark.parametrize("block", ALL, ids=str)
def test_an_example_can_be_typed(block: Block) -> None:
    check(block)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_names_options_that_there_are(page: Path) -> None:
    unknown = [option for option in documented.inline_options(page) if option not in documented.known_options()]
    assert unknown == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_examples_are_fenced(page: Path) -> None:
    """An indented block would be seen by nobody here."""
    text = documented._FENCE.sub("", page.read_text(encoding="utf-8"))
    assert [line for line in text.splitlines() if line.startswith(("    asymswap", "    make ", "    python"))] == []


@pytest.mark.usefixtures("one_thread")
def test_the_ten_line_loop_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare("finetuning.md", tmp_path)
    monkeypatch.chdir(tmp_path)
    test = open_data("digits", DIGITS_PREPROCESSING, "test")
    before = predict(asymswap.load("model.asym.pt"), test).top1
    (loop,) = [block.text for block in ALL if "for images, labels in loader" in block.text]
    scope: dict[str, Any] = {}
    exec(compile(yours("finetuning.md"), "prepared.py", "exec"), scope)
    exec(compile(loop, "finetuning.md", "exec"), scope)
    tuned = asymswap.load("model.asym.pt")
    tuned.load_state_dict(torch.load("tuned.pt", weights_only=True))
    assert before < 0.7
    assert predict(tuned, test).top1 > 0.9


@pytest.mark.usefixtures("one_thread", "own_kinds")
@pytest.mark.parametrize(
    "page",
    [
        pytest.param(
            page,
            marks=[pytest.mark.slow] * (page.name in SLOW) + [pytest.mark.nightly] * (page.name in NIGHTLY),
            id=page.name,
        )
        for page in WITH_EXAMPLES
    ],
)
def test_the_examples_of_a_page_run_in_turn(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    prepare(page.name, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])  # as python does in that folder
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "100")
    scope: dict[str, Any] = {"__name__": "__page__"}
    exec(compile(yours(page.name), "prepared.py", "exec"), scope)
    for block in blocks(page):
        if block.file is not None:
            Path(block.file).write_text(block.text, encoding="utf-8")
        elif block.needs is None and block.language == "python":
            exec(compile(block.text, str(block), "exec"), scope)
        elif block.needs is None and block.language in documented.SHELL:
            _type(block, monkeypatch, capsys)


def _type(block: Block, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    for step in block.steps:
        printed = ""
        for words, file in step.commands:
            capsys.readouterr()
            monkeypatch.setattr(sys, "argv", words)
            with pytest.raises(SystemExit) as stop:
                main()
            captured = capsys.readouterr()
            assert not stop.value.code, f"{block}: {' '.join(words)}: {captured.err}"
            if file is not None:
                Path(file).write_text(captured.out, encoding="utf-8")
            printed += captured.out + captured.err
        assert documented.not_printed(step, printed) == [], f"{block}: {step.text} printed\n{printed}"


@pytest.fixture
def own_kinds(tmp_path: Path) -> Iterator[None]:
    """Files of a page that are kinds are found."""
    replacements.__path__.append(str(tmp_path))
    importlib.invalidate_caches()
    yield
    replacements.__path__.remove(str(tmp_path))
    for name in ("bottleneck",):
        sys.modules.pop(f"{replacements.__name__}.{name}", None)


def test_there_are_examples_of_each_sort() -> None:
    """What is collected is what stands there: a change of the fences must not turn the tests above into nothing."""
    assert sum(len(block.steps) for block in ALL if block.language in documented.SHELL) > 60
    assert sum(block.language == "python" for block in ALL) > 8
    assert 5 < sum(block.needs is not None for block in ALL) < len(ALL) / 2
    assert {block.page.name for block in ALL if block.file is not None} >= {"adding-a-kind.md", "finetuning.md"}


def example(text: str, language: str = "bash") -> Block:
    return Block(ROOT / "README.md", 1, language, text)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (example("asymswap convert x.pt --recipy 3x3-only\n"), "No such option: --recipy"),
        (example("asymswap convert --recipe 3x3-only\n"), "(?i)missing argument 'model'"),
        (example("asymswap convert x.pt --macs half\n"), "Invalid value for '--macs'"),
        (example("asymswap recipes && asymswap covnert x.pt\n"), "no command 'covnert'"),
        (example("$ asymswap show x.pt --offset\nok\n", "console"), "No such option: --offset"),
        (example("# needs two processes\ntorchrun -m asymswap convert x.pt --speed 2\n"), "No such option: --speed"),
        (example("make test\n"), "make is not run by the tests; say what the block needs"),
        (example("# needs the network\nmake tests\n"), "the Makefile has no 'tests'"),
        (example("# needs the network\npip install 'asymswap[all]'\n"), "there is no extra 'all'"),
        (example("# needs time\npython benchmarks/fuzz.py --speed 2\n"), "fuzz.py knows no --speed"),
        (example("# needs luck\nfrobnicate\n"), "unknown program frobnicate"),
        (example("asymswap recipes\n", ""), "say what language it is"),
        (example("x = = 1\n", "python"), "invalid syntax"),
        (example('swap = { kind = "acb", bm = "branch" }\n', "toml"), "unknown key 'bm'"),
        (example("# nothing\n"), "has no command"),
    ],
)
def test_what_would_not_work_is_found(block: Block, message: str) -> None:
    with pytest.raises((ValueError, SyntaxError), match=message):
        check(block)


def test_output_is_compared_but_for_its_numbers() -> None:
    step = documented.Step("asymswap x", ("MACs   2.5 M  ->  1,024", "…", "", "done"))
    assert documented.not_printed(step, "MACs 10.25 M -> 7\ndone\n") == []
    assert documented.not_printed(step, "MACs 10.25 G -> 7\n") == ["MACs # M -> #", "done"]


def test_the_pages_made_from_code_are_those_of_this_code() -> None:
    script = ROOT / "benchmarks" / "make_reference.py"
    done = forked(f"import runpy\nrunpy.run_path({str(script)!r}, run_name='__main__')", "--check", cwd=script.parent)
    assert done.returncode == 0, done.stderr


def test_the_python_page_speaks_of_every_public_name() -> None:
    page = (ROOT / "docs" / "reference" / "python.md").read_text(encoding="utf-8")
    spoken_of = {line.strip("# `") for line in page.splitlines() if line.startswith("### ")}
    assert spoken_of == {*asymswap.__all__} - {"__version__"}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as by `make docs`: a warning is an error."""
    pytest.importorskip("material", reason="mkdocs-material is not installed")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_the_site_has_every_page_and_every_docstring(site: Path) -> None:
    built = {path.relative_to(site).as_posix() for path in site.rglob("*.html")}
    docs = ROOT / "docs"
    assert {path.relative_to(docs).with_suffix(".html").as_posix() for path in docs.rglob("*.md")} <= built
    assert {"index.html", "security.html", "contributing.html", "changelog.html"} <= built
    notebook = (site / "guide" / "notebook.html").read_text(encoding="utf-8")
    assert 'href="notebook.ipynb"' in notebook
    assert "asymswap.export(" in re.sub("<[^>]+>", "", notebook)
    assert (site / "guide" / "notebook.ipynb").exists()
    python = (site / "reference" / "python.html").read_text(encoding="utf-8")
    for name in {*asymswap.__all__} - {"__version__"}:
        about = (getattr(asymswap, name).__doc__ or "").split("`")[0].split(":")[0].split("\n")[0].strip()[:40]
        assert about
        assert html.escape(about, quote=False) in html.unescape(python).replace("\n", " "), name


def test_the_site_links_to_its_own_pages_and_asks_nobody(site: Path) -> None:
    for page in {*site.rglob("*.html")} - {site / "404.html"}:  # that one is served from anywhere
        text = page.read_text(encoding="utf-8")
        assert not re.findall(r'(?:src|href)="(https?:)?//[^"]*\.(?:css|js|woff2?|png|svg)"', text)
        for target in re.findall(r'href="([\w./-]+\.(?:html|md))(?:#[^"]*)?"', text):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
