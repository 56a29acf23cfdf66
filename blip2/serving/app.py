"""The routes, and what becomes of a chat request between its first byte and its last.

service = Service(settings)
await service.start(engine_settings)    # or join another process's
uvicorn serves service.app
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import math
import socket
import sys
import time
from collections.abc import AsyncIterator
from typing import Any, TextIO

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, Router
from starlette.types import Receive, Scope, Send

from blip2.serving import chat, fetch
from blip2.serving.body import Bodies, Incoming
from blip2.serving.chat import Bounds
from blip2.serving.engine import Asked, EngineProcess, Engines, Facts, Load
from blip2.serving.engine_process import EngineSettings
from blip2.serving.errors import Refusal, broken, loading, stopping
from blip2.serving.exchange import LAST_WORD_SECONDS, Exchange
from blip2.serving.frames import Stream
from blip2.serving.front import CLIENT_LEFT, Front
from blip2.serving.metrics import CONTENT_TYPE, Metrics
from blip2.serving.page import Page
from blip2.serving.pictures import KEPT, Decoders, Held, Pictures
from blip2.serving.replies import Reply
from blip2.serving.slots import SharedMemory, Slots
from blip2.serving.together import Together

_BODIES_TOGETHER = 16  # times the largest


@dataclasses.dataclass(frozen=True)
class ServiceSettings:
    """What a server lets its clients do; seconds and bytes."""

    model: str = "blip2"
    api_keys: tuple[str, ...] = ()
    takes_urls: bool = False
    max_waiting: int = 256
    max_body: int = 20 << 20
    body_timeout: float = 20.0
    request_timeout: float = 60.0
    picture_timeout: float = 10.0
    decoders: int = 2
    is_local: bool = False  # only for requests to localhost


class Service:
    """One server's engines, pictures and numbers, and the application that answers with them."""

    def __init__(
        self,
        settings: ServiceSettings,
        together: Together | None = None,
        log: TextIO = sys.stdout,
    ) -> None:
        """Make it, without engines yet; until they are there chat requests get 503.

        Args:
            settings: what clients may do.
            together: what it has in common with other processes of the same server, if there are any.
            log: gets a line for every request.
        """
        self.settings, self._together = settings, together or Together.create()
        self.metrics = Metrics(self._together.processes)
        self.app = Front(
            self._routes(), settings.api_keys, log, self.metrics.count, settings.is_local
        )
        bodies = max(1, _BODIES_TOGETHER // self._together.processes) * settings.max_body
        self._bodies = Bodies(settings.max_body, settings.body_timeout, bodies)
        self._process: EngineProcess | None = None
        self._engines: Engines | None = None
        self._slots: Slots | None = None
        self._decoders: Decoders | None = None
        self._pictures: Pictures | None = None
        self._running: set[asyncio.Task[None]] = set()
        self._durations: collections.deque[float] = collections.deque([1.0], maxlen=64)
        self._is_stopping = False

    async def start(self, engine_settings: EngineSettings) -> Facts:
        """Open the engines; returns when they are ready.

        Raises:
            Blip2Error: they cannot be opened.
            EnginesEnded: their process has ended.
        """
        await self.open(engine_settings)
        return await self.ready()

    async def open(self, engine_settings: EngineSettings) -> EngineProcess:
        """Begin to open the engines; other processes can `join` them from now on."""
        self._slots = Slots(SharedMemory.create())
        self._process = await EngineProcess.start(engine_settings, self._slots.memory)
        self._engines = Engines(self._process.stream, self._slots.give_back)
        return self._process

    async def join(self, engines: socket.socket, memory: SharedMemory) -> Facts:
        """Ask engines that another process has opened; returns, and raises, as `start`.

        Args:
            engines: a connection to them, of `EngineProcess.connect`.
            memory: what was given for it.
        """
        self._slots = Slots(memory)
        self._engines = Engines(await Stream.open(engines), self._slots.give_back)
        return await self.ready()

    async def ready(self) -> Facts:
        """Wait for the engines, and start what else is needed; raises as `start`."""
        facts = await self._engines.ready()
        preprocessing, slots, together = facts.preprocessing, self._slots, self._together
        # Its part of them all: the first processes have one more where they do not come out even.
        share, rest = divmod(self.settings.decoders, together.processes)
        decoders = max(1, share + (together.number < rest))
        # Of each process one that it fills, and one that the engines have yet to take.
        slots.make(2 * decoders, 3 * preprocessing.height * preprocessing.width)
        timeout = self.settings.picture_timeout
        self._decoders = Decoders(decoders, timeout, preprocessing, slots)
        await self._decoders.start()
        kept = max(1, KEPT // together.processes)
        self._pictures = Pictures(self._engines, self._decoders, kept)
        return facts

    async def until_engines_end(self) -> None:
        """Wait for what should not happen."""
        await self._engines.ended

    async def drain(self, seconds: float) -> None:
        """Refuse what is new from now on, and wait for what runs; then end it."""
        self._is_stopping = True
        if self._running:
            await asyncio.wait(set(self._running), timeout=seconds)
        for task in list(self._running):
            task.cancel()
        if self._running:
            await asyncio.wait(set(self._running), timeout=LAST_WORD_SECONDS)

    def close(self) -> None:
        """End the processes."""
        if self._decoders is not None:
            self._decoders.close()
        if self._engines is not None:
            self._engines.close()
        if self._process is not None:
            self._process.close()
        if self._slots is not None:
            self._slots.memory.close()
        self._together.close()

    def _routes(self) -> Router:
        page = Page.load()
        return Router(
            [
                Route("/", page.respond),
                Route("/health", self._health),
                Route("/ready", self._ready),
                Route("/metrics", self._metrics),
                Route("/v1/models", self._models),
                Route("/v1/models/{name}", self._model),
                Route("/v1/chat/completions", _Endpoint(self._chat), methods=["POST"]),
            ],
            redirect_slashes=False,
        )

    async def _health(self, _request: Request) -> Response:
        return JSONResponse({"status": "alive"})

    async def _ready(self, _request: Request) -> Response:
        self._check_open()
        return JSONResponse({"status": "ready"})

    async def _metrics(self, _request: Request) -> Response:
        load = await self._engines.load() if self._has_engines else Load()
        text = self.metrics.text(self._together.answers, load)
        return Response(text, media_type=CONTENT_TYPE)

    async def _models(self, _request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._described()]})

    async def _model(self, request: Request) -> Response:
        if request.path_params["name"] != self.settings.model:
            raise Refusal(404, "this server has no such model", code="model_not_found")
        return JSONResponse(self._described())

    def _described(self) -> dict[str, Any]:
        described = {"id": self.settings.model, "object": "model", "created": 0}
        described["owned_by"] = "blip2-suite"
        if self._has_engines:
            described["fingerprint"] = self._engines.facts.fingerprint
        return described

    @property
    def _has_engines(self) -> bool:
        return self._pictures is not None and self._engines.are_ready

    def _check_open(self) -> None:
        if self._is_stopping:
            raise stopping()
        if self._engines is not None and self._engines.ended.done():
            raise broken()
        if not self._has_engines:
            raise loading()

    def _check_room(self, rows: int) -> None:
        """Raise where more would wait than may, of all processes together."""
        most = self._engines.facts.rows + self.settings.max_waiting
        if self._together.rows + rows > most:
            mean = sum(self._durations) / len(self._durations)
            seconds = mean * self.settings.max_waiting / self._engines.facts.rows
            raise Refusal(
                429,
                "too many requests are waiting; ask again later",
                code="too_many_waiting",
                retry_after=min(60, max(1, math.ceil(seconds))),
            )

    async def _chat(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._check_open()
        self._check_room(1)  # before the body is read
        incoming, headers = scope["blip2.incoming"], Headers(scope=scope)
        body = await self._bodies.read(incoming, headers)
        facts, settings = self._engines.facts, self.settings
        bounds = Bounds(settings.model, facts.max_beams, facts.max_output_len, settings.takes_urls)
        request = chat.parse(body, bounds)
        del body
        self._check_open()  # the body may have taken a while
        with self._together.alone():
            self._check_room(request.rows)
            self._together.add(request.rows, request.choices)
        try:
            await self._answer_or_leave(
                Exchange(request, Reply(request, settings.model), scope, receive, send), incoming
            )
        finally:
            self._together.add(-request.rows, -request.choices)

    async def _answer_or_leave(self, exchange: Exchange, incoming: Incoming) -> None:
        """Answer, unless the client leaves, it takes too long, or the server stops."""
        settings = self.settings
        work = asyncio.create_task(self._answer(exchange))
        gone = asyncio.create_task(incoming.until_gone())
        self._running.add(work)
        try:
            await asyncio.wait(
                {work, gone},
                timeout=settings.request_timeout,
                return_when=asyncio.FIRST_COMPLETED,
            )
            if work.done() and not work.cancelled():
                work.result()
            elif gone.done():
                exchange.note(status=CLIENT_LEFT)
            elif work.cancelled():
                await exchange.fail(stopping())
            else:
                work.cancel()
                await asyncio.wait({work})
                await exchange.fail(
                    Refusal(
                        504,
                        f"the answer did not come within {settings.request_timeout:g} s",
                        code="request_timeout",
                    )
                )
        finally:
            work.cancel()
            gone.cancel()
            await asyncio.wait({work, gone})
            self._running.discard(work)

    async def _answer(self, exchange: Exchange) -> None:
        """Everything between a request that was understood and the last byte of its answer."""
        begun = time.perf_counter()
        try:
            async with self._ask(exchange) as asked:
                await self._reply(exchange, asked, begun)
            self._durations.append(time.perf_counter() - begun)
            self.metrics.request.observe(time.perf_counter() - begun)
        except Refusal as refusal:
            await exchange.fail(refusal)

    @contextlib.asynccontextmanager
    async def _ask(self, exchange: Exchange) -> AsyncIterator[Asked]:
        """Within, the engines work on the request's choices."""
        request, begun = exchange.request, time.perf_counter()
        content = request.picture
        if isinstance(content, str):
            content = await fetch.fetch(content, self.settings.max_body)
            exchange.seconds["fetch"] = time.perf_counter() - begun
            begun = time.perf_counter()
        async with self._hold(content) as held:
            exchange.picture = held
            exchange.seconds["decode"] = time.perf_counter() - begun
            choices = 1 if request.question.options["num_beams"] > 1 else request.choices
            try:
                asked = await self._engines.ask(held.name, request.question, choices)
            except OSError:
                raise broken() from None
            try:
                yield asked
            except Refusal as refusal:
                if refusal.status >= 500:
                    self._pictures.forget(held.sha256)
                raise
            finally:
                asked.cancel()

    @contextlib.asynccontextmanager
    async def _hold(self, content: bytes) -> AsyncIterator[Held]:
        """Within, the engines have this picture; counts what became of it."""
        async with contextlib.AsyncExitStack() as stack:
            try:
                held = await stack.enter_async_context(self._pictures.hold(content))
            except Refusal:
                self.metrics.pictures.labels("refused").inc()
                raise
            self.metrics.pictures.labels("looked_at" if held.is_new else "known").inc()
            yield held

    async def _reply(self, exchange: Exchange, asked: Asked, begun: float) -> None:
        """Send what the engines make, as it is made or at the end."""
        reply, first = exchange.reply, None
        while not reply.is_whole:
            news = await asked.news()
            if first is None:
                first = time.perf_counter()
                self.metrics.first_token.observe(first - begun)
            for one in news:
                reply.take(one)
            if exchange.request.streams:
                await exchange.stream()
        self._count_tokens(reply, time.perf_counter() - first)
        exchange.note(prompt_tokens=reply.prompt_tokens, completion_tokens=reply.completion_tokens)
        await exchange.finish()

    def _count_tokens(self, reply: Reply, seconds: float) -> None:
        self.metrics.prompt_tokens.inc(reply.prompt_tokens)
        self.metrics.completion_tokens.inc(reply.completion_tokens)
        longest = max(end.completion_tokens for end in reply.ends.values())
        if longest > 1:
            self.metrics.token.observe(seconds / (longest - 1))


class _Endpoint:
    """A method as an ASGI application, for `Route`, which takes functions for something else."""

    def __init__(self, application: Any) -> None:
        self._application = application

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._application(scope, receive, send)
