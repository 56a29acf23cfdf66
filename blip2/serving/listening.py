"""A socket that listens, and what answers on it: uvicorn, with time limits for connections.

listening = listen(host, port)
answering = Answering(service.app, listening, idle_timeout)
answering.start()
await answering.stop()
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Iterator
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from blip2.errors import Blip2Error

_BACKLOG = 2048
_SWEEP_SECONDS = 1.0


class _Server(uvicorn.Server):
    """uvicorn's, whose signals are ours."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Listening(socket.socket):
    """A socket that listens already: asyncio's backlog is how many it accepts at a time."""

    def listen(self, _backlog: int = 0) -> None:
        pass


class Answering:
    """An application that answers on a socket, which other processes may listen on too."""

    def __init__(self, app: ASGIApp, listening: socket.socket, idle_timeout: float) -> None:
        """Not yet.

        Args:
            app: what answers.
            listening: of `listen`; it is owned from now on.
            idle_timeout: seconds that a connection may be open without asking.
        """
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # of strangers' bad requests
        config = uvicorn.Config(
            app,
            http=H11Protocol,
            ws="none",
            lifespan="off",
            interface="asgi3",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=max(1, round(idle_timeout)),
            timeout_graceful_shutdown=1,
            # One at a time: of connections that come at once the others are for other processes.
            backlog=1,
        )
        self._server = _Server(config)
        self._listening = _Listening(fileno=listening.detach())
        self._idle_timeout = idle_timeout
        self._serving: asyncio.Task[None] | None = None
        self._sweeping: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Answer from now on."""
        self._serving = asyncio.create_task(self._server.serve(sockets=[self._listening]))
        self._sweeping = asyncio.create_task(sweep(self._server, self._idle_timeout))

    async def stop(self) -> None:
        """Answer no more."""
        self._server.should_exit = True
        await self._serving
        self._sweeping.cancel()


async def sweep(server: uvicorn.Server, idle_timeout: float) -> None:
    """Close connections on which nothing is asked, or read, for too long. Never returns.

    uvicorn itself waits for ever for a first request, for the rest of one whose headers do not end,
    and for a client that does not read the last bytes of its answer.
    """
    loop = asyncio.get_running_loop()
    idle_since: dict[tuple[H11Protocol, Any], float] = {}
    while True:
        await asyncio.sleep(min(_SWEEP_SECONDS, idle_timeout / 4))
        now, connections = loop.time(), list(server.server_state.connections)
        # Since its last request, which is another one than a moment ago where it has asked meanwhile.
        idle = [(c, c.cycle) for c in connections if not _is_busy(c)]
        idle_since = {one: idle_since.get(one, now) for one in idle}
        for (connection, _), since in idle_since.items():
            if now - since > idle_timeout and connection.transport is not None:
                connection.transport.abort()


def _is_busy(connection: H11Protocol) -> bool:
    cycle, transport = connection.cycle, connection.transport
    return cycle is not None and not cycle.response_complete and not transport.is_closing()


def listen(host: str, port: int) -> socket.socket:
    """A socket for connections to an address.

    Raises:
        Blip2Error: there is no such address here, or the port is taken.
    """
    listening = None
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        # With TCP by name: asyncio leaves Nagle's algorithm on for sockets that only imply it, and
        # every answer would wait 40 ms for the client to acknowledge its headers.
        listening = socket.socket(family, kind, protocol or socket.IPPROTO_TCP)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(_BACKLOG)
    except OSError as error:
        if listening is not None:
            listening.close()
        raise Blip2Error(
            f"cannot listen on {host}:{port} ({error.strerror or error})",
            "give another `host` or `port`",
        ) from None
    listening.setblocking(False)
    return listening
