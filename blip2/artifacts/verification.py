"""Artifacts compared with the hashes in their sidecars, once until they change."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path

from blip2 import cache
from blip2.artifacts.sidecars import described_files, sha256
from blip2.errors import Blip2Error

_HASHING_THREADS = 2  # the ViT's weights and OPT's, which are most of the bytes
_SMALL_BYTES = 16 << 20  # what is hashed in no time is hashed whatever the user says


class Verification:
    """Compares artifacts with the hashes in their sidecars, in threads, while engines load.

        verification = Verification({path: "command that makes it"})
        ...                        # something that takes as long
        verification.finish()      # Blip2Error if a file is not the one described

    A process that ends before `finish` does not wait for the threads. Artifacts that have no sidecar
    are left out: whether one is required is for their consumer to say. What was verified is
    remembered, and not read again as long as path, size, time of change and inode stay the same.
    """

    def __init__(self, made_by: Mapping[Path, str], large_too: bool = True) -> None:
        """Start.

        Args:
            made_by: the artifacts, each with the command that makes it.
            large_too: read also the files that take seconds.
        """
        self._hashes = [
            (path, expected, command, Future(), state)
            for artifact, command in made_by.items()
            for path, expected in described_files(artifact)
            if large_too or path.stat().st_size <= _SMALL_BYTES
            if not _is_verified(state := _state(path), str(expected))
        ]
        waiting: queue.SimpleQueue[tuple[Path, Future]] = queue.SimpleQueue()
        for path, _, _, future, _ in self._hashes:
            waiting.put((path, future))
        for _ in range(min(_HASHING_THREADS, len(self._hashes))):
            threading.Thread(target=_hash_files, args=(waiting,), daemon=True).start()

    def finish(self) -> None:
        """Wait for every file; a second call does nothing.

        Raises:
            Blip2Error: names the first that is not the one described.
        """
        while self._hashes:
            path, expected, command, future, state = self._hashes[0]
            try:
                found = future.result()
                unchanged = _state(path) == state
            except OSError as error:
                raise Blip2Error(
                    f"cannot read {path}: {error.strerror}", f"make it again with: {command}"
                ) from None
            if found != expected:
                raise Blip2Error(
                    f"{path} is not the file that its description was written for: it was damaged or"
                    " replaced",
                    f"make both again with: {command}",
                )
            if unchanged:
                _remember_verified(state, found)
            del self._hashes[0]


def _hash_files(waiting: queue.SimpleQueue[tuple[Path, Future]]) -> None:
    with contextlib.suppress(queue.Empty):
        while True:
            path, future = waiting.get_nowait()
            try:
                future.set_result(sha256(path))
            except BaseException as error:
                future.set_exception(error)


def _state(path: Path) -> str:
    """Changes when a file does: the key that its hash is remembered by."""
    status = path.stat()
    facts = (path.resolve(), status.st_size, status.st_mtime_ns, status.st_ino)
    return cache.key_of(*map(str, facts))


def _is_verified(state: str, expected: str) -> bool:
    return cache.read("verified", state) == expected.encode()


def _remember_verified(state: str, found: str) -> None:
    cache.write("verified", state, found.encode())


def remember_described(artifact: Path) -> None:
    """Take what was just written as verified: the first run need not hash it again."""
    for path, found in described_files(artifact):
        _remember_verified(_state(path), str(found))
