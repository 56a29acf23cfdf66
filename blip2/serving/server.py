"""A service behind a socket: uvicorn, with time limits for connections and an orderly end.

serve(settings)        # until SIGTERM or Ctrl-C
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import signal
import socket
import sys
from collections.abc import Iterator
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from blip2.errors import Blip2Error
from blip2.serving.app import Service, ServiceSettings
from blip2.serving.engine import EnginesEnded
from blip2.serving.engine_process import EngineSettings

_BACKLOG = 2048
_SWEEP_SECONDS = 1.0


@dataclasses.dataclass(frozen=True)
class ServerSettings:
    """Where to listen, and for how long.

    Attributes:
        host: the address; port 0 is any that is free.
        idle_timeout: seconds that a connection may be open without asking.
        shutdown_timeout: seconds to finish what runs, once asked to stop.
    """

    service: ServiceSettings
    engines: EngineSettings
    host: str = "127.0.0.1"
    port: int = 8000
    idle_timeout: float = 15.0
    shutdown_timeout: float = 30.0


class _Server(uvicorn.Server):
    """uvicorn's, whose signals are ours."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def serve(settings: ServerSettings) -> None:
    """Serve until SIGTERM or SIGINT, and finish what runs.

    Raises:
        Blip2Error: the engines cannot be opened, or the port is taken.
    """
    _raise_file_limit()
    listening = _listen(settings.host, settings.port)
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # of strangers' bad requests
    with listening:
        asyncio.run(_serve(settings, listening))


async def _serve(settings: ServerSettings, listening: socket.socket) -> None:
    service = Service(settings.service)
    config = uvicorn.Config(
        service.app,
        http=H11Protocol,
        ws="none",
        lifespan="off",
        interface="asgi3",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=max(1, round(settings.idle_timeout)),
        timeout_graceful_shutdown=1,
        backlog=_BACKLOG,
    )
    server = _Server(config)
    asked_to_stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        # Not by the loop's own way, which Windows has not.
        signal.signal(number, lambda *_: loop.call_soon_threadsafe(_stop, asked_to_stop))
    tasks = [
        asyncio.create_task(server.serve(sockets=[listening])),
        asyncio.create_task(sweep(server, settings.idle_timeout)),
        asyncio.create_task(_watch(service, settings, listening)),
        asyncio.create_task(asked_to_stop.wait()),
    ]
    serving, sweeping, watching, stopping = tasks
    try:
        await asyncio.wait({watching, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if stopping.done():
            await service.drain(settings.shutdown_timeout)
        server.should_exit = True
        await serving
        if watching.done():
            watching.result()
    finally:
        sweeping.cancel()
        watching.cancel()
        service.close()


def _stop(asked: asyncio.Event) -> None:
    """Asked once: finish what runs; asked again: at once."""
    if asked.is_set():
        sys.exit(1)
    asked.set()


async def _watch(service: Service, settings: ServerSettings, listening: socket.socket) -> None:
    """Open the engines, say where they can be asked, and see that they stay.

    Raises:
        Blip2Error: they cannot be opened, or have ended.
    """
    host, port = listening.getsockname()[:2]
    place = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    print(f"{place} is loading its engines", file=sys.stderr, flush=True)
    try:
        await service.start(settings.engines)
        print(f"{place} is ready: a page to ask on, and /v1/chat/completions", file=sys.stderr)
        sys.stderr.flush()
        await service.until_engines_end()
    except EnginesEnded:
        pass
    raise Blip2Error(
        "the process with the engines has ended, perhaps because memory ran out",
        "start the server again, with smaller engines if it ends again",
    )


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


def _listen(host: str, port: int) -> socket.socket:
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


def _raise_file_limit() -> None:
    """A connection is an open file; the usual soft limit is 1024."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
        if soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
