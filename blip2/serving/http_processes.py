"""Further processes that speak HTTP: they listen on the same socket, and ask the same engines.

Each has decoders of its own. What is bounded or counted is `together`; a picture is looked at once for
each process that is asked about it, at most. One that ends by itself is replaced.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import socket
import sys

from blip2.errors import Blip2Error
from blip2.serving.app import Service, ServiceSettings
from blip2.serving.engine import EngineProcess, Facts
from blip2.serving.exchange import LAST_WORD_SECONDS
from blip2.serving.frames import Channel, Stream
from blip2.serving.listening import Answering
from blip2.serving.processes import Peer
from blip2.serving.slots import SharedMemory
from blip2.serving.together import Together

_AGAIN_SECONDS = 1.0  # until one that has ended is replaced
_END_SECONDS = 3.0  # to end in, beside what it finishes
_ANSWER, _STOP = {"do": "answer"}, {"do": "stop"}


@dataclasses.dataclass(frozen=True)
class HttpSettings:
    """What each of the processes is told; seconds as `ServerSettings` has them."""

    service: ServiceSettings
    idle_timeout: float
    shutdown_timeout: float


class HttpProcesses:
    """All but the first, which has started them."""

    def __init__(
        self, settings: HttpSettings, listening: socket.socket, together: Together
    ) -> None:
        """None yet."""
        self._settings, self._listening, self._together = settings, listening, together
        self._peers: dict[int, Peer] = {}
        self._keeping: list[asyncio.Task[None]] = []
        self._silent = set(range(1, together.processes))
        self._all_answer = asyncio.Event()
        self._may_answer = self._is_stopping = False

    def start(self, engines: EngineProcess) -> None:
        """Start them, for engines that may be loading still."""
        for number in self._silent:
            self._keeping.append(asyncio.create_task(self._keep(number, engines)))
        self._note_answering()

    async def answer(self) -> None:
        """Let them answer too, now that the first does; returns when all do."""
        self._may_answer = True
        for peer in self._peers.values():
            peer.stream.send_soon(_ANSWER)
        await self._all_answer.wait()

    async def drain(self) -> None:
        """Let them finish what runs, and end; returns when they have, or should have."""
        self._is_stopping = True
        for peer in self._peers.values():
            peer.stream.send_soon(_STOP)
        if self._keeping:
            timeout = self._settings.shutdown_timeout + LAST_WORD_SECONDS + _END_SECONDS
            await asyncio.wait(self._keeping, timeout=timeout)

    def close(self) -> None:
        """End them, whatever they do."""
        for keeping in self._keeping:
            keeping.cancel()
        for peer in self._peers.values():
            peer.kill()

    async def _keep(self, number: int, engines: EngineProcess) -> None:
        """Have one, and another when it ends."""
        together = self._together.of(number)
        while not self._is_stopping:
            with contextlib.suppress(OSError):  # it cannot be started, or the engines have ended
                await self._run_one(number, engines)
            if self._is_stopping:
                return
            together.forget()
            print("note: a process that speaks HTTP has ended; another follows", file=sys.stderr)
            sys.stderr.flush()
            await asyncio.sleep(_AGAIN_SECONDS)

    async def _run_one(self, number: int, engines: EngineProcess) -> None:
        memory = SharedMemory.create()
        with contextlib.closing(memory), engines.connect(memory) as connection:
            arguments = (self._settings, self._listening, connection, memory)
            peer = await Peer.start(
                "blip2-http", run, *arguments, self._together.of(number), is_parent=True
            )
        self._peers[number] = peer
        if self._may_answer:
            peer.stream.send_soon(_ANSWER)
        if self._is_stopping:  # since it was started
            peer.stream.send_soon(_STOP)
        try:
            with contextlib.suppress(EOFError, OSError):
                await peer.stream.receive()  # it answers
                self._silent.discard(number)
                self._note_answering()
                await peer.stream.receive()  # it says nothing more, and ends
        finally:
            del self._peers[number]
            peer.kill()

    def _note_answering(self) -> None:
        if not self._silent:
            self._all_answer.set()


def run(
    channel: Channel,
    settings: HttpSettings,
    listening: socket.socket,
    engines: socket.socket,
    memory: SharedMemory,
    together: Together,
) -> None:
    """Answer once the process that has started this one says so, until it says "stop" or is gone."""
    asyncio.run(_run(channel, settings, listening, engines, memory, together))


async def _run(
    channel: Channel,
    settings: HttpSettings,
    listening: socket.socket,
    engines: socket.socket,
    memory: SharedMemory,
    together: Together,
) -> None:
    starter = await Stream.open(channel.detach())
    service = Service(settings.service, together)
    answering = Answering(service.app, listening, settings.idle_timeout)
    joining = asyncio.create_task(service.join(engines, memory))
    joining.add_done_callback(_explain)
    stopping = None
    try:
        # Until it is told to, others, who can answer, get the connections.
        if (await starter.receive()).message == _ANSWER:
            stopping = asyncio.create_task(starter.receive())
            await asyncio.wait({stopping, joining}, return_when=asyncio.FIRST_COMPLETED)
            if joining.done() and not joining.exception():
                answering.start()
                await starter.send({"answers": True})
                await stopping
                await service.drain(settings.shutdown_timeout)
                await answering.stop()
    except (EOFError, OSError):
        pass
    finally:
        joining.cancel()
        if stopping is not None:
            stopping.cancel()
        service.close()
        starter.close()


def _explain(joining: asyncio.Task[Facts]) -> None:
    """Say why it does not answer, unless it is for the engines, of which the first process says so."""
    if not joining.cancelled() and isinstance(error := joining.exception(), Blip2Error):
        print(f"error: {error}", file=sys.stderr, flush=True)
