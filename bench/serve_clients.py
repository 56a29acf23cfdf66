"""Clients of a server, in processes of their own, and what each of their answers took.

with Clients(port, picture, text) as clients:
    samples = clients.closed(64, seconds=10)
"""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import json
import os
import random
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

from blip2.errors import Blip2Error

TOKENS = 20  # of an answer, at most


@dataclasses.dataclass(frozen=True)
class Sample:
    """One answer: when it was asked for, and seconds to its first text, its last, and to decode."""

    begun: float
    first: float
    whole: float
    decode: float
    tokens: int

    @property
    def token(self) -> float:
        """Seconds from one token to the next, on average."""
        return (self.whole - self.first) / max(1, self.tokens - 1)


class Connection:
    """To the server, for one request after another."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, body: bytes, begun: float) -> Sample:
        """Send a request and read its stream; `begun` is when it should have been sent."""
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self._port, limit=1 << 20)
        reader, writer = self._streams
        head = (
            "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        writer.write(head.encode() + body)
        status = await reader.readline()
        while (await reader.readline()).strip():
            pass
        if b" 200 " not in status:
            raise Blip2Error(f"the server answers {status.decode().strip()}")
        first, last, tokens, decode = 0.0, b"", 0, 0.0
        while size := int((await reader.readline()).strip(), 16):  # chunked: RFC 9112
            last = await reader.readexactly(size)
            await reader.readexactly(2)
            first = first or time.perf_counter()
        await reader.readexactly(2)
        whole = time.perf_counter()
        for event in last.split(b"\n\n"):
            data = event.removeprefix(b"data: ")
            if not data.startswith(b"{"):
                continue
            found = json.loads(data)
            if "error" in found:
                raise Blip2Error(f"the server says: {found['error']['message']}")
            decode = found.get("blip2", {}).get("seconds", {}).get("decode", decode)
            tokens = (found.get("usage") or {}).get("completion_tokens", tokens)
        return Sample(begun, first - begun, whole - begun, decode, tokens)


class Load:
    """Requests without end, each with a picture of its own."""

    def __init__(self, port: int, picture: bytes, text: str) -> None:
        self._port = port
        padded = picture + b"\0" * (-len(picture) % 3)  # base64 of parts is that of the whole
        marker = "@@@"
        url = "data:image/jpeg;base64," + base64.b64encode(padded).decode() + marker
        parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
        body = {
            "messages": [{"role": "user", "content": parts}],
            "max_tokens": TOKENS,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        self._before, _, self._after = json.dumps(body).encode().partition(marker.encode())

    def body(self) -> bytes:
        """The next request's."""
        tail = f"{os.getpid():08x}{time.perf_counter_ns():016x}".encode()
        return self._before + base64.b64encode(tail) + self._after

    async def closed(self, clients: int, begin: float, seconds: float) -> list[Sample]:
        """What `clients` get that ask again as soon as they have an answer."""
        end = begin + seconds

        async def client() -> list[Sample]:
            connection, samples = Connection(self._port), []
            while (now := time.perf_counter()) < end:
                samples.append(await connection.ask(self.body(), now))
            return samples

        await asyncio.sleep(begin - time.perf_counter())
        found = await asyncio.gather(*(client() for _ in range(clients)))
        return [sample for samples in found for sample in samples]

    async def poisson(self, rate: float, begin: float, seconds: float, seed: int) -> list[Sample]:
        """What comes of arrivals at random, `rate` a second, whether others are answered or not."""
        chance, idle = random.Random(seed), [Connection(self._port)]
        samples: list[Sample] = []

        async def one(at: float) -> None:
            connection = idle.pop() if idle else Connection(self._port)
            samples.append(await connection.ask(self.body(), at))
            idle.append(connection)

        at, tasks = begin, []
        while (at := at + chance.expovariate(rate)) < begin + seconds:
            await asyncio.sleep(max(0.0, at - time.perf_counter()))
            tasks.append(asyncio.create_task(one(at)))
        await asyncio.gather(*tasks)
        return samples


class Clients:
    """Processes that ask: one by itself would wait for its own processor. A context."""

    def __init__(self, port: int, picture: bytes, text: str) -> None:
        self._arguments = (port, picture, text)
        self._processes = max(1, min(4, (os.cpu_count() or 1) // 4))

    def __enter__(self) -> Clients:
        self._pool = ProcessPoolExecutor(
            self._processes, get_context("spawn"), _begin_client, self._arguments
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def closed(self, clients: int, seconds: float) -> list[Sample]:
        """As `Load.closed`."""
        parts = [len(range(n, clients, self._processes)) for n in range(self._processes)]
        return self._ask([("closed", (part, _soon(), seconds)) for part in parts if part])

    def poisson(self, rate: float, seconds: float) -> list[Sample]:
        """As `Load.poisson`: together what comes at random to each does so at random."""
        share, begin = rate / self._processes, _soon()
        numbers = range(self._processes)
        return self._ask([("poisson", (share, begin, seconds, number)) for number in numbers])

    def _ask(self, calls: Sequence[tuple[str, tuple]]) -> list[Sample]:
        asked = [self._pool.submit(_ask_as_client, *call) for call in calls]
        return [sample for future in asked for sample in future.result()]


def _soon() -> float:
    return time.perf_counter() + 0.05  # of all processes: CLOCK_MONOTONIC


def _begin_client(*arguments: Any) -> None:
    global _load
    _load = Load(*arguments)


def _ask_as_client(method: str, arguments: tuple) -> list[Sample]:
    return asyncio.run(getattr(_load, method)(*arguments))
