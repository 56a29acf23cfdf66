"""Pictures from the web, for strangers: no way to what only this machine can reach.

A URL is parsed once, and what was parsed is what is checked, connected to and asked for. A name is
resolved once, every address of it must be public, and the connection is made to one of those. Each
redirect begins anew. Proxies of the environment are not used: they would resolve names themselves.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import ipaddress
import re
import socket
import ssl
import urllib.parse

import h11

from blip2 import downloads
from blip2.serving.errors import Refusal

SECONDS = 15.0  # for all of it
_MAX_REDIRECTS = 3
_BLOCK = 1 << 16
_REDIRECTS = (301, 302, 303, 307, 308)
_NAME = re.compile(
    r"(?=.{1,253}$)[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?(\.[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?)*\.?"
)
_TARGET = re.compile(r"/[!-~]*")  # no blanks, nothing beyond ASCII

# Addresses that carry others in them, which routers may lead anywhere.
_CARRIERS = [
    ipaddress.ip_network(net)
    for net in ("64:ff9b::/96", "64:ff9b:1::/48", "2002::/16", "2001::/32", "::/96")
]


@dataclasses.dataclass(frozen=True)
class Target:
    """A URL that was parsed: what to connect to, and what to ask there."""

    is_secure: bool
    host: str
    port: int
    path: str

    @classmethod
    def parse(cls, url: str) -> Target:
        """The parts of a URL.

        Raises:
            Refusal: it is none that is fetched, or one that others could read otherwise.
        """
        try:
            if re.search(r"[\x00-\x20\x7f\\]", url.strip()):
                raise ValueError
            parts = urllib.parse.urlsplit(downloads.as_ascii(url))
            host, port = (parts.hostname or "").lower(), parts.port
            is_literal = parts.netloc.startswith("[")
            if is_literal:
                ipaddress.IPv6Address(host)
            if parts.scheme not in ("http", "https") or re.search("[@%]", parts.netloc):
                raise ValueError
            if not is_literal and not _NAME.fullmatch(host):
                raise ValueError
        except (ValueError, UnicodeError):
            raise _refused("is not a URL of http or https that this server takes") from None
        path = parts.path or "/"
        target = f"{path}?{parts.query}" if parts.query else path
        if not _TARGET.fullmatch(target):
            raise _refused("is not a URL of http or https that this server takes")
        is_secure = parts.scheme == "https"
        return cls(is_secure, host, port or (443 if is_secure else 80), target)

    @property
    def authority(self) -> str:
        """For the Host header."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.is_secure else 80) else f"{host}:{self.port}"

    @property
    def url(self) -> str:
        """The whole again."""
        return f"{'https' if self.is_secure else 'http'}://{self.authority}{self.path}"


def is_public(address: str) -> bool:
    """Whether an address is one that everybody may reach; of one within another both count."""
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(found, ipaddress.IPv6Address):
        if found.ipv4_mapped is not None:
            return is_public(str(found.ipv4_mapped))
        if any(found in network for network in _CARRIERS):
            return False
    return found.is_global and not (
        found.is_private
        or found.is_loopback
        or found.is_link_local
        or found.is_multicast
        or found.is_reserved
        or found.is_unspecified
    )


async def fetch(url: str, most: int) -> bytes:
    """The content behind a URL, at most `most` bytes.

    Raises:
        Refusal: it cannot be had, is too large, takes too long, or is at an address that is not public.
    """
    try:
        return await asyncio.wait_for(_follow(Target.parse(url), most), SECONDS)
    except asyncio.TimeoutError:
        raise _refused(f"did not come within {SECONDS:g} s") from None
    except (OSError, EOFError, h11.ProtocolError, ValueError):
        raise _refused("cannot be fetched") from None


async def _follow(target: Target, most: int) -> bytes:
    for _ in range(_MAX_REDIRECTS + 1):
        answer = await _get(target, most)
        if isinstance(answer, bytes):
            return answer
        target = Target.parse(urllib.parse.urljoin(target.url, answer))
    raise _refused("redirects too often")


async def _get(target: Target, most: int) -> bytes | str:
    """The content, or where it is said to be."""
    reader, writer = await _connect(target)
    try:
        connection = h11.Connection(h11.CLIENT)
        headers = [
            ("Host", target.authority),
            ("User-Agent", "blip2-suite"),
            ("Accept", "image/*"),
            ("Connection", "close"),
        ]
        request = h11.Request(method="GET", target=target.path, headers=headers)
        writer.write(connection.send(request) + connection.send(h11.EndOfMessage()))
        await writer.drain()
        content = bytearray()
        while True:
            event = connection.next_event()
            if event is h11.NEED_DATA:
                connection.receive_data(await reader.read(_BLOCK))
            elif isinstance(event, h11.Response):
                if event.status_code in _REDIRECTS:
                    return _location(event)
                if event.status_code != 200:
                    raise _refused("is not there: its server says so")
            elif isinstance(event, h11.Data):
                content += event.data
                if len(content) > most:
                    raise _refused(f"is larger than {most / (1 << 20):g} MiB")
            elif isinstance(event, h11.EndOfMessage):
                return bytes(content)
            elif isinstance(event, h11.ConnectionClosed):
                raise EOFError
    finally:
        with contextlib.suppress(OSError):
            writer.close()


def _location(response: h11.Response) -> str:
    found = [value for name, value in response.headers if name == b"location"]
    if len(found) != 1:
        raise _refused("redirects to nowhere")
    return found[0].decode("ascii")


async def _connect(target: Target) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection to an address that was looked at, whatever its name means a moment later."""
    context = ssl.create_default_context() if target.is_secure else None
    failed: OSError | None = None
    for address in await _public_addresses(target):
        try:
            return await asyncio.open_connection(
                address,
                target.port,
                ssl=context,
                server_hostname=target.host.rstrip(".") if context else None,
            )
        except OSError as error:
            failed = error
    raise failed or OSError


async def _public_addresses(target: Target) -> list[str]:
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(target.host, target.port, type=socket.SOCK_STREAM)
    addresses = list(dict.fromkeys(address[0] for *_, address in found))
    if not addresses or not all(map(is_public, addresses)):
        raise _refused("is at an address that is not public")
    return addresses


def _refused(why: str) -> Refusal:
    return Refusal(400, f"the picture's URL {why}", param="messages", code="image_url_refused")
