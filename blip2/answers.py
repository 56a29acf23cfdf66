"""An answer. Imports nothing heavy: what asks a server needs no PyTorch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from blip2.language import Beam

Decode = Callable[[list[int]], str]  # the text of an answer's ids


@dataclasses.dataclass(frozen=True)
class Answer:
    """One answer's text.

    `log_prob` is the mean log probability of its tokens, where the engine says it: see `Beam`.
    `score` is what a beam search ranks it by, else the same. `finished` is false of a text that was
    cut: it came to max_output_len tokens without an end. `prefix` is what was given, not answered.
    """

    text: str
    score: float | None = None
    finished: bool = True
    log_prob: float | None = None
    prefix: str = ""

    @classmethod
    def of(cls, beam: Beam, decode: Decode) -> Answer:
        """Of the ids of one."""
        score = beam.log_prob if beam.score is None else beam.score
        text, prefix = decode(beam.token_ids), decode([])
        return cls(text, score, beam.finished, beam.log_prob, prefix)

    @property
    def flags(self) -> list[str]:
        """What is suspicious of it: "empty"; "loop" if it ends by repeating itself; "length".

        A loop is the same words three times over at the end, wherever in them the answer was cut.
        """
        words = self.text.removeprefix(self.prefix).split()
        periods = range(1, len(words) // 3 + 1)
        loops = any(words[-2 * period :] == words[-3 * period : -period] for period in periods)
        found = {"empty": not words, "loop": loops, "length": not self.finished}
        return [flag for flag, holds in found.items() if holds]

    def to_json(self) -> dict[str, Any]:
        """As the programs print it."""
        return {
            "text": self.text,
            "score": self.score,
            "log_prob": self.log_prob,
            "flags": self.flags,
        }


def line_of(answers: Sequence[Answer]) -> dict[str, Any]:
    """What a line of many pictures' output says of the answers to a question, best first."""
    best = answers[0]
    # Digits behind these depend on what else is in a batch.
    score = None if best.log_prob is None else round(best.log_prob, 4) + 0.0  # not -0.0
    line: dict[str, Any] = {"answer": best.text, "score": score, "flags": best.flags}
    if len(answers) > 1:
        line["beams"] = [answer.to_json() for answer in answers]
    return line
