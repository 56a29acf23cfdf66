"""The pages of the documentation, as tests read them: blocks, commands, what is shown of output."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator

from conftest import ROOT

PAGES = sorted(
    (path.relative_to(ROOT).as_posix() for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"))),
    key=lambda name: (name != "README.md", name),
)


@dataclasses.dataclass(frozen=True)
class Command:
    """A command of a page, and the lines that the page shows of its output."""

    text: str
    shown: list[str]


def fenced(page: str) -> list[tuple[str, str]]:
    """The blocks of a page: language and content."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)


def commands(page: str) -> Iterator[Command]:
    """Those of a page in their order."""
    for language, content in fenced(page):
        if language == "bash":
            for text in content.replace("\\\n", "").splitlines():
                yield Command(text, [])
        elif language == "console":
            for part in re.split(r"^\$ ", content, flags=re.MULTILINE)[1:]:
                text, *lines = part.replace("\\\n", "").splitlines()
                here = [line[2:] for line in lines if line.startswith("> ")]
                shown = [line for line in lines if line and not line.startswith("> ")]
                yield Command("\n".join([text, *here]), shown)


def without_numbers(line: str) -> str:
    """How much and how long it was differs, and how wide that makes a column; names stay."""
    if line.startswith("{"):
        return line
    return re.sub(r"[\d.]+", "0", re.sub(r"\s+", " ", line)).strip()


def shows(command: Command, printed: str) -> bool:
    """Whether the lines that a page shows were printed in their order, but for measured numbers."""
    lines = iter([without_numbers(line) for line in printed.splitlines()])
    return all(without_numbers(line) in lines for line in command.shown)  # each behind the last
