"""The HTML report as text: what it says is what the rows say, and nothing that a file brings becomes markup."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_reports import MAKING, kept, like_resnet50, report, site

from asymswap.errors import CheckpointError
from asymswap.reporting.html import to_html
from asymswap.results.convert import OutputChange, Report
from asymswap.results.fuse import FusionRow
from asymswap.results.provenance import Making, read_making, read_report
from asymswap.results.records import to_json
from asymswap.types import Cost

VOID = {"meta", "link", "input", "br", "hr", "img", "wbr"}


@dataclass
class Tag:
    """An element as a browser would see it."""

    name: str
    attributes: dict[str, str]
    children: list[Tag] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join([*self.pieces, *(child.text for child in self.children)])

    def all(self, name: str, **wanted: str) -> list[Tag]:
        """Every element of that name below, in order, with these attributes (`class_` is one of its classes)."""
        found = []
        for child in self.children:
            if child.name == name and all(child.has(key, value) for key, value in wanted.items()):
                found.append(child)
            found += child.all(name, **wanted)
        return found

    def has(self, key: str, value: str) -> bool:
        given = self.attributes.get(key.rstrip("_"), "")
        return value in given.split() if key == "class_" else given == value


class Page(HTMLParser):
    """Builds the tree, and fails where it is not properly nested."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.root = Tag("", {})
        self._open = [self.root]
        self.feed(text)
        self.close()
        assert self._open == [self.root], [tag.name for tag in self._open]

    def handle_starttag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        tag = Tag(name, {key: value or "" for key, value in attributes})
        self._open[-1].children.append(tag)
        if name not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        self._open[-1].children.append(Tag(name, {key: value or "" for key, value in attributes}))

    def handle_endtag(self, name: str) -> None:
        assert self._open.pop().name == name

    def handle_data(self, data: str) -> None:
        self._open[-1].pieces.append(data)


def page(told: Report, making: Making = MAKING) -> Tag:
    return Page(to_html(told, making)).root


def headings(tree: Tag) -> list[str]:
    return [tag.text for tag in tree.all("h2")]


def table(tree: Tag) -> Tag:
    (found,) = tree.all("table", class_="layers")
    return found


MIXED = report(
    site(0), kept(1), site(2, kind="acb", becomes="acb", settings={}, exact=True), kept(3, "rule 2 keeps it")
)
HOSTILE = [
    "</script><script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "{{ 7 * 7 }}{% raw %}",
    "<!--",
    "]]>&amp;<svg onload=alert(1)>",
    "\x00\x1b[31m\x85",
    "\ud800 lone",
    "\u202egnp.live",
]


