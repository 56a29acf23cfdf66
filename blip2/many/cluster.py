"""The stages of many pictures on a Ray cluster: one Ray Data actor with the engines for each GPU.

    with Cluster(address, open_pipeline) as cluster:
        facts = cluster.facts(questions, decoding)
        for answered in cluster.answer(work): ...

One task reads the input, tasks on any machine decode its batches, actors answer them, and this
process gets the answers in the input's order. Ray Data schedules, holds back what is ahead, starts
killed workers again and repeats the batches that they had.

A row is one batch, pickled: Arrow has no type for file names that are no UTF-8. A Blip2Error travels
as a row too; raised in a worker, Ray would turn it into a traceback.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import pickle
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import blip2
from blip2.errors import Blip2Error, first_line
from blip2.images import Preprocessing
from blip2.language import GenerationOptions
from blip2.layout import install
from blip2.many.batch import (
    WAIT,
    Answered,
    Batch,
    Facts,
    Question,
    Start,
    Work,
    answer_batches,
    stack_pictures,
)
from blip2.many.decoders import decode_picture
from blip2.pipeline import Pipeline, Stopwatch

# Ray reads it when it is imported.
os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # else a warning for every actor

try:
    import ray
    import ray.data
except ImportError:
    raise Blip2Error("a cluster needs Ray", f"install it with: {install('ray')}") from None

Row = dict[str, Any]
OpenPipeline = Callable[[], Pipeline]


class Cluster:
    """The workers of a Ray cluster: see `batch.Workers`. Use it as a context: leaving it ends them.

    Pictures and engines must be readable on each machine under the path that they have here; the
    package `blip2` is sent along.
    """

    def __init__(
        self,
        address: str,
        open_pipeline: OpenPipeline,
        actors: int | None = None,
        decoders: int | None = None,
    ) -> None:
        """Join a cluster, or start one.

        Args:
            address: of a cluster, as Ray takes it; "local" starts one of this machine.
            open_pipeline: opens the engines; run on the machines that have the GPUs.
            actors: how many engines at once; None is one for each GPU, or without any GPU one for
                each machine.
            decoders: the most batches decoded at once; None is as many as there are processors.

        Raises:
            Blip2Error: there is no cluster at the address, or it has no room for so many actors.
        """
        self._open_pipeline, self._decoders = open_pipeline, decoders
        self._directory = os.getcwd()
        connect(address)
        resources = ray.cluster_resources()
        gpus, cpus = int(resources.get("GPU", 0)), resources.get("CPU", 1)
        self.count = actors or gpus or sum(node["Alive"] for node in ray.nodes())
        if self.count > (room := gpus or int(cpus)):
            ray.shutdown()
            raise Blip2Error(
                f"`ray_actors` is {self.count}, more than the cluster's {room}"
                f" {'GPU' if gpus else 'processor'}{'s' if room > 1 else ''}",
                "give at most as many",
            )
        # Without GPUs half of the processors compute, in so many threads; the others decode. One for
        # each actor would be what decoding asks for: Ray fuses equal stages, and nothing goes ahead.
        share = cpus / 2 / self.count
        self._per_actor = (
            {"num_gpus": 1, "num_cpus": 1}
            if gpus
            else {"num_cpus": int(share) if share >= 2 else min(round(share, 2), 0.9)}
        )

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        ray.shutdown()

    def facts(self, questions: Sequence[Question], decoding: dict[str, Any]) -> Facts:
        """Open the engines on one of the machines, and read off what a run must know of them.

        Raises:
            Blip2Error: they cannot be opened there, or cannot take a question, or decode so.
        """
        # max_calls: the process ends, and leaves its GPU to an actor.
        task = ray.remote(max_calls=1, max_retries=0, **self._per_actor)(_facts)
        with _killed_workers():
            row = ray.get(task.remote(self._directory, self._open_pipeline, questions, decoding))
        return _unpacked(row)

    def answer(self, work: Work) -> Generator[Answered, None, None]:
        """Do the work, batch by batch in the input's order.

        Raises:
            Blip2Error: a batch's worker was killed again and again, or its engines cannot take a
                question.
        """
        if work.start.entry == len(work.entries):
            return
        rows = (
            ray.data.from_items([_packed(work)])
            .map_batches(_read, fn_args=(self._directory,), num_cpus=0)
            .map(
                _decode,
                fn_args=(self._directory, work.preprocessing),
                num_cpus=1,
                compute=ray.data.TaskPoolStrategy(size=self._decoders),
            )
            .map(
                _Answerer,
                fn_constructor_args=(
                    *(self._directory, self._open_pipeline, work.questions, work.options),
                ),
                # Ray warns of actors that get nothing.
                compute=ray.data.ActorPoolStrategy(size=min(self.count, work.most_batches())),
                **self._per_actor,
            )
        )
        # Closed at once: what Ray still does for an iterator after `shutdown` would start it again.
        with _killed_workers(), contextlib.closing(iter(rows.iter_rows())) as packed:
            for row, position in zip(packed, work.positions(), strict=False):
                answered = _unpacked(row)
                if answered.position != position:
                    raise RuntimeError(f"batch {answered.position} came instead of {position}")
                yield answered


def connect(address: str) -> None:
    """Join a Ray cluster, or start one of this machine ("local"); `blip2` is sent along.

    Raises:
        Blip2Error: there is none at the address.
    """
    on_sigterm = signal.getsignal(signal.SIGTERM)
    for name in ("ray", "ray.data"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        _check_reachable(address)
        with tempfile.TemporaryDirectory() as code, _quiet_stderr():
            # On this machine too: without it, workers import from the current directory first.
            no_caches = shutil.ignore_patterns("__pycache__")
            shutil.copytree(Path(blip2.__file__).parent, Path(code, "blip2"), ignore=no_caches)
            ray.init(
                address=address,
                runtime_env={"working_dir": code},
                logging_level=logging.ERROR,
                log_to_driver=False,
            )
    except (OSError, RuntimeError, ValueError) as error:
        raise Blip2Error(
            f"cannot join a Ray cluster at {address} ({first_line(error)})",
            "check the address, and set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN if it asks for a token",
        ) from None
    # Ray's own handler would end this process before it has said what was done.
    signal.signal(signal.SIGTERM, on_sigterm)
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    # A block, which is what one task takes, never holds two rows.
    context.target_max_block_size = 1
    context.enable_progress_bars = False


def _check_reachable(address: str) -> None:
    """Raise OSError if nothing listens at host:port: Ray would wait for it for two minutes."""
    host, _, port = address.rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=10).close()


@contextlib.contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Hide what libraries in C++ print: Ray's announces the log level that we gave it."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


@contextlib.contextmanager
def _killed_workers() -> Iterator[None]:
    try:
        yield
    except (ray.exceptions.RayActorError, ray.exceptions.WorkerCrashedError) as error:
        raise Blip2Error(
            f"a process of the cluster was killed, perhaps because memory ran out"
            f" ({first_line(error)})",
            "give the same command again to go on",
        ) from None


# What follows runs in Ray's workers.


def _packed(content: object) -> Row:
    return {"content": pickle.dumps(content)}


def _unpacked(row: Row) -> Any:
    """What was packed.

    Raises:
        Blip2Error: that was one.
    """
    content = pickle.loads(row["content"])
    if isinstance(content, Blip2Error):
        raise content
    return content


def _enter(directory: str) -> None:
    """Let relative paths mean what they mean where the run was started."""
    try:
        os.chdir(directory)
    except OSError as error:
        raise Blip2Error(
            f"{socket.gethostname()} cannot enter {directory} ({error.strerror})",
            "start the run in a directory that all machines of the cluster share",
        ) from None


def _facts(
    directory: str,
    open_pipeline: OpenPipeline,
    questions: Sequence[Question],
    decoding: dict[str, Any],
) -> Row:
    try:
        _enter(directory)
        return _packed(Facts.of(open_pipeline(), questions, decoding))
    except Blip2Error as error:
        return _packed(error)


def _read(rows: dict[str, Sequence[bytes]], directory: str) -> Iterator[dict[str, list[bytes]]]:
    """The batches of the work that is the only row."""
    try:
        _enter(directory)
        for batch in pickle.loads(rows["content"][0]).batches():
            yield {"content": [pickle.dumps(batch)]}
    except Blip2Error as error:
        yield {"content": [pickle.dumps(error)]}


def _decode(row: Row, directory: str, preprocessing: Preprocessing) -> Row:
    try:
        _enter(directory)
        batch = _unpacked(row)
    except Blip2Error as error:
        return _packed(error)
    decoded = [decode_picture(picture, preprocessing) for picture in batch.pictures]
    # From here on the names are enough.
    pictures = [dataclasses.replace(picture, content=None) for picture in batch.pictures]
    return _packed(Batch(batch.position, pictures, decoded))


class _Answerer:
    """The engines of one GPU."""

    def __init__(
        self,
        directory: str,
        open_pipeline: OpenPipeline,
        questions: Sequence[Question],
        options: GenerationOptions,
    ) -> None:
        self._questions, self._options = questions, options
        self._opened: Pipeline | Blip2Error
        try:
            _enter(directory)
            self._opened = open_pipeline()
        except Blip2Error as error:
            self._opened = error
        self._idle_since = time.perf_counter()

    def __call__(self, row: Row) -> Row:
        watch = Stopwatch()
        watch.seconds[WAIT] = time.perf_counter() - self._idle_since
        try:
            batch = _unpacked(row)
            if isinstance(self._opened, Blip2Error):
                raise self._opened
            values = stack_pictures(batch, self._opened.vision)
            preprocessing, size = self._opened.vision.preprocessing, len(batch.decoded)
            work = Work([], Start(), size, preprocessing, self._questions, self._options)
            [answered] = answer_batches(self._opened, [(batch, values)], work, watch)
        except Blip2Error as error:
            return _packed(error)
        self._idle_since = time.perf_counter()
        return _packed(answered)
