"""The output of many pictures: a JSON line each, which a killed run can be continued from.

Beside `captions.jsonl` lies `captions.jsonl.options`: what the lines were made with. A run that goes
on must have the same options, engines and pictures, or the file would hold two different things.
While it runs, `captions.jsonl.lock` keeps others away. While errors are asked about again,
`captions.jsonl.retry` grows, which then takes its place.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import stat
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from blip2 import artifacts
from blip2.errors import Blip2Error


class Journal:
    """Lines appended a batch at a time, each batch on disk when `append` returns.

    Every picture has one line with "error", or `questions` lines. After opening, `done` pictures
    are in the file, `failed` of them with an error; what a killed run left torn is gone.
    """

    def __init__(self, path: Path, questions: int, options: dict[str, Any]) -> None:
        """Open or make the file.

        Raises:
            Blip2Error: it cannot be written, another process writes it, or it was made with other
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
                self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - until __exit__
            except BlockingIOError:
                raise Blip2Error(
                    f"another run is writing {path}", "wait for it, or choose another `output`"
                ) from None
            except OSError as error:
                raise cannot_write(path, error) from None
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
        with self._held:
            self._file.close()

    def _check(self, options: dict[str, Any]) -> None:
        sidecar = self.path.with_name(self.path.name + ".options")
        if not os.path.getsize(self.path):
            # Nothing is lost yet, so that the options may still change.
            with artifacts.staging(self.path.parent, is_ours=_are_options) as stage:
                (stage / sidecar.name).write_text(json.dumps(options, indent=2) + "\n")
            _retry_path(self.path).unlink(missing_ok=True)  # of what was here before
            return
        if not sidecar.is_file():
            raise Blip2Error(
                f"{self.path} exists and has no {sidecar.name} beside it, so no run can go on with"
                " it",
                "remove it, or choose another `output`",
            )
        before = artifacts.read_json(sidecar, "removing it and the output, and running again")
        for name in {**before, **options}:
            if before.get(name) != options.get(name):
                raise Blip2Error(
                    f"{self.path} was begun with another {name}",
                    "give the same again, remove the file, or choose another `output`",
                )

    def _drop_torn(self) -> None:
        """Cut the file behind the last picture all of whose lines are whole."""
        pictures = list_pictures(self.path, self._questions)
        self.done, self.failed, end = _count(pictures)
        os.truncate(self.path, end)

    def names(self) -> Iterator[dict[str, str]]:
        """The name of every picture that was done when the file was opened, in order."""
        pictures = list_pictures(self.path, self._questions)
        return (picture.name for picture in itertools.islice(pictures, self.done))

    @contextlib.contextmanager
    def retrying(self) -> Iterator[Retry]:
        """Within, pictures with an error can be given other lines, which then take their place.

        Raises:
            Blip2Error: the file for them cannot be written.
        """
        with Retry(self.path, self._questions, self.done) as retry:
            yield retry
            retry.finish()
        self._file.close()
        try:
            self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 - until __exit__
        except OSError as error:
            raise cannot_write(self.path, error) from None
        self.failed = _count(list_pictures(self.path, self._questions)).failed

    def append(self, lines: list[dict[str, Any]]) -> None:
        """Write lines and wait until they are on disk.

        Raises:
            Blip2Error: the disk is full, or cannot be written.
        """
        try:
            _write(self._file, encoded(lines))
            os.fsync(self._file.fileno())
        except OSError as error:
            raise cannot_write(self.path, error) from None


class Retry:
    """A journal's lines once more, in a file beside it, with other ones for pictures that failed.

    The journal stays as it is until `finish`. A run that is killed leaves both, and the next goes on
    behind the last picture all of whose lines are whole. `done` pictures are in the new file; `failed`
    are the places in the input of those that the journal has an error of.
    """

    def __init__(self, path: Path, questions: int, count: int) -> None:
        """Open or make the file beside the journal of `count` pictures at `path`."""
        self.path, self.done = _retry_path(path), 0
        self._journal, self._copied = path, 0  # bytes of the journal that are done with
        self._pictures = itertools.islice(list_pictures(path, questions), count)
        kept = itertools.islice(list_pictures(path, questions), count)
        self.failed = [number for number, picture in enumerate(kept) if picture.failed]
        try:
            with contextlib.ExitStack() as stack:
                self._source = stack.enter_context(open(path, "rb"))
                self._file = stack.enter_context(open(self.path, "ab"))
                self._go_on(questions)
                self._held = stack.pop_all()
        except OSError as error:
            raise cannot_write(self.path, error) from None

    def __enter__(self) -> Retry:
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def _go_on(self, questions: int) -> None:
        """Cut what is torn, and count what is whole."""
        end = 0
        for picture in list_pictures(self.path, questions):
            other = next(self._pictures, None)
            if other is None or other.name != picture.name:
                raise Blip2Error(f"{self.path} is of another {self._journal}", "remove it")
            self._copied, self.done, end = other.end, self.done + 1, picture.end
        os.truncate(self.path, end)

    def replace(self, number: int, lines: list[dict[str, Any]]) -> None:
        """Write the pictures before the `number`-th as they are, then these lines in its place.

        Raises:
            Blip2Error: the disk is full, or cannot be written.
        """
        try:
            self._copy(number - self.done)
            self._file.write(encoded(lines))
        except OSError as error:
            raise cannot_write(self.path, error) from None
        self._copied, self.done = next(self._pictures).end, number + 1

    def _copy(self, pictures: int | None) -> None:
        for picture in itertools.islice(self._pictures, pictures):
            self._source.seek(self._copied)
            self._file.write(self._source.read(picture.end - self._copied))
            self._copied, self.done = picture.end, self.done + 1

    def flush(self) -> None:
        """Wait until all is on disk.

        Raises:
            Blip2Error: the disk is full, or cannot be written.
        """
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise cannot_write(self.path, error) from None

    def finish(self) -> None:
        """Write the pictures that are left as they are, and put the file in the journal's place.

        Raises:
            Blip2Error: the disk is full, or cannot be written.
        """
        try:
            self._copy(None)
        except OSError as error:
            raise cannot_write(self.path, error) from None
        self.flush()
        self._held.close()  # Windows replaces no file that is open
        try:
            os.replace(self.path, self._journal)
        except OSError as error:
            raise cannot_write(self._journal, error) from None


