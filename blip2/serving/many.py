"""Many pictures through a server: what `run.py --server URL --output FILE` does.

As `blip2.many` does it with engines of its own: the same lines in the same order, and the same way to
go on after a crash; without PyTorch. Requests go out side by side: the server puts them together.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import queue
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

from blip2.errors import Blip2Error
from blip2.many import inputs, journal
from blip2.many.inputs import Picture
from blip2.many.journal import Journal, StandardOutput
from blip2.serving.client import Client, Refused, read_picture

REQUESTS = 32  # at once
_WRITTEN_TOGETHER = 32  # pictures, at most


@dataclasses.dataclass(frozen=True)
class Summary:
    """Pictures in the output, those of them that failed, and those of this run."""

    done: int
    failed: int
    new: int


@dataclasses.dataclass(frozen=True)
class ServedJob:
    """Pictures, the questions about each, and the file that gets a line for every answer.

    Attributes:
        url: of the server.
        sources: files, URLs, folders, patterns, lists and shards of pictures.
        questions: texts, each asked of every picture.
        options: as `Client.ask` takes them.
        output: None is standard output.
        requests: pictures asked about at once.
    """

    url: str
    sources: Sequence[str]
    questions: Sequence[str]
    options: dict[str, Any]
    output: Path | None
    requests: int = REQUESTS

    def run(self) -> Summary:
        """Answer what is not in the output yet.

        Raises:
            Blip2Error: something to mend; the output has what was answered.
        """
        if self.output is not None:
            journal.check_place(self.output)
        entries = inputs.list_entries(self.sources)
        with Client(self.url) as client:
            model = client.model()
        with self._open_output(model) as lines:
            done, failed = lines.done, lines.failed
            pictures = _without_done(inputs.read_pictures(entries), lines)
            total = inputs.count_pictures(entries)
            with _progress_bar(total, done) as bar, contextlib.ExitStack() as clients:
                for answered in _batches(self._answer(pictures, lines.done, clients)):
                    lines.append(list(itertools.chain.from_iterable(answered)))
                    done += len(answered)
                    failed += sum("error" in of_picture[0] for of_picture in answered)
                    bar.set_postfix(failed=failed, refresh=False)
                    bar.update(len(answered))
            return Summary(done, failed, done - lines.done)

    def _open_output(self, model: dict[str, Any]) -> Journal | StandardOutput:
        if self.output is None:
            return StandardOutput()
        made_with = {
            "--input_dir": list(self.sources),
            "--server, or its engines": model.get("fingerprint"),
            "--input_text": list(self.questions),
            **{f"--{name}": value for name, value in self.options.items()},
        }
        return Journal(self.output, len(self.questions), made_with)

    def _answer(
        self, pictures: Iterator[Picture], first: int, clients: contextlib.ExitStack
    ) -> Iterator[list[dict[str, Any]] | None]:
        """Each picture's lines in order; None where the next are not there yet."""
        free: queue.SimpleQueue[Client] = queue.SimpleQueue()
        for _ in range(self.requests):
            free.put(clients.enter_context(Client(self.url)))
        waiting: collections.deque[Future[list[dict[str, Any]]]] = collections.deque()
        numbered = enumerate(pictures, first)
        with ThreadPoolExecutor(self.requests) as pool:
            try:
                while True:
                    ahead = 2 * self.requests - len(waiting)
                    for number, picture in itertools.islice(numbered, ahead):
                        waiting.append(pool.submit(self._lines, free, picture, number))
                    if not waiting:
                        return
                    if not waiting[0].done():
                        yield None  # what is there may be written meanwhile
                    yield waiting.popleft().result()
            finally:
                for future in waiting:
                    future.cancel()

    def _lines(
        self, free: queue.SimpleQueue[Client], picture: Picture, number: int
    ) -> list[dict[str, Any]]:
        """What the output says of a picture, question by question; or one line with what is wrong."""
        client = free.get()
        try:
            content = _content(picture)
            lines = []
            for index, text in enumerate(self.questions):
                # Equal draws for every picture would make the answers alike.
                seed = self.options["seed"] + number * len(self.questions) + index
                answers = client.ask(content, text, {**self.options, "seed": seed}).answers
                line = {**picture.name, "question": text, "answer": answers[0].text}
                line["flags"] = answers[0].flags
                if len(answers) > 1:
                    line["beams"] = [answer.to_json() for answer in answers]
                lines.append(line)
            return lines
        except (Refused, _Unreadable) as error:
            return [{**picture.name, "error": str(error)}]
        finally:
            free.put(client)


class _Unreadable(Blip2Error):
    """A picture that cannot be read here; the others can be."""


def _content(picture: Picture) -> bytes:
    if picture.error:
        raise _Unreadable(picture.error)
    try:
        return read_picture(picture.path) if picture.key is None else picture.read()
    except Blip2Error as error:
        raise _Unreadable(error.problem, error.remedy) from None


def _without_done(
    pictures: Iterator[Picture], lines: Journal | StandardOutput
) -> Iterator[Picture]:
    """Those behind the ones that the output has.

    Raises:
        Blip2Error: the output has others, or in another order.
    """
    for name in lines.names():
        picture = next(pictures, None)
        if picture is None or picture.name != name:
            raise Blip2Error(
                f"{lines.path} has an answer for {'/'.join(name.values())}, which is no longer there"
                " in the input's order",
                "give the same pictures again, or choose another `output`",
            )
    yield from pictures


def _batches(
    answered: Iterator[list[dict[str, Any]] | None],
) -> Iterator[list[list[dict[str, Any]]]]:
    """Pictures' lines to be written at once: what has come until one has to be waited for."""
    batch: list[list[dict[str, Any]]] = []
    for lines in answered:
        if lines is not None:
            batch.append(lines)
        if batch and (lines is None or len(batch) == _WRITTEN_TOGETHER):
            yield batch
            batch = []
    if batch:
        yield batch


def _progress_bar(total: int, done: int) -> tqdm:
    interval = 0.2 if sys.stderr.isatty() else 30  # in a log file every refresh is another line
    return tqdm(total=total, initial=done, unit=" pictures", mininterval=interval, smoothing=0.1)
