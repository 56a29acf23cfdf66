"""Pictures decoded by worker processes, ahead of whoever takes them, in the order given.

with Decoders(workers=4) as decoders:
    for batch in decoders.decode(batches, preprocessing):   # batches of inputs.Picture
        ...
"""

from __future__ import annotations

import base64
import collections
import contextlib
import io
import itertools
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image

from blip2 import images
from blip2.errors import Blip2Error
from blip2.images import Preprocessing
from blip2.many.inputs import Picture

# Batches in flight: one being taken, and enough behind it that the workers never wait for it.
AHEAD = 3
THUMBNAIL = 320  # pixels of the longer side
_SHARE = Path("/sys/fs/cgroup/cpu.max")  # microseconds of processors in so many of time
_MOST_WORKERS = 61 if sys.platform == "win32" else 256  # that Windows can wait for at once

T = TypeVar("T")


def default_workers() -> int:
    """Half of the processors that this process may use, at most 8: the engines need the others."""
    return max(1, min(8, _processors() // 2))


def _processors() -> int:
    """How many processors this process may use: those it is bound to, within a container's share."""
    bound = getattr(os, "sched_getaffinity", None)  # macOS and Windows bind nobody
    count = len(bound(0)) if bound else os.cpu_count() or 1
    try:
        quota, period = _SHARE.read_text().split()
        return max(1, min(count, int(quota) // int(period)))
    except (OSError, ValueError):  # no such file, or no limit: "max"
        return count


class Decoders:
    """A pool of processes that decode pictures. Use it as a context: leaving it ends them."""

    def __init__(self, workers: int) -> None:
        # Not forked: a process that runs engines has threads and a GPU, which no fork could use.
        # Nor forked from a server: that one imports from the current directory, not from ours.
        context = multiprocessing.get_context("spawn")
        # The workers end when nobody holds the other end: even where this process was killed.
        ended, self._lifeline = context.Pipe(duplex=False)
        workers = min(workers, _MOST_WORKERS)
        self._pool = ProcessPoolExecutor(
            workers, mp_context=context, initializer=_start_worker, initargs=(ended,)
        )
        try:
            # They start and import while the engines load.
            for _ in range(workers):
                self._submit(int)
        except BaseException:
            self.__exit__(Blip2Error)
            raise

    def __enter__(self) -> Decoders:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is not None:  # a download would be waited for
            self._lifeline.close()
            # A worker may end with half of a result sent. The pool's thread, which waits for the rest,
            # hears that there is none once this process holds the pipe no longer either.
            self._pool._result_queue._writer.close()
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._lifeline.close()

    def decode(
        self, batches: Iterable[Sequence[Picture]], preprocessing: Preprocessing
    ) -> Iterator[tuple[Sequence[Picture], list[np.ndarray | str]]]:
        """Each batch with, for each picture, its 3 x S x S bytes or what is wrong with it.

        Raises:
            Blip2Error: a worker was killed.
        """
        return self._map(batches, decode_picture, preprocessing)

    def thumbnails(
        self, batches: Iterable[Sequence[Picture]]
    ) -> Iterator[tuple[Sequence[Picture], list[str | None]]]:
        """Each batch with a small JPEG of each picture as a data URL; None where it has none.

        Raises:
            Blip2Error: a worker was killed.
        """
        return self._map(batches, _thumbnail)

    def _map(
        self, batches: Iterable[Sequence[Picture]], function: Callable[..., T], *arguments: object
    ) -> Iterator[tuple[Sequence[Picture], list[T]]]:
        waiting: collections.deque[tuple[Sequence[Picture], list[Future[T]]]] = collections.deque()
        source = iter(batches)
        while True:
            for batch in itertools.islice(source, AHEAD - len(waiting)):
                futures = [self._submit(function, picture, *arguments) for picture in batch]
                waiting.append((batch, futures))
            if not waiting:
                return
            batch, futures = waiting.popleft()
            yield batch, [self._result(future) for future in futures]

    def _submit(self, function: Callable[..., T], *arguments: object) -> Future[T]:
        try:
            with _deaf_to_interrupts():
                return self._pool.submit(function, *arguments)
        except BrokenProcessPool:
            raise _worker_killed() from None
        except OSError as error:
            raise Blip2Error(
                f"cannot start a process that decodes pictures: {error.strerror or error}",
                "end other programs, or give fewer `workers`",
            ) from None

    @staticmethod
    def _result(future: Future[T]) -> T:
        try:
            return future.result()
        except BrokenProcessPool:
            raise _worker_killed() from None


@contextlib.contextmanager
def _deaf_to_interrupts() -> Iterator[None]:
    """Have a process that is started within never hear of Ctrl-C; this one hears it afterwards.

    The new one would answer with a traceback until it has got as far as `_start_worker`.
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


def _worker_killed() -> Blip2Error:
    return Blip2Error(
        "a process that decodes pictures was killed, perhaps because memory ran out",
        "give the same command again to go on, with fewer `workers`",
    )


def _start_worker(ended: Connection) -> None:
    """Leave Ctrl-C to the parent, and end when it closes its end of the pipe, whatever goes on."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with, args=(ended,), daemon=True).start()


def _end_with(ended: Connection) -> None:
    ended.poll(None)  # nothing is ever sent
    os._exit(1)


def _load(picture: Picture) -> Image.Image:
    if picture.error:
        raise Blip2Error(picture.error)
    if picture.content is None:
        return images.load_image(picture.path)
    name = f"{picture.path}/{picture.key}"
    if not picture.content:
        raise Blip2Error(f"{name} is empty", "replace the file")
    return images.decode_image(picture.content, name)


def decode_picture(picture: Picture, preprocessing: Preprocessing) -> np.ndarray | str:
    """A picture's 3 x S x S bytes, not normalised, or what is wrong with it."""
    try:
        return images.resized_pixels(_load(picture), preprocessing)
    except (Blip2Error, MemoryError) as error:
        return str(error) or "not enough memory for this picture"


def _thumbnail(picture: Picture) -> str | None:
    try:
        image = _load(picture)
    except (Blip2Error, MemoryError):
        return None
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    content = io.BytesIO()
    image.save(content, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(content.getvalue()).decode("ascii")
