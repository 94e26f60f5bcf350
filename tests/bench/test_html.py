"""The page holds every figure, escapes everything, needs nothing beside it, and a browser shows it as it should."""

import itertools
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from chromium import Page, chromium, find_chromium
from PIL import Image
from report_sample import passing_report, sample_report, write_images

from pmm_edge.bench.html import write_html
from pmm_edge.bench.html.charts import Axis, Point, Series, chart, linear_axis, log_axis
from pmm_edge.bench.html.page import SHOWN_HITS, html
from pmm_edge.bench.html.pictures import png, thumbnail
from pmm_edge.bench.report import BenchReport, FirstHit
from pmm_edge.errors import OutputError

_VOID = {"meta", "img", "br"}


class Parsed(HTMLParser):
    """Every element with its attributes, and the text; an element that is not closed where it should be is an error."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in _VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def hostile(value: Any, text: str) -> Any:
    """A report with all of its texts replaced, names of scopes and invariants too."""
    if isinstance(value, str):
        return text
    if isinstance(value, list):
        return [hostile(entry, text) for entry in value]
    if isinstance(value, dict):
        return {text + str(key): hostile(entry, text) for key, entry in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        kept = {field.name: getattr(value, field.name) for field in fields(value) if field.name == "scope"}
        changed = {field.name: hostile(getattr(value, field.name), text) for field in fields(value)}
        return type(value)(**changed | kept)
    return value


def test_a_failing_model_is_the_first_that_is_said(tmp_path: Path) -> None:
    page = Parsed(html(sample_report(tmp_path)))
    first = page.text.split("What failed")[0]
    assert "Fails. 1 of 4 models fails: model-bgr.onnx cosine 0.712345" in first
    assert "Likely cause: the input is BGR" in page.text
    assert "It begins at /conv1/Conv" in page.text
    assert "the machine is busy" in page.text


def test_models_that_pass_are_said_to(tmp_path: Path) -> None:
    page = Parsed(html(passing_report(tmp_path)))
    assert "Passes. All 3 models hold their gates against best.pt: mAP moves by at most 0.29 points" in page.text
    assert "What failed" not in page.text


def test_an_interrupted_bench_is_partial_and_whatever_is_missing_is_left_out(tmp_path: Path) -> None:
    report = passing_report(tmp_path)
    bare = [
        replace(
            model,
            parity=None,
            retrieval=None,
            retrieval_change=None,
            cmc=[],
            latency=[],
            invariants=[],
            stream=None,
            cold_start=None,
            compute=None,
            energy=None,
        )
        for model in (report.reference, *report.models)
    ]
    page = Parsed(html(replace(report, reference=bare[0], models=bare[1:], complete=False)))
    assert "Partial. Interrupted" in page.text
    assert not page.all("figure")
    assert "Retrieval" not in page.text
    assert "AMD EPYC" in page.text
    badges = [span for span in page.all("span") if (span.get("class") or "").startswith("badge ")]
    assert {span["class"] for span in badges} == {"badge reference", "badge not-judged"}
    assert "◌ not judged" in page.text


@pytest.mark.parametrize("text", ["<script>alert(1)</script>.jpg", "\"'><img src=x onerror=alert(1)>&amp;", "</style>"])
def test_no_text_of_a_report_becomes_html(text: str, tmp_path: Path) -> None:
    report = sample_report(tmp_path)
    expected = [tag for tag, _ in Parsed(html(replace(report, data=str(tmp_path / "none")))).elements]
    page = Parsed(html(hostile(report, text)))
    assert text in page.text
    assert not page.all("script")
    assert len(page.all("style")) == 1
    assert {tag for tag, _ in page.elements} <= set(expected)
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)


def test_the_page_needs_nothing_from_outside(tmp_path: Path) -> None:
    text = html(sample_report(tmp_path), [("Maps", "three stages", Image.new("RGB", (40, 20)))])
    page = Parsed(text)
    loaded = [value for _, attributes in page.elements for name, value in attributes.items() if name in ("src", "href")]
    assert loaded
    assert all(value and value.startswith(("data:image/", "#")) for value in loaded)
    assert "http" not in re.sub(r'http-equiv="Content-Security-Policy"', "", text)
    assert not re.search(r"url\(|@import", text)
    (policy,) = [meta["content"] for meta in page.all("meta") if meta.get("http-equiv")]
    assert policy is not None
    assert "default-src 'none'" in policy


def test_charts_and_tables_can_be_read_without_seeing_them(tmp_path: Path) -> None:
    page = Parsed(html(sample_report(tmp_path)))
    charts = [svg for svg in page.all("svg") if svg.get("role") == "img"]
    assert len(charts) == 5  # cosine, CMC, accuracy, latency twice
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {svg[said] for svg in charts for said in ("aria-labelledby", "aria-describedby")} <= set(ids)
    assert len(page.all("caption")) == len(page.all("table"))
    assert all(heading.get("scope") in ("col", "row") for heading in page.all("th"))
    assert all(image.get("alt") for image in page.all("img"))
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))


def test_changed_first_hits_are_shown_with_words_and_bounded(tmp_path: Path) -> None:
    page = Parsed(html(sample_report(tmp_path)))
    assert "2 of 458 queries: 1 became wrong, 0 became right, 1 stayed" in page.text
    assert f"The first {SHOWN_HITS} are shown" in page.text
    assert len(page.all("img")) == 3 * (2 + SHOWN_HITS)
    assert "✗ wrong" in page.text
    assert "✓ right" in page.text


def test_only_images_of_the_data_set_are_opened(tmp_path: Path) -> None:
    (inside, *_) = write_images(tmp_path / "data", 1)
    (outside, *_) = write_images(tmp_path / "private", 1)
    assert thumbnail(inside, tmp_path / "data") is not None
    assert thumbnail(outside, tmp_path / "data") is None
    assert thumbnail(str(tmp_path / "data" / ".." / "private" / Path(outside).name), tmp_path / "data") is None
    (tmp_path / "data" / "text.jpg").write_text("no image")
    assert thumbnail(str(tmp_path / "data" / "text.jpg"), tmp_path / "data") is None
    assert thumbnail(str(tmp_path / "data" / "gone.jpg"), tmp_path / "data") is None


def test_images_that_are_gone_leave_their_names(tmp_path: Path) -> None:
    report = sample_report(tmp_path)
    change = report.models[1].retrieval_change
    assert change is not None
    gone = replace(change, first_hits=[FirstHit(str(tmp_path / "gone.jpg"), "/a/b.jpg", True, "c.jpg", False)])
    page = Parsed(html(replace(report, models=[replace(report.models[1], retrieval_change=gone)])))
    assert not page.all("img")
    assert all(name in page.text for name in ("gone.jpg", "b.jpg", "c.jpg"))


def test_pictures_are_pngs_or_refused(tmp_path: Path) -> None:
    picture = Image.new("RGB", (8, 8))
    picture.save(tmp_path / "a.png")
    assert png((tmp_path / "a.png").read_bytes()).startswith("data:image/png;base64,iVBOR")
    with pytest.raises(ValueError, match="no PNG"):
        png(b"<svg onload=alert(1)>")


def test_names_without_utf_8_and_folders_that_cannot_be_written(tmp_path: Path) -> None:
    report = replace(passing_report(tmp_path), data="caf\udce9")
    write_html(report, tmp_path / "report.html")
    assert "caf?" in (tmp_path / "report.html").read_text()
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        write_html(report, tmp_path / "file" / "report.html")


def test_figures_that_are_not_finite_are_drawn_somewhere(tmp_path: Path) -> None:
    nan = float("nan")
    report = sample_report(tmp_path)
    parity = report.models[0].parity
    assert parity is not None
    broken = replace(parity, cosine_quantiles=[nan] * 101)
    latency = [replace(own, p90_ms=nan, ratio=nan) for own in report.models[0].latency]
    text = html(replace(report, models=[replace(report.models[0], parity=broken, latency=latency)]))
    assert not re.search(r'd="[^"]*(nan|inf)', text)


@pytest.mark.parametrize("values", [[0.0], [3.0, 3.0], [0.1, 0.12], [1, 1000], [-5.0, 7.5], [1e-9, 2e-9], [99.9, 100]])
def test_axes_hold_their_values_and_name_at_least_two(values: list[float]) -> None:
    axis = linear_axis("x", values)
    assert axis.low <= min(values) <= max(values) <= axis.high
    assert 2 <= len(axis.ticks) <= 12
    assert all(axis.low - 1e-9 <= value <= axis.high * (1 + 1e-9) + 1e-9 for value, _ in axis.ticks)


@pytest.mark.parametrize("values", [[1.0], [7.4, 22.0], [0.5, 3000], [1e-12, 1.0], [999.0, 1001.0], [2e-16, 2.0]])
def test_logarithmic_axes_too(values: list[float]) -> None:
    axis = log_axis("x", values)
    assert axis.low <= min(values) * (1 + 1e-9)
    assert max(values) <= axis.high * (1 + 1e-9)
    assert 2 <= len(axis.ticks) <= 12
    assert len({text for _, text in axis.ticks}) == len(axis.ticks)


def test_a_line_goes_where_its_values_are() -> None:
    axis = Axis("x", 0, 10, [(0, "0"), (10, "10")])
    svg = chart("c", "t", "d", axis, axis, [Series("a", 0, [Point(0, 0), Point(10, 10), Point(5, 99)])])
    assert 'd="M58.0 254.0L404.0 12.0L231.0 12.0"' in svg  # from the lower left to the upper right; not above the top


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    binary = find_chromium()
    if binary is None:
        pytest.skip("no Chromium on the path; install one or name it in CHROMIUM")
    with chromium(binary, tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    report: BenchReport = sample_report(folder / "data")
    write_html(report, folder / "report.html", [("Maps", "of three stages", Image.new("RGB", (1600, 300), "teal"))])
    return folder / "report.html"


def test_a_browser_loads_nothing_and_complains_about_nothing(browser: Page, written: Path) -> None:
    browser.open(written, 1280, 900)
    requests = [event["params"] for event in browser.events if event["method"] == "Network.requestWillBeSent"]
    assert [asked["request"]["url"] for asked in requests if not asked["request"]["url"].startswith("data:")] == [
        written.as_uri()
    ]
    complaints = ("Log.entryAdded", "Runtime.exceptionThrown", "Page.javascriptDialogOpening")
    assert not [event for event in browser.events if event["method"] in complaints]
    assert browser.value("[...document.images].every(image => image.complete && image.naturalWidth > 0)")


@pytest.mark.parametrize("width", [320, 390, 768, 1280])
def test_no_page_scrolls_sideways(width: int, browser: Page, written: Path) -> None:
    browser.open(written, width, 844)
    assert browser.value("document.documentElement.scrollWidth") <= width
    boxes = browser.value("[...document.querySelectorAll('.scroll')].map(box => box.getBoundingClientRect().right)")
    assert max(boxes) <= width
    sizes = browser.value(
        "[...document.querySelectorAll('svg[role=img] text')].map(text => text.getBoundingClientRect().height)"
    )
    assert min(sizes) >= 9.5  # text in charts stays readable; titles that are turned are taller still


def contrast(first: str, second: str) -> float:
    """Of two colours `rgb(r, g, b)`: WCAG 2.2's ratio, 1 to 21."""

    def luminance(colour: str) -> float:
        values = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
        linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in values]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    bright, dim = sorted((luminance(first), luminance(second)), reverse=True)
    return (bright + 0.05) / (dim + 0.05)


