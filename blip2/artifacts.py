"""What the scripts leave on disk: written whole or not at all, described by a sidecar, checked.

    with artifacts.staging(output_dir) as stage:         # nothing is in output_dir yet
        torch.save(tensor, stage / "image.pt")
        artifacts.write_sidecar(stage / "image.pt", source=...)
                                                         # now everything is

The sidecar of `a/b.onnx` is `a/b.json`. It names the file, its size and SHA-256, and whatever its
producer says of it; a consumer calls `read_sidecar`, which also checks the size, before it opens
the file itself. What no sidecar names is somebody else's, and not replaced.
"""

from __future__ import annotations

import contextlib
import errno
import filecmp
import hashlib
import io
import itertools
import json
import os
import queue
import shutil
import stat
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blip2 import cache

if TYPE_CHECKING:
    import torch

_STAGE_PREFIX = ".stage-"
_LOCK = ".stage.lock"  # of a directory; there only while it is held
_MOST_ATTEMPTS = 5
_HASHING_THREADS = 2  # the ViT's weights and OPT's, which are most of the bytes
_SMALL_BYTES = 16 << 20  # what is hashed in no time is hashed whatever the user says
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


class UserError(Exception):
    """Something the user can mend. Shown as `error: what, where; what to do`, exit code 2."""


def first_line(error: BaseException) -> str:
    """What an error of some library says, in one line; the name of its type if it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


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
        UserError: the directory cannot be created or written, the disk is full, or a file that
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
                box = Path(tempfile.mkdtemp(prefix=_STAGE_PREFIX, dir=directory))
                stack.callback(shutil.rmtree, box, ignore_errors=True)
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
        for path, found in itertools.chain.from_iterable(map(_described_files, targets.values())):
            _remember_verified(_state(path), str(found))


def _target_of(filename: str | None, stage: Path, directory: Path) -> Path:
    """Where a file was to go that could not be written; some errors do not name it."""
    if filename is None:
        files = [path for path in stage.rglob("*") if path.is_file()]
        filename = max(files, key=lambda path: path.stat().st_mtime_ns, default=stage)
    path = Path(filename)
    return directory / path.relative_to(stage) if path.is_relative_to(stage) else path


def _cannot_write(error: OSError, where: str | Path) -> UserError:
    return UserError(
        f"cannot write {where}: {error.strerror or error}; free space there or choose another"
        " output directory"
    )


def is_foreign(path: Path, is_ours: Callable[[Path], bool]) -> bool:
    """Whether `path` is a file with something in it that no sidecar names, nor `is_ours` knows."""
    return path.is_file() and path.stat().st_size > 0 and not (is_described(path) or is_ours(path))


def refuse_foreign(path: Path, is_ours: Callable[[Path], bool]) -> None:
    """See that `path` is no file that somebody else wrote; one without content is nobody's.

    Raises:
        UserError: it holds something, no sidecar names it, and `is_ours` is false of it.
    """
    if is_foreign(path, is_ours):
        raise UserError(
            f"{path} exists, and was not written by this program; move it away, or choose another"
            " place for the output"
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
        UserError: names the two.
    """
    taken: dict[object, str] = {}
    for name, output in outputs.items():
        for identity in _identities(output):
            if (other := taken.setdefault(identity, name)) != name:
                raise UserError(f"{other} and {name} are the same file; choose another for one")
    for name, paths in (inputs or {}).items():
        for path in paths:
            for identity in _identities(path):
                if identity in taken:
                    raise UserError(
                        f"{taken[identity]} is {path}, which {name} reads; choose another place"
                    )


def _identities(file: str | Path | int) -> list[object]:
    """What two names of one file have in common: its place, and on the disk its number."""
    found: list[object] = [] if isinstance(file, int) else [os.path.realpath(file)]
    with contextlib.suppress(OSError, ValueError):
        status = os.stat(file)
        if stat.S_ISREG(status.st_mode):
            found.append((status.st_dev, status.st_ino))
    return found


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


def _remove_abandoned_stages(directory: Path) -> None:
    """Remove what a killed process left: a stage that nobody holds the lock of."""
    for box in directory.glob(f"{_STAGE_PREFIX}*"):
        with contextlib.suppress(OSError):
            with locked(box / "lock", wait=False):
                shutil.rmtree(box / "files", ignore_errors=True)
            shutil.rmtree(box, ignore_errors=True)


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


def is_described(path: Path) -> bool:
    """Whether a sidecar names this file or, of a graph, this data; or whether it is a sidecar."""
    graph = path.with_suffix("") if data_path(path.with_suffix("")) == path else path
    facts = _facts_of(sidecar_path(graph))
    if sidecar_path(graph) == path:
        name = facts.get("file")
        return isinstance(name, str) and sidecar_path(path.with_name(name)) == path
    data = facts.get("data")
    return path.name in (facts.get("file"), data.get("file") if isinstance(data, dict) else None)


