"""When an engine's thread needs no Python: the time for others of its process to do their part.

Python runs one thread at a time, and hands over slowly. Whoever parses requests or spells answers while
that thread queues work for a GPU makes the GPU wait; while the thread waits for the GPU nobody does.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator


class Lull:
    """Begins and ends with each wait of one thread, for any number of others."""

    def __init__(self, is_used: bool) -> None:
        """Of a thread that has not begun; where it is not used there always is a lull."""
        self._is_used = is_used
        self._is_now = threading.Event()
        self._is_now.set()

    @contextlib.contextmanager
    def during(self) -> Iterator[None]:
        """Within, the thread waits for something else than Python."""
        self._is_now.set()
        try:
            yield
        finally:
            if self._is_used:
                self._is_now.clear()

    def wait(self, seconds: float) -> bool:
        """Wait for it, at most so long: there may be none for a while. Returns whether there is one."""
        return self._is_now.wait(seconds)
