"""Pictures from the web: http and https only, at most so large, within so long, no way inside.

A redirect may not lead to an address that is not public: a page could send us to a service that
only this machine can reach. An address that the user gives himself may be any. A proxy may be
anywhere; what names mean behind it is for itself to say, but addresses are looked at.
"""

from __future__ import annotations

import http.client
import ipaddress
import socket
import threading
import time
import urllib.error
import urllib.parse
import urllib.request

from blip2.errors import Blip2Error

MAX_BYTES = 64 << 20
SILENCE_S = 20  # the longest that a server may say nothing
TIMEOUT_S = 60  # the longest that all of it may take
_MAX_REDIRECTS = 5
_BLOCK = 1 << 16
_KEPT = "%!#$&'()*+,/:;=?@[]^|~"  # what browsers do not encode in paths and queries


def is_url(source: str) -> bool:
    """Whether `source` is to be downloaded rather than opened.

    Raises:
        Blip2Error: it is a URL of a kind that is not downloaded.
    """
    scheme, separator, _ = source.partition("://")
    if not separator or not scheme.isalpha():
        return False
    if scheme.lower() not in ("http", "https"):
        raise Blip2Error(f"{source} is neither http nor https", "give one of those, or a file")
    return True


def as_ascii(url: str) -> str:
    """The URL as a browser asks for it: blanks and letters beyond ASCII percent-encoded, in UTF-8.

    Of what is percent-encoded already nothing changes; the host's name is encoded by IDNA 2008.

    Raises:
        ValueError: no host has such a name.
    """
    parts = urllib.parse.urlsplit(url.strip())
    user, at, host = parts.netloc.rpartition("@")
    if not host.isascii():
        import idna  # seldom needed

        name, colon, port = host.partition(":")
        host = idna.encode(name, uts46=True).decode("ascii") + colon + port
    path = parts.path.replace("\\", "/")
    encoded = (
        urllib.parse.quote(part, safe=_KEPT, errors="surrogateescape")
        for part in (path, parts.query)
    )
    return urllib.parse.urlunsplit((parts.scheme, user + at + host, *encoded, ""))


def download(url: str) -> bytes:
    """The content behind a URL.

    Raises:
        Blip2Error: it cannot be had, is too large or takes too long, or a redirect leads to a
            private address.
    """
    finished: list[bytes | Exception] = []

    def work() -> None:
        try:
            finished.append(_fetch(url, time.monotonic() + TIMEOUT_S))
        except Exception as error:
            finished.append(error)

    # A server that sends a byte now and then never lets a socket time out; a thread can be left.
    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    worker.join(TIMEOUT_S)
    content = finished[0] if finished else _too_slow()
    if isinstance(content, bytes):
        return content
    if not isinstance(content, OSError | ValueError | http.client.HTTPException):
        raise content
    reason = getattr(content, "reason", None) or content
    raise Blip2Error(
        f"cannot download {url}: {str(reason) or type(reason).__name__}",
        "check the address, or give a file",
    ) from None


def _too_slow() -> TimeoutError:
    return TimeoutError(f"it takes longer than {TIMEOUT_S} s")


def _fetch(url: str, deadline: float) -> bytes:
    # Not urllib's usual opener, which also follows redirects to ftp.
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        _HTTPHandler(),
        _HTTPSHandler(),
        _Redirects(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
    ):
        opener.add_handler(handler)
    request = urllib.request.Request(as_ascii(url), headers={"User-Agent": "blip2-suite"})
    content = bytearray()
    with opener.open(request, timeout=SILENCE_S) as response:
        while block := response.read(_BLOCK):
            content += block
            if len(content) > MAX_BYTES:
                raise ValueError(f"it is larger than {MAX_BYTES >> 20} MiB")
            if time.monotonic() > deadline:
                raise _too_slow()
        if response.length:
            raise http.client.IncompleteRead(bytes(content), response.length)
    return bytes(content)


class _Redirects(urllib.request.HTTPRedirectHandler):
    max_redirections = _MAX_REDIRECTS

    def redirect_request(self, *arguments):
        """A request that remembers where it leads, as it was not the user who asked for it."""
        request = super().redirect_request(*arguments)
        request.leads_to = request.host  # a proxy takes that place
        return request


class _Public:
    """A connection that ends before anything is asked where its other end is no public address."""

    def connect(self) -> None:
        super().connect()
        # The address that was reached, not the name: a name can have another one by now.
        try:
            _check_public(self.sock.getpeername()[0])
        except ValueError:
            self.close()
            raise


class _PublicHTTP(_Public, http.client.HTTPConnection):
    pass


class _PublicHTTPS(_Public, http.client.HTTPSConnection):
    pass


def _check_public(address: str) -> None:
    """Raise ValueError for an address that is not public; a name is none."""
    if not ipaddress.ip_address(address.partition("%")[0]).is_global:
        raise ValueError(f"a redirect leads to {address}, which is no public address")


def _check_behind_proxy(host: str) -> None:
    """As `_check_public`, of the host that a proxy is asked for, without asking anyone for its name."""
    name = host.rstrip(".").lower()
    if name == "localhost" or name.endswith(".localhost"):
        raise ValueError(f"a redirect leads to {host}, which is no public address")
    try:
        # In any of the ways to write it that the proxy may know: 127.1, 0x7f000001.
        known = socket.getaddrinfo(name, None, flags=socket.AI_NUMERICHOST)
    except OSError:
        return
    for *_, (address, *_) in known:
        _check_public(address)


def _connection(request: urllib.request.Request, kind: type, public: type) -> type:
    """What to connect with: where a redirect leads, something that looks where it has got."""
    host = getattr(request, "leads_to", None)
    if host is None:
        return kind
    if host == request.host:
        return public
    _check_behind_proxy(urllib.parse.urlsplit(f"//{host}").hostname)  # we reach the proxy alone
    return kind


class _HTTPHandler(urllib.request.HTTPHandler):
    def http_open(self, request):
        kind = _connection(request, http.client.HTTPConnection, _PublicHTTP)
        return self.do_open(kind, request)


class _HTTPSHandler(urllib.request.HTTPSHandler):
    def https_open(self, request):
        kind = _connection(request, http.client.HTTPSConnection, _PublicHTTPS)
        return self.do_open(kind, request, context=self._context)
