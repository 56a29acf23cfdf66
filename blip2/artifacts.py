"""What the scripts leave on disk: written whole or not at all, described by a sidecar, checked.

    with artifacts.staging(output_dir) as stage:         # nothing is in output_dir yet
        torch.save(tensor, stage / "image.pt")
        artifacts.write_sidecar(stage / "image.pt", source=...)
                                                         # now everything is

The sidecar of `a/b.onnx` is `a/b.json`. It names the file, its size and SHA-256, and whatever its
producer says of it; a consumer calls `read_sidecar`, which also checks the size, before it opens
the file itself.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_STAGE_PREFIX = ".stage-"
_WRITE_FAILURES = {
    errno.EACCES,
    errno.EDQUOT,
    errno.EEXIST,
    errno.EFBIG,
    errno.EIO,
    errno.ENOSPC,
    errno.ENOTDIR,
    errno.EPERM,
    errno.EROFS,
}


class UserError(Exception):
    """Something the user can mend. Shown as `error: what, where; what to do`, exit code 2."""


@contextlib.contextmanager
def staging(directory: Path) -> Iterator[Path]:
    """Yield a temporary directory whose files move into `directory` when the block succeeds.

    On any exception, Ctrl-C included, the temporary directory is removed and `directory` is as it
    was. Every file is flushed to disk before the first one moves. Two processes may stage into the
    same directory: the moves are serialised, so the result is one of the two, whole.

    Raises:
        UserError: the directory cannot be created or written, or the disk is full.
    """
    stage = None
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _remove_abandoned_stages(directory)
        stage = Path(tempfile.mkdtemp(prefix=_STAGE_PREFIX, dir=directory))
        with _locked(stage):
            yield stage
            files = [path for path in stage.rglob("*") if path.is_file()]
            for path in files:
                with path.open("rb") as written:
                    os.fsync(written.fileno())
            with _locked(directory):
                # Descriptions last: a crash between two moves leaves a sidecar that does not match.
                for path in sorted(files, key=lambda path: (path.suffix == ".json", path)):
                    target = directory / path.relative_to(stage)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    os.replace(path, target)
    except OSError as error:
        if error.errno not in _WRITE_FAILURES:
            raise
        where = error.filename or directory
        raise UserError(
            f"cannot write {where}: {error.strerror or error}; free space there or choose another"
            " output directory"
        ) from error
    finally:
        if stage is not None:
            shutil.rmtree(stage, ignore_errors=True)


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    handle = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _remove_abandoned_stages(directory: Path) -> None:
    """Remove what a killed process left: a stage that nobody holds a lock on."""
    for stage in directory.glob(f"{_STAGE_PREFIX}*"):
        with contextlib.suppress(OSError):
            handle = os.open(stage, os.O_RDONLY)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(stage, ignore_errors=True)
            finally:
                os.close(handle)


def sidecar_path(path: Path) -> Path:
    """Where the description of the artifact `path` lies."""
    return path.with_suffix(".json")


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def describe_file(path: Path) -> dict[str, Any]:
    """Name, size in bytes and SHA-256 of a file, as sidecars hold them."""
    return {"file": path.name, "size": path.stat().st_size, "sha256": sha256(path)}


def write_sidecar(path: Path, **facts: Any) -> None:
    """Write the sidecar of `path`: its name, size and hash, then `facts` (JSON values)."""
    text = json.dumps({**describe_file(path), **facts}, indent=2)
    sidecar_path(path).write_text(text + "\n", encoding="utf-8")


def read_sidecar(path: Path, made_by: str) -> dict[str, Any]:
    """Return what the sidecar of `path` says, once the file is there and has the recorded size.

    `made_by` is the command that makes the artifact; it goes into the error messages.

    Raises:
        UserError: artifact or sidecar missing, unreadable, or not of one another.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist; make it with: {made_by}")
    facts = read_json(sidecar_path(path), made_by)
    check_size(path, facts, made_by)
    return facts


def check_size(path: Path, described: dict[str, Any], made_by: str) -> None:
    """Compare a file's size with its description's (see `describe_file`); UserError if it differs."""
    if not path.is_file():
        raise UserError(f"{path} does not exist; make it with: {made_by}")
    size = path.stat().st_size
    if described.get("size") != size:
        raise UserError(
            f"{path} has {size} bytes, its description says {described.get('size')}: it is"
            f" truncated or was replaced; make it again with: {made_by}"
        )


def same_source(made_by: str, described: dict[Path, dict[str, Any]]) -> None:
    """Check that artifacts, given with their sidecars, come from one checkpoint.

    Raises:
        UserError: names two files that do not belong together.
    """
    (first, facts), *others = described.items()
    for path, other in others:
        if other.get("source", {}).get("fingerprint") != facts.get("source", {}).get("fingerprint"):
            raise UserError(
                f"{first} and {path} come from different checkpoints; make both again with: {made_by}"
            )


def read_json(path: Path, made_by: str) -> dict[str, Any]:
    """Read a JSON object; raise UserError, naming the command `made_by`, where that fails."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; make it with: {made_by}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}; make it again with: {made_by}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object; make it again with: {made_by}")
    return content


def load_tensor(path: Path, made_by: str) -> torch.Tensor:
    """Load a tensor that `torch.save` wrote, running no code from the file.

    Raises:
        UserError: missing, damaged, or anything but one plain tensor of finite numbers.
    """
    import pickle

    import torch

    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; make it with: {made_by}") from None
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"cannot read {path}: {reason[0]}; make it again with: {made_by}") from None
    if not isinstance(content, torch.Tensor):
        raise UserError(f"{path} holds no plain tensor; make it again with: {made_by}")
    if not torch.isfinite(content).all():
        raise UserError(f"{path} holds NaN or Inf; make it again with: {made_by}")
    return content