class TestRows:
    def test_the_table_has_a_row_for_each_layer_with_its_exact_numbers(self) -> None:
        rows = table(page(MIXED)).all("tbody")[0].all("tr")
        assert [row.all("th")[0].text for row in rows] == [row.site for row in MIXED.sites]
        for shown, row in zip(rows, MIXED.sites, strict=True):
            values = [cell.attributes.get("data-value") for cell in shown.all("td", class_="number")]
            costs = [row.before.macs, row.after.macs, row.before.params, row.after.params]
            errors = [row.predicted_error, row.kernel_error, row.output_error]
            assert values[2:] == [*map(str, costs), *("" if error is None else str(error) for error in errors)]
            assert (shown.attributes["data-action"], shown.attributes["data-kind"]) == (row.action, row.kind or "kept")

    def test_the_totals_are_those_of_the_rows(self) -> None:
        found = table(page(MIXED))
        columns = zip(
            *(
                [float(c.attributes["data-value"]) for c in row.all("td", class_="number")[2:6]]
                for row in found.all("tbody")[0].all("tr")
            ),
            strict=True,
        )
        rest = [MIXED.rest.macs, MIXED.rest.macs, MIXED.rest.params, MIXED.rest.params]
        total = [MIXED.before.macs, MIXED.after.macs, MIXED.before.params, MIXED.after.params]
        assert [sum(column) + more for column, more in zip(columns, rest, strict=True)] == total
        assert [c.text for c in found.all("tr", class_="total")[0].all("td", class_="number")] == [
            "28 M",
            "18 M",
            "2.13 M",
            "2.09 M",
        ]

    def test_every_layer_can_be_opened_for_its_settings(self) -> None:
        opened = table(page(MIXED)).all("details")
        assert len(opened) == len(MIXED.sites)
        assert "rank5" in opened[0].text
        assert "horizontal" not in opened[0].text
        assert opened[1].all("summary")[0].text == "a 1x1 kernel has nothing to separate"

    def test_kinds_are_told_by_text_and_by_shape(self) -> None:
        rows = table(page(MIXED)).all("tbody")[0].all("tr")
        done = [row.all("td", class_="done")[0] for row in rows]
        assert [cell.text for cell in done] == ["separable", "kept", "acb", "kept"]
        assert [cell.all("svg")[0].children[0].name for cell in done] == ["circle", "rect", "polygon", "rect"]
        options = [option.attributes["value"] for option in page(MIXED).all("option")]
        assert options == ["", "swap", "keep", "kind:separable", "kind:acb"]

    def test_markup_for_those_who_listen(self) -> None:
        tree = page(like_resnet50())
        for one in tree.all("table"):
            assert one.all("caption")
            assert all(head.attributes.get("scope") == "col" for head in one.all("thead")[0].all("th"))
            assert all(head.attributes.get("scope") == "row" for head in one.all("tbody")[0].all("th"))
        ids = {tag.attributes["id"] for tag in tree.all("h2")}
        assert {tag.attributes["aria-labelledby"] for tag in tree.all("section")} <= ids
        assert tree.all("html")[0].attributes["lang"] == "en"
        levels = [int(tag.name[1]) for tag in [*tree.all("h1"), *tree.all("h2"), *tree.all("h3")]]
        assert sorted(levels)[0] == 1
        assert levels.count(1) == 1


class TestFigures:
    def test_bars_are_as_long_as_the_numbers(self) -> None:
        told = report(site(0))
        pairs = page(told).all("svg", class_="pair")
        for picture, before, after in (
            (pairs[0], told.before.macs, told.after.macs),
            (pairs[1], told.before.params, told.after.params),
            (pairs[2], *told.weights_bytes),
            (pairs[3], 0.0262, 0.0193),
        ):
            widths = [float(bar.attributes["width"]) for bar in picture.all("rect")]
            assert widths == pytest.approx([100, 100 * after / before], abs=0.01)

    def test_accuracy_is_drawn_of_the_whole(self) -> None:
        bars = page(report(site(0))).all("svg", class_="pair")[4].all("rect")
        assert [float(bar.attributes["width"]) for bar in bars] == [87.8, 86.7]

    def test_what_has_grown_is_drawn_longer(self) -> None:
        told = report(site(0, after=Cost(20_000_000, 80_000)), rest=Cost(0, 0))
        first = page(told).all("svg", class_="pair")[0]
        assert [float(bar.attributes["width"]) for bar in first.all("rect")] == [50, 100]
        assert "MACs100.0 % more" in "".join(page(told).all("li", class_="figure")[0].text.split("\n"))


class TestPicture:
    def test_columns_are_as_high_as_the_costs(self) -> None:
        (picture,) = page(MIXED).all("svg", class_="layers")
        columns = picture.all("g", class_="column")
        assert [column.all("title")[0].text.split("\n")[0] for column in columns] == [row.site for row in MIXED.sites]
        heights = [[float(bar.attributes["height"]) for bar in column.all("rect")[1:]] for column in columns]
        macs = [row.before.macs for row in MIXED.sites]
        # The tallest bar of the first panel sets the scale; the others follow it.
        scale = heights[0][0] / macs[0]
        assert heights[0][1] == pytest.approx(scale * MIXED.sites[0].after.macs, abs=0.01)
        assert heights[1][0] == pytest.approx(scale * macs[1], abs=0.01)
        params = heights[0][2] / MIXED.sites[0].before.params
        assert heights[0][3] == pytest.approx(params * MIXED.sites[0].after.params, abs=0.01)
        assert heights[1][1] == pytest.approx(params * MIXED.sites[1].before.params, abs=0.01)

    def test_errors_are_shown_predicted_and_measured(self) -> None:
        (picture,) = page(MIXED).all("svg", class_="layers")
        axis = [text.text for text in picture.all("g", class_="axis")[2].all("text")]
        assert axis == ["Error", "0", "2.0 %", "4.0 %", "6.0 %", "8.0 %"]
        first, second = picture.all("g", class_="column")[:2]
        bar, line = first.all("rect")[-1], first.all("line")[0]
        bottom = float(bar.attributes["y"]) + float(bar.attributes["height"])
        ratio = (bottom - float(line.attributes["y1"])) / float(bar.attributes["height"])
        assert ratio == pytest.approx(0.05 / 0.06, rel=1e-3)
        assert second.all("line") == []

    def test_nothing_swapped_and_nothing_there_are_drawn_too(self) -> None:
        assert "0 of 1 convolutions swapped" in page(report(kept(0))).all("p", class_="verdict")[0].text
        page(report(site(0, before=Cost(0, 0), after=Cost(0, 0)), rest=Cost(0, 0), weights_bytes=(0, 0)))
        page(report(site(0, output_error=float("inf"), predicted_error=float("nan"))))


