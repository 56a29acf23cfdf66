"""A service behind a socket, in as many processes as that takes, and its orderly end.

serve(settings)        # until SIGTERM or Ctrl-C
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import signal
import socket
import sys

from blip2.errors import Blip2Error
from blip2.serving.app import Service, ServiceSettings
from blip2.serving.engine import EnginesEnded
from blip2.serving.engine_process import EngineSettings
from blip2.serving.http_processes import HttpProcesses, HttpSettings
from blip2.serving.listening import Answering, listen
from blip2.serving.together import Together


@dataclasses.dataclass(frozen=True)
class ServerSettings:
    """Where to listen, and for how long.

    Attributes:
        host: the address; port 0 is any that is free.
        idle_timeout: seconds that a connection may be open without asking.
        shutdown_timeout: seconds to finish what runs, once asked to stop.
        processes: that speak HTTP; more than one are within `together.metrics_together`.
    """

    service: ServiceSettings
    engines: EngineSettings
    host: str = "127.0.0.1"
    port: int = 8000
    idle_timeout: float = 15.0
    shutdown_timeout: float = 30.0
    processes: int = 1


def serve(settings: ServerSettings) -> None:
    """Serve until SIGTERM or SIGINT, and finish what runs.

    Raises:
        Blip2Error: the engines cannot be opened, or the port is taken.
    """
    _raise_file_limit()
    with listen(settings.host, settings.port) as listening:
        asyncio.run(_serve(settings, listening))


async def _serve(settings: ServerSettings, listening: socket.socket) -> None:
    together = Together.create(settings.processes)
    service = Service(settings.service, together)
    http = HttpSettings(settings.service, settings.idle_timeout, settings.shutdown_timeout)
    others = HttpProcesses(http, listening, together)
    answering = Answering(service.app, listening.dup(), settings.idle_timeout)
    asked_to_stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, _stop, asked_to_stop)
    answering.start()
    watching = asyncio.create_task(_watch(service, others, settings.engines, _place(listening)))
    stopping = asyncio.create_task(asked_to_stop.wait())
    try:
        await asyncio.wait({watching, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if stopping.done():
            await asyncio.gather(service.drain(settings.shutdown_timeout), others.drain())
        await answering.stop()
        if watching.done():
            watching.result()
    finally:
        watching.cancel()
        others.close()
        service.close()


def _stop(asked: asyncio.Event) -> None:
    """Asked once: finish what runs; asked again: at once."""
    if asked.is_set():
        sys.exit(1)
    asked.set()


def _place(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


async def _watch(
    service: Service, others: HttpProcesses, engines: EngineSettings, place: str
) -> None:
    """Open the engines, say where they can be asked, and see that they stay.

    Raises:
        Blip2Error: they cannot be opened, or have ended.
    """
    print(f"{place} is loading its engines", file=sys.stderr, flush=True)
    try:
        others.start(await service.open(engines))
        await service.ready()
        await others.answer()
        print(f"{place} is ready: a page to ask on, and /v1/chat/completions", file=sys.stderr)
        sys.stderr.flush()
        await service.until_engines_end()
    except EnginesEnded:
        pass
    raise Blip2Error(
        "the process with the engines has ended, perhaps because memory ran out",
        "start the server again, with smaller engines if it ends again",
    )


def _raise_file_limit() -> None:
    """A connection is an open file; the usual soft limit is 1024."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
        if soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
