"""The report's page in a real browser: ``make browser``."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Error, Page, sync_playwright
from reporting import METHODS, SEEDS, Runs, make_runs, score_of

from alignkit.cli import main

QUIET = [
    "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-component-update",
    "--disable-sync",
]  # fmt: skip
NO_BROWSER = (
    "there is no browser. Debian: apt-get install chromium; elsewhere: .venv/bin/playwright install chromium, or set "
    "CHROMIUM=/path/to/chrome."
)
SCHEMES = ("light", "dark")
WIDTHS = {"phone": 390, "desktop": 1280}


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    found = os.environ.get("CHROMIUM") or next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )
    with sync_playwright() as play:
        try:
            browser = play.chromium.launch(executable_path=found, args=QUIET)
        except Error as e:
            pytest.fail(f"{NO_BROWSER} ({str(e).splitlines()[0]})")
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return make_runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="session")
def file(runs: Runs) -> Path:
    root = next(iter(runs.values())).parent
    main(["report", str(root)])
    return root / "report.html"


class Seen:
    """A page and what went on while it was open."""

    def __init__(self, page: Page, file: Path) -> None:
        self.page, self.said, self.requests = page, list[str](), list[str]()
        page.on("console", lambda message: self.said.append(message.text))
        page.on("pageerror", lambda error: self.said.append(str(error)))
        page.on("request", lambda request: self.requests.append(request.url))
        page.goto(file.as_uri())

    def open_all(self) -> None:
        self.page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true; })")


@pytest.fixture(params=[(width, scheme) for width in WIDTHS for scheme in SCHEMES], ids="-".join)
def seen(request: pytest.FixtureRequest, browser: Browser, file: Path) -> Iterator[Seen]:
    """The page on a phone and a desktop, in light and dark."""
    width, scheme = request.param
    context = browser.new_context(viewport={"width": WIDTHS[width], "height": 844}, color_scheme=scheme)
    yield Seen(context.new_page(), file)
    context.close()


@pytest.fixture
def desktop(browser: Browser, file: Path) -> Iterator[Seen]:
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    yield Seen(context.new_page(), file)
    context.close()


def test_nothing_is_fetched_and_nothing_complains(seen: Seen, file: Path) -> None:
    seen.open_all()
    seen.page.mouse.wheel(0, 20_000)
    assert seen.said == []
    assert [url for url in seen.requests if not url.startswith("data:")] == [file.as_uri()]


def test_the_page_does_not_scroll_sideways_but_wide_tables_do(seen: Seen) -> None:
    seen.open_all()
    inner, whole = seen.page.evaluate("[document.documentElement.clientWidth, document.documentElement.scrollWidth]")
    assert whole <= inner
    boxes = seen.page.evaluate(
        "[...document.querySelectorAll('.box')].map(b => [b.clientWidth, b.scrollWidth, getComputedStyle(b).overflowX])"
    )
    assert all(overflow == "auto" for *_, overflow in boxes)
    if inner == WIDTHS["phone"]:
        assert any(scroll > client for client, scroll, _ in boxes), (
            "a table that is wider than a phone can be scrolled in its box"
        )


def test_axe_finds_no_fault(seen: Seen) -> None:
    """WCAG 2.2 AA and best practices, contrast included, with everything unfolded."""
    seen.open_all()
    found = Axe().run(seen.page)
    faults = [f"{v['id']}: {v['help']} ({v['nodes'][0]['html'][:200]})" for v in found.response["violations"]]
    assert faults == []
    assert len(found.response["passes"]) > 20


def _luminance(colour: str) -> float:
    channels = [int(x) / 255 for x in re.findall(r"\d+", colour)[:3]]
    r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def test_lines_of_charts_stand_out_from_the_paper(seen: Seen) -> None:
    """axe looks at text alone; graphics want 3 : 1 (WCAG 1.4.11). Every colour of the style, used or not."""
    paper, colours = seen.page.evaluate(
        """() => { const p = document.createElement('p'); document.body.append(p); const found = [];
        for (let i = 0; i < 8; i++) { p.className = 'c' + i; found.push(getComputedStyle(p).color); } p.remove();
        return [getComputedStyle(document.body).backgroundColor, found]; }"""
    )
    for colour in colours:
        high, low = sorted((_luminance(colour), _luminance(paper)), reverse=True)
        assert (high + 0.05) / (low + 0.05) >= 3, (colour, paper)
    assert len(set(colours)) == 8


def test_the_dark_page_is_dark(browser: Browser, file: Path) -> None:
    lights = []
    for scheme in SCHEMES:
        context = browser.new_context(color_scheme=scheme)
        page = context.new_page()
        page.goto(file.as_uri())
        ink, paper = page.evaluate(
            "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
        )
        lights.append((_luminance(ink), _luminance(paper)))
        context.close()
    (ink, paper), (dark_ink, dark_paper) = lights
    assert ink < 0.1 < 0.9 < paper and dark_paper < 0.05 < 0.6 < dark_ink


def test_the_numbers_are_those_of_the_runs(desktop: Seen, runs: Runs) -> None:
    for method in METHODS:
        mean = sum(score_of(runs[method, seed], "bleu") for seed in SEEDS) / len(SEEDS)
        row = desktop.page.locator("table").first.locator(
            "tr", has=desktop.page.get_by_role("rowheader", name=method, exact=True)
        )
        assert row.locator("td").nth(1).inner_text().split()[0] == f"{mean:.2f}"


def test_search_leaves_the_rows_that_hold_all_words(desktop: Seen) -> None:
    desktop.open_all()
    cards = desktop.page.locator("article.card")
    texts = [text.lower() for text in cards.all_text_contents()]
    word = texts[0].split()[1][:6]
    wanted = sum(word in text for text in texts)
    desktop.page.get_by_label("Search").fill(word)
    assert 0 < desktop.page.locator("article.card:visible").count() == wanted <= len(texts)
    assert desktop.page.locator("output").inner_text() == f"{wanted} of {len(texts)} rows"
    desktop.page.get_by_label("Search").fill("no row holds this")
    assert desktop.page.locator("article.card:visible").count() == 0
    desktop.page.get_by_label("Search").fill("")
    desktop.page.get_by_label("only where systems differ").check()
    said: list[list[str]] = desktop.page.evaluate(
        "[...document.querySelectorAll('article.card')].map(c => [...c.querySelectorAll('.said dd')].map(d => (d.querySelector('.text') || {}).textContent || ''))"
    )
    assert desktop.page.locator("article.card:visible").count() == sum(len(set(one)) > 1 for one in said)


def test_without_scripts_everything_can_be_read(browser: Browser, file: Path) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(file.as_uri())
    page.locator("summary", has_text="Outputs").click()
    assert page.locator("article.card").first.is_visible()
    assert not page.get_by_role("searchbox").is_visible(), "a box that cannot search is not shown"
    context.close()


def test_the_keyboard_reaches_links_folds_and_boxes(desktop: Seen) -> None:
    reached = set()
    desktop.page.keyboard.press("Tab")
    assert desktop.page.evaluate("document.activeElement.className") == "skip"
    assert desktop.page.evaluate("document.activeElement.getBoundingClientRect().left") >= 0, (
        "it shows when it has the focus"
    )
    for _ in range(80):
        desktop.page.keyboard.press("Tab")
        reached.add(desktop.page.evaluate("document.activeElement.tagName + '.' + document.activeElement.className"))
    assert {"A.", "SUMMARY.", "DIV.box"} <= reached
    desktop.page.locator("summary", has_text="Outputs").focus()
    desktop.page.keyboard.press("Enter")
    assert desktop.page.locator("article.card").first.is_visible()


def test_on_paper_nothing_is_cut_off(desktop: Seen) -> None:
    desktop.page.emulate_media(media="print")
    desktop.page.set_viewport_size({"width": 700, "height": 1000})  # A4 less its margins
    desktop.open_all()
    assert desktop.page.evaluate("document.documentElement.scrollWidth") <= 700
    styles: list[Any] = desktop.page.evaluate(
        "[...document.querySelectorAll('.box')].map(b => getComputedStyle(b).overflowX)"
    )
    assert set(styles) == {"visible"}
    assert not desktop.page.locator("nav").is_visible()
    desktop.page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert desktop.page.locator("details:not([open])").count() == 0


def test_a_point_of_a_line_says_its_value(desktop: Seen) -> None:
    title = desktop.page.locator("svg.chart circle title").first.text_content() or ""
    assert re.fullmatch(r"(reinforce|grpo), step \d+: [\d.]+ \([\d.]+ to [\d.]+\)", title)
