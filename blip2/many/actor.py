"""What an actor of a Ray cluster is: the engines of its process, given batches, sending back lines.

Nothing here imports PyTorch, or Ray.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import os
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from blip2.errors import Blip2Error

if TYPE_CHECKING:
    from blip2.many.work import Answered, Batch, Facts, Question, Work
    from blip2.pipeline import Pipeline

OpenPipeline = Callable[[], "Pipeline"]

AHEAD = 2  # windows that wait in an actor, besides those that it decodes or answers


@dataclasses.dataclass
class Report:
    """What an actor has answered since its last one, and how many batches more it has room for."""

    answered: list[Answered]
    room: int


class Engines:
    """What an actor is: `LocalWorkers` for the batches that it is given. Runs in a worker of Ray's."""

    def __init__(self) -> None:
        """Import what takes seconds, while the process that wants us does so too."""
        import blip2.many.local  # noqa: F401

        self._changed = threading.Condition()
        # Batches in order; None where there are no more for now.
        self._given: collections.deque[Batch | None] = collections.deque()
        self._is_hungry = False  # somebody waits for more of them
        self._answered: list[Answered] = []
        self._error: BaseException | None = None
        self._work: Work | None = None

    def open(
        self,
        directory: str,
        open_pipeline: OpenPipeline,
        decoders: int,
        questions: Sequence[Question],
        decoding: dict[str, Any],
    ) -> Facts | Blip2Error:
        """Open the engines, and read off what a run must know of them."""
        from blip2 import onnx_sessions
        from blip2.many.decoders import Decoders
        from blip2.many.local import LocalWorkers
        from blip2.many.work import Facts

        onnx_sessions.own_process()

        # Or a process that decodes would import Ray's program, as what it was started from.
        vars(sys.modules["__main__"]).pop("__file__", None)
        try:
            _enter(directory)
            with contextlib.ExitStack() as on_error:
                # They start while the engines load.
                pool = on_error.enter_context(Decoders(decoders))
                pipeline = open_pipeline()
                facts = Facts.of(pipeline, questions, decoding)
                on_error.pop_all()
        except Blip2Error as error:
            return error
        self._workers = LocalWorkers(pipeline, pool)
        threading.Thread(target=self._run, daemon=True).start()
        return facts

    def begin(self, work: Work) -> None:
        """What is asked of the batches that come from now on."""
        with self._changed:
            self._given.append(None)
            self._work = work

    def exchange(self, batches: Sequence[Batch], is_all: bool) -> Report | Blip2Error:
        """Take batches in order; wait for an answer, or until there is nothing to do but take more.

        `is_all` says that there are no more for now: what was given is answered to its end.
        """
        with self._changed:
            self._given.extend(batches)
            if is_all:
                self._given.append(None)
            self._changed.notify_all()
            self._changed.wait_for(
                lambda: self._answered or self._error or (self._is_hungry and not self._given)
            )
            if isinstance(self._error, Blip2Error):
                return self._error
            if self._error is not None:
                raise self._error
            answered, self._answered = self._answered, []
            return Report(answered, max(0, AHEAD - len(self._given)))

    def _next(self) -> Batch | None:
        with self._changed:
            while not self._given:
                self._is_hungry = True
                self._changed.notify_all()
                self._changed.wait()
            self._is_hungry = False
            return self._given.popleft()

    def _run(self) -> None:
        try:
            while True:
                if (first := self._next()) is None:
                    continue
                batches = itertools.chain([first], iter(self._next, None))
                for answered in self._workers.answer_some(batches, self._work):
                    with self._changed:
                        self._answered.append(answered)
                        self._changed.notify_all()
        except BaseException as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()


def _enter(directory: str) -> None:
    """Let relative paths mean what they mean where the run was started."""
    try:
        os.chdir(directory)
    except OSError as error:
        raise Blip2Error(
            f"{socket.gethostname()} cannot enter {directory} ({error.strerror})",
            "start the run in a directory that all machines of the cluster share",
        ) from None
