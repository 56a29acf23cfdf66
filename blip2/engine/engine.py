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
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import torch

from blip2 import memory
from blip2.engine.request import Picture, Request
from blip2.errors import Blip2Error
from blip2.language import Generation, GenerationOptions
from blip2.language.rows import BEAMS, NOT_FINITE, Admission, Chosen, Rows
from blip2.pipeline import Answer, Pipeline, Stopwatch

_PATIENCE = 0.03  # seconds that a request waits for others to be looked at with, if there are rows
_REMEMBERED = 1024  # prompts whose ids are kept


class Engine:
    """Answers requests of any options at once, where OPT's session has rows; else in batches."""

    def __init__(self, pipeline: Pipeline, max_rows: int | None = None) -> None:
        """Of an open pipeline, which nobody else may use from now on.

        Args:
            pipeline: the sessions and the tokenizer.
            max_rows: answers at once; None is what suits the engines.
        """
        self._pipeline = pipeline
        self._max_rows = max_rows or pipeline.default_batch_size
        self._rows: Rows | None = None
        self._active: dict[int, Request] = {}
        self._leaving: list[int] = []  # those whose rows are to be taken back
        self._prompts: dict[tuple[str, GenerationOptions], torch.Tensor] = {}
        self._coming: collections.deque[Chosen] = collections.deque()
        self._waiting: collections.deque[Request] = collections.deque()
        self._arrivals: list[Request] = []
        self._calls: list[tuple[Callable[[], Any], Future]] = []
        self._changed = threading.Condition()
        self._is_closed = False
        self._thread: threading.Thread | None = None

    def picture(self, pixel_values: torch.Tensor) -> Picture:
        """Something to ask about: 3 x S x S, as the ViT takes it. It is copied to its device now."""
        vision = self._pipeline.vision
        on_gpu = vision.device.type == "cuda"
        with torch.cuda.device(vision.device) if on_gpu else contextlib.nullcontext():
            return Picture(pixel_values.to(vision.device, vision.dtype, non_blocking=True))

    def submit(
        self, picture: Picture, text: str, options: GenerationOptions, number: int = 0
    ) -> Request:
        """Ask; returns at once.

        Args:
            picture: of this engine.
            text: the prompt; an empty one asks for a caption.
            options: how to decode.
            number: among the requests that share a seed: each draws its own numbers.

        Raises:
            Blip2Error: the engines cannot take such a request.
        """
        input_ids = self._input_ids(text, options)
        request = Request(picture, input_ids, options, self._pipeline.tokenizer.decode, number)
        self._tell(lambda: self._arrivals.append(request))
        return request

    def _input_ids(self, text: str, options: GenerationOptions) -> torch.Tensor:
        """Of a prompt, once it is clear that the engine can take it: most ask the same again."""
        key = (text, dataclasses.replace(options, seed=0))
        if (input_ids := self._prompts.get(key)) is None:
            if options.num_beams > self._max_rows:
                raise Blip2Error(
                    f"`num_beams` is {options.num_beams}, this engine has {self._max_rows} rows",
                    "lower it",
                )
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
            self._changed.notify()

    def _run(self) -> None:
        device = self._pipeline.vision.device
        if device.type == "cuda":
            torch.cuda.set_device(device)
        while True:
            with self._changed:
                while not (self._arrivals or self._calls or self._is_busy or self._is_closed):
                    self._changed.wait()
                if self._is_closed:
                    break
                self._waiting.extend(self._arrivals)
                self._arrivals.clear()
                calls, self._calls = self._calls, []
            for function, future in calls:
                _run_call(function, future)
            try:
                self._turn()
            except BaseException as error:
                self._fail_all(error)
        closed = Blip2Error("the engine was closed", "load the model again")
        self._waiting.extend(self._arrivals)
        for request in self._waiting:
            request.fail(closed)
        self._fail_all(closed)
        for _, future in self._calls:
            future.set_exception(closed)

    @property
    def _is_busy(self) -> bool:
        return bool(self._waiting or self._active or self._coming)

    def _fail_all(self, error: BaseException) -> None:
        """End what has rows: nobody knows what is in them now."""
        for request in self._active.values():
            request.fail(_explained(error))
        self._active.clear()
        self._coming.clear()
        self._leaving.clear()
        self._rows = None
        memory.release()

    def _turn(self) -> None:
        self._drop_cancelled()
        self._let_go()
        if self._waiting:
            self._begin()
            self._let_go()
        if self._rows is not None and self._rows.used:
            self._note(self._rows.step())
        ahead = 1 if self._rows is not None and self._rows.used else 0
        while len(self._coming) > ahead:
            self._deliver(self._coming.popleft())

    def _drop_cancelled(self) -> None:
        for request in [r for r in self._active.values() if r.is_cancelled]:
            self._end_rows(request)
            request.finish(finished=False)
        if any(request.is_cancelled for request in self._waiting):
            for request in self._waiting:
                if request.is_cancelled:
                    request.finish(finished=False)
            self._waiting = collections.deque(r for r in self._waiting if not r.is_cancelled)

    def _begin(self) -> None:
        """Look at pictures and read prompts, as many as there are rows for."""
        first = self._waiting[0]
        if self._rows is None or not (self._rows.used or self._rows.fits(_admission(first))):
            self._rows = None  # its memory first
            try:
                self._rows = self._pipeline.language.open_rows(
                    self._max_rows, len(first.input_ids), first.options.max_output_len
                )
            except Exception as error:
                self._waiting.popleft().fail(_explained(error))
                return
            if self._rows is None:
                self._answer_batch()
                return
        free = self._rows.capacity - self._rows.used
        if self._rows.used and not self._is_due(free):
            return
        begun: list[Request] = []
        while self._waiting and len(begun) < self._pipeline.default_batch_size:
            request = self._waiting[0]
            if request.options.num_beams > free or not self._rows.fits(_admission(request)):
                break  # in order: who is large waits for room, not for ever
            free -= request.options.num_beams
            begun.append(self._waiting.popleft())
        if begun := self._look(begun):
            self._admit(begun)

    def _is_due(self, free: int) -> bool:
        """Whether to look and read now, which those under way have to wait for.

        Half of the rows at a time: fewer cost hardly less. Who would find a row does not wait long.
        """
        together = max(1, self._rows.capacity // 2)
        if len(self._waiting) > free:
            return free >= together
        waited = time.monotonic() - self._waiting[0].arrived
        return len(self._waiting) >= together or waited > _PATIENCE

    def _look(self, requests: list[Request]) -> list[Request]:
        """Look at their pictures; those are returned whose pictures could be looked at."""
        pictures = {id(r.picture): r.picture for r in requests if r.picture.query_output is None}
        try:
            if pictures:
                values = torch.stack([p.pixel_values for p in pictures.values()])
                look = self._pipeline.look(values, Stopwatch())
                self._pipeline.check_files()
                # Whether it is finite nobody waits for: if not, OPT's logits will not be either.
                for picture, row in zip(pictures.values(), look.query_output.clone(), strict=True):
                    picture.query_output, picture.pixel_values = row, None
        except Exception as error:
            for request in requests:
                request.fail(_explained(error))
            return []
        return requests

    def _admit(self, requests: list[Request]) -> None:
        try:
            chosen = self._rows.admit([_admission(request) for request in requests])
        except Exception as error:
            # Nobody has got rows yet. One alone may find room, or is the one at fault.
            if len(requests) == 1:
                requests[0].fail(_explained(error))
                return
            memory.release()
            for half in (requests[: len(requests) // 2], requests[len(requests) // 2 :]):
                self._admit(half)
            return
        for request in requests:
            self._active[request.key] = request
        self._note(chosen)

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
        for key, token, has_ended in chosen.read():
            request = self._active.get(key)
            if request is None:  # ended a step ago
                continue
            if token == NOT_FINITE:
                self._end_rows(request)
                request.fail(self._not_finite(request))
            elif token == BEAMS:
                if has_ended or key in chosen.last:
                    self._end_rows(request)
                    self._finish(request, chosen.result(key))
            elif token == request.options.end_id:
                self._end_rows(request)
                request.finish()
            else:
                request.say(token)
                if request.said == request.options.max_output_len:
                    self._end_rows(request)
                    request.finish(finished=False)

    def _end_rows(self, request: Request) -> None:
        self._active.pop(request.key, None)
        self._leaving.append(request.key)

    def _let_go(self) -> None:
        """Take back the rows of those that have ended, all at once."""
        if self._leaving:
            self._rows.release(self._leaving)
            self._leaving.clear()

    def _not_finite(self, request: Request) -> Blip2Error:
        if torch.isfinite(request.picture.query_output).all():
            return Blip2Error(
                "the OPT yields NaN or Inf", "make its checkpoint again from the original"
            )
        return self._pipeline.not_finite("ViT or Q-Former")

    def _answer_batch(self) -> None:
        """For a session without rows: those that wait with the same options, to their end."""
        options = self._waiting[0].options
        batch = [r for r in self._waiting if _shared(r) == _shared(self._waiting[0])]
        batch = batch[: self._pipeline.default_batch_size]
        taken = {request.key for request in batch}
        self._waiting = collections.deque(r for r in self._waiting if r.key not in taken)
        self._look(batch)
        for request in batch:  # such an engine may not notice
            if not request.is_over and not torch.isfinite(request.picture.query_output).all():
                request.fail(self._not_finite(request))
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
                batch[0].fail(_explained(error))
                return
            memory.release()
            for half in (batch[: len(batch) // 2], batch[len(batch) // 2 :]):
                self._generate(half, options)
            return
        for request, generation in zip(batch, generations, strict=True):
            self._finish(request, generation)

    def _finish(self, request: Request, generation: Generation) -> None:
        """End a request whose beams are known all at once."""
        decode = self._pipeline.tokenizer.decode
        for token in generation.beams[0].token_ids:
            request.say(token)
        request.finish([Answer(decode(b.token_ids), b.score, b.finished) for b in generation.beams])


def _admission(request: Request) -> Admission:
    table = request.picture.query_output
    return Admission(request.key, request.input_ids, table, request.options, request.number)


def _shared(request: Request) -> tuple[GenerationOptions, int | None]:
    """What requests of a batch have in common; those that sample are asked alone."""
    alone = request.key if request.options.samples else None
    return dataclasses.replace(request.options, seed=0), alone


def _explained(error: BaseException) -> BaseException:
    """The error, as a sentence where memory has run out."""
    kind = None if isinstance(error, Blip2Error) else memory.exhausted(error)
    if kind is None:
        return error
    advice = "lower `max_output_len` or `num_beams`, or free some memory"
    return memory.OutOfMemory(f"not enough {kind} memory for this request", advice)


def _run_call(function: Callable[[], Any], future: Future) -> None:
    try:
        future.set_result(function())
    except BaseException as error:
        future.set_exception(error)
