"""A hub on this machine: the routes that huggingface_hub needs to look at and download a repository.

    with LocalHub({"somebody/blip2": directory}) as hub:
        environment = hub.environment(home)         # for programs that are to use it

What breaks on the way can be arranged: see `Faults`.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import re
import threading
import urllib.parse
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

LARGE = 1 << 12  # bytes from which a file is kept as Git LFS does
BLOCK = 1 << 22


@dataclasses.dataclass
class Faults:
    """By a file's name: what is wrong with it.

    Attributes:
        cut: after how many bytes of each answer the connection ends, and how often.
        flipped: files of which one byte is another than the hash is of.
        short: files of which half is sent, as if it were all.
    """

    cut: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
    flipped: set[str] = dataclasses.field(default_factory=set)
    short: set[str] = dataclasses.field(default_factory=set)


class LocalHub:
    """Serves directories as repositories; `requests` are (method, file's name, Range) so far."""

    def __init__(self, repositories: Mapping[str, Path]) -> None:
        self.repositories, self.faults = dict(repositories), Faults()
        self.requests: list[tuple[str, str, str | None]] = []
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> LocalHub:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def environment(self, home: Path) -> dict[str, str]:
        """What a program that asks this hub has in its environment; downloads go below `home`."""
        return {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}

    def downloads(self, name: str) -> list[str | None]:
        """The Range of each time that a file's content was asked for."""
        return [part for method, file, part in self.requests if (method, file) == ("GET", name)]


@dataclasses.dataclass(frozen=True)
class _File:
    name: str
    size: int
    git_sha1: str
    sha256: str

    @classmethod
    @functools.cache  # of gigabytes it takes a while
    def of(cls, path: Path) -> _File:
        size = path.stat().st_size
        git, sha = hashlib.sha1(b"blob %d\0" % size), hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(BLOCK):
                git.update(block)
                sha.update(block)
        return cls(path.name, size, git.hexdigest(), sha.hexdigest())

    @property
    def is_large(self) -> bool:
        return self.size >= LARGE

    def sibling(self) -> dict[str, Any]:
        large = {"sha256": self.sha256, "size": self.size, "pointerSize": 134}
        return {
            "rfilename": self.name,
            "size": self.size,
            "blobId": self.git_sha1,
            **({"lfs": large} if self.is_large else {}),
        }

    def entry(self) -> dict[str, Any]:
        large = {"oid": self.sha256, "size": self.size, "pointerSize": 134}
        return {
            "type": "file",
            "path": self.name,
            "size": self.size,
            "oid": self.git_sha1,
            **({"lfs": large} if self.is_large else {}),
        }


class _Handler(BaseHTTPRequestHandler):
    hub: LocalHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(has_body=False)

    def do_GET(self) -> None:
        self._answer(has_body=True)

    def _answer(self, has_body: bool) -> None:
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/[^/]+)?(/tree/[^/]+)?", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path)
        found = api or file
        if found is None or found[1] not in self.hub.repositories:
            self._send(404, {"X-Error-Code": "RepoNotFound"}, b"")
            return
        directory = self.hub.repositories[found[1]]
        files = {path.name: _File.of(path) for path in sorted(directory.iterdir())}
        sha = hashlib.sha1("".join(one.git_sha1 for one in files.values()).encode()).hexdigest()
        if file:
            self.hub.requests.append((self.command, file[2], self.headers["Range"]))
            if file[2] in files:
                self._send_file(directory / file[2], files[file[2]], sha, has_body)
            else:
                self._send(404, {"X-Error-Code": "EntryNotFound"}, b"")
        elif api[3]:
            self._send_json([one.entry() for one in files.values()])
        else:
            siblings = [one.sibling() for one in files.values()]
            self._send_json({"id": found[1], "sha": sha, "siblings": siblings})

    def _send_json(self, content: object) -> None:
        self._send(200, {"Content-Type": "application/json"}, json.dumps(content).encode())

    def _send(self, code: int, headers: Mapping[str, str], body: bytes) -> None:
        self._begin(code, {**headers, "Content-Length": str(len(body))})
        if self.command == "GET":
            self.wfile.write(body)

    def _begin(self, code: int, headers: Mapping[str, str]) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def _send_file(self, path: Path, file: _File, sha: str, has_body: bool) -> None:
        faults, part = self.hub.faults, self.headers["Range"]
        start = int(re.fullmatch(r"bytes=(\d+)-", part)[1]) if part else 0
        end = file.size // 2 if file.name in faults.short and has_body else file.size
        headers = {
            "ETag": f'"{file.sha256 if file.is_large else file.git_sha1}"',
            "X-Repo-Commit": sha,
            "Accept-Ranges": "bytes",
            "Content-Length": str(end - start),
        }
        if part:
            headers["Content-Range"] = f"bytes {start}-{file.size - 1}/{file.size}"
        self._begin(206 if part else 200, headers)
        if not has_body:
            return
        bytes_, times = faults.cut.get(file.name, (0, 0))
        if times:
            faults.cut[file.name] = (bytes_, times - 1)
            end, self.close_connection = min(end, start + bytes_), True
        flipped = file.size // 2 if file.name in faults.flipped else None
        with path.open("rb") as content:
            content.seek(start)
            while block := content.read(min(BLOCK, end - start)):
                if flipped is not None and start <= flipped < start + len(block):
                    changed = bytearray(block)
                    changed[flipped - start] ^= 1
                    block = bytes(changed)
                self.wfile.write(block)
                start += len(block)
