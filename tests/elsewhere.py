"""Run a script as on a machine that is no Linux: python elsewhere.py {macos,windows} run.py …

Takes away what Python has not there. No more than that: files, processes and libraries stay Linux's.
"""

from __future__ import annotations

import os
import runpy
import sys


def lock_descriptor(handle: int, *, blocking: bool = True, poll_interval: float = 0.0) -> bool:
    """What filelock does on Windows: lock the beginning of a file."""
    del poll_interval
    try:
        os.lockf(handle, os.F_LOCK if blocking else os.F_TLOCK, 1)
    except BlockingIOError:
        return False
    return True


def take_away(system: str) -> None:
    del os.sched_getaffinity
    if system == "windows":
        import filelock

        filelock.lock_descriptor = lock_descriptor
        for module in ("fcntl", "resource", "grp", "pwd", "termios"):
            sys.modules[module] = None
        for name in ("fork", "getuid", "mkfifo"):
            delattr(os, name)


if __name__ == "__main__":
    _, system, *sys.argv = sys.argv
    sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
    take_away(system)
    runpy.run_path(sys.argv[0], run_name="__main__")
