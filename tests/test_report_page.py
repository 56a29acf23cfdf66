"""The page of many answers, in a real browser: filters, order, keys, and 2000 pictures stay quick."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator

import pytest
from PIL import Image

from blip2.many import report
from blip2.many.decoders import Decoders

playwright = pytest.importorskip(
    "playwright.sync_api", reason="pip install -r requirements-test.txt"
)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="needs a browser: apt-get install chromium"
)

COUNT = report.MAX_PICTURES
EVIL = '</script><script>document.title = "evil"</script>'


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Iterator[playwright.Page]:
    """2000 pictures: every tenth loops, every hundredth is an error, one has a nasty answer."""
    folder = tmp_path_factory.mktemp("page")
    picture = str(folder / "p.png")
    Image.new("RGB", (8, 8), "red").save(picture)
    with open(folder / "out.jsonl", "w", encoding="utf-8") as output:
        for number in range(COUNT):
            line = {"path": "p.png", "question": "", "answer": f"caption {number}", "flags": []}
            line["score"] = -((number * 7) % COUNT) / 1000
            if number % 10 == 5:
                line["flags"] = ["loop"]
            if number % 100 == 7:
                line = {"path": "p.png", "error": f"broken {number}"}
            if number == 3:
                line["answer"] = f"nasty {EVIL}"
            output.write(json.dumps(line) + "\n")
    with Decoders(2) as decoders:
        report.write_report(
            folder / "page.html", folder / "out.jsonl", [picture] * COUNT, decoders, 1
        )
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        opened = browser.new_page()
        opened.set_default_timeout(30_000)
        asked: list[str] = []
        opened.on("request", lambda request: asked.append(request.url))
        opened.errors = []
        opened.on("pageerror", lambda error: opened.errors.append(str(error)))
        opened.goto((folder / "page.html").as_uri())
        yield opened
        assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
        assert opened.errors == []
        browser.close()


@pytest.fixture(autouse=True)
def fresh(page):
    page.keyboard.press("Escape")
    assert count(page) == f"{COUNT} of {COUNT}"


def count(page) -> str:
    return page.locator("output").inner_text()


def shown(page) -> list[str]:
    texts = page.locator("article:not([hidden]) p").all_text_contents()
    return [text.split(" (")[0].strip() for text in texts]


def test_words_and_flags_filter(page):
    page.fill("[name=text]", "CAPTION 199")
    assert shown(page) == [f"caption {n}" for n in (199, 1199, *range(1990, 2000))]
    page.select_option("[name=flag]", "loop")
    assert shown(page) == ["caption 1995"]
    page.fill("[name=text]", "")
    assert count(page) == f"{COUNT // 10} of {COUNT}"
    page.select_option("[name=flag]", "error")
    assert shown(page) == [f"broken {n}" for n in range(7, COUNT, 100)]


def test_scores_sort_and_errors_come_last(page):
    expected = sorted((n for n in range(COUNT) if n % 100 != 7), key=lambda n: -((n * 7) % COUNT))
    names = [f"caption {n}" if n != 3 else f"nasty {EVIL}" for n in expected]
    page.select_option("[name=order]", "1")
    assert shown(page)[: len(names)] == names
    assert shown(page)[len(names) :] == [f"broken {n}" for n in range(7, COUNT, 100)]
    page.select_option("[name=order]", "-1")
    assert shown(page)[0] == "caption 0"
    assert shown(page)[len(names) :] == [f"broken {n}" for n in range(7, COUNT, 100)]
    page.select_option("[name=order]", "")
    assert shown(page)[:3] == ["caption 0", "caption 1", "caption 2"]


def test_keys_walk_over_what_is_shown(page):
    page.fill("[name=text]", "caption 199")
    page.locator("[name=text]").blur()
    focused = "document.activeElement.querySelector('p').textContent.split(' (')[0].trim()"
    walked = []
    for key in ("j", "j", "j", "k"):
        page.keyboard.press(key)
        walked.append(page.evaluate(focused))
    assert walked == ["caption 199", "caption 1199", "caption 1990", "caption 1199"]
    page.keyboard.press("/")
    page.keyboard.type("5")
    assert page.input_value("[name=text]") == "caption 1995"


def test_an_answer_is_text_whatever_is_in_it(page):
    assert page.title() == "page"
    page.fill("[name=text]", "nasty")
    assert shown(page) == [f"nasty {EVIL}"]


def test_a_filter_is_no_work_for_what_is_not_seen(page):
    """Of 2000 cards a browser lays out those in the window; the others' boxes are guesses."""
    style = "getComputedStyle(document.querySelector('article')).contentVisibility"
    assert page.evaluate(style) == "auto"
    laid_out = (
        "[...document.querySelectorAll('h2')].filter((name) =>"
        " name.checkVisibility({contentVisibilityAuto: true})).length"
    )
    assert 0 < page.evaluate(laid_out) < COUNT / 4
