"""Many pictures on a Ray cluster: an actor with the engines, and processes that decode, for each GPU.

    with Cluster(address) as cluster:
        facts = cluster.open(open_pipeline, questions, decoding)
        for answered in cluster.answer(work): ...

An actor is a `LocalWorkers`: it is given windows of the input, decodes the next ones while it answers
one, and sends back lines. So pictures are decoded on the machine that answers them, and of those that
are files only the names travel. This process gives out blocks of windows, as many as `Work.block`
says, and puts what comes back into the input's order. The blocks of an actor that is lost, or its
machine with it, begin anew on another.

Nothing here imports PyTorch: the actors do that while this process does, so make a Cluster first. A
Blip2Error travels as a result; raised in a worker, Ray would turn it into a traceback.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import blip2
from blip2.errors import Blip2Error, first_line
from blip2.layout import install
from blip2.many.actor import AHEAD, Engines, OpenPipeline, Report

if TYPE_CHECKING:
    from blip2.many.work import Answered, Batch, Facts, Question, Work

# Ray reads it when it is imported.
os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # else a warning for every actor

try:
    import ray
except ImportError:
    raise Blip2Error("a cluster needs Ray", f"install it with: {install('ray')}") from None

TRIES = 3


class Cluster:
    """The workers of a Ray cluster: see `work.Workers`. Use it as a context: leaving it ends them.

    Pictures and engines must be readable on each machine under the path that they have here; the
    package `blip2` is sent along.
    """

    def __init__(
        self, address: str, actors: int | None = None, decoders: int | None = None
    ) -> None:
        """Join a cluster, or start one, and have its actors started.

        Args:
            address: of a cluster, as Ray takes it; "local" starts one of this machine.
            actors: how many engines at once; None is one for each GPU, or without any GPU one for
                each machine.
            decoders: processes that decode pictures, of each actor; None is half of its share of the
                processors, on a machine with GPUs at most 8.

        Raises:
            Blip2Error: there is no cluster at the address, or it has no room for so many actors.
        """
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
        # Half of the processors decode. Without GPUs the others compute, in so many threads.
        share = cpus / 2 / self.count
        threads = int(share) if share >= 2 else min(round(share, 2), 0.9)
        self._options = (
            {"num_gpus": 1, "num_cpus": 1}
            if gpus
            else {"num_cpus": threads, "scheduling_strategy": "SPREAD"}
        )
        self._decoders = decoders or max(1, min(int(share), 8 if gpus else int(share)))
        self._opening: tuple[Any, ...] = ()
        self._work: Work | None = None
        self._lost: list[_Block] = []
        self._actors = [_Actor(self._start()) for _ in range(self.count)]

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        ray.shutdown()

    def open(
        self, open_pipeline: OpenPipeline, questions: Sequence[Question], decoding: dict[str, Any]
    ) -> Facts:
        """Open the engines in every actor; returns when the first has done so.

        Args:
            open_pipeline: opens them; run on the machines.
            questions: that will be asked.
            decoding: fields of GenerationOptions.

        Returns:
            What a run must know of the engines.

        Raises:
            Blip2Error: they cannot be opened there, or cannot take a question, or decode so.
        """
        self._opening = (self._directory, open_pipeline, self._decoders, questions, decoding)
        for actor in self._actors:
            actor.call = actor.handle.open.remote(*self._opening)
        while (first := self._result()) is None:
            pass
        _, facts = first
        return facts

    def answer(self, work: Work) -> Generator[Answered, None, None]:
        """Do the work, batch by batch in the input's order.

        Raises:
            Blip2Error: a block's actors were lost again and again, no actor is left, or the engines
                cannot take a question.
        """
        # The names of a whole input may be many: what is to be done travels by and by.
        self._work = dataclasses.replace(work, entries=(), only=None)
        for actor in self._actors:
            if actor.is_open:
                actor.handle.begin.remote(self._work)
        unread = _blocks(work)
        answers: dict[int, Answered | None] = {}  # in the input's order; None is yet to come

        def next_block() -> _Block | None:
            if self._lost:
                return self._lost.pop(0)
            if (block := next(unread, None)) is not None:
                answers.update(dict.fromkeys(batch.position for batch in block.batches))
            return block

        while True:
            for actor in self._actors:
                if actor.is_open and actor.call is None:
                    actor.give(next_block)
            if not answers:
                return
            if (result := self._result()) is None:
                continue
            actor, report = result
            for answered in actor.take(report):
                # Of a block that was lost some may have come before.
                if answers.get(answered.position, answered) is None:
                    # By this machine's clock.
                    answers[answered.position] = dataclasses.replace(
                        answered, moment=time.perf_counter()
                    )
            while answers and (answered := answers[next(iter(answers))]) is not None:
                del answers[answered.position]
                yield answered

    def _start(self) -> Any:
        """An actor, of which its machine is not known yet."""
        return ray.remote(**self._options)(Engines).remote()

    def _result(self) -> tuple[_Actor, Any] | None:
        """Wait for the end of a call; what came of it, None where that is of no interest.

        Raises:
            Blip2Error: what came of it is one; or as `_replace`.
        """
        calls = {actor.call: actor for actor in self._actors if actor.call is not None}
        [call], _ = ray.wait(list(calls))
        actor = calls[call]
        actor.call = None
        try:
            result = ray.get(call)
        except ray.exceptions.RayTaskError:
            raise  # a bug, with its traceback
        except ray.exceptions.RayError as error:
            self._replace(actor, error)
            return None
        if isinstance(result, Blip2Error):
            raise result
        if not actor.is_open:
            actor.is_open = True
            if self._work is None:
                return actor, result
            actor.handle.begin.remote(self._work)
            return None
        return actor, result

    def _replace(self, actor: _Actor, error: Exception) -> None:
        """Start another actor in place of one that was lost; its blocks begin anew.

        Raises:
            Blip2Error: that was tried too often.
        """
        print(f"note: an actor was lost ({first_line(error)})", file=sys.stderr)
        with contextlib.suppress(ray.exceptions.RayError):
            ray.kill(actor.handle)  # its machine may only be out of reach
        mend = "lower `batch_size`, or give fewer `workers`; the same command goes on"
        if actor.blocks:
            first = actor.blocks[0]
            first.losses += 1
            if first.losses == TRIES:
                names = (first.batches[n].pictures[n].name.values() for n in (0, -1))
                raise Blip2Error(
                    f"each of {TRIES} actors was lost that answered the pictures from"
                    f" {' to '.join(map('/'.join, names))}, perhaps because memory ran out",
                    mend,
                )
        self._lost = sorted([*self._lost, *actor.blocks], key=lambda b: b.batches[0].position)
        self._actors.remove(actor)
        if actor.losses + 1 < TRIES:
            replacement = _Actor(self._start(), losses=actor.losses + 1)
            replacement.call = replacement.handle.open.remote(*self._opening)
            self._actors.append(replacement)
        if not self._actors:
            raise Blip2Error(
                f"every actor was lost {TRIES} times before it answered anything, perhaps because"
                " memory ran out",
                mend,
            )


@dataclasses.dataclass
class _Block:
    """Batches behind one another, and how many actors were lost that answered them."""

    batches: list[Batch]
    losses: int = 0


def _blocks(work: Work) -> Iterator[_Block]:
    size = work.batch_size * work.block
    for _, batches in itertools.groupby(work.batches(), lambda batch: batch.position // size):
        yield _Block(list(batches))


@dataclasses.dataclass(eq=False)
class _Actor:
    """An actor as this process sees it.

    Attributes:
        handle: Ray's.
        losses: of those before it, in a row, since one has answered something.
        call: what it is about; None where it has nothing to do.
        is_open: its engines are.
        blocks: those that it was given and has not answered yet, in that order.
        unsent: batches of the last of them.
        room: how many batches it waits for.
    """

    handle: Any
    losses: int = 0
    call: Any = None
    is_open: bool = False
    blocks: list[_Block] = dataclasses.field(default_factory=list)
    unsent: collections.deque[Batch] = dataclasses.field(default_factory=collections.deque)
    room: int = AHEAD

    def give(self, next_block: Callable[[], _Block | None]) -> None:
        """Send it what it has room for. Where there is no more it is told so, and ends what it has."""
        batches: list[Batch] = []
        while len(batches) < self.room:
            if not self.unsent:
                if (block := next_block()) is None:
                    break
                self.blocks.append(block)
                self.unsent.extend(block.batches)
            batches.append(self.unsent.popleft())
        if batches or self.blocks:
            self.call = self.handle.exchange.remote(batches, len(batches) < self.room)

    def take(self, report: Report) -> list[Answered]:
        """Note what it has answered: in the order in which it was given."""
        self.room = report.room
        for answered in report.answered:
            self.losses = 0
            if answered.position == self.blocks[0].batches[-1].position:
                del self.blocks[0]
        return report.answered


def connect(address: str) -> None:
    """Join a Ray cluster, or start one of this machine ("local"); `blip2` is sent along.

    Raises:
        Blip2Error: there is none at the address.
    """
    on_sigterm = signal.getsignal(signal.SIGTERM)
    logging.getLogger("ray").setLevel(logging.ERROR)
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
                **({"include_dashboard": False} if address == "local" else {}),
            )
    except (OSError, RuntimeError, ValueError) as error:
        raise Blip2Error(
            f"cannot join a Ray cluster at {address} ({first_line(error)})",
            "check the address, and set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN if it asks for a token",
        ) from None
    # Ray's own handler would end this process before it has said what was done.
    signal.signal(signal.SIGTERM, on_sigterm)


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