ALWAYS = ["Headline figures", "The layers in order", "All layers", "What the change does to the output"]


class TestSections:
    def test_all_that_is_known_has_its_place(self) -> None:
        fused = replace(MAKING, fused=(FusionRow("layer1.0.conv2", "acb", "fused"),))
        expected = [*ALWAYS, "Accuracy", "Latency", "Calibration", "Fused since", "How it was made"]
        assert headings(page(like_resnet50(), fused)) == expected

    def test_what_is_not_known_has_none(self) -> None:
        bare = report(site(0), accuracy=None, latency=None, calibration=None)
        assert headings(page(bare, Making())) == [*ALWAYS, "How it was made"]
        assert len(page(bare).all("li", class_="figure")) == 3

    def test_how_it_was_made(self) -> None:
        tree = page(like_resnet50())
        assert [tag.text for tag in tree.all("pre")] == [MAKING.command, MAKING.recipe.strip()]
        facts = {tag.all("dt")[0].text: tag.all("dd")[0].text for tag in tree.all("section")[-1].all("div")}
        assert facts["Changed in it"] == "budget.macs = 0.5"
        assert facts["Versions"] == "asymswap 0.1.0, torch 2.14.1"
        assert facts["SHA-256 of the file"] == "ab" * 32
        assert facts["Seconds"] == "2.8 (load 0.5, plan 2.2)"

    def test_accuracy_counts_images(self) -> None:
        (section,) = [one for one in page(like_resnet50()).all("section") if one.all("h2")[0].text == "Accuracy"]
        cells = [cell.text for cell in section.all("td")]
        assert cells == ["87.80 %", "1,756", "2,000", "86.70 %", "1,734", "2,000"]
        assert "Change: -1.10 points; one image is 0.05." in section.text


class TestAlone:
    def test_what_a_mac_is_stands_as_it_is_counted(self) -> None:
        page = to_html(like_resnet50(), MAKING)
        for counted in ("FLOPs are 2 x MACs", "interpolation of feature maps", "4 MACs for each sample"):
            assert page.count(counted) == 1

    def test_it_is_small(self) -> None:
        assert len(to_html(like_resnet50(), MAKING).encode()) < 300_000

    def test_it_asks_for_nothing(self) -> None:
        text = to_html(like_resnet50(), MAKING)
        assert not re.search(r"https?:|url\(|@import", text)
        tree = Page(text).root
        for tag in [*tree.all("a"), *tree.all("link"), *tree.all("script"), *tree.all("img"), *tree.all("use")]:
            assert "src" not in tag.attributes
            assert tag.attributes.get("href", "#").startswith(("#", "data:,"))

    @pytest.mark.parametrize("told", [MIXED, report(site(0, site="</style><script>x</script>"))], ids=["tame", "wild"])
    def test_its_policy_lets_just_its_own_script_and_style_in(self, told: Report) -> None:
        tree = page(told)
        (policy,) = tree.all("meta", **{"http-equiv": "Content-Security-Policy"})
        rules = dict(rule.strip().split(" ", 1) for rule in policy.attributes["content"].split(";"))
        assert rules["default-src"] == "'none'"
        for name in ("style", "script"):
            (tag,) = tree.all(name)
            digest = base64.b64encode(hashlib.sha256(tag.text.encode()).digest()).decode()
            assert rules[f"{name}-src"] == f"'sha256-{digest}'"

    def test_no_attribute_is_style_or_script(self) -> None:
        # The policy would refuse them, and the page would look otherwise than meant.
        def walk(tag: Tag) -> None:
            assert not [key for key in tag.attributes if key == "style" or key.startswith("on")]
            for child in tag.children:
                walk(child)

        walk(page(like_resnet50()))