@pytest.mark.parametrize("dark", [False, True])
def test_text_and_lines_stand_out_in_light_and_dark(dark: bool, browser: Page, written: Path) -> None:
    browser.open(written, 1280, 900, dark=dark)
    colour = "getComputedStyle(document.querySelector({!r})).{}"
    card = browser.value(colour.format(".card", "backgroundColor"))
    page = browser.value(colour.format("body", "backgroundColor"))
    assert contrast(page, "rgb(255, 255, 255)") > 15 if dark else contrast(page, "rgb(0, 0, 0)") > 15
    for selector in ("td", "thead th", ".kind", "figcaption", ".badge.fails", ".badge.passes", "summary"):
        assert contrast(browser.value(colour.format(selector, "color")), card) >= 4.5, selector
    assert contrast(browser.value(colour.format(".verdict.fails", "color")), page) >= 4.5
    for number in range(5):
        assert contrast(browser.value(colour.format(f".s{number}", "color")), card) >= 3, number


def test_a_screen_reader_gets_the_verdict_the_charts_and_the_tables(browser: Page, written: Path) -> None:
    browser.open(written, 1280, 900)
    tree = browser.accessible()
    roles = [role for role, _ in tree]
    assert {"banner", "main", "navigation", "contentinfo"} <= set(roles)
    headings = [name for role, name in tree if role == "heading"]
    assert headings[0] == "Does the export retrieve the same people?"
    assert "Parity" in headings
    pictures = [name for role, name in tree if role in ("image", "img")]
    assert "CMC: queries with a match among the first k" in pictures
    assert all(pictures)
    assert any(role == "table" and name.startswith("Parity on 2,450 images") for role, name in tree)
    assert ("rowheader", "model-bgr.onnx") in tree
    assert ("columnheader", "result") in tree
    regions = [name for role, name in tree if role == "region"]
    assert regions
    assert all(regions)


def test_it_prints(browser: Page, written: Path) -> None:
    browser.open(written, 1280, 900)
    assert browser.pdf().startswith(b"%PDF")
