"""What is asked of an engine, and what comes of it."""

from __future__ import annotations

import dataclasses
import itertools
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import torch

from blip2.language import GenerationOptions
from blip2.pipeline import Answer

_keys = itertools.count()  # no two requests have one, as they may have an address

# Called by the engine's thread with each token of a request, and with None when it is over: must not
# wait, nor raise.
Listener = Callable[["Request", "int | None"], None]


@dataclasses.dataclass(eq=False)
class Picture:
    """Something to ask about, looked at once however many ask, and when the first of them is due.

    Attributes:
        pixel_values: 3 x S x S, until it was looked at.
        query_output: n x H_lm, once it was.
    """

    pixel_values: torch.Tensor | None
    query_output: torch.Tensor | None = None


class Request:
    """A question that an engine answers. Any thread may wait for it, or cancel it."""

    def __init__(
        self,
        picture: Picture,
        input_ids: torch.Tensor,
        options: GenerationOptions,
        decode: Callable[[list[int]], str],
        number: int,
        listener: Listener | None = None,
    ) -> None:
        """Made by `Engine.submit`."""
        self.picture, self.input_ids, self.options = picture, input_ids, options
        self.number, self.arrived = number, time.monotonic()
        self.key = next(_keys)
        self.is_cancelled = False
        self.scheduled = 0  # tokens that are chosen, or under way
        self._decode = decode
        self._ids: list[int] = []
        self._news: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._listener = listener
        # Seconds: until it was begun, of its looks if its picture needed one, of OPT once it is over.
        self.stages: dict[str, float] = {}
        self._is_over = threading.Event()
        self._answers: list[Answer] = []
        self._error: BaseException | None = None

    def tokens(self) -> Iterator[int]:
        """The answer's tokens, each as soon as it is there. With beams those of the best, at the end.

        For one reader, once.

        Raises:
            Blip2Error: the request cannot be answered.
        """
        while (token := self._news.get()) is not None:
            yield token
        self._raise()

    def pieces(self) -> Iterator[str]:
        """The answer's text as it grows; no piece ends within a character. As `tokens`."""
        return pieces(self.tokens(), self._decode)

    def answers(self) -> list[Answer]:
        """The answer, or all beams, best first; waits for them.

        Raises:
            Blip2Error: the request cannot be answered.
        """
        self._is_over.wait()
        self._raise()
        return self._answers

    def cancel(self) -> None:
        """Let nobody work for it any more; its tokens end."""
        self.is_cancelled = True

    @property
    def is_over(self) -> bool:
        """Whether it was answered, has failed or was cancelled."""
        return self._is_over.is_set()

    # What follows is the engine's.

    def say(self, token: int) -> None:
        """Hand out a token."""
        self._ids.append(token)
        self._tell(token)

    def begin(self) -> None:
        """Note that it is no longer waiting."""
        self.stages["wait"] = time.monotonic() - self.arrived

    @property
    def said(self) -> int:
        """Tokens handed out."""
        return len(self._ids)

    def finish(self, answers: Sequence[Answer] | None = None, finished: bool = True) -> None:
        """End with these answers, or with the tokens that were handed out."""
        if answers is None:
            answers = [Answer(self._decode(self._ids), None, finished)]
        self._end(list(answers), None)

    def fail(self, error: BaseException) -> None:
        """End with an error."""
        self._end([], error)

    def _end(self, answers: list[Answer], error: BaseException | None) -> None:
        if not self._is_over.is_set():
            self._answers, self._error = answers, error
            rest = time.monotonic() - self.arrived - sum(self.stages.values())
            self.stages["OPT" if self.stages else "wait"] = rest
            self._is_over.set()
            self._tell(None)

    def _tell(self, token: int | None) -> None:
        self._news.put(token)
        if self._listener is not None:
            self._listener(self, token)

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error


def pieces(tokens: Iterator[int], decode: Callable[[list[int]], str]) -> Iterator[str]:
    """The text of tokens, as far as no further token can change it."""
    ids: list[int] = []
    said = ""
    for token in tokens:
        ids.append(token)
        text = decode(ids)
        # A character may take several tokens, and reads as this until the last of them is there.
        if len(text) > len(said) and not text.endswith("\N{REPLACEMENT CHARACTER}"):
            yield text[len(said) :]
            said = text
    if rest := decode(ids)[len(said) :]:
        yield rest
