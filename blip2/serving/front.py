"""What every request passes first: an id, the key, a line of the log, and errors in one form."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import json
import re
import sys
import time
import traceback
import uuid
from collections.abc import Callable, Sequence
from typing import Any, TextIO

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from blip2.serving.body import Gone, Incoming
from blip2.serving.errors import Refusal

# The page is the same for everyone, and tells nothing of this server.
OPEN_PATHS = frozenset({"/health", "/"})
_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_LONGEST_PATH = 200  # in the log
CLIENT_LEFT = 499  # as nginx calls it: nobody is there to get a status


class Front:
    """The outermost application."""

    def __init__(
        self,
        app: ASGIApp,
        keys: Sequence[str],
        log: TextIO,
        count: Callable[[int], None] = lambda _: None,
        is_local: bool = False,
    ) -> None:
        """Stand before another.

        Args:
            app: the routes.
            keys: any of which a request must bring; none: nobody needs one.
            log: gets a line of JSON for every request.
            count: is told the status of every chat request.
            is_local: nobody but this machine's users may ask, who call it by no name of a site.
        """
        self._app, self._log, self._count, self._is_local = app, log, count, is_local
        self._keys = [_digest(key) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """An ASGI application."""
        if scope["type"] != "http":
            return
        begun, headers = time.perf_counter(), Headers(scope=scope)
        asked_id = headers.get("x-request-id", "")
        request_id = asked_id if _ID.fullmatch(asked_id) else uuid.uuid4().hex
        incoming = Incoming(receive, headers)
        scope["blip2"] = notes = {"id": request_id}
        scope["blip2.incoming"] = incoming
        scope["app"] = self  # with one, Starlette's routes raise instead of answering as they like
        status = 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                sent = MutableHeaders(scope=message)
                sent["x-request-id"] = request_id
                sent["x-content-type-options"] = "nosniff"
                sent.setdefault("cache-control", "no-store")
            await send(message)

        try:
            try:
                self._check_host(headers)
                self._check_key(scope["path"], headers)
                await self._app(scope, incoming.receive, answer)
            except Gone:
                status = CLIENT_LEFT
            except Refusal as refusal:
                notes["error"] = refusal.code or refusal.kind
                if not status:
                    await incoming.discard()
                    await respond(refusal, scope, incoming.receive, answer)
            except HTTPException as error:  # of the routes: no such path or method
                refusal = Refusal(error.status_code, _SAID.get(error.status_code, "not possible"))
                await incoming.discard()
                await respond(refusal, scope, incoming.receive, answer, error.headers)
            except Exception:
                print(f"request {request_id}:", file=sys.stderr)
                traceback.print_exc()
                if not status:
                    refusal = Refusal(500, "something went wrong in this server", code="internal")
                    await respond(refusal, scope, incoming.receive, answer)
        finally:
            self._write_log(scope, status, time.perf_counter() - begun, notes)

    def _check_host(self, headers: Headers) -> None:
        """Keep out the pages of sites whose names have come to mean this machine (DNS rebinding).

        Raises:
            Refusal: the request is for another host than this machine.
        """
        if self._is_local and not is_loopback(_without_port(headers.get("host", ""))):
            raise Refusal(
                421,
                "this server has no API key, and answers only to localhost; give it a key",
                code="host_not_allowed",
            )

    def _check_key(self, path: str, headers: Headers) -> None:
        """Compare in a time that says nothing of the keys, before anything else is looked at.

        Raises:
            Refusal: no key, or another.
        """
        if not self._keys or path in OPEN_PATHS:
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        digest = _digest(given.strip())
        matches = [hmac.compare_digest(digest, key) for key in self._keys]
        if scheme.lower() != "bearer" or not any(matches):
            raise Refusal(
                401,
                "this server wants its API key, as: Authorization: Bearer KEY",
                code="invalid_api_key",
            )

    def _write_log(self, scope: Scope, status: int, seconds: float, notes: dict[str, Any]) -> None:
        status = notes.pop("status", status)
        if scope["path"] == "/v1/chat/completions":
            self._count(status)
        client = scope.get("client")
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "id": notes.pop("id"),
            "client": client[0] if client else None,
            "method": scope["method"],
            "path": scope["path"][:_LONGEST_PATH],
            "status": status,
            "ms": round(1e3 * seconds, 1),
            **notes,
        }
        try:
            # At once: processes share the log, and print writes a line and its end by themselves.
            self._log.write(f"{json.dumps(line)}\n")
            self._log.flush()
        except OSError:  # the log's reader has gone; whoever asks is still answered
            return


_SAID = {
    404: "there is nothing at this path",
    405: "this path does not take that method",
}


async def respond(
    refusal: Refusal, scope: Scope, receive: Receive, send: Send, headers: Any = None
) -> None:
    """Send a refusal as a response."""
    headers = dict(headers or {})
    if refusal.status == 401:
        headers["www-authenticate"] = "Bearer"
    if refusal.retry_after is not None:
        headers["retry-after"] = str(refusal.retry_after)
    if refusal.status in (408, 413):
        headers["connection"] = "close"  # what still comes is no request
    await JSONResponse(refusal.to_json(), refusal.status, headers)(scope, receive, send)


def _without_port(host: str) -> str:
    return host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]


def is_loopback(host: str) -> bool:
    """Whether a name or an address means this machine, whoever is asked for it."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _digest(key: str) -> bytes:
    """Of one length for every key: comparing takes no longer for a longer one."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
