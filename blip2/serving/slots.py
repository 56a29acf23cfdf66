"""Memory that the server's processes share: pixels lie in its slots on their way to the engines.

Through sockets, and the process that speaks HTTP, they would be most of what that one has to move.
"""

from __future__ import annotations

import asyncio
import mmap
import os
import tempfile
from multiprocessing import reduction
from pathlib import Path
from typing import Any, BinaryIO

from blip2.errors import Blip2Error

_MEMORY = Path("/dev/shm")  # where files are in memory, on Linux


class SharedMemory:
    """A file without a name; may be an argument of a process that is started."""

    def __init__(self, file: BinaryIO) -> None:
        """Of a file that is open to read and write."""
        self._file = file
        self._map: memoryview | None = None

    @classmethod
    def create(cls) -> SharedMemory:
        """Make it, empty."""
        return cls(tempfile.TemporaryFile(dir=_MEMORY if _MEMORY.is_dir() else None))

    def resize(self, size: int) -> None:
        """Give it its size, before anybody looks into it.

        Raises:
            Blip2Error: there is no room for it.
        """
        try:
            # What is only promised would end whoever writes there.
            os.posix_fallocate(self._file.fileno(), 0, size)
        except OSError as error:
            raise Blip2Error(
                f"{_MEMORY} has no room for {size} bytes ({error.strerror})",
                "enlarge it (docker run --shm-size), or take fewer `workers`",
            ) from None

    def slot(self, number: int, size: int) -> memoryview:
        """One of its slots, all of which have `size` bytes."""
        if self._map is None:
            self._map = memoryview(mmap.mmap(self._file.fileno(), 0))
        return self._map[number * size : (number + 1) * size]

    def fileno(self) -> int:
        """The file's descriptor."""
        return self._file.fileno()

    def close(self) -> None:
        """Let it go here."""
        self._file.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return _opened, (reduction.DupFd(self._file.fileno()),)


def _opened(descriptor: Any) -> SharedMemory:
    return SharedMemory(os.fdopen(descriptor.detach(), "r+b"))


class Slots:
    """Who may write where: the slots of a memory that nobody has."""

    def __init__(self, memory: SharedMemory) -> None:
        """None yet, of a memory that has no size yet."""
        self.memory = memory
        self._free: asyncio.Queue[int] = asyncio.Queue()

    def make(self, count: int, size: int) -> None:
        """Have `count` slots of `size` bytes.

        Raises:
            Blip2Error: there is no room for them.
        """
        self.memory.resize(count * size)
        for number in range(count):
            self._free.put_nowait(number)

    async def take(self) -> int:
        """A free one, for whoever writes into it; waits for it."""
        return await self._free.get()

    def give_back(self, slot: int) -> None:
        """Nobody writes into it, or reads what was written, any more."""
        self._free.put_nowait(slot)
