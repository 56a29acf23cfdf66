"""A conversation about a picture as OPT reads it, cut at whole turns to what fits."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from blip2.templates import TEMPLATE, fill_template

Turn = tuple[str, str]  # a question and its answer


def prompt_of(turns: Sequence[Turn], question: str, template: str = TEMPLATE) -> str:
    """The prompt: earlier turns before the question, as LAVIS joins them.

    An empty question asks for a caption, to which earlier turns say nothing. A turn without a question
    (a caption) or without an answer is left out.
    """
    last = fill_template(template, question)
    if not last:
        return ""
    filled = [
        f"{fill_template(template, asked)} {_sentence(answer)}"
        for asked, answer in turns
        if asked.strip() and answer.strip()
    ]
    return " ".join([*filled, last])


def _sentence(text: str) -> str:
    text = text.strip()
    return text if text[-1] in ".!?" else f"{text}."


def fitting_prompt(
    turns: Sequence[Turn],
    question: str,
    template: str,
    count: Callable[[str], int],
    limit: int,
) -> str | None:
    """The prompt with as many of the latest turns as fit; None if the question alone does not.

    Args:
        turns: earlier questions and answers, oldest first.
        question: the text to answer.
        template: what a question is put into.
        count: tokens of a prompt.
        limit: tokens, at most.
    """
    for first in range(len(turns) + 1):
        prompt = prompt_of(turns[first:], question, template)
        if count(prompt) <= limit:
            return prompt
    return None
