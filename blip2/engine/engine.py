"""The only thing that runs sessions for requests that come at any time.

    engine = Engine(pipeline)
    request = engine.submit(engine.picture(pixel_values), "Question: … Answer:", options)
    for piece in request.pieces(): ...

One thread owns the device, and holds no lock while it works. Its turns: let go what nobody waits
for; look at pictures and read prompts, if there are rows for them; take one step for all rows; hand
out the tokens of the step before. What an answer is does not depend on what else is asked, but for
ties of two candidates within the last digit.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import torch

from blip2 import memory
from blip2.engine.lull import Lull
from blip2.engine.request import Listener, Picture, Request
from blip2.engine.running import Running, explained
from blip2.errors import Blip2Error
from blip2.language import GenerationOptions
from blip2.pipeline import Pipeline

# Seconds. A group of requests is looked at and read while those under way wait, for 5 ms on an H100
# and 1.5 ms for each of them. So groups are made large: one is begun when its requests have waited, all
# together, for as long as it holds up those under way, all together, at …
_HELD_UP = 0.007  # each, or when …
_PATIENCE = 0.06  # one that would find a row has waited, or …
_LONG_PATIENCE = 0.2  # none was begun, where more wait than find rows
# Where all answers end at once those who had them may ask again, all at once too. An engine that has
# nothing else to do waits for them until …
_SILENCE = 0.002  # nobody came, or …
_AGAIN = 0.025  # they have had

_REMEMBERED = 1024  # prompts whose ids are kept


@dataclasses.dataclass(frozen=True)
class Load:
    """What an engine has to do: requests that wait or have rows, and its rows."""

    waiting: int
    running: int
    rows_used: int
    rows: int


class Engine:
    """Answers requests of any options at once, where OPT's session has rows; else in batches."""

    def __init__(
        self,
        pipeline: Pipeline,
        max_rows: int | None = None,
        *,
        prompt_len: int = 0,
        max_output_len: int = 0,
    ) -> None:
        """Of an open pipeline, which nobody else may use from now on.

        Args:
            pipeline: the sessions and the tokenizer.
            max_rows: answers at once; None is what suits the engines.
            prompt_len: input_ids that every row has room for, and
            max_output_len: new tokens. A request that needs more waits until no row is in use.
        """
        self._pipeline = pipeline
        rows = max_rows or pipeline.default_rows
        self.lull = Lull(pipeline.vision.device.type == "cuda")
        self._running = Running(pipeline, rows, prompt_len, max_output_len, self.lull)
        self._load = Load(0, 0, 0, rows)
        self._begun_at = 0.0  # when requests were last begun
        self._expected, self._until = 0, 0.0  # requests that may come at once, and till when
        self._wanted = 1  # arrivals at which the thread is to be woken
        self._is_silent = False  # nobody came in the last turn
        self._prompts: dict[tuple[str, GenerationOptions], torch.Tensor] = {}
        self._waiting: collections.deque[Request] = collections.deque()
        self._arrivals: list[Request] = []
        self._calls: list[tuple[Callable[[], Any], Future]] = []
        self._changed = threading.Condition()
        self._is_closed = False
        self._thread: threading.Thread | None = None

    def picture(self, pixel_values: torch.Tensor) -> Picture:
        """Something to ask about: 3 x S x S, as `VisionSession.pixel_values` takes it.

        It is copied to the ViT's device now; bytes stay bytes until it is looked at.
        """
        vision = self._pipeline.vision
        on_gpu = vision.device.type == "cuda"
        with torch.cuda.device(vision.device) if on_gpu else contextlib.nullcontext():
            if pixel_values.dtype == torch.uint8:
                return Picture(pixel_values.to(vision.device, non_blocking=True))
            return Picture(vision.pixel_values(pixel_values))

    @property
    def load(self) -> Load:
        """As it was after the last turn, for any thread."""
        return self._load

    def submit(
        self,
        picture: Picture,
        text: str,
        options: GenerationOptions,
        number: int = 0,
        listener: Listener | None = None,
        prefix: str = "",
    ) -> Request:
        """Ask; returns at once.

        Args:
            picture: of this engine.
            text: the prompt; an empty one asks for a caption.
            options: how to decode.
            number: among the requests that share a seed: each draws its own numbers.
            listener: is called with each token, and with None at the end.
            prefix: the end of the text that the answer is to begin with.

        Raises:
            Blip2Error: the engines cannot take such a request.
        """
        input_ids = self._input_ids(text, options)
        decode = self._pipeline.decoder(prefix)
        request = Request(picture, input_ids, options, decode, number, listener)
        self._tell(lambda: self._arrivals.append(request))
        return request

    def _input_ids(self, text: str, options: GenerationOptions) -> torch.Tensor:
        """Of a prompt, once it is clear that the engine can take it: most ask the same again."""
        key = (text, dataclasses.replace(options, seed=0))
        if (input_ids := self._prompts.get(key)) is None:
            if options.rows > self._running.max_rows:
                raise _too_wide(options, self._running.max_rows)
            self._pipeline.check([text], options)
            if len(self._prompts) >= _REMEMBERED:
                self._prompts.clear()
            [input_ids] = self._pipeline.encode([text])
            self._prompts[key] = input_ids
        return input_ids

    def call(self, function: Callable[[], Any]) -> Any:
        """Have the engine's thread run something between two turns; returns its result."""
        future: Future = Future()
        self._tell(lambda: self._calls.append((function, future)))
        return future.result()

    def warm_up(self, text: str, options: GenerationOptions) -> None:
        """Have all that many such requests at once need made: rows, kernels, graphs.

        On a GPU that takes seconds, and longer where nothing is compiled yet. Without it, whoever is
        the first to need something waits for it. Before anything is asked.

        Raises:
            Blip2Error: the engines cannot take such a request, or not even one of them.
        """
        input_ids = self._input_ids(text, options)
        self.call(lambda: self._running.warm_up(input_ids, options))

    def close(self) -> None:
        """End what is under way, and the thread. A second call does nothing."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        # Whoever lets the last reference go may be that thread itself.
        if self._thread not in (None, threading.current_thread()):
            self._thread.join()

    def _tell(self, add: Callable[[], None]) -> None:
        with self._changed:
            if self._is_closed:
                raise Blip2Error("the engine is closed", "load the model again")
            add()
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="blip2", daemon=True)
                self._thread.start()
            if self._calls or len(self._arrivals) >= self._wanted:
                self._changed.notify()

    def _run(self) -> None:
        device = self._pipeline.vision.device
        if device.type == "cuda":
            torch.cuda.set_device(device)
        while True:
            with self._changed:
                self._wait_for_work()
                if self._is_closed:
                    break
                self._is_silent = not self._arrivals
                self._waiting.extend(self._arrivals)
                self._arrivals.clear()
                calls, self._calls = self._calls, []
            for function, future in calls:
                _run_call(function, future)
            try:
                self._turn()
            except BaseException as error:
                self._running.fail_all(error)
            self._note_load()
        closed = Blip2Error("the engine was closed", "load the model again")
        self._waiting.extend(self._arrivals)
        for request in self._waiting:
            request.fail(closed)
        self._running.fail_all(closed)
        for _, future in self._calls:
            future.set_exception(closed)

    def _wait_for_work(self) -> None:
        """Until there is something to do; called with the lock held."""
        while not (self._is_closed or self._calls or self._running.is_busy):
            came = len(self._arrivals)
            if not (came or self._waiting):
                with self.lull.during():
                    self._changed.wait()
                continue
            wanted = self._expected - len(self._waiting)
            if came >= wanted or time.monotonic() >= self._until:
                return
            self._wanted = wanted  # with fewer nobody wakes this thread, which would slow them down
            with self.lull.during():
                self._changed.wait(_SILENCE)
            self._wanted = 1
            if len(self._arrivals) == came:
                return

    @property
    def _is_busy(self) -> bool:
        return bool(self._waiting or self._running.is_busy)

    def _turn(self) -> None:
        running = self._running
        self._drop_cancelled()
        running.let_go()
        # Whoever has an answer by now may ask again, together with those that wait.
        if self._waiting and (running.used or not running.is_busy):
            self._begin()
        active = len(running.requests)
        running.turn()
        if active and not running.is_busy:
            self._expected = active + len(self._waiting)
            self._until = time.monotonic() + _AGAIN

    def _note_load(self) -> None:
        requests = self._running.requests
        used = sum(request.options.rows for request in requests)
        rows = self._running.rows
        capacity = self._running.max_rows if rows is None else rows.capacity
        self._load = Load(len(self._waiting), len(requests), used, capacity)

    def _drop_cancelled(self) -> None:
        self._running.drop(lambda request: request.is_cancelled)
        if any(request.is_cancelled for request in self._waiting):
            for request in self._waiting:
                if request.is_cancelled:
                    request.finish()
            self._waiting = collections.deque(r for r in self._waiting if not r.is_cancelled)

    def _begin(self) -> None:
        """Look at pictures and read prompts, as many as there are rows for."""
        running, first = self._running, self._waiting[0]
        if not running.used:
            try:
                has_rows = running.open_for(first.input_ids, first.options)
            except Exception as error:
                self._waiting.popleft().fail(explained(error))
                return
            if not has_rows:
                self._answer_batch()
                return
            if first.options.rows > running.rows.capacity:
                self._waiting.popleft().fail(_too_wide(first.options, running.rows.capacity))
                return
        elif not self._is_due():
            return
        begun = self._next_group()
        if begun:
            if not running.is_busy:  # the first of all wait for what others find made
                running.prepare(max(len(r.input_ids) for r in begun), len(begun))
            running.admit(running.look(begun))
            self._begun_at = time.monotonic()

    def _next_group(self) -> list[Request]:
        """Those to begin now, in order: who is large waits for room, not for ever."""
        running, free = self._running, self._running.free
        group: list[Request] = []
        for request in itertools.islice(self._waiting, self._pipeline.default_batch_size):
            free -= request.options.rows
            if free < 0 or not running.fits(request.input_ids, request.options):
                break
            group.append(request)
        for _ in group:
            self._waiting.popleft()
        return group

    def _is_due(self) -> bool:
        """Whether to look and read now, which those under way have to wait for."""
        running, first, now = self._running, self._waiting[0], time.monotonic()
        batch = min(self._pipeline.default_batch_size, max(1, running.rows.capacity // 2))
        nearest = list(itertools.islice(self._waiting, batch))
        waiting = sum(request.options.rows for request in nearest)
        if waiting <= running.free:
            waited = sum(request.options.rows * (now - request.arrived) for request in nearest)
            all_came = self._is_silent and waiting >= running.used
            is_worth_it = waited > _HELD_UP * running.used or now - first.arrived > _PATIENCE
            return waiting >= batch or all_came or is_worth_it
        is_full = batch <= running.free
        return is_full or now - self._begun_at > _LONG_PATIENCE

    def _answer_batch(self) -> None:
        """For a session without rows: those that wait with the same options, to their end."""
        options = self._waiting[0].options
        batch = [r for r in self._waiting if _shared(r) == _shared(self._waiting[0])]
        batch = batch[: self._pipeline.default_batch_size]
        taken = {request.key for request in batch}
        self._waiting = collections.deque(r for r in self._waiting if r.key not in taken)
        self._running.look(batch)
        for request in batch:  # such an engine may not notice
            if not request.is_over and not torch.isfinite(request.picture.query_output).all():
                request.fail(self._running.not_finite(request))
        self._running.note_looks()
        if batch := [request for request in batch if not request.is_over]:
            self._generate(batch, options)

    def _generate(self, batch: list[Request], options: GenerationOptions) -> None:
        if options.samples:
            options = dataclasses.replace(options, seed=options.seed + batch[0].number)
        tables = torch.stack([request.picture.query_output for request in batch])
        language = self._pipeline.language
        try:
            generations = language.generate([r.input_ids for r in batch], tables, options)
        except Exception as error:
            if len(batch) == 1:
                batch[0].fail(explained(error))
                return
            memory.release()
            for half in (batch[: len(batch) // 2], batch[len(batch) // 2 :]):
                self._generate(half, options)
            return
        for request, generation in zip(batch, generations, strict=True):
            self._running.finish(request, generation)


def _shared(request: Request) -> tuple[GenerationOptions, int | None]:
    """What requests of a batch have in common; those that sample are asked alone."""
    alone = request.key if request.options.samples else None
    return dataclasses.replace(request.options, seed=0), alone


def _too_wide(options: GenerationOptions, rows: int) -> Blip2Error:
    what = "num_beams" if options.num_beams > 1 else "num_return_sequences"
    return Blip2Error(f"`{what}` is {options.rows}, this engine has {rows} rows", "lower it")


def _run_call(function: Callable[[], Any], future: Future) -> None:
    try:
        future.set_result(function())
    except BaseException as error:
        future.set_exception(error)
