"""Questions as OPT reads them. Imports nothing heavy: `--help` shows the default."""

from __future__ import annotations

import re

TEMPLATE = "Question: {} Answer:"  # what BLIP-2 was trained to answer


def fill_template(template: str, text: str) -> str:
    """The prompt for a text: put in place of the template's {}, without the blanks around it.

    A text that has the template's form already, however it is spaced, gets the template's spacing;
    one of blanks alone is empty, which asks for a caption.
    """
    before, after = template.split("{}")
    form = re.fullmatch(rf"{_words(before)}(.*){_words(after)}", text.strip(), re.DOTALL)
    inner = (form[1] if form else text).strip()
    return f"{before}{inner}{after}" if form or inner else ""


def begin_answer(prompt: str, prefix: str) -> str:
    """A prompt whose answer has begun already, with `prefix`."""
    return f"{prompt} {prefix.strip()}".strip()


def _words(text: str) -> str:
    """A pattern for the same words, with any blanks between; it ends and begins no longer word."""
    words = r"\s+".join(map(re.escape, text.split()))
    return rf"(?!(?<=\w)\w){words}(?!(?<=\w)\w)" if words else ""
