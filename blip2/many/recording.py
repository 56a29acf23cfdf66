"""The lines that workers answer, written in order; what they took, and how far they are."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tqdm import tqdm

from blip2.many.journal import Journal, StandardOutput
from blip2.many.work import WAIT, Answered, Start, Work, Workers
from blip2.pipeline import Stopwatch

_LONG_WAIT = 0.2  # of the time in which there were answers
_RECENT = 10.0  # seconds whose rate the progress bar shows


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
        waited = self.seconds.get(WAIT, 0.0) / (self.workers * self.wall_seconds or 1)
        if self.middle_rate and waited > _LONG_WAIT:  # of a short run, mostly for the first
            lines.append(
                f"{waited:.0%} of the time the engines waited for pictures to be decoded: give more"
                " --workers, or --decode fast for large JPEGs"
            )
        return "\n".join(lines)

    def _start_and_middle(self) -> str:
        """What a short run is of, and what a long one is."""
        parts = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in self.before.items())
        start = f"first answer after {self.first_after:.1f} s" + (f" ({parts})" if parts else "")
        if not self.middle_rate:
            return start
        return f"{start}; {self.middle_rate:.1f} pictures/s in the middle of the run"


def record(
    answers: Iterable[Answered],
    workers: int,
    total: int | None,
    journal: Journal | StandardOutput,
    begun: float | None = None,
) -> Summary:
    """Write the lines of every batch, those of pictures that are in the journal left out.

    Args:
        answers: batches from the one with the first missing picture on, in order.
        workers: how many engines they come from.
        total: pictures of the input, for the progress bar; None if nobody knows.
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


def _progress_bar(total: int | None, done: int) -> _ProgressBar:
    # In a log file every refresh is another line.
    interval = 0.2 if sys.stderr.isatty() else 30
    return _ProgressBar(total=total, initial=done, unit=" pictures", mininterval=interval)
