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
</head>
<body>
<h1>{title}</h1>
<p>{note}</p>
<main>
"""
_TAIL = "</main>\n</body>\n</html>\n"


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
    parts = ["<article>"]
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
        parts.append(f"<p>{html.escape(line['answer'])}{flags}</p>")
    return "\n".join([*parts, "</article>\n"])
