"""Windows of pictures through the rows of OPT's cache: whose answer ends gives its row to the next.

Equal windows are answered equally, whenever that is: what is begun when depends on how many rows are
free, which the lengths of the answers say, and never on the clock. Every so many windows nothing is
left under way, so that a run may begin anew there.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable, Iterator, Sequence

import torch

from blip2.engine.request import Picture, Request
from blip2.engine.running import Running
from blip2.language import GenerationOptions
from blip2.pipeline import Answer, Look, Pipeline, Stopwatch

_BLOCK = 8  # windows; at the end of a block rows stay empty for some steps: 2 % of its time

Asked = list[list[list[Answer]]]  # question by question, of each picture its beams, best first


@dataclasses.dataclass(frozen=True)
class Window:
    """Pictures of the input from `position` on, `size` of them, and those that could be decoded.

    pixel_values: B x 3 x S x S.
    """

    position: int
    size: int
    pixel_values: torch.Tensor


def has_rows(pipeline: Pipeline, options: GenerationOptions) -> bool:
    """Whether windows are answered so; else each is one batch.

    It pays where several have rows at once, on a GPU. A batch's beams are searched for by kernels
    that take all of them at once.
    """
    if not pipeline.language.has_rows or options.num_beams > 1:
        return False
    return pipeline.default_rows > pipeline.default_batch_size


def block_of(pipeline: Pipeline, options: GenerationOptions) -> int:
    """After how many windows nothing is under way: counted from the first of the input."""
    return _BLOCK if has_rows(pipeline, options) else 1


def answer_in_batches(
    pipeline: Pipeline,
    windows: Iterable[Window],
    prompts: Sequence[str],
    options: GenerationOptions,
    batch_size: int,
    watch: Stopwatch,
    prefix: str = "",
) -> Iterator[Asked]:
    """Ask every prompt of every picture; yields window by window, in order.

    Args:
        pipeline: the engines.
        windows: in the input's order; the next one is taken when there is room for it.
        prompts: for each picture.
        options: how to decode; of a sampling, `seed` is the first of a series.
        batch_size: pictures of a window, at most.
        watch: where to add the seconds of each stage.
        prefix: the end of the prompts that answers are to begin with.

    Raises:
        Blip2Error: the engines cannot take a question, or yield NaN or Inf.
    """
    pipeline.prepare(list(prompts[:1]) * batch_size, options)
    for window in windows:
        count = len(window.pixel_values)
        look = pipeline.look(window.pixel_values, watch) if count else None
        asked: Asked = []
        for number, prompt in enumerate(prompts):
            with watch.time("OPT"):
                seeded = _seeded(options, window, number, len(prompts))
                asked.append(pipeline.ask(look, [prompt] * count, seeded, prefix) if count else [])
        yield asked


def answer_in_rows(
    pipeline: Pipeline,
    windows: Iterable[Window],
    prompts: Sequence[str],
    options: GenerationOptions,
    batch_size: int,
    watch: Stopwatch,
    prefix: str = "",
) -> Iterator[Asked]:
    """As `answer_in_batches`, of an OPT that has rows."""
    ratio = pipeline.default_rows // pipeline.default_batch_size
    max_rows = ratio * batch_size * options.rows
    asking = _Asking(pipeline, max_rows, prompts, options, watch, prefix)
    asking.prepare(batch_size)
    block_size = batch_size * block_of(pipeline, options)
    under_way: collections.deque[_UnderWay] = collections.deque()
    block = 0
    for window in windows:
        if window.position // block_size != block:
            block = window.position // block_size
            asking.end()
        under_way.append(asking.begin(window))
        asking.make_room(batch_size * options.rows)
        while under_way and under_way[0].is_over:
            yield under_way.popleft().answers(pipeline)
    asking.end()
    for rest in under_way:
        yield rest.answers(pipeline)


def _seeded(
    options: GenerationOptions, window: Window, question: int, questions: int
) -> GenerationOptions:
    """The seed counts requests over: equal draws in every window would make them alike."""
    first = window.position * questions + question * window.size
    return dataclasses.replace(options, seed=options.seed + first)


@dataclasses.dataclass(frozen=True)
class _UnderWay:
    """A window, its pictures looked at and every question about them asked."""

    look: Look | None  # of those that could be decoded, if any
    requests: list[list[Request]]

    @property
    def is_over(self) -> bool:
        return all(request.is_over for group in self.requests for request in group)

    def answers(self, pipeline: Pipeline) -> Asked:
        if self.look is not None:
            pipeline.check_look(self.look)  # a better explanation than what OPT made of it
        return [[request.answers() for request in group] for group in self.requests]


class _Asking:
    """Takes windows through the rows."""

    def __init__(
        self,
        pipeline: Pipeline,
        max_rows: int,
        prompts: Sequence[str],
        options: GenerationOptions,
        watch: Stopwatch,
        prefix: str,
    ) -> None:
        self._decode = pipeline.decoder(prefix)
        self._pipeline, self._running, self._watch = pipeline, Running(pipeline, max_rows), watch
        self._options, self._input_ids = options, pipeline.encode(prompts)

    def prepare(self, batch_size: int) -> None:
        """Have what windows of that size need compiled, all at once; the rest waits for it."""
        longest = max(self._input_ids, key=len)
        self._running.open_for(longest, self._options)
        self._running.prepare(len(longest), batch_size)

    def begin(self, window: Window) -> _UnderWay:
        """Look at a window's pictures, and read what is asked about them."""
        if not len(window.pixel_values):
            return _UnderWay(None, [[] for _ in self._input_ids])
        look = self._pipeline.look(window.pixel_values, self._watch)
        pictures = [Picture(None, row) for row in look.query_output.clone()]
        look = dataclasses.replace(look, query_output=None, image_embeds=None)  # overwritten soon
        requests = []
        for number, input_ids in enumerate(self._input_ids):
            options = _seeded(self._options, window, number, len(self._input_ids))
            group = [
                Request(picture, input_ids, options, self._decode, index)
                for index, picture in enumerate(pictures)
            ]
            self._read(group)
            requests.append(group)
        return _UnderWay(look, requests)

    def _read(self, group: Sequence[Request]) -> None:
        rows = self._options.rows
        size = min(len(group), max(1, self._running.rows.capacity // rows))
        for start in range(0, len(group), size):
            part = group[start : start + size]
            self.make_room(len(part) * rows)
            with self._watch.time("OPT"):
                self._running.admit(part)

    def make_room(self, rows: int) -> None:
        """Take steps until so many rows are free, or all of them."""
        with self._watch.time("OPT"):
            self._running.let_go()
            while self._running.used and self._running.free < rows:
                self._running.turn()
                self._running.let_go()

    def end(self) -> None:
        """Take steps until nothing is under way."""
        with self._watch.time("OPT"):
            while self._running.is_busy:
                self._running.turn()
            self._running.let_go()