class StandardOutput:
    """Lines for a pipe: what `Journal` is for a file, but that no run can go on with them."""

    path, done, failed = Path("-"), 0, 0

    def __enter__(self) -> StandardOutput:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def names(self) -> Iterator[dict[str, str]]:
        """Nothing was done before."""
        return iter(())

    def append(self, lines: list[dict[str, Any]]) -> None:
        """Print lines at once, whatever the terminal's encoding, as they would be in a file."""
        sys.stdout.flush()
        sys.stdout.buffer.write(encoded(lines))
        sys.stdout.buffer.flush()


class Lines(NamedTuple):
    """One picture's lines: its name, where they end in the file, and whether they say an error."""

    name: dict[str, str]
    end: int
    failed: bool


class _Count(NamedTuple):
    done: int
    failed: int
    end: int


def list_pictures(path: Path, questions: int) -> Iterator[Lines]:
    """Every picture of a file all of whose lines are whole.

    Raises:
        Blip2Error: a line is damaged.
    """
    with open(path, "rb") as file:
        lines, end = 0, 0
        for line in file:
            end += len(line)
            if not line.endswith(b"\n"):
                return
            try:
                fields = json.loads(line)
                name = {key: fields[key] for key in ("path", "key") if key in fields}
            except (ValueError, TypeError, KeyError):
                raise Blip2Error(
                    f"{path} has a damaged line before its end (byte {end - len(line)})",
                    "cut it there, or choose another `output`",
                ) from None
            lines += 1
            failed = "error" in fields
            if failed or lines == questions:
                lines = 0
                yield Lines(name, end, failed)


def _count(pictures: Iterable[Lines]) -> _Count:
    done = failed = end = 0
    for picture in pictures:
        done, failed, end = done + 1, failed + picture.failed, picture.end
    return _Count(done, failed, end)


def _retry_path(path: Path) -> Path:
    return path.with_name(path.name + ".retry")


def companions(path: Path) -> dict[str, Path]:
    """The files that a journal at `path` has beside it, by what becomes of them."""
    names = {"options": "its options", "lock": "its lock", "retry": "its second try"}
    return {
        f"{what} (.{suffix})": path.with_name(f"{path.name}.{suffix}")
        for suffix, what in names.items()
    }


def check_place(path: Path) -> None:
    """See, before anything is opened, that lines may be appended to `path` and read again.

    Raises:
        Blip2Error: it is a folder, a pipe or a device, or where this program's own output goes.
    """
    try:
        status = os.stat(path)
    except OSError:
        return  # not there yet, or for the journal to say
    if stat.S_ISDIR(status.st_mode):
        raise Blip2Error(f"{path} is a directory", "name a file in it")
    streams = [os.fstat(descriptor) for descriptor in (1, 2)]
    if not stat.S_ISREG(status.st_mode) or any(os.path.samestat(status, s) for s in streams):
        raise Blip2Error(
            f"{path} is a pipe, a device or where this program prints, and no run could go on with"
            " it",
            "name a file, or print the lines with: `output` -",
        )


def encoded(lines: Sequence[dict[str, Any]]) -> bytes:
    """Lines of JSON in UTF-8; what no terminal shows is escaped, and parts of names that are no text.

    So that a line is one to whatever reads it: U+2028 ends one, too.
    """
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    return _NO_ASCII.sub(_escaped, text).encode("utf-8")


_NO_ASCII = re.compile(r"[^\x00-\x7e]")


def _escaped(found: re.Match[str]) -> str:
    return found[0] if found[0].isprintable() else json.dumps(found[0])[1:-1]


def _are_options(path: Path) -> bool:
    """Whether a file holds the options of a run: they go by their flags."""
    try:
        return any(name.startswith("--") for name in json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError, AttributeError):
        return False


def _write(file: BinaryIO, content: bytes) -> None:
    while content:
        content = content[file.write(content) :]


def cannot_write(path: Path | str, error: OSError) -> Blip2Error:
    """What to say of an output that cannot be written."""
    return Blip2Error(
        f"cannot write {path}: {error.strerror or error}",
        "mend that and give the same command again to go on, or choose another `output`",
    )
