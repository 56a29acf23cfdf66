"""Locks among processes, on any system."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[None]:
    """Hold a lock among processes: the file `path`, which is there only meanwhile.

    Whoever is killed leaves the file, and no lock on it.

    Raises:
        BlockingIOError: another process holds it, and `wait` is false.
        OSError: the file cannot be made.
    """
    handle = _open_locked(path, wait)
    try:
        yield
    finally:
        # Windows removes no file that somebody has open. Elsewhere it is removed under the lock, and
        # who has waited for it finds that out.
        if os.name == "nt":
            os.close(handle)
        with contextlib.suppress(OSError):
            path.unlink()
        if os.name != "nt":
            os.close(handle)


def _open_locked(path: Path, wait: bool) -> int:
    import filelock  # takes as long as all of --help

    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if not filelock.lock_descriptor(handle, blocking=wait, poll_interval=0.01):
                raise BlockingIOError(errno.EWOULDBLOCK, os.strerror(errno.EWOULDBLOCK), str(path))
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(handle), os.stat(path)):
                    return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # of a file that its last holder has removed
