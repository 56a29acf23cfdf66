"""The server on several GPUs or machines: one Ray Serve replica a GPU, each with the same application.

Ray's proxies take the requests, and each goes to the replica that has least to do. A replica is a
`Service` with processes of its own; keys, limits and answers are those of one server.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import signal
import sys
import threading
from typing import Any

from blip2.errors import Blip2Error, first_line
from blip2.layout import install
from blip2.serving.app import Service, ServiceSettings
from blip2.serving.engine import EnginesEnded
from blip2.serving.engine_process import EngineSettings

try:
    import ray
    from ray import serve

    from blip2.many import cluster
except ImportError:
    raise Blip2Error("replicas need Ray", f"install it with: {install('ray')}") from None

_NAME = "blip2"
_MOST_ONGOING = 1000  # of a replica: it refuses by itself what it has no room for


@dataclasses.dataclass(frozen=True)
class ReplicaSettings:
    """Where to run replicas, and how many.

    Attributes:
        address: of a Ray cluster; "local" starts one of this machine.
        host: the address that the proxies listen on.
        shutdown_timeout: seconds to finish what runs.
        replicas: None is one a GPU, or without GPUs one.
        autoscaling: Ray Serve's autoscaling_config, instead of a number.
    """

    service: ServiceSettings
    engines: EngineSettings
    address: str
    host: str
    port: int
    shutdown_timeout: float
    replicas: int | None = None
    autoscaling: dict[str, Any] | None = None


class ReplicaApp:
    """The application of a replica, which opens its engines before it takes requests."""

    def __init__(self, settings: ReplicaSettings, directory: str) -> None:
        """In the replica's process; relative paths are those of `directory`."""
        os.chdir(directory)
        self._settings = settings
        self._service: Service | None = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """An ASGI application, with a lifespan."""
        if scope["type"] != "lifespan":
            await self._service.app(scope, receive, send)
            return
        while True:
            message = await receive()
            if message["type"] == "lifespan.startup":
                await send(await self._start())
            else:
                await self._service.drain(self._settings.shutdown_timeout)
                self._service.close()
                await send({"type": "lifespan.shutdown.complete"})
                return

    async def _start(self) -> dict[str, Any]:
        self._service = Service(self._settings.service)
        try:
            await self._service.start(self._settings.engines)
        except (Blip2Error, EnginesEnded) as error:
            self._service.close()
            return {"type": "lifespan.startup.failed", "message": str(error)}
        return {"type": "lifespan.startup.complete"}


def serve_replicas(settings: ReplicaSettings) -> None:
    """Serve until SIGTERM or SIGINT, then have the replicas finish what runs.

    Raises:
        Blip2Error: there is no such cluster, or the engines cannot be opened there.
    """
    asked_to_stop = threading.Event()
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    cluster.connect(settings.address)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: asked_to_stop.set())
    gpus = int(ray.cluster_resources().get("GPU", 0))
    how_many = (
        {"autoscaling_config": settings.autoscaling}
        if settings.autoscaling
        else {"num_replicas": settings.replicas or max(1, gpus)}
    )
    resources = {"num_gpus": 1, "num_cpus": 1} if gpus else {"num_cpus": 1}
    directory = os.getcwd()

    def build() -> ReplicaApp:
        return ReplicaApp(settings, directory)

    @serve.deployment(
        name=_NAME,
        ray_actor_options=resources,
        max_ongoing_requests=_MOST_ONGOING,
        graceful_shutdown_timeout_s=settings.shutdown_timeout,
        max_constructor_retry_count=1,
        **how_many,
    )
    @serve.ingress(build)
    class Replica:
        pass

    place = f"http://{settings.host}:{settings.port}"
    print(f"{place} is loading its engines", file=sys.stderr, flush=True)
    try:
        serve.start(
            http_options={"host": settings.host, "port": settings.port},
            logging_config={"log_level": "ERROR", "enable_access_log": False},
        )
        serve.run(Replica.bind(), name=_NAME, route_prefix="/")
        print(f"{place} is ready: a page to ask on, and /v1/chat/completions", file=sys.stderr)
        asked_to_stop.wait()
    except (RuntimeError, ray.exceptions.RayError) as error:
        raise _why(settings.engines, resources, first_line(error)) from None
    finally:
        serve.shutdown()
        ray.shutdown()


def _why(engines: EngineSettings, resources: dict[str, Any], says: str) -> Blip2Error:
    """What is wrong with the engines where a replica would run: Ray itself does not hand it on."""
    serve.shutdown()  # its replicas have the GPUs
    task = ray.remote(max_calls=1, max_retries=0, **resources)(_open_engines)
    try:
        if found := ray.get(task.remote(os.getcwd(), engines)):
            return Blip2Error(*found)
    except ray.exceptions.RayError as error:
        says = first_line(error)
    return Blip2Error(
        f"the replicas do not start ({says})", "try the same without --ray, which may say why"
    )


def _open_engines(directory: str, engines: EngineSettings) -> tuple[str, str | None] | None:
    """What is wrong with them, and what to do; None if nothing is."""
    from blip2.engines import Places
    from blip2.pipeline import open_pipeline

    try:
        os.chdir(directory)
        open_pipeline(Places.of(**engines.places), engines.verify)
    except Blip2Error as error:
        return error.problem, error.remedy
    return None
