"""Many pictures through the pipeline: decoded ahead, each looked at once, every question asked of it.

    start = find_start(entries, journal, batch_size)
    work = Work(entries, start, batch_size, facts.preprocessing, questions, options)
    summary = record(workers.answer(work), workers.count, total, journal)

`workers` are this process (`blip2.many.local`) or the machines of a Ray cluster
(`blip2.many.cluster`); `record` is `blip2.many.recording`'s.

Batches are windows of the input: batch k holds pictures k * size … (k + 1) * size - 1 of it, those
that cannot be read left out. Where OPT has rows, answers of several are under way at the same time,
but for the ends of blocks of windows: a run that goes on begins with a block. So it, and one that has
many workers, computes what an uninterrupted one would, and gives the same answers, sampled ones too.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from blip2.errors import Blip2Error
from blip2.images import Preprocessing
from blip2.language import GenerationOptions
from blip2.many import answering, inputs
from blip2.many.inputs import Picture
from blip2.many.journal import Journal, StandardOutput
from blip2.pipeline import Pipeline

WAIT = "wait for pictures"  # the stage of a worker that has none to look at


@dataclasses.dataclass(frozen=True)
class Question:
    """What a line of the output is asked, and the prompt that OPT reads for it.

    `prefix` is the end of the prompt that the answer is to begin with.
    """

    text: str
    prompt: str
    prefix: str = ""


@dataclasses.dataclass(frozen=True)
class Facts:
    """What a run must know of the engines, wherever they are: `prompts` are token ids.

    `block` is the number of windows after which nothing is under way; `has_scores` whether answers
    have one.
    """

    prompts: list[list[int]]
    options: GenerationOptions
    preprocessing: Preprocessing
    batch_size: int
    block: int = 1
    has_scores: bool = True

    @classmethod
    def of(
        cls, pipeline: Pipeline, questions: Sequence[Question], decoding: dict[str, Any]
    ) -> Facts:
        """Read them off open engines; `batch_size` is the one to take where none is asked for.

        Args:
            decoding: fields of GenerationOptions, for `Pipeline.options`.

        Raises:
            Blip2Error: the engines cannot take a question, or decode so.
        """
        prompts, options = [question.prompt for question in questions], pipeline.options(decoding)
        pipeline.check(prompts, options)
        return cls(
            [pipeline.tokenizer.encode(prompt) for prompt in prompts],
            options,
            pipeline.vision.preprocessing,
            pipeline.default_batch_size,
            answering.block_of(pipeline, options),
            pipeline.language.has_scores(options),
        )


@dataclasses.dataclass(frozen=True)
class Start:
    """Where a run begins: at picture `position` of the input, picture `skip` of entry `entry`."""

    position: int = 0
    entry: int = 0
    skip: int = 0


@dataclasses.dataclass(frozen=True)
class Batch:
    """Pictures of the window that begins at `position`; decoded: each one's 3 x S x S, or an error."""

    position: int
    pictures: Sequence[Picture]
    decoded: Sequence[np.ndarray | str] = ()


@dataclasses.dataclass(frozen=True)
class Work:
    """What is to be done: every question about every picture of `entries` from `start` on.

    Attributes:
        entries: what `inputs.list_entries` found.
        batch_size: pictures looked at, and asked one question, at once.
        preprocessing: what the engines' ViT takes.
        options: how to decode; of a sampling, `seed` is the first of a series.
        only: places in the input of the pictures to look at; None is all from `start` on.
        block: windows after which nothing is under way; `start` is where such a block begins.
        is_fast: decode large JPEGs at a smaller scale: see `decode_picture`.
    """

    entries: Sequence[str]
    start: Start
    batch_size: int
    preprocessing: Preprocessing
    questions: Sequence[Question]
    options: GenerationOptions
    only: frozenset[int] | None = None
    block: int = 1
    is_fast: bool = False

    def batches(self) -> Iterator[Batch]:
        """The batches from `start` on, not decoded; of those with none of `only`, nothing."""
        pictures = inputs.read_pictures(self.entries[self.start.entry :])
        pictures, position = itertools.islice(pictures, self.start.skip, None), self.start.position
        while batch := list(itertools.islice(pictures, self.batch_size)):
            chosen = [p for number, p in enumerate(batch, position) if self.is_wanted(number)]
            if chosen:
                yield Batch(position, chosen)
            position += len(batch)

    def is_wanted(self, number: int) -> bool:
        """Whether picture `number` of the input is to be looked at."""
        return self.only is None or number in self.only


@dataclasses.dataclass(frozen=True)
class Answered:
    """The output's lines of each picture of the batch at `position`, and what its stages took.

    `moment` is when it was known here, by time.perf_counter: not all are written at once.
    """

    position: int
    lines: list[list[dict[str, Any]]]
    seconds: dict[str, float]
    moment: float = dataclasses.field(default_factory=time.perf_counter)


class Workers(Protocol):
    """Who answers: `count` engines at once."""

    count: int

    def answer(self, work: Work) -> Generator[Answered, None, None]:
        """Do the work, batch by batch in the input's order; close what you do not take to its end.

        Raises:
            Blip2Error: a worker was killed, or its engines cannot take a question.
        """


def describe(facts: Facts, questions: Sequence[Question], batch_size: int) -> dict[str, Any]:
    """What must stay the same for a run to go on with the output of another, by flag."""
    return {
        "--input_text or --prompt_template": [dataclasses.asdict(q) for q in questions],
        "--batch_size": batch_size,
        **{f"--{name}": value for name, value in facts.options.to_json().items()},
        "tokenizer": facts.prompts,
    }


def find_start(entries: Sequence[str], journal: Journal | StandardOutput, size: int) -> Start:
    """Where the block begins that holds the first picture which is not in the journal.

    Args:
        entries: of the input.
        journal: what was done so far.
        size: pictures of a block.

    Raises:
        Blip2Error: the input is another than that of the journal's pictures.
    """
    position, number, names = journal.done // size * size, 0, journal.names()
    start = Start()
    for index, entry in enumerate(entries):
        for skip, picture in enumerate(inputs.read_pictures([entry])):
            if number == position:
                start = Start(position, index, skip)
            if (name := next(names, None)) is None:
                return start
            if picture.name != name:
                rest = itertools.chain([picture], inputs.read_pictures(entries[index:]))
                raise _changed_input(journal, name, picture, rest)
            number += 1
    if missing := next(names, None):
        raise _changed_input(journal, missing)
    return Start(journal.done, len(entries))


def _changed_input(
    journal: Journal | StandardOutput,
    name: dict[str, str],
    found: Picture | None = None,
    rest: Iterable[Picture] = (),
) -> Blip2Error:
    """What to say where the input has `found`, then `rest`, and the output `name`."""
    if found and any(picture.name == name for picture in rest):
        return Blip2Error(
            f"{'/'.join(found.name.values())} is new in the input, or was elsewhere in it:"
            f" {journal.path} has {'/'.join(name.values())} in its place",
            "move it away until the"
            " output is whole, give it behind the other pictures, or choose another `output`",
        )
    return Blip2Error(
        f"{journal.path} has an answer for {'/'.join(name.values())}, which is no longer there in"
        " the input's order",
        "give the same pictures again, or choose another `output`",
    )
