"""Files of object stores (s3://, gs://, hf:// …) and shards on web servers, through fsspec.

Needs fsspec, and for each kind of store the package that knows it: nothing of either is imported before
such a file is named. Who may read or write is what that package finds: its variables and files. A URL
that says so itself is refused, as it would stand in outputs.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import IO, Any

from blip2.errors import Blip2Error, first_line
from blip2.layout import install

_SCHEME = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+://")


def is_remote(place: str) -> bool:
    """Whether a place is a URL."""
    return _SCHEME.match(place) is not None


def _filesystem(url: str) -> tuple[Any, str]:
    """What reads and writes a URL, and the path that it knows it by.

    Raises:
        Blip2Error: there is no such kind of URL, its package is missing, or it holds a secret.
    """
    rest = url.partition("://")[2]
    if "?" in rest or "@" in rest.partition("/")[0]:
        raise Blip2Error(
            f"{url.partition('?')[0].rpartition('@')[2]} is given with a query or a password, which"
            " would stand in the output",
            "give the URL alone, and the credentials as the store's own tools take them",
        )
    try:
        import fsspec
    except ImportError:
        raise Blip2Error(f"{url} needs fsspec", f"install it with: {install('data')}") from None
    try:
        return fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise Blip2Error(
            f"{url} cannot be opened: {first_line(error)}",
            "install the package that fsspec needs for it, as s3fs for s3:// and gcsfs for gs://",
        ) from None


def open_file(url: str) -> IO[bytes]:
    """A file to read, from its begin to its end or anywhere.

    Raises:
        Blip2Error: it cannot be opened so.
        OSError: it is not there, or the store refuses.
    """
    filesystem, path = _filesystem(url)
    return _asked(url, filesystem.open, path, "rb")


def read(url: str, most: int) -> bytes:
    """A file's content.

    Raises:
        Blip2Error: it cannot be read, or has more than `most` bytes.
    """
    try:
        with open_file(url) as file:
            content = file.read(most + 1)
    except OSError as error:
        raise Blip2Error(f"cannot read {url}: {_why(error)}", "check the address") from None
    if len(content) > most:
        raise Blip2Error(f"{url} is larger than {most >> 20} MiB", "give a smaller file")
    return content


def find(url: str) -> list[str]:
    """The files below a URL that ends by a slash, or that a pattern matches, sorted; as URLs.

    Raises:
        Blip2Error: the store cannot be asked.
    """
    filesystem, path = _filesystem(url)
    try:
        look = filesystem.find if url.endswith("/") else filesystem.glob
        return sorted(filesystem.unstrip_protocol(found) for found in _asked(url, look, path))
    except OSError as error:
        raise Blip2Error(f"cannot list {url}: {_why(error)}", "check the address") from None


def exists(url: str) -> bool:
    """Whether there is a file.

    Raises:
        Blip2Error: the store cannot be asked.
    """
    filesystem, path = _filesystem(url)
    try:
        return _asked(url, filesystem.exists, path)
    except OSError as error:
        raise Blip2Error(f"cannot look for {url}: {_why(error)}", "check the address") from None


def upload(file: Path, url: str) -> None:
    """Put a file in a store: whole, or not at all.

    Raises:
        OSError: the store refuses, or cannot be reached.
    """
    filesystem, path = _filesystem(url)
    _asked(url, filesystem.put_file, str(file), path)


def remove(url: str) -> None:
    """Remove a file.

    Raises:
        OSError: the store refuses, or cannot be reached.
    """
    filesystem, path = _filesystem(url)
    _asked(url, filesystem.rm_file, path)


def _asked(url: str, function: Any, *arguments: Any) -> Any:
    """What a store answers; whatever its package raises is an OSError."""
    try:
        return function(*arguments)
    except OSError:
        raise
    except Exception as error:  # of botocore, aiohttp, the hub's client …
        raise OSError(None, first_line(error), url) from None


def _why(error: OSError) -> str:
    return error.strerror or (
        "there is no such file" if isinstance(error, FileNotFoundError) else ""
    )
