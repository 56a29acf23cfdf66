"""What asks a server: the standard library alone, so that a question takes no longer than its answer.

client = Client("http://127.0.0.1:8000", key)
answered = client.ask(picture, "which city is this?", {"num_beams": 5})
print(answered.answers[0].text, answered.seconds)
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import http.client
import json
import os
import stat
import time
import urllib.parse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blip2.answers import Answer
from blip2.errors import Blip2Error

KEY_VARIABLE = "BLIP2_API_KEY"
_TIMEOUT = 600.0  # seconds that a server may say nothing: it has a limit of its own
_PATIENCE = 60.0  # seconds to go on asking a server that is busy or loading
_MAX_FILE_BYTES = 64 << 20


@dataclasses.dataclass(frozen=True)
class Answered:
    """What a server answered: the prompt that it read, beams best first, its seconds by stage."""

    prompt: str
    answers: list[Answer]
    seconds: dict[str, float]


class Refused(Blip2Error):
    """The server has answered with an error; it may answer another question."""


class Client:
    """One connection to a server. Not for several threads."""

    def __init__(self, url: str, key: str | None = None) -> None:
        """Connect to nothing yet.

        Args:
            url: where it is: http://127.0.0.1:8000.
            key: what it asks for; None is $BLIP2_API_KEY, if there is one.

        Raises:
            Blip2Error: no server has such an address.
        """
        try:
            parts = urllib.parse.urlsplit(url)
            port = parts.port
        except ValueError:
            parts, port = urllib.parse.urlsplit(""), None
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query:
            raise Blip2Error(
                f"{url} is not the address of a server", "give one like http://127.0.0.1:8000"
            )
        kind = (
            http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        )
        self.url, self._path = url, parts.path.rstrip("/").removesuffix("/v1")
        self._connection = kind(parts.hostname, port, timeout=_TIMEOUT)
        self._key = os.environ.get(KEY_VARIABLE, "").split(",")[0] if key is None else key

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def model(self) -> dict[str, Any]:
        """What the server runs: its "id", and a "fingerprint" that changes with its engines.

        Raises:
            Blip2Error: it cannot be asked.
        """
        return self._request("GET", "/v1/models")["data"][0]

    def ask(self, picture: bytes, text: str, options: Mapping[str, Any]) -> Answered:
        """Ask about a picture; waits for a server that is busy.

        Args:
            picture: a file's content.
            text: the question; an empty one asks for a caption.
            options: fields of GenerationOptions, prompt_template, max_txt_len; None is the default.

        Raises:
            Refused: the server cannot answer it.
            Blip2Error: it cannot be asked.
        """
        url = "data:image/any;base64," + base64.b64encode(picture).decode("ascii")
        parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
        body = {"messages": [{"role": "user", "content": parts}], **_fields(options)}
        found = self._request("POST", "/v1/chat/completions", json.dumps(body).encode("ascii"))
        extras = found["blip2"]
        answers = [
            Answer(one["text"], one["score"], "length" not in one["flags"])
            for one in extras["answers"]
        ]
        return Answered(extras["prompt"], answers, extras["seconds"])

    def _request(self, method: str, path: str, body: bytes | None = None) -> dict[str, Any]:
        give_up = time.monotonic() + _PATIENCE
        while True:
            status, headers, content = self._exchange(method, path, body)
            if status == 200:
                break
            if status not in (429, 503) or time.monotonic() > give_up:
                raise self._refused(status, content)
            wait = headers.get("retry-after", "1")
            time.sleep(min(5.0, float(wait) if wait.isdigit() else 1.0))
        try:
            return json.loads(content)
        except ValueError:
            raise self._unknown() from None

    def _exchange(
        self, method: str, path: str, body: bytes | None
    ) -> tuple[int, dict[str, str], bytes]:
        headers = {"Content-Type": "application/json", "User-Agent": "blip2-suite"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        was_open = self._connection.sock is not None
        for is_last in (
            not was_open,
            True,
        ):  # one that was kept open may have been closed meanwhile
            try:
                self._connection.request(method, self._path + path, body, headers)
                response = self._connection.getresponse()
                found = {name.lower(): value for name, value in response.getheaders()}
                return response.status, found, response.read()
            except (OSError, http.client.HTTPException) as error:
                self._connection.close()
                if is_last:
                    why = getattr(error, "strerror", None) or str(error) or type(error).__name__
                    raise Blip2Error(
                        f"cannot ask {self.url}: {why}", "start a server there with serve.py"
                    ) from None
        raise AssertionError("the last try returns or raises")

    def _refused(self, status: int, content: bytes) -> Blip2Error:
        message = None
        with contextlib.suppress(ValueError, LookupError, TypeError):
            message = json.loads(content)["error"]["message"]
        if not isinstance(message, str):
            return self._unknown(status)
        if status == 401:
            return Blip2Error(f"{self.url} wants its API key", f"set {KEY_VARIABLE}")
        return Refused(f"{self.url} says: {message}")

    def _unknown(self, status: int | None = None) -> Blip2Error:
        says = f"answers with status {status}" if status else "answers something else"
        return Blip2Error(f"{self.url} {says}, not as serve.py does", "check the address")


def _fields(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as the server calls them; sampling is what it is there."""
    given = {name: value for name, value in options.items() if value is not None}
    given["max_tokens"] = given.pop("max_output_len")
    if {"top_k", "top_p", "temperature"} & given.keys():
        # Where a request names none of them with effect, a server takes the likeliest token.
        given = {"temperature": 1.0, "top_k": 0, **given}
    else:
        given.pop("seed", None)
    return given


def read_picture(source: str) -> bytes:
    """A picture file's content, from a path or an http(s) URL.

    Raises:
        Blip2Error: it cannot be had.
    """
    if "://" in source:
        from blip2 import downloads

        if downloads.is_url(source):
            return downloads.download(source)
    path = Path(source)
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise Blip2Error(f"{path} is not a file", "give one picture")
        if status.st_size > _MAX_FILE_BYTES:
            limit = _MAX_FILE_BYTES >> 20
            raise Blip2Error(f"{path} is larger than {limit} MiB", "give a smaller file")
        return path.read_bytes()
    except FileNotFoundError:
        raise Blip2Error(f"picture {path} does not exist", "check the path") from None
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise Blip2Error(f"cannot read {str(path)!r}: {why}", "check the path") from None
