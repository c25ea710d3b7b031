"""Reports and pictures that the commands write."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

import asymswap
from asymswap.checkpoint import read_checkpoint
from asymswap.cli.convert import repeatable
from asymswap.errors import AsymswapError
from asymswap.models.converted import restore, save_checkpoint
from asymswap.reporting.tables import view
from asymswap.results.records import read_report

Run = Callable[..., Any]
Refusal = Callable[..., str]
CONVERT = ("convert", "digits-resnet", "--recipe", "3x3-only", "-q")


def layers_of(page: str) -> list[str]:
    return re.findall(
        r'<th scope="row"[^>]*>([^<]*)</th>', page.replace("<wbr>", "").partition("<tbody>")[2].partition("</tbody>")[0]
    )


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("converted")


@pytest.fixture
def converted(run: Run, store: Path) -> Path:
    """The network of the digits, converted with a report as HTML; for the first test, and copied for the others."""
    if not any(store.iterdir()):
        assert run(*CONVERT, "--report", "r.html", "--evaluate", "digits").code == 0
        shutil.copytree(".", store, dirs_exist_ok=True)
    else:
        shutil.copytree(store, ".", dirs_exist_ok=True)
    return Path("digits-resnet.asym.pt")


def test_a_checkpoint_writes_no_markup_into_a_markdown_report(run: Run, converted: Path) -> None:
    nasty = "<script>alert(1)</script>\n\n# heading | `x` ![y](http://z) \x1b[31m"
    stored = read_checkpoint(converted)
    report = stored.header.provenance["report"]
    sites = [{**report["sites"][0], "site": "a`<b>|c", "conv": nasty, "reason": nasty}, *report["sites"][1:]]
    changed = {**report, "model": {**report["model"], "reference": nasty, "notes": [nasty]}, "sites": sites}
    text = view(read_report({"report": changed}, "x.pt"), None).markdown()
    assert "\x1b" not in text
    lines = text.splitlines()
    assert [line for line in lines if line.startswith("#")] == lines[:1]
    assert lines[0].startswith(
        r"# \<script>alert(1)\</script> # heading | \`x\` !\[y](http://z) \\x1b\[31m (digits-resnet) by "
    )
    # What is left after the escapes is no tag, no code and no link.
    bare = re.sub(r"\\[\\`*<\[|]", "", text)
    assert not re.search(r"<[a-z/!?]|\[", bare)
    rows = [line for line in lines if line.startswith("|")][-len(sites) - 4 :]
    assert {len(re.sub(r"\\\\|\\\|", "", row).split("|")) for row in rows} == {14}


class TestHtml:
    def test_it_has_the_rows_of_the_json(self, run: Run, converted: Path) -> None:
        data = json.loads(run("convert", "digits-resnet", "--recipe", "3x3-only", "--dry-run", "--json").out)
        page = Path("r.html").read_text()
        assert layers_of(page) == [row["site"] for row in data["sites"]]
        for row in data["sites"]:
            assert f'data-value="{row["after"]["macs"]}"' in page
        assert f"{data['before']['macs'] / 1e6:.3g} M" in page
        assert "Top-1 on digits" in page

    def test_show_renders_the_same_from_the_checkpoint(self, run: Run, converted: Path) -> None:
        assert run("show", converted, "--report", "again.html").code == 0
        first, again = Path("r.html").read_text(), Path("again.html").read_text()
        # How long it took is not in a checkpoint, for equal runs write equal files; all else is.
        assert again == re.sub(r"<div><dt>Seconds</dt>.*?</div>\n", "", first)

    def test_it_tells_the_command_and_the_recipe(self, converted: Path) -> None:
        page = Path("r.html").read_text()
        assert "asymswap convert digits-resnet --recipe 3x3-only --evaluate digits</pre>" in page
        assert "swap = { kind = &#34;separable&#34;" in page

    @pytest.mark.parametrize("form", ["json", "md"])
    def test_show_writes_the_other_forms_too(self, form: str, run: Run, converted: Path) -> None:
        assert run("show", converted, "--report", f"r.{form}").code == 0
        text = Path(f"r.{form}").read_text()
        assert "7 of 9" in text if form == "md" else len(json.loads(text)["sites"]) == 9
        assert "Time:" not in text  # equal conversions write equal files, without times

    def test_what_was_fused_since_is_told(self, run: Run) -> None:
        assert run("convert", "digits-resnet", "--recipe", "acnet", "-o", "a.pt", "-q").code == 0
        assert run("fuse", "a.pt", "-o", "f.pt", "-q").code == 0
        assert run("show", "f.pt", "--report", "f.html").code == 0
        assert "Fused since" in Path("f.html").read_text()

    def test_an_existing_file_stays(self, refusal: Refusal, converted: Path) -> None:
        assert "r.html exists already" in refusal("show", converted, "--report", "r.html")

    def test_another_ending(self, refusal: Refusal, converted: Path) -> None:
        expected = "report r.htm: the file must end in .html, .json or .md; did you mean .html?"
        assert refusal("show", converted, "--report", "r.htm") == expected


class TestFromPython:
    def test_a_conversion_and_its_checkpoint_tell_the_same(self, run: Run) -> None:
        conversion = asymswap.convert("digits-resnet", "3x3-only")
        asymswap.write_report(conversion, "r.html")
        page = Path("r.html").read_text()
        assert layers_of(page) == [row.site for row in conversion.report.sites]
        assert "<h3>Command</h3>" not in page
        asymswap.save(conversion, "x.pt")
        with pytest.raises(AsymswapError, match=r"r\.html exists already"):
            asymswap.write_report("x.pt", "r.html")
        asymswap.write_report("x.pt", "r.html", force=True)
        assert layers_of(Path("r.html").read_text()) == layers_of(page)


class TestCheckpointsOfOthers:
    def changed(self, path: Path, change: Callable[[Any], None]) -> Path:
        stored = read_checkpoint(path)
        provenance = json.loads(json.dumps(stored.header.provenance))
        change(provenance)
        save_checkpoint(Path("wild.pt"), restore(stored, "x"), replace(stored.header, provenance=provenance))
        return Path("wild.pt")

    def test_their_names_are_text(self, run: Run, converted: Path) -> None:
        def change(provenance: Any) -> None:
            provenance["report"]["sites"][0]["site"] = "</script><script>alert(1)</script>"

        wild = self.changed(converted, change)
        assert run("show", wild, "--report", "wild.html").code == 0
        assert layers_of(Path("wild.html").read_text())[0].startswith("&lt;/script&gt;&lt;script&gt;alert(1)")

    @pytest.mark.parametrize(
        ("key", "value", "said"),
        [
            ("before", {"macs": 10**400, "params": 1}, r"wild\.pt has a damaged report: "),
            ("accuracy", {"data": "x", "images": 0, "before": "much", "after": 0}, r"wild\.pt has a damaged report: "),
            ("sites", "none", r"wild\.pt has a damaged report: sites"),
        ],
    )
    def test_their_numbers_may_be_wrong(
        self, key: str, value: Any, said: str, refusal: Refusal, converted: Path
    ) -> None:
        wild = self.changed(converted, lambda provenance: provenance["report"].update({key: value}))
        assert re.match(said, refusal("show", wild, "--report", "wild.html"))

    def test_one_without_a_report(self, refusal: Refusal, converted: Path) -> None:
        wild = self.changed(converted, lambda provenance: provenance.pop("report"))
        said = refusal("show", wild, "--report", "wild.html")
        assert said == "wild.pt holds no report; convert the model again to have one"


class TestCommand:
    @pytest.mark.parametrize(
        ("arguments", "told"),
        [
            (["convert", "m.pt", "--recipe", "r", "-o", "x.pt", "--force"], "asymswap convert m.pt --recipe r"),
            (["convert", "m.pt", "-ox.pt", "--output=y.pt", "--report=r.md", "--json"], "asymswap convert m.pt"),
            (
                ["convert", "a b.pt", "--set", "rank=3", "--write-plan", "p.json"],
                "asymswap convert 'a b.pt' --set rank=3",
            ),
            (["convert", "m.pt", "--output"], "asymswap convert m.pt"),
        ],
    )
    def test_it_leaves_out_where_results_go(self, arguments: list[str], told: str) -> None:
        assert repeatable(arguments) == told

    def test_equal_runs_write_equal_files_whatever_they_are_called(self, run: Run) -> None:
        for name in ("a.pt", "b.pt"):
            run(*CONVERT, "-o", name, "--report", f"{name}.html")
        assert Path("a.pt").read_bytes() == Path("b.pt").read_bytes()


class TestPictures:
    def test_it_is_drawn_beside_the_table(self, run: Run) -> None:
        pytest.importorskip("matplotlib")
        outcome = run("candidates", "digits-resnet", "--plot", "p.svg")
        assert (outcome.code, outcome.err) == (0, "")
        assert "9 of 9 convs are candidates" in outcome.out
        texts = "".join(ElementTree.parse("p.svg").getroot().itertext())
        assert all(name in texts for name in ("conv1", "layer1.0.conv1", "layer2.1.conv2"))

    def test_another_ending_is_refused(self, refusal: Refusal) -> None:
        assert refusal("candidates", "digits-resnet", "--plot", "x.pdf") == (
            "--plot x.pdf: the file must end in .svg or .png"
        )

    def test_no_file_is_replaced_unasked(self, refusal: Refusal) -> None:
        Path("p.svg").write_text("mine")
        assert "p.svg exists already" in refusal("candidates", "digits-resnet", "--plot", "p.svg")
