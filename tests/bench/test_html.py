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
from chromium import Browser, find_chromium
from PIL import Image
from report_sample import sample_report

from pmm_edge.bench.charts import charts, check_plot, save_cmc_plot
from pmm_edge.bench.html import render, write_html
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
def text() -> str:
    return render(sample_report(Path("market1501")))


def test_sections_are_those_that_were_measured(text: str) -> None:
    report = sample_report(Path("market1501"))
    nothing = dict.fromkeys(("parity", "retrieval", "retrieval_change", "decisions", "cold_start", "energy"))
    nothing |= {"cmc": [], "latency": [], "invariants": []}
    bare = [replace(model, **nothing) for model in (report.reference, *report.models)]
    less = render(replace(report, reference=bare[0], models=bare[1:]))
    measured = ["models", "parity", "retrieval", "decisions", "speed", "environment"]
    for content, sections, tables in ((text, measured, 8), (less, ["models", "parity", "environment"], 2)):
        page = Parsed(content)
        assert [section["id"] for section in page.all("section") if "id" in section] == sections
        assert [link["href"] for link in page.all("a")[1:]] == [f"#{name}" for name in sections]
        assert len(page.all("table")) == tables
    assert not page.all("figure")


@pytest.mark.parametrize("name", ["<script>alert(1)</script>.jpg", "\"'><img src=x onerror=alert(1)>&amp;</style>"])
def test_no_text_of_a_report_becomes_markup(name: str, text: str) -> None:
    page = Parsed(render(hostile(sample_report(Path()), name)))
    assert name in page.text
    assert len(page.all("style")) == 1
    assert {tag for tag, _ in page.elements} <= {tag for tag, _ in Parsed(text).elements} - {"script", "img"}
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)


def test_the_page_is_self_contained_and_accessible(text: str) -> None:
    page = Parsed(text)
    links = [value for _, attributes in page.elements for name, value in attributes.items() if name in ("src", "href")]
    assert links
    assert all(value and value.startswith("#") for value in links)
    assert not re.search(r"url\((?!#)|@import", text)
    (policy,) = [meta["content"] for meta in page.all("meta") if meta.get("http-equiv")]
    assert policy is not None
    assert policy.startswith("default-src 'none';")
    assert len([element for element in page.all("div") if element.get("role") == "img" and element["aria-label"]]) == 5
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert len(page.all("caption")) == len(page.all("table"))
    assert all(heading.get("scope") in ("col", "row") for heading in page.all("th"))
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert (levels[0], levels.count(1)) == (1, 1)
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))


def test_charts_are_reproducible_and_values_may_be_nan() -> None:
    report = sample_report(Path())
    assert report.models[0].parity
    report.models[0].parity = replace(report.models[0].parity, cosine_quantiles=[float("nan")] * 101)
    drawn = charts(report)
    assert drawn == charts(report)
    assert {section: len(found) for section, found in drawn.items()} == {"parity": 1, "retrieval": 1, "speed": 3}
    assert not any(re.search(r' d="[^"]*(nan|inf)', svg) for found in drawn.values() for _, svg in found)


def test_without_matplotlib_the_page_has_no_charts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    write_html(replace(sample_report(tmp_path), data="caf\udce9"), tmp_path / "report.html")
    page = Parsed((tmp_path / "report.html").read_text())
    assert r"caf\xe9" in page.text  # a path that is not UTF-8
    assert not page.all("svg")
    assert len(page.all("table")) == 8
    assert ".[train]" in page.text
    with pytest.raises(OutputError):
        check_plot(tmp_path / "cmc.png")


def test_a_cmc_plot_is_a_picture(tmp_path: Path) -> None:
    curves = {"_a $x$": [0.5 + rank / 100 for rank in range(50)], "b": [0.6] * 50}
    save_cmc_plot(tmp_path / "cmc.png", "CMC", curves)
    assert Image.open(tmp_path / "cmc.png").size == (1050, 750)
    save_cmc_plot(tmp_path / "cmc.svg", "CMC", curves)
    assert (tmp_path / "cmc.svg").read_text().count("<svg") == 1
    with pytest.raises(OutputError):
        check_plot(tmp_path / "cmc.pdf")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if not (binary := find_chromium()):
        pytest.skip("needs Chromium on the path or in the variable CHROMIUM")
    opened = Browser(binary, tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


def test_a_browser_loads_nothing_and_the_page_fits_every_screen(browser: Browser, text: str, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text(text)
    for width in (320, 390, 1280):
        browser.open(path, width)
        requests = [event["params"] for event in browser.events if event["method"] == "Network.requestWillBeSent"]
        assert [request["request"]["url"] for request in requests] == [path.as_uri()]
        assert not {event["method"] for event in browser.events} & {"Log.entryAdded", "Runtime.exceptionThrown"}
        assert browser.value("document.documentElement.scrollWidth") <= width
        height = "Math.min(...[...document.querySelectorAll('svg text')].map(t => t.getBoundingClientRect().height))"
        assert browser.value(height) >= 8.5  # the text of charts is readable


def test_page_and_charts_follow_the_color_scheme(browser: Browser, text: str, tmp_path: Path) -> None:
    def brightness(selector: str, name: str) -> int:
        color = str(browser.value(f"getComputedStyle(document.querySelector({selector!r})).{name}"))
        return sum(int(part) for part in re.findall(r"\d+", color)[:3])

    path = tmp_path / "report.html"
    path.write_text(text)
    for dark, sign in ((False, 1), (True, -1)):
        browser.open(path, 1280, dark)
        card = brightness(".card", "backgroundColor")
        for part in (("td", "color"), ("svg text", "fill"), (".verdict.fails", "color")):
            assert sign * (card - brightness(*part)) > 250
