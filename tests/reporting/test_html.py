"""The HTML report as text: what it says is what the rows say, and nothing that a file brings becomes markup."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from dataclasses import replace

import pytest
from html_tree import Page, Tag
from hypothesis import given
from hypothesis import strategies as st
from made_reports import PROVENANCE, kept, like_resnet50, report, site

from asymswap.errors import CheckpointError
from asymswap.reporting.convert import report_view, to_html
from asymswap.results.convert import FusionRow, OutputChange, Report
from asymswap.results.records import Provenance, read_provenance, read_report, to_json
from asymswap.types import Cost


def page(told: Report, provenance: Provenance = PROVENANCE) -> Tag:
    return Page(to_html(told, provenance)).root


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
            values = [cell.attributes.get("data-value") for cell in shown.all("td", class_="right")]
            costs = [row.before.macs, row.after.macs, row.before.params, row.after.params]
            errors = [row.predicted_error, row.kernel_error, row.output_error]
            expected = [*map(str, costs), *("" if error is None else str(error) for error in errors)]
            assert values[2:] == expected  # behind the place and the calls

    def test_the_totals_are_those_of_the_rows(self) -> None:
        found = table(page(MIXED))
        columns = zip(
            *(
                [float(c.attributes["data-value"]) for c in row.all("td", class_="right")[2:6]]
                for row in found.all("tbody")[0].all("tr")
            ),
            strict=True,
        )
        rest = [MIXED.rest.macs, MIXED.rest.macs, MIXED.rest.params, MIXED.rest.params]
        total = [MIXED.before.macs, MIXED.after.macs, MIXED.before.params, MIXED.after.params]
        assert [sum(column) + more for column, more in zip(columns, rest, strict=True)] == total
        assert [c.text for c in found.all("tr", class_="total")[0].all("td", class_="right") if c.text] == [
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
        assert opened[1].all("summary")[0].text == " kept: a 1x1 kernel has nothing to separate-"

    def test_kinds_are_told_by_text_and_by_shape(self) -> None:
        rows = table(page(MIXED)).all("tbody")[0].all("tr")
        done = [row.all("summary")[0] for row in rows]
        assert [cell.pieces[0].split(":")[0].strip() for cell in done] == ["separable", "kept", "acb", "kept"]
        marks = [cell.all("span")[0] for cell in done]
        assert [mark.text for mark in marks] == ["●", "-", "■", "-"]
        assert [mark.attributes["class"] for mark in marks] == ["kind0", "kept", "kind1", "kept"]
        options = [option.attributes["value"] for option in page(MIXED).all("option")]
        assert options == ["", "swapped", "separable", "acb", "kept"]

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


def lengths(tag: Tag) -> list[dict[str, int]]:
    """The length of each bar in a tag by its first class: the number behind `w` or `h` in the second."""
    return [{css: int(length[1:])} for css, length in (bar.attributes["class"].split() for bar in tag.all("i"))]


class TestFigures:
    def test_bars_are_as_long_as_the_numbers(self) -> None:
        told = report(site(0))
        pairs = page(told).all("div", class_="pair")
        for pair, before, after in (
            (pairs[0], told.before.macs, told.after.macs),
            (pairs[1], told.before.params, told.after.params),
            (pairs[2], *told.weights_bytes),
            (pairs[3], 0.0262, 0.0193),
        ):
            assert lengths(pair) == [{"before": 100}, {"after": round(100 * after / before)}]

    def test_accuracy_is_drawn_of_the_whole(self) -> None:
        assert lengths(page(report(site(0))).all("div", class_="pair")[4]) == [{"before": 88}, {"after": 87}]

    def test_what_has_grown_is_drawn_longer(self) -> None:
        told = report(site(0, after=Cost(20_000_000, 80_000)), rest=Cost(0, 0))
        assert lengths(page(told).all("div", class_="pair")[0]) == [{"before": 50}, {"after": 100}]
        assert "MACs100.0 % more" in "".join(page(told).all("li", class_="figure")[0].text.split("\n"))


class TestPicture:
    def test_columns_are_as_high_as_the_costs(self) -> None:
        tree = page(MIXED)
        layers = tree.all("a", class_="layer")
        assert [layer.all("span", class_="name")[0].text for layer in layers] == [row.site for row in MIXED.sites]
        for title, layer, row in zip(("●", "-", "■", "-"), layers, MIXED.sites, strict=True):
            assert layer.all("span", class_="shape")[0].text == title
            panels = layer.all("span", class_="panel")
            for panel, name, most in zip(panels, ("macs", "params"), (10_002_000, 36_866), strict=False):
                before, after = (round(100 * getattr(cost, name) / most) for cost in (row.before, row.after))
                assert lengths(panel) == [{"before": before}, {"after": after}]

    def test_errors_are_shown_predicted_and_measured(self) -> None:
        tree = page(MIXED)
        (axis,) = tree.all("div", class_="axis")
        assert [panel.text for panel in axis.all("span")] == ["10 MMACs", "36.9 kParameters", "6.3 %Error"]
        first, second = (layer.all("span", class_="panel")[2] for layer in tree.all("a", class_="layer")[:2])
        assert lengths(first) == [{"after": round(100 * 0.06 / 0.063)}, {"predicted": round(100 * 0.05 / 0.063)}]
        assert lengths(second) == []

    def test_a_column_leads_to_its_row_and_tells_of_the_layer(self) -> None:
        tree = page(MIXED)
        ids = [row.attributes["id"] for row in table(tree).all("tbody")[0].all("tr")]
        layers = tree.all("a", class_="layer")
        assert [layer.attributes["href"] for layer in layers] == [f"#{one}" for one in ids]
        tips = [[line.text for line in layer.all("span", class_="tip")[0].all("span")] for layer in layers]
        assert tips[0] == [
            *("layer1.0.conv2", "Conv 64->64 3x3", "Map 56x56", "Calls 1", "Becomes separable: rank 5, vertical"),
            *("MACs 10 M", "after 5 M", "Params 36.9 k", "after 18 k"),
            *("Predicted 5.0 %", "Kernel error 20.0 %", "Error 6.0 %"),
        ]
        assert tips[1][4:] == ["Becomes kept: a 1x1 kernel has nothing to separate", *tips[1][5:9]]
        assert [layer.attributes["aria-label"] for layer in layers] == ["; ".join(tip) for tip in tips]

    def test_every_length_has_its_rule(self) -> None:
        tree = page(like_resnet50())
        style = tree.all("style")[0].text
        for bar in [*tree.all("i", class_="before"), *tree.all("i", class_="after")]:
            length = bar.attributes["class"].split()[-1]
            assert f".{length}{{" in style

    def test_nothing_swapped_and_nothing_there_are_drawn_too(self) -> None:
        assert "0 of 1 convolutions swapped" in page(report(kept(0))).all("p", class_="verdict")[0].text
        page(report(site(0, before=Cost(0, 0), after=Cost(0, 0)), rest=Cost(0, 0), weights_bytes=(0, 0)))
        page(report(site(0, output_error=float("inf"), predicted_error=float("nan"))))


ALWAYS = ["Headline figures", "The layers in order", "All layers", "What the change does to the output"]


class TestSections:
    def test_all_that_is_known_has_its_place(self) -> None:
        fused = replace(PROVENANCE, fused=(FusionRow("layer1.0.conv2", "acb", "fused"),))
        expected = [*ALWAYS, "Scores", "Time", "Calibration", "Fused since", "How it was made"]
        assert headings(page(like_resnet50(), fused)) == expected

    def test_what_is_not_known_has_none(self) -> None:
        bare = report(site(0), accuracy=None, latency=None, calibration=None)
        assert headings(page(bare, Provenance())) == [*ALWAYS, "How it was made"]
        assert len(page(bare).all("li", class_="figure")) == 3

    def test_how_it_was_made(self) -> None:
        tree = page(like_resnet50())
        command, recipe, markdown = (tag.text for tag in tree.all("pre"))
        assert [command, recipe] == [PROVENANCE.command, PROVENANCE.recipe.strip()]
        assert markdown == report_view(replace(like_resnet50(), seconds={}), None).markdown()
        facts = {tag.all("dt")[0].text: tag.all("dd")[0].text for tag in tree.all("section")[-1].all("div")}
        assert facts["Changed in it"] == "budget.macs = 0.5"
        assert facts["Versions"] == "asymswap 0.1.0, torch 2.14.1"
        assert facts["SHA-256 of the file"] == "ab" * 32
        assert facts["Seconds"] == "2.8 (load 0.5, plan 2.2)"

    def test_accuracy_counts_images(self) -> None:
        (section,) = [one for one in page(like_resnet50()).all("section") if one.all("h2")[0].text == "Scores"]
        assert "87.80 % before, 86.70 % after: -1.10 points. Right: 1,756 before, 1,734 after" in section.text
        assert "of 2,000 images; one image is 0.05 points." in section.text


class TestAlone:
    def test_what_a_mac_is_stands_as_it_is_counted(self) -> None:
        page = to_html(like_resnet50(), PROVENANCE)
        for counted in ("FLOPs are 2 x MACs", "interpolation of feature maps", "4 MACs for each sample"):
            assert page.count(counted) == 1

    def test_it_is_small(self) -> None:
        assert len(to_html(like_resnet50(), PROVENANCE).encode()) < 300_000

    def test_it_asks_for_nothing(self) -> None:
        text = to_html(like_resnet50(), PROVENANCE)
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
            provenance = Provenance(word, {word: word}, 0, word, {word: word}, (FusionRow(word, word, word, word),))
            made = to_html(told, provenance)
            made.encode()
            return Page(made).root

        assert shape(named(text)) == shape(named("tame"))

    @given(st.text(st.characters(), min_size=1, max_size=8))
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

    def test_a_report_from_when_top_1_was_all_has_it_as_its_score(self) -> None:
        told = like_resnet50()
        data = json.loads(json.dumps(to_json(told)))
        old = {
            "data": told.accuracy and told.accuracy.data,
            "images": 2000,
            "before": 0.878,
            "after": 0.867,
            "note": "",
        }
        assert read_report({"report": {**data, "accuracy": old}}, "x.pt") == told

    def test_numbers_that_are_not_finite_are_null_and_come_back_as_none_of_their_own(self) -> None:
        told = replace(like_resnet50(), output=OutputChange(math.inf, math.nan, "1 image"), multiplier=math.inf)
        data = json.loads(json.dumps(to_json(told), allow_nan=False))
        assert data["output"] == {"relative": None, "largest": None, "probe": "1 image", "input": ""}
        assert data["multiplier"] is None
        back = read_report({"report": data}, "x.pt")
        assert math.isnan(back.output.relative)
        assert "nan % relative difference" in to_html(back, PROVENANCE)

    def test_how_it_was_made_comes_back(self) -> None:
        written = {
            "recipe": PROVENANCE.recipe,
            "overrides": PROVENANCE.overrides,
            "seed": 0,
            "command": PROVENANCE.command,
            "versions": PROVENANCE.versions,
            "fused": {"sites": [{"site": "a", "kind": "acb", "outcome": "left", "reason": "because"}]},
            "something newer": 1,
        }
        fused = (FusionRow("a", "acb", "left", "because"),)
        assert read_provenance(written, "x.pt") == replace(PROVENANCE, fused=fused)
        assert read_provenance({}, "x.pt") == Provenance()

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