def shape(tag: Tag) -> list[object]:
    """The elements and their attributes' names, whatever the texts are."""
    return [tag.name, sorted(tag.attributes), *(shape(child) for child in tag.children if child.name != "wbr")]


class TestNamesOfOthers:
    @pytest.mark.parametrize("text", HOSTILE)
    def test_no_text_becomes_markup(self, text: str) -> None:
        def named(word: str) -> Tag:
            told = report(
                site(0, site=word, conv=word, becomes=word, reason=word, settings={word: word}, absorbs=word),
                kept(1, word),
                recipe=word,
                preserves={"separable": word},
            )
            calibration = replace(told.calibration, data=word, notes=(word,)) if told.calibration else None
            accuracy = replace(told.accuracy, data=word, note=word) if told.accuracy else None
            latency = replace(told.latency, machine=word) if told.latency else None
            model = replace(told.model, reference=word, origin=word, weights=word, notes=(word,))
            told = replace(told, calibration=calibration, accuracy=accuracy, latency=latency, model=model)
            making = Making(word, {word: word}, 0, word, {word: word}, (FusionRow(word, word, word, word),))
            made = to_html(told, making)
            made.encode()
            return Page(made).root

        assert shape(named(text)) == shape(named("tame"))

    @given(st.text(st.characters(), min_size=1, max_size=8))
    @settings(max_examples=60, deadline=None, derandomize=True)
    def test_names_are_read_as_they_were_written(self, text: str) -> None:
        name = "n" + text
        tree = page(report(site(0, site=name), kept(1)))
        shown = table(tree).all("tbody")[0].all("th")[0].text
        assert len(shown) == len(name)
        assert all(one == other or other == "\ufffd" for one, other in zip(name, shown, strict=True))
        assert "\ufffd" not in "".join(char for char in shown if char.isalnum())


class TestReadBack:
    def test_a_report_comes_back_from_its_json(self) -> None:
        told = like_resnet50()
        written = json.loads(json.dumps({"report": to_json(told)}))
        assert read_report(written, "x.pt") == told

    def test_numbers_that_are_not_finite_are_null_and_come_back_as_none_of_their_own(self) -> None:
        told = replace(like_resnet50(), output=OutputChange(math.inf, math.nan, "1 image"), multiplier=math.inf)
        data = json.loads(json.dumps(to_json(told), allow_nan=False))
        assert data["output"] == {"relative": None, "largest": None, "probe": "1 image"}
        assert data["multiplier"] is None
        back = read_report({"report": data}, "x.pt")
        assert math.isnan(back.output.relative)
        assert "nan % relative difference" in to_html(back, MAKING)

    def test_how_it_was_made_comes_back(self) -> None:
        written = {
            "recipe": MAKING.recipe,
            "overrides": MAKING.overrides,
            "seed": 0,
            "command": MAKING.command,
            "versions": MAKING.versions,
            "fused": {"sites": [{"site": "a", "kind": "acb", "outcome": "left", "reason": "because"}]},
            "something newer": 1,
        }
        fused = (FusionRow("a", "acb", "left", "because"),)
        assert read_making(written, "x.pt") == replace(MAKING, fused=fused)
        assert read_making({}, "x.pt") == Making()

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"report": None}, r"x\.pt has a damaged report: : "),
            ({"report": {"sites": 3}}, r"x\.pt has a damaged report: "),
            ({}, r"x\.pt holds no report; convert the model again to have one"),
        ],
    )
    def test_damage_is_told(self, change: dict[str, object], said: str) -> None:
        with pytest.raises(CheckpointError, match=said):
            read_report(change, "x.pt")

    def test_damage_deep_inside_is_named(self) -> None:
        data = json.loads(json.dumps(to_json(MIXED)))
        data["sites"][1]["before"]["macs"] = "many"
        with pytest.raises(CheckpointError, match=r"x\.pt has a damaged report: sites\.1\.before\.macs: .*integer"):
            read_report({"report": data}, "x.pt")
