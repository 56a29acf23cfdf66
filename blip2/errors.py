"""The one error of this package: what is wrong, where, and what to do."""

from __future__ import annotations


class Blip2Error(Exception):
    """Something the user can mend; `str` is both of its parts as one line.

    `problem` says what is wrong, and where; `remedy` what to do, where there is something to say.
    Parameters stand in backticks (`num_beams`); a program puts its flags in their place when it shows
    the error (`error: …`, exit code 2).
    """

    def __init__(self, problem: str, remedy: str | None = None) -> None:
        super().__init__(problem, remedy)
        self.problem, self.remedy = problem, remedy

    def __str__(self) -> str:
        return self.problem if self.remedy is None else f"{self.problem}; {self.remedy}"


def first_line(error: BaseException) -> str:
    """What an error of some library says, in one line; the name of its type if it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
