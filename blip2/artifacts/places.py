"""Whose file a place holds: no program replaces what it did not write, or what it reads."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from blip2.artifacts.sidecars import is_described
from blip2.errors import Blip2Error


def is_foreign(path: Path, is_ours: Callable[[Path], bool]) -> bool:
    """Whether `path` is a file with something in it that no sidecar names, nor `is_ours` knows."""
    return path.is_file() and path.stat().st_size > 0 and not (is_described(path) or is_ours(path))


def refuse_foreign(path: Path, is_ours: Callable[[Path], bool]) -> None:
    """See that `path` is no file that somebody else wrote; one without content is nobody's.

    Raises:
        Blip2Error: it holds something, no sidecar names it, and `is_ours` is false of it.
    """
    if is_foreign(path, is_ours):
        raise Blip2Error(
            f"{path} exists, and was not written by this program",
            "move it away, or choose another place for the output",
        )


def refuse_same(
    outputs: Mapping[str, Path | int], inputs: Mapping[str, Iterable[str | Path]] | None = None
) -> None:
    """See that no two outputs are one file, by whatever names, and that none is an input.

    Args:
        outputs: by what the user calls them; a descriptor stands for the file that it is open on.
        inputs: files that will be read, by what the user calls them; those that are not there
            do no harm.

    Raises:
        Blip2Error: names the two.
    """
    taken: dict[object, str] = {}
    for name, output in outputs.items():
        for identity in _identities(output):
            if (other := taken.setdefault(identity, name)) != name:
                raise Blip2Error(f"{other} and {name} are the same file", "choose another for one")
    for name, paths in (inputs or {}).items():
        for path in paths:
            for identity in _identities(path):
                if identity in taken:
                    raise Blip2Error(
                        f"{taken[identity]} is {path}, which {name} reads", "choose another place"
                    )


def _identities(file: str | Path | int) -> list[object]:
    """What two names of one file have in common: its place, and on the disk its number."""
    found: list[object] = [] if isinstance(file, int) else [os.path.realpath(file)]
    with contextlib.suppress(OSError, ValueError):
        status = os.stat(file)
        if stat.S_ISREG(status.st_mode):
            found.append((status.st_dev, status.st_ino))
    return found
