"""The HTML report in a real browser: it sorts, filters, opens details, goes by keyboard, asks for nothing."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from made_reports import PROVENANCE, kept, like_resnet50, report, site

from asymswap.reporting.convert import to_html

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.programs,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (apt install chromium)"),
]

QUIET = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 375, "height": 740}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield chromium
        chromium.close()


@dataclass
class OpenedModel:
    """A page with all that it has complained about and asked for."""

    page: Any
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def names(self) -> list[str]:
        """The layers that the table shows, from above."""
        found: list[str] = self.page.locator("table.layers tbody tr:visible > th").all_inner_texts()
        return found

    def heading(self, name: str, nth: int = 0) -> Any:
        return self.page.locator("table.layers thead th").filter(has_text=name).nth(nth)

    def sort(self, name: str, nth: int = 0) -> None:
        self.heading(name, nth).get_by_role("button").click()


@pytest.fixture
def opened(browser: Any, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[OpenedModel]:
    """The report of a network like ResNet-50, opened from a file."""
    path = tmp_path / "report.html"
    path.write_text(to_html(like_resnet50(), PROVENANCE), encoding="utf-8")
    context = browser.new_context(viewport=getattr(request, "param", DESKTOP), reduced_motion="reduce")
    page = context.new_page()
    found = OpenedModel(page)
    page.on("console", lambda message: found.complaints.append(message.text))
    page.on("pageerror", lambda error: found.complaints.append(str(error)))
    page.on("request", lambda asked: found.requests.append(asked.url))
    page.goto(path.as_uri())
    yield found
    context.close()
    assert found.complaints == []
    assert [url for url in found.requests if not url.startswith("data:")] == [path.as_uri()]


ROWS = like_resnet50().sites


class TestTable:
    def test_it_stands_in_the_order_of_the_network_at_first(self, opened: OpenedModel) -> None:
        assert opened.names() == [row.site for row in ROWS]
        assert opened.heading("#").get_attribute("aria-sort") == "ascending"

    def test_numbers_sort_by_their_value_the_largest_first(self, opened: OpenedModel) -> None:
        opened.sort("MACs")
        assert opened.names() == [row.site for row in sorted(ROWS, key=lambda row: -row.before.macs)]
        assert opened.heading("MACs").get_attribute("aria-sort") == "descending"
        assert opened.heading("#").get_attribute("aria-sort") == "none"
        opened.sort("MACs")
        assert opened.names() == [row.site for row in sorted(ROWS, key=lambda row: row.before.macs)]
        assert opened.heading("MACs").get_attribute("aria-sort") == "ascending"

    def test_what_has_no_value_stands_last_both_ways(self, opened: OpenedModel) -> None:
        swapped = [row for row in ROWS if row.output_error is not None]
        for sign in (-1, 1):
            opened.sort("Error", 1)
            expected = sorted(swapped, key=lambda row: sign * (row.output_error or 0.0))
            assert opened.names()[: len(swapped)] == [row.site for row in expected]

    def test_text_sorts_with_its_numbers_as_numbers(self, opened: OpenedModel) -> None:
        opened.sort("Becomes")
        hows = opened.page.locator("table.layers tbody summary").all_inner_texts()
        ranks = [int(how.split("rank ")[1].split(",")[0]) for how in hows if "rank" in how]
        assert ranks == sorted(ranks)
        assert ranks[0] < 10 <= ranks[-1]

    def test_the_totals_stay_below(self, opened: OpenedModel) -> None:
        opened.sort("MACs")
        assert opened.page.locator("table.layers tfoot th").all_inner_texts() == ["other layers", "total"]

    def test_a_text_filters(self, opened: OpenedModel) -> None:
        opened.page.get_by_label("Find").fill("LAYER3 1x1")
        wanted = [row.site for row in ROWS if row.site.startswith("layer3") and "1x1" in row.conv]
        assert opened.names() == wanted
        assert opened.page.locator("output").inner_text() == f"{len(wanted)} of 53 layers"
        opened.page.get_by_label("Find").fill("no such layer")
        assert opened.names() == []
        opened.page.get_by_label("Find").fill("")
        assert len(opened.names()) == 53

    def test_what_was_done_filters(self, opened: OpenedModel) -> None:
        opened.page.get_by_label("Show").select_option("swapped")
        assert opened.names() == [row.site for row in ROWS if row.action == "swap"]
        opened.page.get_by_label("Find").fill("layer1")
        opened.sort("MACs")
        wanted = [row for row in ROWS if row.action == "swap" and row.site.startswith("layer1")]
        assert opened.names() == [row.site for row in sorted(wanted, key=lambda row: -row.before.macs)]

    def test_details_open(self, opened: OpenedModel) -> None:
        row = opened.page.locator("#layer-2")
        assert not row.get_by_text("vertical-first").is_visible()
        row.locator("summary").click()
        assert row.get_by_text("vertical-first").is_visible()

    def test_all_of_it_goes_by_keyboard(self, opened: OpenedModel) -> None:
        page = opened.page
        page.get_by_label("Find").focus()
        page.keyboard.type("layer2")
        assert {name.split(".")[0] for name in opened.names()} == {"layer2"}
        page.keyboard.press("Tab")
        page.keyboard.press("Tab")  # past the choice of what is shown, to the table's frame
        for _ in range(7):
            page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.textContent") == "MACs"
        page.keyboard.press("Enter")
        assert opened.heading("MACs").get_attribute("aria-sort") == "descending"
        first = page.locator("table.layers tbody tr:visible summary").first
        first.focus()
        page.keyboard.press("Enter")
        assert page.locator("table.layers details[open]").count() == 1


class TestPicture:
    def test_pointing_at_a_layer_tells_of_it(self, opened: OpenedModel) -> None:
        tips = opened.page.locator(".tip:visible")
        assert tips.count() == 0
        frame = opened.page.locator("figure").bounding_box()
        for number, name in ((4, "layer1.4.conv2"), (52, "layer7.4.conv2")):
            opened.page.locator("a.layer").nth(number).hover()
            assert tips.count() == 1
            assert tips.inner_text().startswith(name)
            box = tips.bounding_box()
            assert frame["x"] <= box["x"]
            assert box["x"] + box["width"] <= frame["x"] + frame["width"] + 1
        opened.page.mouse.move(5, 5)
        assert tips.count() == 0

    def test_it_goes_by_keyboard(self, opened: OpenedModel) -> None:
        page, tips = opened.page, opened.page.locator(".tip:visible")
        page.locator("a.layer").first.focus()
        page.keyboard.press("Tab")
        assert tips.inner_text().startswith("layer1.1.conv2")
        page.keyboard.press("Enter")
        assert page.locator("tr:target > th").inner_text() == "layer1.1.conv2"

    def test_bars_have_their_heights(self, opened: OpenedModel) -> None:
        layer = opened.page.locator("a.layer").nth(1)
        panel = layer.locator(".panel").first.bounding_box()
        before = layer.locator(".panel").first.locator(".before").bounding_box()
        after = layer.locator(".panel").first.locator(".after").bounding_box()
        assert before["height"] == pytest.approx(panel["height"], rel=0.03)
        assert after["height"] == pytest.approx(panel["height"] / 2, rel=0.03)
        assert before["y"] + before["height"] == pytest.approx(after["y"] + after["height"], abs=0.5)

    def test_a_layer_that_is_filtered_out_is_found_too(self, opened: OpenedModel) -> None:
        opened.page.get_by_label("Show").select_option("kept")
        opened.page.locator("a.layer").nth(1).click()
        assert opened.page.locator("#layer-2").is_visible()
        assert len(opened.names()) == 53

    def test_every_column_has_a_name(self, opened: OpenedModel) -> None:
        labels = [column.get_attribute("aria-label") for column in opened.page.locator("a.layer").all()]
        assert [label.split(";")[0] for label in labels] == [row.site for row in ROWS]


@pytest.mark.parametrize("opened", [PHONE], indirect=True)
def test_a_phone_scrolls_the_page_one_way_only(opened: OpenedModel) -> None:
    wide, seen = opened.page.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
    assert wide == seen == 375
    opened.page.locator("a.layer").nth(3).scroll_into_view_if_needed()
    opened.page.locator("a.layer").nth(3).hover()
    assert opened.page.locator(".tip:visible").count() == 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_reader_chooses_light_or_dark(opened: OpenedModel, scheme: str) -> None:
    opened.page.emulate_media(color_scheme=scheme)
    paper = opened.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert paper == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 25, 31)"}[scheme]
    drawn = opened.page.evaluate("getComputedStyle(document.querySelector('a.kept .after')).backgroundColor")
    assert drawn == {"light": "rgb(109, 121, 133)", "dark": "rgb(152, 164, 176)"}[scheme]


def test_paper_is_light_and_has_no_controls(opened: OpenedModel) -> None:
    opened.page.emulate_media(media="print", color_scheme="dark")
    assert opened.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert not opened.page.get_by_label("Find").is_visible()
    assert opened.page.pdf(format="A4").startswith(b"%PDF")


def test_without_scripts_the_page_promises_nothing(browser: Any, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text(to_html(like_resnet50(), PROVENANCE), encoding="utf-8")
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(path.as_uri())
    assert page.locator("table.layers tbody tr").count() == 53
    assert not page.locator(".controls").is_visible()
    assert page.locator("th button").count() == 0
    page.locator("#layer-2 summary").click()
    assert page.locator("#layer-2").get_by_text("vertical-first").is_visible()
    context.close()


def test_a_script_in_a_name_never_runs(browser: Any, tmp_path: Path) -> None:
    wild = "</script></style><img src=x onerror=document.title='gone'><script>document.title='gone'</script>"
    told = report(site(0, site=wild), kept(1, reason=wild), recipe=wild)
    path = tmp_path / "report.html"
    path.write_text(to_html(told, PROVENANCE), encoding="utf-8")
    context = browser.new_context()
    page = context.new_page()
    requests: list[str] = []
    page.on("request", lambda asked: requests.append(asked.url))
    page.goto(path.as_uri())
    assert page.title() != "gone"
    assert page.locator("table.layers tbody tr > th").first.inner_text() == wild
    assert page.locator("img").count() == 0
    assert [url for url in requests if not url.startswith("data:")] == [path.as_uri()]
    # Were a script to come in nevertheless, the page's own policy would refuse it.
    page.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=data:, onerror=\"document.title=1\">')")
    page.evaluate(
        "{const s=document.createElement('script'); s.textContent='document.title=2'; document.body.append(s)}"
    )
    assert page.title() not in ("gone", "1", "2")
    context.close()
