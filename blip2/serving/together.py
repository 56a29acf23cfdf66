"""What several processes that speak HTTP for one server have in common: counts in shared memory.

Each writes its own alone, and reads all. So a process that is killed leaves nothing half-done behind
but its counts, which `forget` takes away.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterator

from blip2.serving.slots import SharedMemory

_FIELDS = 2  # of a process: rows that are wanted, answers under way
_ROWS, _ANSWERS = range(_FIELDS)
_BYTES = 8  # of a count
_METRICS = "PROMETHEUS_MULTIPROC_DIR"  # where prometheus_client then keeps what it counts


class Together:
    """The counts, for one of the processes."""

    def __init__(self, memory: SharedMemory, number: int, processes: int) -> None:
        """Of process `number` of so many, in a memory that `create` has made."""
        self._memory, self.number, self.processes = memory, number, processes
        self._counts: memoryview | None = None

    @classmethod
    def create(cls, processes: int = 1) -> Together:
        """The first of them, with all counts at zero."""
        memory = SharedMemory.create()
        memory.resize(processes * _FIELDS * _BYTES)
        return cls(memory, 0, processes)

    def of(self, number: int) -> Together:
        """The same for another process."""
        return Together(self._memory, number, self.processes)

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Within, no other process is: for what is looked at first and then counted."""
        # Of a process, not of this object: it ends with the process, however that ends.
        fcntl.lockf(self._memory, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.lockf(self._memory, fcntl.LOCK_UN)

    def add(self, rows: int, answers: int) -> None:
        """Count what this process has accepted, or, below zero, what is over."""
        self._all[self._at(_ROWS)] += rows
        self._all[self._at(_ANSWERS)] += answers

    @property
    def rows(self) -> int:
        """That are wanted by the requests that all have accepted."""
        return sum(self._all[_ROWS::_FIELDS])

    @property
    def answers(self) -> int:
        """Under way, of all."""
        return sum(self._all[_ANSWERS::_FIELDS])

    def forget(self) -> None:
        """Take away what this process has counted: it has ended."""
        for field in range(_FIELDS):
            self._all[self._at(field)] = 0

    def close(self) -> None:
        """Let the memory go here."""
        self._memory.close()

    @property
    def _all(self) -> memoryview:
        if self._counts is None:
            whole = self._memory.slot(0, self.processes * _FIELDS * _BYTES)
            self._counts = whole.cast("q")
        return self._counts

    def _at(self, field: int) -> int:
        return self.number * _FIELDS + field


@contextlib.contextmanager
def metrics_together() -> Iterator[None]:
    """Within, what processes count is counted together; prometheus_client is imported there."""
    with tempfile.TemporaryDirectory(prefix="blip2-metrics-") as directory:
        os.environ[_METRICS] = directory
        yield
