"""A directory's new files: written whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import filecmp
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from blip2.artifacts.locks import locked
from blip2.artifacts.places import is_foreign, refuse_foreign
from blip2.artifacts.verification import remember_described
from blip2.errors import Blip2Error

_STAGE_PREFIX = ".stage-"
_LOCK = ".stage.lock"  # of a directory; there only while it is held
_MOST_ATTEMPTS = 5
_WRITE_FAILURES = {
    errno.EACCES,
    errno.EDQUOT,
    errno.EEXIST,
    errno.EFBIG,
    errno.EIO,
    errno.EISDIR,
    errno.ENAMETOOLONG,
    errno.ENOSPC,
    errno.ENOTDIR,
    errno.EPERM,
    errno.EROFS,
}


@contextlib.contextmanager
def staging(
    directory: Path,
    replaces: Sequence[str] = (),
    is_ours: Callable[[Path], bool] = lambda _: False,
) -> Iterator[Path]:
    """Yield a temporary directory whose files move into `directory` when the block succeeds.

    On any exception, Ctrl-C included, the temporary directory is removed and `directory` is as it
    was. Every file is flushed to disk before the first one moves. Two processes may stage into the
    same directory: the moves are serialised, so the result is one of the two, whole.

    Args:
        directory: made if need be.
        replaces: patterns of the files that an older result may have in `directory`: those that
            the new one has not are removed.
        is_ours: whether a file that no sidecar names is nevertheless of this program's making.

    Raises:
        Blip2Error: the directory cannot be created or written, the disk is full, or a file that
            would be replaced is not ours: at once if one of `replaces`, else at the end.
    """
    with contextlib.ExitStack() as stack:
        try:
            for old in _older(directory, replaces):
                refuse_foreign(old, is_ours)
            stage = _open_stage(directory, stack)
        except OSError as error:
            raise _cannot_write(error, error.filename or directory) from error
        try:
            yield stage
        except OSError as error:
            # Some writers say what happened, but not with which number.
            if error.errno not in _WRITE_FAILURES and error.errno is not None:
                raise
            raise _cannot_write(error, _target_of(error.filename, stage, directory)) from error
        try:
            _publish(stage, directory, replaces, is_ours)
        except OSError as error:
            raise _cannot_write(
                error, _target_of(error.filename2 or error.filename, stage, directory)
            ) from error


def _open_stage(directory: Path, stack: contextlib.ExitStack) -> Path:
    """Make a stage, which is removed with the stack; so is `directory` if it is new and empty then."""
    for attempt in range(_MOST_ATTEMPTS):
        new = [path for path in (directory, *directory.parents) if not path.exists()]
        try:
            directory.mkdir(parents=True, exist_ok=True)
            stack.callback(_remove_empty, new)
            with locked(directory / _LOCK):  # before it is locked itself, a stage looks abandoned
                _remove_abandoned_stages(directory)
                box = directory / f"{_STAGE_PREFIX}{secrets.token_hex(8)}"
                stack.callback(shutil.rmtree, box, ignore_errors=True)  # first: Ctrl-C may follow
                box.mkdir(mode=0o700)
                stack.enter_context(locked(box / "lock"))
            stage = box / "files"
            stage.mkdir()
            break
        except FileNotFoundError:
            # Another process may just have removed what it had made and left empty.
            if attempt == _MOST_ATTEMPTS - 1:
                raise
    return stage


def _remove_empty(directories: Sequence[Path]) -> None:
    with contextlib.suppress(OSError):
        for directory in directories:
            directory.rmdir()


def _older(directory: Path, replaces: Sequence[str]) -> set[Path]:
    return {path for pattern in replaces for path in directory.glob(pattern)}


def _publish(
    stage: Path, directory: Path, replaces: Sequence[str], is_ours: Callable[[Path], bool]
) -> None:
    targets = {
        path: directory / path.relative_to(stage) for path in stage.rglob("*") if path.is_file()
    }
    for path in targets:
        with path.open("r+b") as written:  # Windows flushes nothing that is open for reading
            os.fsync(written.fileno())
    with locked(directory / _LOCK):
        # Whatever can be in the way is found before the first file moves.
        for target in targets.values():
            target.parent.mkdir(parents=True, exist_ok=True)
            if target.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(target))
        for path, target in targets.items():
            if is_foreign(target, is_ours) and not filecmp.cmp(path, target, shallow=False):
                refuse_foreign(target, is_ours)
        leftover = _older(directory, replaces) - set(targets.values())
        for old in leftover:
            refuse_foreign(old, is_ours)
        # Descriptions first: a crash between two moves leaves one that does not match, and by which
        # the next run knows what it may replace.
        for path in sorted(targets, key=lambda path: (path.suffix != ".json", path)):
            os.replace(path, targets[path])
        for old in leftover:
            old.unlink()
        # Hashed as they were written: the first run need not do so again.
        for target in targets.values():
            remember_described(target)


def _target_of(filename: str | None, stage: Path, directory: Path) -> Path:
    """Where a file was to go that could not be written; some errors do not name it."""
    if filename is None:
        files = [path for path in stage.rglob("*") if path.is_file()]
        filename = max(files, key=lambda path: path.stat().st_mtime_ns, default=stage)
    path = Path(filename)
    return directory / path.relative_to(stage) if path.is_relative_to(stage) else path


def _cannot_write(error: OSError, where: str | Path) -> Blip2Error:
    return Blip2Error(
        f"cannot write {where}: {error.strerror or error}",
        "free space there or choose another output directory",
    )


def _remove_abandoned_stages(directory: Path) -> None:
    """Remove what a killed process left: a stage that nobody holds the lock of."""
    for box in directory.glob(f"{_STAGE_PREFIX}*"):
        with contextlib.suppress(OSError):
            with locked(box / "lock", wait=False):
                shutil.rmtree(box / "files", ignore_errors=True)
            shutil.rmtree(box, ignore_errors=True)
