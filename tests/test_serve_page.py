"""The page to ask on, in a real browser: Debian's chromium, driven by Playwright."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Iterator

import pytest
from conftest import ROOT
from serving_runs import CAPTION, KEY, SCENE

playwright = pytest.importorskip(
    "playwright.sync_api", reason="pip install -r requirements-test.txt"
)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.xdist_group("serve"),
    pytest.mark.skipif(CHROMIUM is None, reason="there is no browser: apt-get install chromium"),
]

DROP = """([name, kind, content]) => {
  const bytes = Uint8Array.from(atob(content), (letter) => letter.charCodeAt(0));
  const data = new DataTransfer();
  data.items.add(new File([bytes], name, { type: kind }));
  for (const event of ["dragenter", "dragover", "drop"])
    document.getElementById("drop").dispatchEvent(
      new DragEvent(event, { dataTransfer: data, bubbles: true, cancelable: true }));
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[playwright.Browser]:
    with playwright.sync_playwright() as running:
        found = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


class Page:
    """The page in a window of its own; what its console said and what it asked others for."""

    def __init__(self, browser: playwright.Browser, server, **window) -> None:
        self.context = browser.new_context(**{"viewport": {"width": 900, "height": 900}, **window})
        self.context.set_default_timeout(15_000)
        self.page = self.context.new_page()
        self.console: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.console.append(message.text))
        self.page.on("pageerror", lambda error: self.console.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        # From the start: a browser that is told too late shows its own dialog, to nobody.
        self.choosers: list[playwright.FileChooser] = []
        self.page.on("filechooser", lambda chooser: self.choosers.append(chooser))
        self.page.goto(server.url)
        # What a 401 would bring up; the server of the tests has a key.
        self.page.evaluate("document.getElementById('key-label').hidden = false")
        self.page.fill("#key", KEY)

    def drop(
        self, content: bytes = SCENE, name: str = "scene.png", kind: str = "image/png"
    ) -> None:
        self.page.evaluate(DROP, [name, kind, base64.b64encode(content).decode()])

    def ask(self, text: str) -> None:
        self.page.fill("#question", text)
        self.page.click("#send")

    def answers(self) -> list[str]:
        return self.page.locator(".answer").all_inner_texts()

    def wait_for_answers(self, count: int) -> None:
        playwright.expect(self.page.locator(".times")).to_have_count(count)


@pytest.fixture
def page(browser, server) -> Iterator[Page]:
    found = Page(browser, server)
    yield found
    found.context.close()


def test_a_picture_is_dropped_and_the_answer_streams_in(page, server):
    page.drop()
    playwright.expect(page.page.locator("#preview")).to_be_visible()
    with server.slowly():
        page.page.click("#send")  # no question: a caption
        grown = page.page.locator(".answer.running")
        playwright.expect(grown).to_contain_text("a small red")
        assert len(page.answers()[0]) < len(CAPTION)
    page.wait_for_answers(1)
    assert page.answers() == [CAPTION]
    times = page.page.locator(".times").inner_text()
    for part in ("decode", "wait", "OPT", "tokens/s", "23 tokens", "ms in all"):
        assert part in times, times
    assert page.console == []
    assert {url.split("/")[2] for url in page.asked if "://" in url} == {f"127.0.0.1:{server.port}"}


def test_follow_ups_are_a_conversation_about_the_same_picture(page):
    page.drop()
    page.ask("What colour is the circle?")
    page.wait_for_answers(1)
    with page.page.expect_request("**/chat/completions") as sent:
        page.ask("What colour is the triangle?")
    page.wait_for_answers(2)
    first, answer, second = json.loads(sent.value.post_data)["messages"]
    assert [part["type"] for part in first["content"]] == ["image_url", "text"]
    assert (answer["role"], answer["content"]) == ("assistant", "red")
    assert second["content"] == [{"type": "text", "text": "What colour is the triangle?"}]
    assert "ViT" not in page.page.locator(".times").last.inner_text()  # it was looked at before
    assert page.answers()[0] == "red"
    page.page.click("#anew")
    assert page.answers() == []
    assert page.console == []


def test_stop_stops(page, server):
    page.drop()
    with server.slowly():
        page.page.click("#send")
        playwright.expect(page.page.locator(".answer.running")).to_contain_text("a small")
        page.page.click("#stop")
        page.wait_for_answers(1)
        assert server.metrics()["blip2_rows_used"] <= 1
    assert "stopped" in page.page.locator(".times").inner_text()
    assert len(page.answers()[0]) < len(CAPTION)
    page.ask("What colour is the circle?")
    page.wait_for_answers(2)
    assert page.console == []


def test_what_goes_wrong_is_shown(page):
    page.page.click("#send")
    error = page.page.locator("#error")
    playwright.expect(error).to_have_text("Choose a picture first.")
    playwright.expect(error).to_be_visible()
    page.drop(b"some text", "notes.txt", "text/plain")
    playwright.expect(error).to_have_text("notes.txt is not a picture.")
    assert page.console == []
    page.drop(b"no picture at all")
    page.ask("What is it?")
    playwright.expect(error).to_contain_text("The picture is in none of the formats BMP, GIF")
    assert page.answers() == []
    assert page.page.input_value("#question") == "What is it?"  # to be sent again
    page.drop()
    playwright.expect(error).to_be_hidden()
    page.page.fill("#key", "another")
    page.ask("")
    playwright.expect(error).to_contain_text("API key")
    playwright.expect(page.page.locator("#key")).to_be_focused()
    # The browser's own line about each answer that is an error is all that its console says.
    assert len(page.console) == 2
    assert all(line.startswith("Failed to load resource") for line in page.console)


def test_it_works_with_the_keyboard_alone(page):
    keys = page.page.keyboard
    page.page.evaluate("document.activeElement.blur()")
    focused = "document.activeElement.id || document.activeElement.querySelector('img')?.alt"
    reached = []
    for _ in range(12):
        keys.press("Tab")
        reached.append(page.page.evaluate(focused))
    reached = list(filter(None, reached))  # without the document itself
    assert reached[:4] == ["drop", *(f"Example: {name}" for name in EXAMPLES)]
    assert {"question", "send", "beams", "tokens", "temperature", "key"} <= set(reached)
    page.page.locator("#examples button").first.focus()
    keys.press("Enter")
    playwright.expect(page.page.locator("#question")).to_be_focused()
    keys.type("What colour is the circle?")
    keys.press("Enter")
    page.wait_for_answers(1)
    assert page.answers() == ["red"]
    page.page.locator("#drop").focus()
    keys.press("Enter")
    for _ in range(100):
        if page.choosers:
            break
        page.page.wait_for_timeout(50)
    assert len(page.choosers) == 1


EXAMPLES = ("four shapes", "three circles", "a star and a square")


def test_the_examples_are_answered_rightly(page):
    captions = []
    for number in range(len(EXAMPLES)):
        page.page.locator("#examples button").nth(number).click()
        page.page.click("#send")
        page.wait_for_answers(1)
        captions += page.answers()
    assert captions[0] == CAPTION
    assert captions[1].startswith(
        "a small blue circle, a large green circle and a small orange circle"
    )
    assert captions[2].startswith("a small purple star and a large yellow square")


def test_a_picture_is_pasted_or_picked(page, tmp_path):
    page.page.evaluate(
        """(content) => {
          const bytes = Uint8Array.from(atob(content), (letter) => letter.charCodeAt(0));
          const data = new DataTransfer();
          data.items.add(new File([bytes], "pasted.png", { type: "image/png" }));
          dispatchEvent(new ClipboardEvent("paste", { clipboardData: data }));
        }""",
        base64.b64encode(SCENE).decode(),
    )
    playwright.expect(page.page.locator("#preview")).to_have_attribute(
        "alt", "The picture pasted.png"
    )
    (tmp_path / "picked.png").write_bytes(SCENE)
    page.page.set_input_files("#file", tmp_path / "picked.png")
    playwright.expect(page.page.locator("#preview")).to_have_attribute(
        "alt", "The picture picked.png"
    )


def test_beams_length_and_temperature_are_sent(page):
    page.drop()
    page.page.fill("#tokens", "4")
    page.page.fill("#temperature", "2")
    with page.page.expect_request("**/chat/completions") as sent:
        page.page.click("#send")
    page.wait_for_answers(1)
    body = json.loads(sent.value.post_data)
    assert (body["max_tokens"], body["temperature"], body["num_beams"]) == (4, 2, 1)
    assert "cut at its length" in page.page.locator(".times").inner_text()
    page.page.fill("#beams", "3")
    assert page.page.is_disabled("#temperature")
    page.page.click("#send")
    page.wait_for_answers(2)
    assert page.answers()[1] == "a small red circle"


def test_what_is_copied_can_be_used(page):
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.drop()
    page.ask("What's the circle's colour?")
    page.wait_for_answers(1)

    def copied(name: str) -> str:
        page.page.click(f"text={name}")
        playwright.expect(page.page.locator(".copies")).to_contain_text("Copied")
        return page.page.evaluate("navigator.clipboard.readText()")

    record = json.loads(copied("Copy JSON"))
    assert record["question"] == "What's the circle's colour?"
    assert record["answer"] == page.answers()[0]
    if shutil.which("curl"):
        done = subprocess.run(
            ["bash", "-c", copied("Copy curl")],
            capture_output=True,
            text=True,
            env={**os.environ, "BLIP2_API_KEY": KEY},
        )
        content = json.loads(done.stdout)["choices"][0]["message"]["content"]
        assert content == page.answers()[0], done.stderr


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_in_light_and_dark(browser, server, scheme, tmp_path):
    found = Page(
        browser, server, viewport={"width": 320, "height": 640}, color_scheme=scheme, has_touch=True
    )
    found.drop()
    found.ask("W" * 30)  # wider than the window, and no place to break
    found.wait_for_answers(1)
    width = found.page.evaluate("document.documentElement.scrollWidth")
    assert width <= 320
    ground = found.page.evaluate("getComputedStyle(document.body).backgroundColor")
    levels = [int(part) for part in ground.removeprefix("rgb(").rstrip(")").split(",")]
    assert (sum(levels) > 600) == (scheme == "light")
    assert _contrasts(found) >= 4.5
    found.page.screenshot(path=tmp_path / "phone.png", full_page=True)
    found.context.close()


def _contrasts(page: Page) -> float:
    """The least contrast of a text that is shown to what is behind it, as WCAG reckons it."""
    return page.page.evaluate(
        """() => {
          const numbers = (color) => color.match(/[\\d.]+/g).map(Number);
          const light = (color) => {
            const [r, g, b] = numbers(color).map((v) => v / 255)
              .map((v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
          };
          const ground = (node) => {
            for (; node; node = node.parentElement) {
              const color = getComputedStyle(node).backgroundColor;
              if (numbers(color)[3] !== 0) return color;
            }
            return "rgb(255, 255, 255)";
          };
          let least = 21;
          for (const node of document.querySelectorAll("h1, p, button:not(:disabled), label, span")) {
            if (!node.innerText || !node.offsetParent) continue;
            const [a, b] = [light(getComputedStyle(node).color), light(ground(node))];
            least = Math.min(least, (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05));
          }
          return least;
        }"""
    )


def test_nothing_of_it_comes_from_elsewhere(server):
    text = (ROOT / "blip2" / "serving" / "page.html").read_text()
    for word in ('src="http', 'href="http', "@import", " url(", "//cdn", "<script src"):
        assert word not in text
    policy = server.get("/").headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
