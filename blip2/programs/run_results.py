"""What run.py prints of one picture: for people, or for programs."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from blip2.answers import Answer


@dataclasses.dataclass(frozen=True)
class Asked:
    """A text, and the prompt that OPT reads for it."""

    text: str
    prompt: str


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds by stage, and those of the whole as the clock has them; medians of `repeats` runs."""

    stages: dict[str, float]
    total: float
    repeats: int | None = None


def as_json(question: Asked, answers: list[list[Answer]], times: Times) -> dict[str, Any]:
    """The result for programs: seconds by stage; with --benchmark they are medians."""
    return {
        "question": question.text,
        "prompt": question.prompt,
        "answers": [[beam.to_json() for beam in beams] for beams in answers],
        "seconds": times.stages,
        "total_seconds": times.total,
        "benchmark": times.repeats,
    }


def as_text(question: Asked, answers: list[list[Answer]], times: Times) -> str:
    """The result for people: prompt, answers, and a table of the stages."""
    lines = [f"[Q] {question.prompt or '(caption)'}"]
    for beams in answers:
        for beam in beams:
            is_one_of_several = beam.score is not None and len(beams) > 1
            score = [f"   ({beam.score:.4f})"] if is_one_of_several else []
            flags = [f"({flag})" for flag in beam.flags]
            lines.append(" ".join(["[A]", *filter(None, [beam.text]), *score, *flags]))
    median = f", median of {times.repeats}" if times.repeats else ""
    lines += ["", f"{'stage':<14}{'time' + median:>22}{'share':>8}"]
    other = times.total - sum(times.stages.values())
    for stage, seconds in [*times.stages.items(), ("other", other), ("total", times.total)]:
        lines.append(f"{stage:<14}{seconds * 1e3:>19.1f} ms{seconds / times.total:>7.0%}")
    return "\n".join(lines)