def _facts_of(sidecar: Path) -> dict[str, Any]:
    """What a sidecar says; nothing where there is none, or something else."""
    try:
        facts = json.loads(sidecar.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return facts if isinstance(facts, dict) and {"file", "size", "sha256"} <= facts.keys() else {}


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


@contextlib.contextmanager
def reading_sidecar(path: Path, made_by: str) -> Iterator[None]:
    """Within, a sidecar of `path` that lacks an entry or has one that makes no sense is a UserError."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{sidecar_path(path)} does not describe {path.name} ({type(error).__name__}: {error});"
            f" make both again with: {made_by}"
        ) from None


def check_size(path: Path, described: Any, made_by: str) -> None:
    """Compare a file's size with its description's (see `describe_file`); UserError if it differs."""
    if not path.is_file():
        raise UserError(f"{path} does not exist; make it with: {made_by}")
    size = path.stat().st_size
    recorded = described.get("size") if isinstance(described, dict) else None
    if recorded != size:
        raise UserError(
            f"{path} has {size} bytes, its description says {recorded}: it is"
            f" truncated or was replaced; make it again with: {made_by}"
        )


def same_source(made_by: str, described: dict[Path, dict[str, Any]]) -> None:
    """Check that artifacts, given with their sidecars, come from one checkpoint.

    Raises:
        UserError: names two files that do not belong together, or one that does not say.
    """
    fingerprints = {}
    for path, facts in described.items():
        with reading_sidecar(path, made_by):
            fingerprints[path] = facts["source"]["fingerprint"]
    (first, fingerprint), *others = fingerprints.items()
    for path, other in others:
        if other != fingerprint:
            raise UserError(
                f"{first} and {path} come from different checkpoints; make both again with: {made_by}"
            )


class Verification:
    """Compares artifacts with the hashes in their sidecars, in threads, while engines load.

        verification = Verification({path: "command that makes it"})
        ...                        # something that takes as long
        verification.finish()      # UserError if a file is not the one described

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
            for path, expected in _described_files(artifact)
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
            UserError: names the first that is not the one described.
        """
        while self._hashes:
            path, expected, command, future, state = self._hashes[0]
            try:
                found = future.result()
                unchanged = _state(path) == state
            except OSError as error:
                raise UserError(
                    f"cannot read {path}: {error.strerror}; make it again with: {command}"
                ) from None
            if found != expected:
                raise UserError(
                    f"{path} is not the file that its description was written for: it was damaged or"
                    f" replaced; make both again with: {command}"
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


def _described_files(artifact: Path) -> Iterator[tuple[Path, Any]]:
    """Each file that the sidecar of `artifact` describes, itself and a graph's data, with its hash."""
    try:
        facts = json.loads(sidecar_path(artifact).read_text(encoding="utf-8"))
        described = {artifact: facts, data_path(artifact): facts.get("data")}
    except (OSError, ValueError, RecursionError, AttributeError):
        return
    for path, facts in described.items():
        if isinstance(facts, dict) and path.is_file():
            yield path, facts.get("sha256")


def data_path(path: Path) -> Path:
    """Where a graph's weights lie: `visual_encoder.onnx.data` beside `visual_encoder.onnx`."""
    return path.with_name(path.name + ".data")


def read_json(path: Path, made_by: str) -> dict[str, Any]:
    """Read a JSON object; raise UserError, naming the command `made_by`, where that fails."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; make it with: {made_by}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path}: {error}; make it again with: {made_by}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object; make it again with: {made_by}")
    return content


def save_tensor(tensor: torch.Tensor, path: Path) -> None:
    """`torch.save` of something small, whose failures are the file's: torch's own writer hides them."""
    import torch

    content = io.BytesIO()
    torch.save(tensor, content)
    path.write_bytes(content.getvalue())


def load_tensor(path: Path, made_by: str) -> torch.Tensor:
    """Load a tensor that `torch.save` wrote, running no code from the file.

    Raises:
        UserError: missing, damaged, or anything but one plain tensor of finite numbers.
    """
    import torch

    if not path.is_file():
        raise UserError(f"{path} does not exist; make it with: {made_by}")
    try:
        stored = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check its permissions") from None
    try:
        content = torch.load(io.BytesIO(stored), map_location="cpu", weights_only=True)
    except Exception:  # anything; its message advises to run what the file holds
        raise UserError(
            f"cannot read {path}: it is damaged, or no tensor that torch.save wrote (a picture needs"
            f" its own suffix); make it again with: {made_by}"
        ) from None
    if not is_plain(content) or not content.is_floating_point():
        raise UserError(f"{path} holds no plain tensor; make it again with: {made_by}")
    if not torch.isfinite(content).all():
        raise UserError(f"{path} holds NaN or Inf; make it again with: {made_by}")
    return content


def is_plain(content: Any) -> bool:
    """Whether what was unpickled is a tensor whose numbers are all in the file, and nothing more."""
    import torch

    return (
        isinstance(content, torch.Tensor)
        and content.layout == torch.strided
        and content.device.type == "cpu"
        and not content.is_quantized
        # A file of some bytes can describe a tensor of any size, whose rows are all the same.
        and content.untyped_storage().nbytes() >= content.numel() * content.itemsize
    )
