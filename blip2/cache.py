"""What can be made anew, kept between runs: compiled kernels, and which files were verified.

Lies in $XDG_CACHE_HOME/blip2, by default ~/.cache/blip2, and may be removed at any time. Nothing here
fails: what cannot be read or is damaged is not there, and what cannot be written is not kept.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from pathlib import Path

_DIGEST_BYTES = hashlib.sha256().digest_size


def directory() -> Path:
    """Where entries lie, each kind in a folder of its own."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "blip2"


def key_of(*parts: bytes | str) -> str:
    """A name for what was made from `parts`."""
    digest = hashlib.sha256()
    for part in parts:
        content = part.encode(errors="surrogateescape") if isinstance(part, str) else part
        digest.update(len(content).to_bytes(8, "little") + content)
    return digest.hexdigest()


def read(kind: str, key: str) -> bytes | None:
    """The entry that `write` left, or None."""
    try:
        stored = (directory() / kind / key).read_bytes()
    except (OSError, RuntimeError):  # the latter where there is no home directory
        return None
    digest, content = stored[:_DIGEST_BYTES], stored[_DIGEST_BYTES:]
    return content if hashlib.sha256(content).digest() == digest else None


def write(kind: str, key: str, content: bytes) -> None:
    """Keep an entry, whole or not at all."""
    with contextlib.suppress(OSError, RuntimeError):
        folder = directory() / kind
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
            try:
                file.write(hashlib.sha256(content).digest() + content)
                file.close()
                os.replace(file.name, folder / key)
            except BaseException:  # Ctrl-C leaves nothing behind either
                file.close()
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(file.name)
                raise
