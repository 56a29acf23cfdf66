"""Many pictures through the pipeline: decoded ahead, each looked at once, every question asked of it.

    start = find_start(entries, journal, batch_size)
    work = Work(entries, start, batch_size, facts.preprocessing, questions, options)
    summary = record(workers.answer(work), workers.count, total, journal)

`workers` are this process (`LocalWorkers`) or the machines of a Ray cluster (`blip2.many.cluster`).

Batches are windows of the input: batch k holds pictures k * size … (k + 1) * size - 1 of it, those
that cannot be read left out. Where OPT has rows, answers of several are under way at the same time,
but for the ends of blocks of windows: a run that goes on begins with a block. So it, and one that has
many workers, computes what an uninterrupted one would, and gives the same answers, sampled ones too.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import sys
import time
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import torch
from tqdm import tqdm

from blip2.errors import Blip2Error
from blip2.images import Preprocessing
from blip2.language import GenerationOptions
from blip2.many import answering, inputs
from blip2.many.decoders import Decoders
from blip2.many.inputs import Picture
from blip2.many.journal import Journal, StandardOutput
from blip2.pipeline import Answer, Pipeline, Stopwatch
from blip2.vision.session import VisionSession

WAIT = "wait for pictures"  # the stage of a worker that has none to look at
_RECENT = 10.0  # seconds whose rate the progress bar shows


@dataclasses.dataclass(frozen=True)
class Question:
    """What a line of the output is asked, and the prompt that OPT reads for it."""

    text: str
    prompt: str


@dataclasses.dataclass(frozen=True)
class Facts:
    """What a run must know of the engines, wherever they are: `prompts` are token ids.

    `block` is the number of windows after which nothing is under way.
    """

    prompts: list[list[int]]
    options: GenerationOptions
    preprocessing: Preprocessing
    batch_size: int
    block: int = 1

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
    """

    entries: Sequence[str]
    start: Start
    batch_size: int
    preprocessing: Preprocessing
    questions: Sequence[Question]
    options: GenerationOptions
    only: frozenset[int] | None = None
    block: int = 1

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


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a run did: pictures in the output, those of this run, and seconds by stage.

    The seconds are sums over all workers. `wall_seconds` are those in which there were answers;
    `before` and `after` those of this process before the workers could begin and when they had ended.
    The first answer came `first_after` seconds after the run began; `middle_rate` are the pictures a
    second of its middle half, or 0 where that is too short to say.
    """

    done: int
    failed: int
    new: int
    wall_seconds: float
    seconds: dict[str, float]
    workers: int = 1
    before: Mapping[str, float] = dataclasses.field(default_factory=dict)
    after: Mapping[str, float] = dataclasses.field(default_factory=dict)
    first_after: float | None = None
    middle_rate: float = 0.0

    def following(self, earlier: Summary) -> Summary:
        """Of two parts of a run, the later of which is this one."""
        seconds = collections.Counter(earlier.seconds)
        seconds.update(self.seconds)
        new, wall = self.new + earlier.new, self.wall_seconds + earlier.wall_seconds
        first = self.first_after if earlier.first_after is None else earlier.first_after
        return dataclasses.replace(
            self, new=new, wall_seconds=wall, seconds=dict(seconds), first_after=first
        )

    def table(self, total: float) -> str:
        """What was done, and a line for each stage.

        `total` are the seconds of the whole run, as a clock beside it would say.
        """
        rate = self.new / self.wall_seconds if self.new else 0.0
        pictures = "picture" if self.done == 1 else "pictures"
        summed, name = self.workers > 1, "total"
        by_workers = f" by {self.workers} workers" if summed else ""
        lines = [
            f"{self.done} {pictures} done, {self.failed} of them failed;"
            f" {self.new} in this run{by_workers}, {rate:.1f} pictures/s"
        ]
        if self.first_after is not None:
            lines.append(self._start_and_middle())
        stages = {**self.before, **self.seconds, **self.after}
        if summed:
            # Of the time in which they could answer.
            name, stages = f"total, {self.workers} x {self.wall_seconds:.1f} s", dict(self.seconds)
            total = self.workers * self.wall_seconds
        heading = f"sum of {self.workers} workers" if summed else "time"
        width = max(20, len(heading) + 2)
        lines.append(f"{'stage':<20}{heading:>{width}}{'share':>8}")
        stages["other"] = total - sum(stages.values())
        for stage, seconds in [*stages.items(), (name, total)]:
            lines.append(f"{stage:<20}{seconds:>{width - 2}.1f} s{seconds / total:>7.0%}")
        return "\n".join(lines)

    def _start_and_middle(self) -> str:
        """What a short run is of, and what a long one is."""
        parts = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in self.before.items())
        start = f"first answer after {self.first_after:.1f} s" + (f" ({parts})" if parts else "")
        if not self.middle_rate:
            return start
        return f"{start}; {self.middle_rate:.1f} pictures/s in the middle of the run"


def describe(facts: Facts, questions: Sequence[Question], batch_size: int) -> dict[str, Any]:
    """What must stay the same for a run to go on with the output of another, by flag."""
    return {
        "--input_text or --prompt_template": [dataclasses.asdict(q) for q in questions],
        "--batch_size": batch_size,
        **{f"--{name}": value for name, value in dataclasses.asdict(facts.options).items()},
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


def record(
    answers: Iterable[Answered],
    workers: int,
    total: int,
    journal: Journal | StandardOutput,
    begun: float | None = None,
) -> Summary:
    """Write the lines of every batch, those of pictures that are in the journal left out.

    Args:
        answers: batches from the one with the first missing picture on, in order.
        workers: how many engines they come from.
        total: pictures of the input, for the progress bar.
        begun: when the run began, by time.perf_counter; None is now.

    Raises:
        Blip2Error: the journal cannot be written, or `answers` raises it. What was written stays.
    """
    started, done, failed = time.perf_counter(), journal.done, journal.failed
    seconds: collections.Counter[str] = collections.Counter()
    watch, first_after = Stopwatch(), None
    moments: list[tuple[float, int]] = []
    with _progress_bar(total, done) as bar:
        for answered in answers:
            # The first block may be one that a killed run wrote in part.
            new = answered.lines[max(0, journal.done - answered.position) :]
            with watch.time("write"):
                journal.append(list(itertools.chain.from_iterable(new)))
            if new and first_after is None:
                first_after = time.perf_counter() - (started if begun is None else begun)
            moments.append((answered.moment, len(new)))
            seconds.update(answered.seconds)
            done += len(new)
            failed += sum("error" in lines[0] for lines in new)
            bar.set_postfix(failed=failed, refresh=False)
            bar.update(len(new))
    return Summary(
        done,
        failed,
        done - journal.done,
        time.perf_counter() - started,
        {**seconds, **watch.seconds},
        workers,
        first_after=first_after,
        middle_rate=_middle_rate(moments),
    )


def _middle_rate(moments: Sequence[tuple[float, int]]) -> float:
    """Pictures a second between the first quarter of the batches and the last, of `moments` of each.

    0 where a batch more or less would matter.
    """
    moments = sorted(moments)
    middle = moments[len(moments) // 4 : len(moments) - len(moments) // 4]
    if len(middle) < 10 or middle[0][0] == middle[-1][0]:
        return 0.0
    return sum(count for _, count in middle[1:]) / (middle[-1][0] - middle[0][0])


def retry_errors(workers: Workers, work: Work, journal: Journal) -> Summary:
    """Answer the pictures again of which the journal has an error; nothing else in it changes.

    Answered is what failed of a block, whatever a run that was killed had answered of it.

    Args:
        workers: who answers.
        work: that of the whole input; where it starts does not count.
        journal: what was done so far.

    Raises:
        Blip2Error: the journal cannot be written, or the workers raise it. What was answered is
            kept, for a run that goes on.
    """
    begun, size = time.perf_counter(), work.batch_size
    seconds: collections.Counter[str] = collections.Counter()
    if not journal.failed:
        return Summary(journal.done, 0, 0, 0.0, {}, workers.count)
    with journal.retrying() as retry:
        waiting = [number for number in retry.failed if number >= retry.done]
        if waiting:
            begins = waiting[0] // (size * work.block) * size * work.block
            only = frozenset(number for number in retry.failed if number >= begins)
            work = dataclasses.replace(work, start=Start(), only=only)
            with (
                contextlib.closing(workers.answer(work)) as answers,
                _progress_bar(len(waiting), 0) as bar,
            ):
                for answered in answers:
                    window = range(answered.position, answered.position + size)
                    numbers = filter(only.__contains__, window)
                    for number, lines in zip(numbers, answered.lines, strict=True):
                        if number >= retry.done:
                            retry.replace(number, lines)
                            bar.update()
                    retry.flush()
                    seconds.update(answered.seconds)
    wall = time.perf_counter() - begun
    return Summary(journal.done, journal.failed, len(waiting), wall, dict(seconds), workers.count)


class _ProgressBar(tqdm):
    """Shows pictures/s of the last seconds, without the start of a run."""

    def __init__(self, **arguments: Any) -> None:
        self._moments: collections.deque[tuple[float, float]] = collections.deque()
        super().__init__(**arguments)

    def update(self, n: float = 1) -> bool | None:
        """Count `n` more."""
        now = time.perf_counter()
        self._moments.append((now, self.n + n))
        while len(self._moments) > 2 and self._moments[1][0] < now - _RECENT:
            self._moments.popleft()
        return super().update(n)

    @property
    def format_dict(self) -> dict[str, Any]:
        """What it shows."""
        rate = None
        if len(self._moments) > 1:
            (begun, before), (_, done) = self._moments[0], self._moments[-1]
            rate = (done - before) / max(time.perf_counter() - begun, 1e-9)
        return {**super().format_dict, "rate": rate}


def _progress_bar(total: int, done: int) -> _ProgressBar:
    # In a log file every refresh is another line.
    interval = 0.2 if sys.stderr.isatty() else 30
    return _ProgressBar(total=total, initial=done, unit=" pictures", mininterval=interval)


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
        decoded = zip(named, self._decoders.decode(pictures, work.preprocessing), strict=False)
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

    for asked in answer(pipeline, windows(), prompts, options, work.batch_size, watch):
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
    lines = []
    for question, beams in zip(questions, outcome, strict=True):
        best = beams[0]
        line = {**picture.name, "question": question.text, "answer": best.text, "flags": best.flags}
        if len(beams) > 1:
            line["beams"] = [beam.to_json() for beam in beams]
        lines.append(line)
    return lines
