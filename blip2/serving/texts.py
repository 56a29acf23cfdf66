"""The text of an answer as it grows, up to a stop text."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what a character reads as before its last token


class GrowingText:
    """Tokens in, pieces of text out: none ends within a character, none has part of a stop text."""

    def __init__(self, decode: Callable[[list[int]], str], stops: Sequence[str] = ()) -> None:
        """Start with no token.

        Args:
            decode: the text of token ids.
            stops: texts before the first of which the answer ends.
        """
        self._decode, self._stops = decode, stops
        self._ids: list[int] = []
        self._said = 0
        self.has_stopped = False

    @property
    def text(self) -> str:
        """All of it that was handed out."""
        return self._decode(self._ids)[: self._said]

    @property
    def tokens(self) -> int:
        """Those that came."""
        return len(self._ids)

    def add(self, token: int) -> str:
        """What the text has grown by; may be empty."""
        self._ids.append(token)
        text = self._decode(self._ids)
        end = self._end(text)
        if not self.has_stopped:
            if text.endswith(_UNFINISHED):
                return ""
            end = len(text) - _overlap(text, self._stops)
        return self._grow(text, end)

    def finish(self) -> str:
        """The rest, when no further token comes."""
        text = self._decode(self._ids)
        return self._grow(text, self._end(text))

    def _end(self, text: str) -> int:
        """Where the text ends; notes whether by a stop text."""
        end = first_stop(text, self._stops)
        self.has_stopped = end is not None
        return len(text) if end is None else end

    def _grow(self, text: str, end: int) -> str:
        if end <= self._said:
            return ""
        piece, self._said = text[self._said : end], end
        return piece


def first_stop(text: str, stops: Sequence[str]) -> int | None:
    """Where the stop text begins that is whole first; None where there is none.

    However the text comes in pieces, it ends there.
    """
    found = [(at + len(stop), at) for stop in stops if (at := text.find(stop)) >= 0]
    return min(found)[1] if found else None


def _overlap(text: str, stops: Sequence[str]) -> int:
    """Letters at the text's end that a stop text may begin with."""
    longest = max((len(stop) - 1 for stop in stops), default=0)
    for count in range(min(longest, len(text)), 0, -1):
        if any(stop.startswith(text[-count:]) for stop in stops):
            return count
    return 0
