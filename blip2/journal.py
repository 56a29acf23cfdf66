"""The output of many pictures: a JSON line each, which a killed run can be continued from.

Beside `captions.jsonl` lies `captions.jsonl.options`: what the lines were made with. A run that goes
on must have the same options, engines and pictures, or the file would hold two different things.
While it runs, `captions.jsonl.lock` keeps others away.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from blip2 import artifacts, checkpoints
from blip2.artifacts import UserError

_SUFFIXES = {".json", ".plan", ".onnx", ".data", ".safetensors", ".engine", ".pt"}
_READ_WHOLE = 1 << 20  # bytes: descriptions are smaller, weights larger
_BLOCKS, _BLOCK_BYTES = 256, 4096


class Journal:
    """Lines appended a batch at a time, each batch on disk when `append` returns.

    Every picture has one line with "error", or `questions` lines. After opening, `done` pictures
    are in the file, `failed` of them with an error; what a killed run left torn is gone.
    """

    def __init__(self, path: Path, questions: int, options: dict[str, Any]) -> None:
        """Open or make the file.

        Raises:
            UserError: it cannot be written, another process writes it, or it was made with other
                options.
        """
        self.path, self.done, self.failed = path, 0, 0
        self._questions = questions
        with contextlib.ExitStack() as stack:
            is_new = not path.exists()
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                lock = path.with_name(path.name + ".lock")
                stack.enter_context(artifacts.locked(lock, wait=False))
                self._file = stack.enter_context(open(path, "ab", buffering=0))
            except BlockingIOError:
                raise UserError(
                    f"another run is writing {path}; wait for it, or choose another --output"
                ) from None
            except OSError as error:
                raise _cannot_write(path, error) from None
            try:
                self._check(json.loads(json.dumps(options)))
                self._drop_torn()
            except BaseException:
                self._file.close()
                if is_new:
                    path.unlink()
                raise
            self._held = stack.pop_all()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def _check(self, options: dict[str, Any]) -> None:
        sidecar = self.path.with_name(self.path.name + ".options")
        if not os.path.getsize(self.path):
            # Nothing is lost yet, so that the options may still change.
            with artifacts.staging(self.path.parent, is_ours=_are_options) as stage:
                (stage / sidecar.name).write_text(json.dumps(options, indent=2) + "\n")
            return
        if not sidecar.is_file():
            raise UserError(
                f"{self.path} exists and has no {sidecar.name} beside it, so no run can go on with"
                " it; remove it, or choose another --output"
            )
        before = artifacts.read_json(sidecar, "removing it and the output, and running again")
        for name in {**before, **options}:
            if before.get(name) != options.get(name):
                raise UserError(
                    f"{self.path} was begun with another {name}; give the same again, remove the"
                    " file, or choose another --output"
                )

    def _drop_torn(self) -> None:
        """Cut the file behind the last picture all of whose lines are whole."""
        end = 0
        for _, whole, failed in self._pictures():
            end = whole
            self.done += 1
            self.failed += failed
        os.truncate(self.path, end)

    def _pictures(self) -> Iterator[tuple[dict[str, str], int, bool]]:
        """Name, end in the file and failure of every picture whose lines are whole."""
        with open(self.path, "rb") as file:
            lines, end = 0, 0
            for line in file:
                end += len(line)
                if not line.endswith(b"\n"):
                    return
                try:
                    fields = json.loads(line)
                    name = {key: fields[key] for key in ("path", "key") if key in fields}
                except (ValueError, TypeError, KeyError):
                    raise UserError(
                        f"{self.path} has a damaged line before its end (byte {end - len(line)});"
                        " cut it there, or choose another --output"
                    ) from None
                lines += 1
                failed = "error" in fields
                if failed or lines == self._questions:
                    lines = 0
                    yield name, end, failed

    def names(self) -> Iterator[dict[str, str]]:
        """The name of every picture that was done when the file was opened, in order."""
        for number, (name, _, _) in enumerate(self._pictures()):
            if number == self.done:
                return
            yield name

    def append(self, lines: list[dict[str, Any]]) -> None:
        """Write lines and wait until they are on disk.

        Raises:
            UserError: the disk is full, or cannot be written.
        """
        # Names that are no UTF-8 are escaped, so that any reader takes the file.
        content = "".join(json.dumps(line) + "\n" for line in lines).encode("ascii")
        try:
            _write(self._file, content)
            os.fsync(self._file.fileno())
        except OSError as error:
            raise _cannot_write(self.path, error) from None


def _are_options(path: Path) -> bool:
    """Whether a file holds the options of a run: they go by their flags."""
    try:
        return any(name.startswith("--") for name in json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError, AttributeError):
        return False


def _write(file: BinaryIO, content: bytes) -> None:
    while content:
        content = content[file.write(content) :]


def _cannot_write(path: Path, error: OSError) -> UserError:
    return UserError(
        f"cannot write {path}: {error.strerror or error}; mend that and give the same command again"
        " to go on, or choose another --output"
    )


def fingerprint(directory: Path) -> str:
    """SHA-256 that changes with the engine in `directory`, or with the one file given.

    Descriptions are read whole, and hold the hashes of what they describe; of large files, of which
    not all have one, blocks spread over the file are read, and of a checkpoint's weights blocks of
    every tensor: all of their gigabytes would take minutes.

    Raises:
        UserError: a checkpoint there cannot be read.
    """
    found = directory.rglob("*") if directory.is_dir() else [directory]
    digest = hashlib.sha256()
    for path in sorted(path for path in found if path.suffix in _SUFFIXES and path.is_file()):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(directory)} {size}\n".encode(errors="replace"))
        with path.open("rb") as file:
            for start, count in _blocks(size):
                file.seek(start)
                digest.update(file.read(count))
    if checkpoints.is_checkpoint(directory):
        digest.update(checkpoints.open_checkpoint(directory).fingerprint.encode())
    return digest.hexdigest()


def _blocks(size: int) -> list[tuple[int, int]]:
    """Where to read a file of that size, and how much: all of it, or blocks from begin to end."""
    if size <= _READ_WHOLE:
        return [(0, size)]
    return [(i * (size - _BLOCK_BYTES) // (_BLOCKS - 1), _BLOCK_BYTES) for i in range(_BLOCKS)]
