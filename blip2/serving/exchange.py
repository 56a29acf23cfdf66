"""One chat request that was understood: what its client has been sent, and what is left to send."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import Message, Receive, Scope, Send

from blip2.serving import replies
from blip2.serving.chat import ChatRequest
from blip2.serving.errors import Refusal
from blip2.serving.front import respond
from blip2.serving.pictures import Held
from blip2.serving.replies import Reply

LAST_WORD_SECONDS = 1.0  # for what a client that reads slowly is told at the end


class Exchange:
    """A request that was understood, and what its client has been sent."""

    def __init__(
        self, request: ChatRequest, reply: Reply, scope: Scope, receive: Receive, send: Send
    ) -> None:
        """Begin with nothing sent."""
        self.request, self.reply = request, reply
        self.seconds: dict[str, float] = {}
        self.picture: Held | None = None
        self._scope, self._receive, self._send = scope, receive, send
        self._has_begun = self._is_over = False

    def note(self, **facts: Any) -> None:
        """For the log."""
        self._scope["blip2"].update(facts)

    async def stream(self) -> None:
        """Send what the reply has grown by."""
        events = []
        if not self._has_begun:
            await self._begin_stream()
            events += self.reply.first_chunks()
        events += self.reply.chunks()
        if events:
            await self._send_body(b"".join(map(replies.event, events)))

    async def finish(self) -> None:
        """Send the end of the answer, or all of it."""
        picture = {"sha256": self.picture.sha256, "known": not self.picture.is_new}
        extras = self.reply.extras(self.seconds, picture)
        if not self.request.streams:
            self._has_begun = self._is_over = True
            response = JSONResponse(self.reply.whole(extras))
            await response(self._scope, self._receive, self._send)
            return
        events = b"".join(map(replies.event, self.reply.last_chunks(extras)))
        self._is_over = True
        await self._send_body(events + replies.DONE, more=False)

    async def fail(self, refusal: Refusal) -> None:
        """Say what went wrong, in a stream that has begun as its last event."""
        self.note(error=refusal.code or refusal.kind)
        if not self._has_begun:
            self._has_begun = self._is_over = True
            await respond(refusal, self._scope, self._receive, self._send)
        elif not self._is_over:
            self._is_over = True
            self.note(status=refusal.status)
            with contextlib.suppress(asyncio.TimeoutError, OSError):
                last = self._send_body(replies.event(refusal.to_json()), more=False)
                await asyncio.wait_for(last, LAST_WORD_SECONDS)

    async def _begin_stream(self) -> None:
        self._has_begun = True
        headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
        headers.append((b"x-accel-buffering", b"no"))  # nginx would keep events back
        start: Message = {"type": "http.response.start", "status": 200, "headers": headers}
        await self._send(start)

    async def _send_body(self, content: bytes, more: bool = True) -> None:
        await self._send({"type": "http.response.body", "body": content, "more_body": more})
