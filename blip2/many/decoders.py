"""Pictures decoded by worker processes, ahead of whoever takes them, in the order given.

with Decoders(workers=4) as decoders:
    for batch, decoded in decoders.decode(batches, preprocessing):   # batches of inputs.Picture
        ...

A worker that is killed is started again, and what it had is tried again: a picture that kills it each
time is one that cannot be read.
"""

from __future__ import annotations

import base64
import collections
import io
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from typing import TypeVar

import numpy as np
from PIL import Image

from blip2 import cpu, images
from blip2.errors import Blip2Error
from blip2.images import Preprocessing
from blip2.many.inputs import Picture
from blip2.many.processes import TRIES, Killed, Processes

# Batches in flight: one being taken, and enough behind it that the workers never wait for it.
AHEAD = 3
THUMBNAIL = 320  # pixels of the longer side
_MOST_TOGETHER = 8  # pictures of a batch for one worker at a time

T = TypeVar("T")


def default_workers() -> int:
    """Half of the processors that this process may use, at most 8: the engines need the others."""
    return max(1, min(8, cpu.cores() // 2))


class Decoders:
    """A pool of processes that decode pictures. Use it as a context: leaving it ends them."""

    def __init__(self, workers: int) -> None:
        """Start `workers` of them.

        Raises:
            Blip2Error: one cannot be started.
        """
        try:
            self._processes = Processes(workers)
        except OSError as error:
            raise _not_started(error) from None

    def __enter__(self) -> Decoders:
        return self

    def __exit__(self, *_: object) -> None:
        self._processes.close()

    def decode(
        self,
        batches: Iterable[Sequence[Picture]],
        preprocessing: Preprocessing,
        is_fast: bool = False,
    ) -> Iterator[tuple[Sequence[Picture], list[np.ndarray | str]]]:
        """Each batch with, for each picture, its 3 x S x S bytes or what is wrong with it.

        Arguments are those of `decode_picture`.

        Raises:
            Blip2Error: a worker was killed, and cannot be started again.
        """
        for batch, decoded in self._map(batches, decode_picture, preprocessing, is_fast):
            yield (
                batch,
                [
                    _killed(picture) if isinstance(result, Killed) else result
                    for picture, result in zip(batch, decoded, strict=True)
                ],
            )

    def thumbnails(
        self, batches: Iterable[Sequence[Picture]]
    ) -> Iterator[tuple[Sequence[Picture], list[str | None]]]:
        """Each batch with a small JPEG of each picture as a data URL; None where it has none.

        Raises:
            Blip2Error: a worker was killed, and cannot be started again.
        """
        for batch, decoded in self._map(batches, _thumbnail):
            yield batch, [None if isinstance(result, Killed) else result for result in decoded]

    def _map(
        self, batches: Iterable[Sequence[Picture]], function: Callable[..., T], *arguments: object
    ) -> Iterator[tuple[Sequence[Picture], list[T | Killed]]]:
        waiting: collections.deque[tuple[Sequence[Picture], list[Future[list[T | Killed]]]]]
        waiting = collections.deque()
        source = iter(batches)
        while True:
            for batch in itertools.islice(source, AHEAD - len(waiting)):
                size = min(-(-len(batch) // self._processes.count), _MOST_TOGETHER)
                parts = (batch[start : start + size] for start in range(0, len(batch), size or 1))
                futures = [self._processes.map(function, part, *arguments) for part in parts]
                waiting.append((batch, futures))
            if not waiting:
                return
            batch, futures = waiting.popleft()
            try:
                results = [result for future in futures for result in future.result()]
            except OSError as error:
                raise _not_started(error) from None
            yield batch, results


def _not_started(error: OSError) -> Blip2Error:
    return Blip2Error(
        f"cannot start a process that decodes pictures: {error.strerror or error}",
        "end other programs, or give fewer `workers`",
    )


def _killed(picture: Picture) -> str:
    name = "/".join(picture.name.values())
    return (
        f"{name} has ended each of the {TRIES} processes that decoded it, perhaps because memory ran"
        " out; scale it down, or give fewer workers"
    )


def _load(picture: Picture, least_side: int | None = None) -> Image.Image:
    """As `images.load_image`."""
    if picture.error:
        raise Blip2Error(picture.error)
    if picture.key is None:
        return images.load_image(picture.path, least_side)
    name = f"{picture.path}/{picture.key}"
    content = picture.read()
    if not content:
        raise Blip2Error(f"{name} is empty", "replace the file")
    return images.decode_image(content, name, least_side)


def decode_picture(
    picture: Picture, preprocessing: Preprocessing, is_fast: bool = False
) -> np.ndarray | str:
    """A picture's 3 x S x S bytes, not normalised, or what is wrong with it.

    Args:
        picture: not decoded.
        preprocessing: what the ViT takes.
        is_fast: decode large JPEGs at a smaller scale, at least twice the ViT's side.
    """
    least_side = 2 * max(preprocessing.width, preprocessing.height) if is_fast else None
    try:
        return images.resized_pixels(_load(picture, least_side), preprocessing)
    except (Blip2Error, MemoryError) as error:
        return str(error) or "not enough memory for this picture"


def _thumbnail(picture: Picture) -> str | None:
    try:
        image = _load(picture, THUMBNAIL)
    except (Blip2Error, MemoryError):
        return None
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    content = io.BytesIO()
    image.save(content, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(content.getvalue()).decode("ascii")
