"""Processes that the server starts, and talks to by frames."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import socket
from collections.abc import Callable
from typing import Any

from blip2.serving import frames
from blip2.serving.frames import Channel, Frame


class Peer:
    """A process of this server's, started afresh: it shares no memory, and ends with this one."""

    def __init__(
        self, name: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, process: Any
    ) -> None:
        """Made by `start`."""
        self.name, self._reader, self._writer, self._process = name, reader, writer, process
        self._draining = asyncio.Lock()  # asyncio before 3.10.6 lets only one task wait for that

    @classmethod
    async def start(cls, name: str, target: Callable[..., None], *arguments: object) -> Peer:
        """Run `target(channel, *arguments)` in a new process; returns before it has begun.

        Raises:
            OSError: no process can be started.
        """
        ours, theirs = socket.socketpair()
        # Not forked: this process has an event loop and threads.
        context = multiprocessing.get_context("spawn")
        process = context.Process(
            target=_run, args=(target, theirs, arguments), name=name, daemon=True
        )
        # Starting takes milliseconds, in which nobody else would be answered.
        await asyncio.to_thread(process.start)
        theirs.close()
        reader, writer = await asyncio.open_connection(sock=ours, limit=1 << 22)
        return cls(name, reader, writer, process)

    async def send(self, message: dict[str, Any], content: bytes = b"") -> None:
        """Send a frame; waits while the process has too much to read.

        Raises:
            OSError: it has ended.
        """
        self._writer.writelines(frames.encode(message, content))
        async with self._draining:
            await self._writer.drain()

    def send_soon(self, message: dict[str, Any]) -> None:
        """Send a small frame without waiting; to a process that has ended nothing is sent."""
        if not self._writer.is_closing():
            self._writer.writelines(frames.encode(message))

    async def receive(self) -> Frame:
        """The next frame.

        Raises:
            EOFError, OSError: the process has ended.
        """
        return await frames.read(self._reader)

    async def ask(self, message: dict[str, Any], content: bytes = b"") -> Frame:
        """Send a frame and wait for the next one. Raises as `send` and `receive`."""
        await self.send(message, content)
        return await self.receive()

    def kill(self) -> None:
        """End it, whatever it does."""
        self._writer.close()
        self._process.kill()
        self._process.join()

    @property
    def is_alive(self) -> bool:
        """Whether it has not ended."""
        return self._process.is_alive()


def _run(target: Callable[..., None], connection: socket.socket, arguments: tuple) -> None:
    # Signals are the server's: it ends its processes when it has nothing left for them to do.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        target(Channel(connection), *arguments)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        os._exit(0)  # the server is gone, and with it whoever could wait for something
