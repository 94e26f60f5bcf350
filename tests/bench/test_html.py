"""The report page: complete, safe against markup in names, self-contained, and readable in a browser."""

import itertools
import re
import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from enum import Enum
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from chromium import Page, chromium, find_chromium
from PIL import Image
from report_sample import sample_report

from pmm_edge.bench.charts import charts, save_cmc_plot
from pmm_edge.bench.html import Picture, render, write_html
from pmm_edge.errors import OutputError


class Parsed(HTMLParser):
    """All elements with their attributes, and the text; elements that are not closed properly are an error."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def hostile(value: Any, text: str) -> Any:
    """A report with all of its free text replaced."""
    if isinstance(value, str) and not isinstance(value, Enum):
        return text
    if isinstance(value, list | tuple):
        return type(value)(hostile(entry, text) for entry in value)
    if isinstance(value, dict):
        return {text + str(key): hostile(entry, text) for key, entry in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        changed = {field.name: hostile(getattr(value, field.name), text) for field in fields(value)}
        return replace(value, **changed | {name: getattr(value, name) for name in changed.keys() & {"scope"}})
    return value


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    picture = Picture("Attention", "Grad-CAM", Image.new("RGB", (1600, 300)))
    return render(sample_report(tmp_path_factory.mktemp("data")), [picture])


def test_sections_are_those_that_were_measured(text: str, tmp_path: Path) -> None:
    measured = ["models", "parity", "retrieval", "speed", "pictures", "environment"]
    report = sample_report(tmp_path)
    nothing = dict.fromkeys(("parity", "retrieval", "retrieval_change", "cold_start", "energy"))
    bare = [
        replace(model, **nothing, cmc=[], latency=[], invariants=[]) for model in (report.reference, *report.models)
    ]
    less = render(replace(report, reference=bare[0], models=bare[1:]))
    for content, sections, tables in ((text, measured, 9), (less, ["models", "parity", "environment"], 3)):
        page = Parsed(content)
        assert [section["id"] for section in page.all("section") if "id" in section] == sections
        assert [link["href"] for link in page.all("a")[1:]] == [f"#{name}" for name in sections]
        assert len(page.all("table")) == tables
    assert not page.all("figure")


@pytest.mark.parametrize("name", ["<script>alert(1)</script>.jpg", "\"'><img src=x onerror=alert(1)>&amp;</style>"])
def test_no_text_of_a_report_becomes_markup(name: str, text: str, tmp_path: Path) -> None:
    page = Parsed(render(hostile(sample_report(tmp_path), name)))
    assert name in page.text
    assert len(page.all("style")) == 1
    assert {tag for tag, _ in page.elements} <= {tag for tag, _ in Parsed(text).elements} - {"script"}
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)


def test_the_page_is_self_contained(text: str) -> None:
    page = Parsed(text)
    links = [value for _, attributes in page.elements for name, value in attributes.items() if name in ("src", "href")]
    assert links
    assert all(value and value.startswith(("data:image/", "#")) for value in links)
    assert not re.search(r"url\((?!#)|@import", text)
    (policy,) = [meta["content"] for meta in page.all("meta") if meta.get("http-equiv")]
    assert policy is not None
    assert policy.startswith("default-src 'none'; img-src data:;")


def test_charts_and_tables_are_accessible(text: str) -> None:
    page = Parsed(text)
    assert len([element for element in page.all("div") if element.get("role") == "img" and element["aria-label"]]) == 5
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert len(page.all("caption")) == len(page.all("table"))
    assert all(heading.get("scope") in ("col", "row") for heading in page.all("th"))
    assert all(image.get("alt") for image in page.all("img"))
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))


def test_charts_are_reproducible_and_values_may_be_nan(tmp_path: Path) -> None:
    report, nan = sample_report(tmp_path), float("nan")
    parity = report.models[0].parity
    assert parity
    report.models[0].parity = replace(parity, cosine_quantiles=[nan] * 101)
    drawn = charts(report)
    assert drawn == charts(report)
    assert drawn.keys() == {"cosine", "cmc", "accuracy", "latency", "end_to_end"}
    assert not any(re.search(r' d="[^"]*(nan|inf)', chart.svg) for chart in drawn.values())


def test_without_matplotlib_the_page_has_no_charts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    page = Parsed(render(sample_report(tmp_path)))
    assert not page.all("svg")
    assert len(page.all("table")) == 9
    assert ".[train]" in page.text
    with pytest.raises(OutputError):
        save_cmc_plot(tmp_path / "cmc.png", "CMC", {"model": [0.5, 1.0]})


def test_a_cmc_plot_is_a_picture(tmp_path: Path) -> None:
    curves = {"_a $x$": [0.5 + rank / 100 for rank in range(50)], "b": [0.6] * 50}
    save_cmc_plot(tmp_path / "cmc.png", "CMC", curves)
    assert Image.open(tmp_path / "cmc.png").size == (1050, 750)
    save_cmc_plot(tmp_path / "cmc.svg", "CMC", curves)
    assert (tmp_path / "cmc.svg").read_text().count("<svg") == 1
    with pytest.raises(OutputError):
        save_cmc_plot(tmp_path / "cmc.pdf", "CMC", curves)


def test_paths_that_are_not_utf_8(tmp_path: Path) -> None:
    write_html(replace(sample_report(tmp_path), data="caf\udce9"), tmp_path / "report.html")
    page = Parsed((tmp_path / "report.html").read_text())
    assert "caf?" in page.text
    assert not page.all("img")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    binary = find_chromium()
    if binary is None:
        pytest.skip("needs Chromium on the path or in the variable CHROMIUM")
    with chromium(binary, tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture(scope="module")
def written(text: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(text)
    return path


def test_a_browser_loads_nothing_and_reports_no_errors(browser: Page, written: Path) -> None:
    browser.open(written, 1280, 900)
    requests = [event["params"] for event in browser.events if event["method"] == "Network.requestWillBeSent"]
    urls = [request["request"]["url"] for request in requests]
    assert [url for url in urls if not url.startswith("data:")] == [written.as_uri()]
    errors = ("Log.entryAdded", "Runtime.exceptionThrown", "Page.javascriptDialogOpening")
    assert not [event for event in browser.events if event["method"] in errors]
    assert browser.value("[...document.images].every(image => image.complete && image.naturalWidth > 0)")


@pytest.mark.parametrize("width", [320, 390, 1280])
def test_the_page_fits_the_screen_and_chart_text_is_readable(width: int, browser: Page, written: Path) -> None:
    browser.open(written, width, 844)
    assert browser.value("document.documentElement.scrollWidth") <= width
    boxes = browser.value("[...document.querySelectorAll('.scroll')].map(box => box.getBoundingClientRect().right)")
    assert max(boxes) <= width
    height = "Math.min(...[...document.querySelectorAll('svg text')].map(text => text.getBoundingClientRect().height))"
    assert browser.value(height) >= 8.5


def test_page_and_charts_follow_the_color_scheme(browser: Page, written: Path) -> None:
    def brightness(selector: str, name: str) -> int:
        color = str(browser.value(f"getComputedStyle(document.querySelector({selector!r})).{name}"))
        return sum(int(part) for part in re.findall(r"\d+", color)[:3])

    contrasts = []
    for dark in (False, True):
        browser.open(written, 1280, 900, dark=dark)
        card = brightness(".card", "backgroundColor")
        contrasts.append(
            [card - brightness(*part) for part in (("td", "color"), ("svg text", "fill"), (".verdict.fails", "color"))]
        )
    assert min(contrasts[0]) > 250
    assert max(contrasts[1]) < -250
