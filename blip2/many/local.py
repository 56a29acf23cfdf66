"""Many pictures, answered by the engines of this process."""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from blip2.answers import Answer, line_of
from blip2.many import answering
from blip2.many.decoders import Decoders
from blip2.many.inputs import Picture
from blip2.many.work import WAIT, Answered, Batch, Question, Work
from blip2.pipeline import Pipeline, Stopwatch
from blip2.vision.session import VisionSession


class LocalWorkers:
    """The engines of this process, its pictures decoded by others: see `Workers`."""

    count = 1

    def __init__(self, pipeline: Pipeline, decoders: Decoders) -> None:
        self._pipeline, self._decoders = pipeline, decoders

    def answer(self, work: Work) -> Generator[Answered, None, None]:
        """Do the work, batch by batch.

        Raises:
            Blip2Error: no decoding process can be started, or the engines cannot take a question.
        """
        return self.answer_some(work.batches(), work)

    def answer_some(self, batches: Iterable[Batch], work: Work) -> Generator[Answered, None, None]:
        """Do some of the work: batches of whole blocks, not decoded, which are taken ahead.

        Raises:
            Blip2Error: as `answer`.
        """
        named, taken = itertools.tee(batches)
        pictures = (batch.pictures for batch in taken)
        decoded = zip(
            named,
            self._decoders.decode(pictures, work.preprocessing, work.is_fast),
            strict=False,
        )
        # The next batch is laid out while this one is answered.
        ahead = ThreadPoolExecutor(1)
        watch = Stopwatch()

        def laid_out() -> Iterator[tuple[Batch, torch.Tensor]]:
            coming = ahead.submit(self._next_batch, decoded)
            while True:
                with watch.time(WAIT):
                    found = coming.result()
                if found is None:
                    return
                coming = ahead.submit(self._next_batch, decoded)
                yield found

        try:
            yield from answer_batches(self._pipeline, laid_out(), work, watch)
        finally:
            # Not waited for: it may wait for a picture, until the decoders end.
            ahead.shutdown(wait=False, cancel_futures=True)

    def _next_batch(
        self, decoded: Iterator[tuple[Batch, tuple[Sequence[Picture], list[np.ndarray | str]]]]
    ) -> tuple[Batch, torch.Tensor] | None:
        if (found := next(decoded, None)) is None:
            return None
        batch, (_, values) = found
        # From here on the names are enough.
        pictures = [dataclasses.replace(picture, content=None) for picture in batch.pictures]
        batch = Batch(batch.position, pictures, values)
        return batch, stack_pictures(batch, self._pipeline.vision)


def stack_pictures(batch: Batch, vision: VisionSession) -> torch.Tensor:
    """The pixels of a batch's pictures that could be decoded: B x 3 x S x S, uint8.

    For a GPU in memory that it copies from at full speed.
    """
    values = [picture for picture in batch.decoded if not isinstance(picture, str)]
    size = (len(values), 3, vision.preprocessing.height, vision.preprocessing.width)
    on_gpu = vision.device.type == "cuda"
    stacked = torch.empty(size, dtype=torch.uint8, pin_memory=on_gpu)
    if values:
        np.stack(values, out=stacked.numpy())
    return stacked


def answer_batches(
    pipeline: Pipeline,
    batches: Iterable[tuple[Batch, torch.Tensor]],
    work: Work,
    watch: Stopwatch,
) -> Iterator[Answered]:
    """Ask every question of every picture of decoded batches, in order.

    Args:
        pipeline: the engines.
        batches: of some blocks of the input, each with what `stack_pictures` makes of it.
        work: the run's.
        watch: has the seconds since the batch before was answered.

    Raises:
        Blip2Error: the engines cannot take a question, or yield NaN or Inf.
    """
    prompts, options = [question.prompt for question in work.questions], work.options
    answer = answering.answer_in_rows
    if not answering.has_rows(pipeline, options):
        answer = answering.answer_in_batches
    taken: collections.deque[Batch] = collections.deque()

    def windows() -> Iterator[answering.Window]:
        for batch, values in batches:
            taken.append(batch)
            yield answering.Window(batch.position, len(batch.decoded), values)

    [prefix] = {question.prefix for question in work.questions}  # of a run there is one
    for asked in answer(pipeline, windows(), prompts, options, work.batch_size, watch, prefix):
        batch, answers = taken.popleft(), zip(*asked, strict=True)
        outcomes = [
            outcome if isinstance(outcome, str) else list(next(answers))
            for outcome in batch.decoded
        ]
        lines = [
            _lines(picture, outcome, work.questions)
            for picture, outcome in zip(batch.pictures, outcomes, strict=True)
        ]
        seconds, watch.seconds = watch.seconds, {}
        yield Answered(batch.position, lines, seconds)


def _lines(
    picture: Picture, outcome: list[list[Answer]] | str, questions: Sequence[Question]
) -> list[dict[str, Any]]:
    if isinstance(outcome, str):
        return [{**picture.name, "error": outcome}]
    return [
        {**picture.name, "question": question.text, **line_of(answers)}
        for question, answers in zip(questions, outcome, strict=True)
    ]
