"""A request's body: JSON alone, within a size and a time, both checked while it is read."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator, Mapping

from starlette.types import Message, Receive

from blip2.serving.errors import Refusal

_DISCARD_SECONDS = 0.3
_DISCARD_BYTES = 64 << 20


class Gone(Exception):
    """The client has left."""


class Incoming:
    """What comes of one request; knows whether all of it was read."""

    def __init__(self, receive: Receive, headers: Mapping[str, str]) -> None:
        """Of an ASGI request."""
        self._receive, self._headers = receive, headers
        self._is_whole = not (
            headers.get("content-length", "0") != "0" or "transfer-encoding" in headers
        )

    async def receive(self) -> Message:
        """The next message, as ASGI has it."""
        message = await self._receive()
        if message["type"] != "http.request" or not message.get("more_body", False):
            self._is_whole = True
        return message

    async def until_gone(self) -> None:
        """Wait until the client has left; its body was read."""
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def discard(self) -> None:
        """Read on for a moment what nobody wants, so that the client hears the answer.

        One that is still sending when the connection closes hears of that instead.
        """
        if self._is_whole or "expect" in self._headers:
            return
        discarded = 0

        async def read() -> None:
            nonlocal discarded
            while not self._is_whole and discarded < _DISCARD_BYTES:
                discarded += len((await self.receive()).get("body", b""))

        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(read(), _DISCARD_SECONDS)


class Bodies:
    """The bodies that are being read, all of which together are bounded too."""

    def __init__(self, most: int, seconds: float, together: int) -> None:
        """Make the bounds.

        Args:
            most: bytes of one body.
            seconds: that one may take.
            together: bytes of all that are being read.
        """
        self._most, self._seconds, self._together = most, seconds, together
        self._held = 0

    @contextlib.contextmanager
    def _account(self) -> Iterator[list[int]]:
        mine = [0]
        try:
            yield mine
        finally:
            self._held -= mine[0]

    async def read(self, incoming: Incoming, headers: Mapping[str, str]) -> bytes:
        """A whole body.

        Raises:
            Refusal: it is not JSON, too large, too slow, or too many others are being read.
            Gone: the client has left before its end.
        """
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise Refusal(415, "the body must be JSON, with Content-Type: application/json")
        if headers.get("content-encoding", "identity").lower() != "identity":
            raise Refusal(415, "the body must not be compressed")
        length = headers.get("content-length", "")
        if length.isdigit() and int(length) > self._most:
            raise self._too_large()
        try:
            return await asyncio.wait_for(self._collect(incoming), self._seconds)
        except asyncio.TimeoutError:
            raise Refusal(
                408, f"the body did not come within {self._seconds:g} s", code="body_timeout"
            ) from None

    async def _collect(self, incoming: Incoming) -> bytes:
        body = bytearray()
        with self._account() as mine:
            while True:
                message = await incoming.receive()
                if message["type"] == "http.disconnect":
                    raise Gone
                chunk = message.get("body", b"")
                body += chunk
                mine[0] += len(chunk)
                self._held += len(chunk)
                if len(body) > self._most:
                    raise self._too_large()
                if self._held > self._together:
                    raise Refusal(
                        429, "too many large requests at once; ask again soon", retry_after=2
                    )
                if not message.get("more_body", False):
                    return bytes(body)

    def _too_large(self) -> Refusal:
        most = self._most / (1 << 20)
        return Refusal(413, f"the body is larger than {most:g} MiB; scale the picture down")
