"""Processes that the server starts, and talks to by frames."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from blip2.serving.frames import Channel, Stream


class Peer:
    """A process of this server's, started afresh: it shares no memory, and ends with this one."""

    def __init__(self, stream: Stream, process: Any) -> None:
        """Made by `start`."""
        self.stream, self._process = stream, process

    @classmethod
    async def start(
        cls, name: str, target: Callable[..., None], *arguments: object, is_parent: bool = False
    ) -> Peer:
        """Run `target(channel, *arguments)` in a new process; returns before it has begun.

        Args:
            name: of the process.
            target: what it does.
            arguments: may hold sockets and shared memory.
            is_parent: whether it starts processes of its own.

        Raises:
            OSError: no process can be started.
        """
        ours, theirs = socket.socketpair()
        # Not forked: this process has an event loop and threads.
        context = multiprocessing.get_context("spawn")
        process = context.Process(
            target=_run, args=(name, target, theirs, arguments), name=name, daemon=not is_parent
        )
        # Starting takes milliseconds, in which nobody else would be answered.
        await asyncio.to_thread(process.start)
        theirs.close()
        return cls(await Stream.open(ours), process)

    def kill(self) -> None:
        """End it, whatever it does."""
        self.stream.close()
        self._process.kill()
        self._process.join()

    @property
    def is_alive(self) -> bool:
        """Whether it has not ended."""
        return self._process.is_alive()


def _run(
    name: str, target: Callable[..., None], connection: socket.socket, arguments: tuple
) -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/comm").write_text(name)  # what ps and top call it
    # Signals are the server's: it ends its processes when it has nothing left for them to do.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        target(Channel(connection), *arguments)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        os._exit(0)  # the server is gone, and with it whoever could wait for something
