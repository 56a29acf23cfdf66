"""Texts at which an answer ends, found token by token: `stop_strings` of transformers' `generate`.

    stop = StopTexts(["."], tokenizer.token_bytes())
    state = stop.next(stop.START, token)      # on the host, or of many rows at once:
    states = stop.table[states, tokens]
    states == stop.found

An answer ends with the token that completes one of the texts, which stays in it. Whether a text has
come is the state of an automaton (Aho and Corasick, 1975) over the bytes of the tokens; a table of
what each token makes of each state needs no text, and lies where the tokens are.
"""

from __future__ import annotations

import collections
from collections.abc import Sequence

import numpy as np
import torch

from blip2.errors import Blip2Error


class StopTexts:
    """The texts, and the automaton that finds them. Two of the same texts and tokens are equal.

    `table` is states x tokens, int64: the state after a token; `found` is the one that is never left.
    """

    START = 0

    def __init__(self, texts: Sequence[str], token_bytes: Sequence[bytes]) -> None:
        """Make the table for texts, and for tokens of these bytes.

        Raises:
            Blip2Error: a text is empty, or no Unicode.
        """
        self.texts = tuple(texts)
        if not all(self.texts):
            raise Blip2Error("`stop` has an empty text", "give one that an answer may have")
        try:
            steps = _automaton([text.encode("utf-8") for text in self.texts])
        except UnicodeEncodeError:
            raise Blip2Error("`stop` has a text that is not UTF-8", "write it so") from None
        self.found = len(steps) - 1
        self.table = torch.from_numpy(_table(steps, token_bytes))
        self._rows = self.table.numpy()

    def __eq__(self, other: object) -> bool:
        same = isinstance(other, StopTexts) and self.texts == other.texts
        return same and self.table.shape == other.table.shape

    def __hash__(self) -> int:
        return hash(self.texts)

    def next(self, state: int, token: int) -> int:
        """The state after a token."""
        return int(self._rows[state, token])

    def length(self, token_ids: Sequence[int]) -> int | None:
        """How many of these ids there are up to the one that completes a text, if one does."""
        state = self.START
        for number, token in enumerate(token_ids, 1):
            state = self.next(state, token)
            if state == self.found:
                return number
        return None


def _automaton(words: Sequence[bytes]) -> np.ndarray:
    """States x 256: the state after a byte; 0 is the first, the last is that of a found word."""
    children: list[dict[int, int]] = [{}]
    ends = [False]
    for word in words:
        state = 0
        for byte in word:
            if byte not in children[state]:
                children[state][byte] = len(children)
                children.append({})
                ends.append(False)
            state = children[state][byte]
        ends[state] = True
    found = len(children)
    steps = np.zeros((found + 1, 256), dtype=np.int64)
    steps[found] = found
    # Breadth first: what follows a state's longest own ending is known before it is needed.
    waiting = collections.deque([(0, 0)])
    while waiting:
        state, ending = waiting.popleft()
        ends[state] |= ends[ending]
        if state:
            steps[state] = steps[ending]
        for byte, child in children[state].items():
            waiting.append((child, steps[ending, byte] if state else 0))
            steps[state, byte] = child
    is_end = np.array([*ends, True])
    return np.where(is_end[steps], found, steps)


def _table(steps: np.ndarray, token_bytes: Sequence[bytes]) -> np.ndarray:
    """States x tokens: the state after all bytes of a token."""
    states = np.repeat(np.arange(len(steps))[:, None], len(token_bytes), axis=1)
    lengths = np.array([len(token) for token in token_bytes])
    for place in range(lengths.max(initial=0)):
        [longer] = np.nonzero(lengths > place)
        bytes_here = np.array([token_bytes[token][place] for token in longer])
        states[:, longer] = steps[states[:, longer], bytes_here]
    return states
