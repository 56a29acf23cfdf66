"""Requests that have rows of OPT's cache, from their pictures to their ends.

    running = Running(pipeline, max_rows=128)
    if running.open_for(input_ids, options):
        running.admit(running.look([request]))
        while running.is_busy:
            running.turn()

When requests are admitted is the callers' choice: `Engine` for those that come at any time, and
`blip2.many` for the pictures of a folder.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Sequence

import torch

from blip2 import memory
from blip2.engine.lull import Lull
from blip2.engine.request import Picture, Request
from blip2.errors import Blip2Error
from blip2.language import Generation, GenerationOptions
from blip2.language.rows import BEAMS, NOT_FINITE, Admission, Chosen, Rows, prepared_rows
from blip2.pipeline import Answer, Pipeline, QueuedStopwatch

_STEPS_AHEAD = 1  # that are queued before the tokens of the one before are read


class Running:
    """The rows, and the requests that have them. Not for several threads."""

    def __init__(
        self,
        pipeline: Pipeline,
        max_rows: int,
        prompt_len: int = 0,
        max_output_len: int = 0,
        lull: Lull | None = None,
    ) -> None:
        """Of an open pipeline.

        Args:
            pipeline: the sessions and the tokenizer.
            max_rows: at most; fewer where memory does not suffice.
            prompt_len: input_ids that rows have room for, whoever opens them, and
            max_output_len: new tokens.
            lull: what begins where the device is waited for.
        """
        self._lull = lull or Lull(is_used=False)
        self.max_rows, self._room = max_rows, (prompt_len, max_output_len)
        self._pipeline = pipeline
        self.rows: Rows | None = None
        self._prepared: set[tuple[int, int]] = set()
        self._active: dict[int, Request] = {}
        self._leaving: list[int] = []  # those whose rows are to be taken back
        self._coming: collections.deque[Chosen] = collections.deque()
        # What was looked at, for whom, and is perhaps not over yet.
        self._looks: list[tuple[QueuedStopwatch, list[Request]]] = []

    @property
    def is_busy(self) -> bool:
        """Whether a request is not over yet, or tokens of one are under way."""
        return bool(self._active or self._coming)

    @property
    def requests(self) -> list[Request]:
        """Those that have rows and are not over."""
        return list(self._active.values())

    @property
    def used(self) -> int:
        """Rows that requests have."""
        return 0 if self.rows is None else self.rows.used

    @property
    def free(self) -> int:
        """Rows that they do not have."""
        return 0 if self.rows is None else self.rows.capacity - self.rows.used

    def fits(self, input_ids: torch.Tensor, options: GenerationOptions) -> bool:
        """Whether a request's tokens fit into a row, however many are free."""
        return self.rows is not None and self.rows.fits(len(input_ids), options.max_output_len)

    def open_for(self, input_ids: torch.Tensor, options: GenerationOptions) -> bool:
        """Make rows that hold such a request, unless these do; nobody may have any.

        Returns:
            Whether there are rows: an engine may have none.

        Raises:
            Exception: there is no memory for a single one.
        """
        if not self._pipeline.language.has_rows:
            return False
        if not self.fits(input_ids, options):
            self.rows = None  # its memory first
            lengths = map(max, self._room, (len(input_ids), options.max_output_len))
            self.rows = self._pipeline.language.open_rows(self.max_rows, *lengths)
        return True

    def prepare(self, prompt_len: int, count: int) -> None:
        """Have what so many pictures, prompts and all steps behind them need compiled, all at once.

        Otherwise one kernel after another would be, each when it is first launched. Nobody may have
        rows.
        """
        case = (-(-prompt_len // 16), prepared_rows(count))
        if case in self._prepared or self.rows is None:
            return
        self._prepared.add(case)
        vision = self._pipeline.vision
        try:
            vision.prepare(count)
            self.rows.prepare(prompt_len, vision.num_query_tokens, count)
        except Exception as error:
            if not memory.exhausted(error):  # else those that begin will say so, or do with less
                raise

    def warm_up(self, input_ids: torch.Tensor, options: GenerationOptions) -> None:
        """Go once through all that such requests may need; see `Engine.warm_up`."""
        if not self.open_for(input_ids, options):
            return
        if self._pipeline.vision.device.type != "cuda":
            self._answer_nothing(input_ids, [1])
            return
        batch = min(self._pipeline.default_batch_size, self.rows.capacity)
        self.prepare(len(input_ids), batch)
        for count in sorted({prepared_rows(count) for count in range(1, batch + 1)}):
            for _ in range(2):  # the second time graphs are captured
                self._answer_nothing(input_ids, [2] * count)
        # Every number of rows for two steps.
        lengths = [3 + 2 * (row // 8) for row in range(self.rows.capacity)]
        self._answer_nothing(input_ids, lengths)

    def _answer_nothing(self, input_ids: torch.Tensor, lengths: Sequence[int]) -> None:
        """Answers of these lengths about pictures of zeros."""
        vision, decode = self._pipeline.vision, self._pipeline.tokenizer.decode
        shape = (3, vision.preprocessing.height, vision.preprocessing.width)
        requests = []
        for number, length in enumerate(lengths):
            nothing = torch.zeros(shape, dtype=vision.dtype, device=vision.device)
            plain = GenerationOptions(end_id=-1, max_output_len=min(length, self.rows.max_new))
            requests.append(Request(Picture(nothing), input_ids, plain, decode, number))
        batch = self._pipeline.default_batch_size
        for start in range(0, len(requests), batch):
            self.admit(self.look(requests[start : start + batch]))
        while self.is_busy:
            self.turn()
        self.let_go()

    def look(self, requests: Sequence[Request]) -> list[Request]:
        """Look at their pictures; those are returned whose pictures could be looked at."""
        pictures = {id(r.picture): r.picture for r in requests if r.picture.query_output is None}
        for request in requests:
            request.begin()
        try:
            if pictures:
                values = self._stacked([p.pixel_values for p in pictures.values()])
                # What follows is queued while the GPU looks: it need not wait for that either.
                watch = QueuedStopwatch(self._pipeline.vision.device)
                look = self._pipeline.look(values, watch)
                self._looks.append((watch, [r for r in requests if id(r.picture) in pictures]))
                self._pipeline.check_files()
                # Whether it is finite nobody waits for: if not, OPT's logits will not be either.
                for picture, row in zip(pictures.values(), look.query_output.clone(), strict=True):
                    picture.query_output, picture.pixel_values = row, None
        except Exception as error:
            for request in requests:
                request.fail(explained(error))
            return []
        return list(requests)

    def _stacked(self, pictures: Sequence[torch.Tensor]) -> torch.Tensor:
        if len({picture.dtype for picture in pictures}) > 1:  # bytes and what becomes of them
            pictures = [self._pipeline.vision.pixel_values(picture) for picture in pictures]
        return torch.stack(tuple(pictures))

    def note_looks(self) -> None:
        """Tell requests how long looking took, where that is over."""
        looks, self._looks = self._looks, []
        for watch, requests in looks:
            if not watch.is_over:
                self._looks.append((watch, requests))
                continue
            for request in requests:
                request.stages |= watch.seconds

    def admit(self, requests: Sequence[Request]) -> None:
        """Read their prompts into free rows, of which there have to be enough."""
        if not requests:
            return
        try:
            chosen = self.rows.admit([_admission(request) for request in requests])
        except Exception as error:
            # Nobody has got rows yet. One alone may find room, or is the one at fault.
            if len(requests) == 1:
                requests[0].fail(explained(error))
                return
            memory.release()
            for half in (requests[: len(requests) // 2], requests[len(requests) // 2 :]):
                self.admit(half)
            return
        for request in requests:
            self._active[request.key] = request
        self._note(chosen)

    def turn(self) -> None:
        """Take back the rows of those that have ended, take a step for the rest, hand out tokens.

        A step that fails fails all that have rows.
        """
        self.let_go()
        try:
            if self.used:
                self._note(self.rows.step())
            ahead = _STEPS_AHEAD if self.used else 0
            while len(self._coming) > ahead:
                self._deliver(self._coming.popleft())
        except BaseException as error:
            self.fail_all(error)
            raise

    def let_go(self) -> None:
        """Take back the rows of those that have ended, all at once."""
        if self._leaving:
            self.rows.release(self._leaving)
            self._leaving.clear()

    def drop(self, is_dropped: Callable[[Request], bool]) -> None:
        """End some of them, unfinished."""
        for request in [r for r in self._active.values() if is_dropped(r)]:
            self._end_rows(request)
            request.finish()

    def fail_all(self, error: BaseException) -> None:
        """End all of them: nobody knows what is in the rows now."""
        for request in self._active.values():
            request.fail(explained(error))
        self._active.clear()
        self._coming.clear()
        self._leaving.clear()
        self._looks.clear()
        self.rows = None
        memory.release()

    def _note(self, chosen: Chosen) -> None:
        """Count the tokens that are under way; a request that gets no more leaves its rows."""
        self._coming.append(chosen)
        for key in chosen.keys:
            request = self._active[key]
            request.scheduled += 1
            if request.scheduled == request.options.max_output_len:
                chosen.last.add(key)
                self._leaving.append(key)

    def _deliver(self, chosen: Chosen) -> None:
        with self._lull.during():
            chosen.wait()
        read = list(chosen.read())
        self.note_looks()  # of whom these are the first tokens, they are over
        for news in read:
            request = self._active.get(news.key)
            if request is None:  # ended a step ago
                continue
            if news.tokens == [NOT_FINITE]:
                self._end_rows(request)
                request.fail(self.not_finite(request))
            elif news.tokens == [BEAMS]:
                if news.has_ended or news.key in chosen.last:
                    self._end_rows(request)
                    self._finish_beams(request, chosen)
            elif request.hear(news.tokens, news.log_probs):
                self._end_rows(request)
                request.finish()

    def _finish_beams(self, request: Request, chosen: Chosen) -> None:
        try:
            generation = chosen.result(request.key)
        except FloatingPointError:  # of a step behind the one that was asked about
            request.fail(self.not_finite(request))
        else:
            self.finish(request, generation)

    def _end_rows(self, request: Request) -> None:
        self._active.pop(request.key, None)
        self._leaving.append(request.key)

    def not_finite(self, request: Request) -> Blip2Error:
        """What to say of a request whose logits are NaN or Inf."""
        if torch.isfinite(request.picture.query_output).all():
            return Blip2Error(
                "the OPT yields NaN or Inf", "make its checkpoint again from the original"
            )
        return self._pipeline.not_finite("ViT or Q-Former")

    def finish(self, request: Request, generation: Generation) -> None:
        """End a request whose beams are known all at once."""
        request.say_all(generation.beams[0].token_ids)
        request.finish([Answer.of(beam, request.decode) for beam in generation.beams])


def explained(error: BaseException) -> BaseException:
    """The error, as a sentence where memory has run out."""
    kind = None if isinstance(error, Blip2Error) else memory.exhausted(error)
    if kind is None:
        return error
    advice = "lower `max_output_len` or `num_beams`, or free some memory"
    return memory.OutOfMemory(f"not enough {kind} memory for this request", advice)


def _admission(request: Request) -> Admission:
    table = request.picture.query_output
    return Admission(request.key, request.input_ids, table, request.options, request.number)
