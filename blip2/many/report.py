"""Answers for people to look through: one self-contained HTML page, readable on a phone."""

from __future__ import annotations

import html
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from blip2 import artifacts
from blip2.many import inputs
from blip2.many.decoders import Decoders

MAX_PICTURES = 2000  # about 20 KB each: more than a phone can open
_BATCH = 16

_HEAD = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; font: 16px/1.45 system-ui, sans-serif; }}
body {{ margin: 1rem auto; padding: 0 1rem; max-width: 76rem; }}
main {{ display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 17rem), 1fr)); }}
article {{ border: 1px solid #8886; border-radius: .6rem; overflow: hidden; }}
img {{ display: block; width: 100%; height: 13rem; object-fit: contain; background: #8882; }}
h2 {{ font-size: .8rem; font-weight: 400; opacity: .75; margin: .6rem .8rem 0; }}
h2, p {{ overflow-wrap: anywhere; }}
p {{ margin: .3rem .8rem .7rem; }}
.question {{ font-weight: 600; margin-bottom: 0; }}
.flag, .error {{ color: #c0392b; }}
</style>
<style>
form {{ display: flex; flex-wrap: wrap; gap: .5rem; margin: 1rem 0; position: sticky; top: 0;
  padding: .5rem 0; background: Canvas; z-index: 1; }}
input, select {{ font: inherit; padding: .3rem .5rem; max-width: 100%; }}
input {{ flex: 1 1 12rem; min-width: 0; }}
article {{ content-visibility: auto; contain-intrinsic-size: auto 20rem; scroll-margin: 4rem; }}
article[hidden] {{ display: none; }}
article:focus {{ outline: 3px solid #2980b9; }}
.score::after {{ content: "(" attr(data-score) ")"; opacity: .75; font-size: 1rem; }}
</style>
</head>
<body>
<h1>{title}</h1>
<p>{note} Keys: / to filter, j and k for the next and the one before, Escape for all.</p>
<form>
<input type="search" name="text" placeholder="words in names, questions and answers">
<select name="flag" aria-label="which"><option value="">all</option>
<option>empty</option><option>loop</option><option>length</option><option>error</option></select>
<select name="order" aria-label="order"><option value="">in order</option>
<option value="1">lowest score first</option><option value="-1">highest score first</option></select>
<output name="count"></output>
</form>
<main>
"""
# What is looked for stands in the page: nothing of it is fetched, and no name or answer is run.
_TAIL = """</main>
<script>
"use strict";
const form = document.forms[0], main = document.querySelector("main");
const cards = [...main.children].map((card) => ({
  card, text: card.textContent.toLowerCase(), flags: card.dataset.flags.split(" "),
  score: card.dataset.score === "" ? NaN : Number(card.dataset.score),
}));
let shown = cards, order = "";
function sorted(sign) {
  if (!sign) return cards;
  const known = cards.filter(({ score }) => !isNaN(score));
  known.sort((one, other) => sign * (one.score - other.score));
  return [...known, ...cards.filter(({ score }) => isNaN(score))];
}
function update() {
  const words = form.text.value.toLowerCase().split(" ").filter(Boolean), flag = form.flag.value;
  const all = sorted(Number(form.order.value));
  if (order !== form.order.value) main.append(...all.map(({ card }) => card));
  order = form.order.value;
  shown = all.filter(({ text, flags }) =>
    (!flag || flags.includes(flag)) && words.every((word) => text.includes(word)));
  const kept = new Set(shown);
  for (const one of cards) one.card.hidden = !kept.has(one);
  form.count.value = shown.length + " of " + cards.length;
}
form.addEventListener("input", update);
form.addEventListener("submit", (event) => event.preventDefault());
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "Escape") { form.reset(); update(); document.activeElement.blur(); return; }
  if (event.target.matches("input, select")) return;
  if (event.key === "/") { event.preventDefault(); form.text.focus(); return; }
  const step = { j: 1, k: -1 }[event.key];
  if (!step || !shown.length) return;
  const at = shown.findIndex(({ card }) => card === document.activeElement);
  const next = at < 0 ? 0 : Math.min(Math.max(at + step, 0), shown.length - 1);
  shown[next].card.focus();
});
update();
</script>
</body>
</html>
"""


def write_report(
    path: Path, output: Path, entries: Sequence[str], decoders: Decoders, questions: int
) -> None:
    """Make a page of the answers in `output`, each beside a thumbnail of its picture.

    Args:
        path: the page; replaced whole.
        output: JSON lines of `questions` each a picture, or one with "error".
        entries: the pictures of the output, in its order.

    Raises:
        Blip2Error: the page cannot be written.
    """
    pictures = itertools.islice(inputs.read_pictures(entries), MAX_PICTURES)
    batches = iter(lambda: list(itertools.islice(pictures, _BATCH)), [])
    thumbnails = itertools.chain.from_iterable(shown for _, shown in decoders.thumbnails(batches))
    with (
        artifacts.staging(path.absolute().parent, is_ours=_is_ours) as stage,
        open(output, encoding="utf-8") as lines,
    ):
        answers = _answers(map(json.loads, lines), questions)
        # A name that is no UTF-8 shows as question marks.
        with open(stage / path.name, "w", encoding="utf-8", errors="replace") as page:
            note = f"At most the first {MAX_PICTURES} pictures of {output.name}."
            page.write(_HEAD.format(title=html.escape(path.stem), note=html.escape(note)))
            for thumbnail, of_picture in zip(thumbnails, answers, strict=False):
                page.write(_article(thumbnail, of_picture))
            page.write(_TAIL)


def check_place(path: Path) -> None:
    """See, before there is anything to show, that the page may be written.

    Raises:
        Blip2Error: there is a file that is no such page.
    """
    artifacts.refuse_foreign(path, _is_ours)


def _is_ours(page: Path) -> bool:
    """Whether a page was written here: only ours looks so."""
    style = _HEAD[_HEAD.index("<style>") : _HEAD.index("</style>")].format()
    with page.open(encoding="utf-8", errors="replace") as content:
        return style in content.read(len(_HEAD) + 10_000)


def _answers(lines: Iterator[dict[str, Any]], questions: int) -> Iterator[list[dict[str, Any]]]:
    """The lines of each picture."""
    for line in lines:
        more = 0 if "error" in line else questions - 1
        yield [line, *itertools.islice(lines, more)]


def _article(thumbnail: str | None, lines: Sequence[dict[str, Any]]) -> str:
    """All that comes from outside is escaped: names, questions, answers and errors."""
    name = html.escape(" ".join(filter(None, (lines[0]["path"], lines[0].get("key")))))
    flags = {flag for line in lines for flag in line.get("flags", ["error"])}
    scores = [line["score"] for line in lines if line.get("score") is not None]
    score = f"{min(scores):.4f}" if scores else ""
    parts = [f'<article tabindex="-1" data-flags="{" ".join(sorted(flags))}" data-score="{score}">']
    if thumbnail:
        parts.append(f'<img src="{thumbnail}" alt="" loading="lazy">')
    parts.append(f"<h2>{name}</h2>")
    for line in lines:
        if "error" in line:
            parts.append(f'<p class="error">{html.escape(line["error"])}</p>')
            continue
        if line["question"]:
            parts.append(f'<p class="question">{html.escape(line["question"])}</p>')
        flags = "".join(f' <span class="flag">({flag})</span>' for flag in line["flags"])
        score = line.get("score")
        shown = "" if score is None else f' <span class="score" data-score="{score:.2f}"></span>'
        parts.append(f"<p>{html.escape(line['answer'])}{flags}{shown}</p>")
    return "\n".join([*parts, "</article>\n"])
