"""A function run on items in processes of their own, which may be killed.

    with Processes(4) as processes:
        results = processes.map(function, items, argument).result()

A process that is killed is started again, and goes on with the item that it had. One that kills it
TRIES times has no result but `Killed`. Each process has a pipe and a thread of this one, so that
what one of them leaves unfinished holds nobody up.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing import connection, resource_tracker
from multiprocessing.connection import Connection
from typing import Any, TypeVar

T = TypeVar("T")

TRIES = 3


class Killed:
    """What came of an item whose process was killed whenever it had that."""


class Processes:
    """A pool of processes. Use it as a context: leaving it ends them, whatever they do."""

    def __init__(self, count: int) -> None:
        """Start `count` of them; they import while this process goes on.

        Raises:
            OSError: one cannot be started.
        """
        self.count = count
        self._lock = threading.Lock()
        self._is_closed = False
        self._started: set[_Process] = set()
        self._idle: queue.SimpleQueue[_Process] = queue.SimpleQueue()
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="processes")
        try:
            for _ in range(count):
                self._idle.put(self._start())
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the processes. What was not done yet is cancelled, or has an error."""
        with self._lock:
            self._is_closed = True
            started = list(self._started)
        for process in started:
            process.kill()
        self._threads.shutdown(wait=True, cancel_futures=True)

    def map(
        self, function: Callable[..., T], items: Sequence[Any], *arguments: object
    ) -> Future[list[T | Killed]]:
        """Have one of the processes call `function(item, *arguments)` for each item, in order.

        The future raises RuntimeError where a call does, with that one's traceback, and OSError
        where a process cannot be started again.
        """
        return self._threads.submit(self._map, function, items, arguments)

    def _map(
        self, function: Callable[..., T], items: Sequence[Any], arguments: tuple[object, ...]
    ) -> list[T | Killed]:
        results: list[T | Killed] = []
        tries = starts = 0
        process = self._idle.get()
        try:
            while rest := items[len(results) :]:
                try:
                    process.begin(function, rest, arguments)
                except (EOFError, OSError):  # the other end of the pipe is gone; of no item's doing
                    starts += 1
                    if starts > TRIES:
                        raise OSError("it ends before it has begun") from None
                    process = self._replace(process)
                    continue
                starts = 0
                try:
                    for result in process.results(len(rest)):
                        results.append(result)
                        tries = 0
                except (EOFError, OSError):
                    process = self._replace(process)
                    tries += 1
                    if tries == TRIES:
                        results.append(Killed())
                        tries = 0
        finally:
            self._idle.put(process)
        return results

    def _replace(self, process: _Process) -> _Process:
        process.kill()
        with self._lock:
            self._started.discard(process)
        return self._start()

    def _start(self) -> _Process:
        with self._lock:
            if self._is_closed:
                raise RuntimeError("the processes have ended")
            process = _Process()
            self._started.add(process)
            return process


class _Process:
    """One process, and this one's end of the pipe to it."""

    def __init__(self) -> None:
        # Not forked: a process that runs engines has threads and a GPU, which no fork could use.
        # Nor forked from a server: that one imports from the current directory, not from ours.
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        with other, _deaf_to_interrupts():
            self._process = context.Process(target=_work, args=(other,), daemon=True)
            try:
                self._process.start()
            except BaseException:
                self._pipe.close()
                raise

    def begin(
        self, function: Callable[..., Any], items: Sequence[Any], arguments: tuple[object, ...]
    ) -> None:
        """Have it call the function for each item; returns when it has begun to.

        Raises:
            EOFError, OSError: the process has ended.
        """
        self._pipe.send((function, items, arguments))
        self._pipe.recv()

    def results(self, count: int) -> Iterator[Any]:
        """The result of each item as soon as it is there.

        Raises:
            EOFError, OSError: the process has ended.
            RuntimeError: the function raised something.
        """
        for _ in range(count):
            result, error = self._pipe.recv()
            if error is not None:
                raise RuntimeError(error)
            yield result

    def kill(self) -> None:
        """End it, if it has not ended."""
        self._process.kill()
        self._process.join()


@contextlib.contextmanager
def _deaf_to_interrupts() -> Iterator[None]:
    """Have a process that is started within never hear of Ctrl-C; this one hears it afterwards.

    The new one would answer with a traceback until it has got as far as `_work`.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    resource_tracker.ensure_running()  # else the first start does so, and opens the ears
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _work(pipe: Connection) -> None:
    """What a process does: answer what comes through the pipe, as long as its parent lives."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with contextlib.suppress(EOFError, OSError):  # nobody is there any more
        while True:
            function, items, arguments = pipe.recv()
            pipe.send("begun")
            for item in items:
                try:
                    answer = (function(item, *arguments), None)
                except Exception:
                    answer = (None, traceback.format_exc())
                pipe.send(answer)
                if answer[1] is not None:
                    break


def _end_with_parent() -> None:
    """Whatever goes on: a download would go on for minutes."""
    connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)
