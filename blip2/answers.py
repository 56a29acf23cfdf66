"""An answer. Imports nothing heavy: what asks a server needs no PyTorch."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Answer:
    """One beam's text, with its score where the engine gives one.

    `finished` is false of a text that was cut: it came to max_output_len tokens without an end.
    """

    text: str
    score: float | None = None
    finished: bool = True

    @property
    def flags(self) -> list[str]:
        """What is suspicious of it: "empty"; "loop" if it ends by repeating itself; "length".

        A loop is the same words three times over at the end, wherever in them the answer was cut.
        """
        words = self.text.split()
        periods = range(1, len(words) // 3 + 1)
        loops = any(words[-2 * period :] == words[-3 * period : -period] for period in periods)
        found = {"empty": not words, "loop": loops, "length": not self.finished}
        return [flag for flag, holds in found.items() if holds]

    def to_json(self) -> dict[str, Any]:
        """As the programs print it."""
        return {"text": self.text, "score": self.score, "flags": self.flags}
