"""Answers in the forms that people keep captions in: one writer a form.

    with writer_of(target, ...) as writer:
        writer.add(0, lines, picture)        # what is answered of the first picture
        writer.finish()

A writer begins anew each time, with the first picture, and is given all of them: what a killed run
left is written over. So the same answers make the same files, however often a run was continued.
"""

from __future__ import annotations

import abc
import csv
import io
import itertools
import json
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from blip2 import remote
from blip2.errors import Blip2Error
from blip2.images import read_picture
from blip2.layout import install
from blip2.many.inputs import Picture
from blip2.many.journal import cannot_write, encoded

Lines = Sequence[dict[str, Any]]  # of one picture

_ROW_GROUP = 10_000  # rows of a Parquet file
_COLUMNS = ("path", "key", "question", "answer", "score", "flags", "error", "beams")


class Store:
    """Where whole files go: a folder here, or with a URL one of an object store's."""

    def __init__(self, folder: Path, url: str = "") -> None:
        self._folder, self._url = folder, url

    @property
    def is_remote(self) -> bool:
        return bool(self._url)

    def publish(self, begun: Path, name: str) -> None:
        """Move a whole file there.

        Raises:
            OSError: it cannot be written there.
        """
        if self._url:
            remote.upload(begun, self._url + name)
            begun.unlink()
        else:
            _publish(begun, self._folder / name)

    def shards(self, path: Path) -> list[str]:
        """The names of the shards of `path` that there are."""
        pattern = re.compile(re.escape(path.stem) + r"-\d{6}\.tar")
        if self._url:
            found = remote.find(f"{self._url}{path.stem}-*.tar")
            names = [url.rpartition("/")[2] for url in found]
        else:
            names = os.listdir(self._folder) if self._folder.is_dir() else []
        return sorted(name for name in names if pattern.fullmatch(name))

    def exists(self, name: str) -> bool:
        """Whether a file is there."""
        if self._url:
            return remote.exists(self._url + name)
        return (self._folder / name).exists()

    def remove(self, name: str) -> None:
        """Remove a file."""
        if self._url:
            remote.remove(self._url + name)
        else:
            (self._folder / name).unlink()

    def shown(self, name: str) -> str:
        """How a file there is called."""
        return self._url + name if self._url else str(self._folder / name)


class Writer(abc.ABC):
    """Takes every picture's lines, in the input's order. Use it as a context: leaving it closes it."""

    needs_pictures = False  # their content, too

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @abc.abstractmethod
    def add(self, number: int, lines: Lines, picture: Picture | None) -> None:
        """Write the lines of picture `number` of the input; there may be none.

        Raises:
            OSError: the disk is full, or cannot be written.
        """

    def flush(self) -> None:  # noqa: B027 - most have nothing to show before they are whole
        """Let what was added be seen."""

    def finish(self) -> None:
        """That was all: what was not whole yet now is."""
        self.flush()

    def close(self) -> None:  # noqa: B027
        """Let go; what was not finished stays as it is."""


class _OneFile(Writer):
    """One that shows what was added as it grows, but in a store."""

    def __init__(self, path: Path, store: Store, mode: str, **how: str) -> None:
        self._path, self._store = path, store
        self._file = open(_begun_in(path, store), mode, **how)  # noqa: SIM115 - until close

    def flush(self) -> None:
        self._file.flush()

    def finish(self) -> None:
        self._file.close()
        if self._store.is_remote:  # else it is where it belongs
            self._store.publish(_begun(self._path), self._path.name)

    def close(self) -> None:
        self._file.close()
        if self._store.is_remote:
            _begun(self._path).unlink(missing_ok=True)


class JsonLines(_OneFile):
    """A line of JSON each."""

    def __init__(self, path: Path, store: Store) -> None:
        super().__init__(path, store, "wb")

    def add(self, number: int, lines: Lines, picture: Picture | None) -> None:  # noqa: ARG002
        self._file.write(encoded(lines))


class Csv(_OneFile):
    """A row each, in UTF-8, under the names of the columns; flags have blanks between them.

    What is no text in a file's name is escaped. `beams` is JSON, and empty without any.
    """

    def __init__(self, path: Path, store: Store) -> None:
        how = {"encoding": "utf-8", "errors": "backslashreplace", "newline": ""}
        super().__init__(path, store, "w", **how)
        self._rows = csv.DictWriter(self._file, _COLUMNS, lineterminator="\n")
        self._rows.writeheader()

    def add(self, number: int, lines: Lines, picture: Picture | None) -> None:  # noqa: ARG002
        for line in lines:
            row = {**line, "flags": " ".join(line.get("flags", ()))}
            if "beams" in row:
                row["beams"] = json.dumps(row["beams"], ensure_ascii=False)
            self._rows.writerow(row)


class Parquet(Writer):
    """A row each; the file is there once it is whole."""

    def __init__(self, path: Path, store: Store) -> None:
        """Begin it.

        Raises:
            Blip2Error: pyarrow is not installed.
        """
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError:
            raise Blip2Error(
                "a .parquet needs pyarrow", f"install it with: {install('data')}"
            ) from None
        self._arrow, self._path, self._begun = pyarrow, path, _begun(path)
        self._store = store
        text, number = pyarrow.string(), pyarrow.float64()
        beam = {"text": text, "score": number, "log_prob": number, "flags": pyarrow.list_(text)}
        types = dict.fromkeys(_COLUMNS, text)
        types |= {"score": number, "flags": pyarrow.list_(text)}
        types["beams"] = pyarrow.list_(pyarrow.struct(beam))
        self._schema = pyarrow.schema(types)
        self._file = pyarrow.parquet.ParquetWriter(self._begun, self._schema)
        self._rows: list[dict[str, Any]] = []

    def add(self, number: int, lines: Lines, picture: Picture | None) -> None:  # noqa: ARG002
        self._rows += (_in_unicode(line) for line in lines)
        if len(self._rows) >= _ROW_GROUP:
            self._write()

    def _write(self) -> None:
        self._file.write_table(self._arrow.Table.from_pylist(self._rows, self._schema))
        self._rows = []

    def finish(self) -> None:
        if self._rows:
            self._write()
        self._file.close()
        self._store.publish(self._begun, self._path.name)

    def close(self) -> None:
        self._file.close()
        self._begun.unlink(missing_ok=True)


class TarShards(Writer):
    """Shards for webdataset: of each picture the file as it was, a .txt and a .json.

    `captions.tar` becomes `captions-000000.tar` and on: shard k has the pictures k * size to
    (k + 1) * size - 1 of the input, without those of which there are no answers. Shards are there once
    they are whole, one after the other: those before the last of an earlier run are not written again.
    """

    needs_pictures = True

    def __init__(self, path: Path, store: Store, size: int) -> None:
        self._path, self._store, self._size = path, store, size
        self._whole = max(0, len(store.shards(path)) - 1)
        self._shard: tarfile.TarFile | None = None
        self._begun: Path | None = None
        self._count = 0

    def _name(self, number: int) -> str:
        return f"{self._path.stem}-{number:06}.tar"

    def add(self, number: int, lines: Lines, picture: Picture | None) -> None:
        shard = number // self._size
        if number % self._size == 0 and shard >= self._whole:
            self._end()
            self._begun = _begun(self._path.with_name(self._name(shard)))
            self._shard = tarfile.open(self._begun, "w")  # noqa: SIM115 - until _end
        self._count = number + 1
        answers = [line for line in lines if "error" not in line]
        if answers and self._shard is not None:
            self._write(number, answers, picture)

    def _write(self, number: int, answers: Lines, picture: Picture) -> None:
        content = read_picture(picture.path) if picture.key is None else picture.read()
        suffix = Path(picture.key or picture.path).suffix.lower() or ".jpg"
        told = [{k: v for k, v in line.items() if k not in ("path", "key")} for line in answers]
        parts = {
            suffix: content,
            ".txt": "\n".join(line["answer"] for line in answers).encode("utf-8"),
            ".json": encoded([{**picture.name, "answers": told}]),
        }
        for ending, part in parts.items():
            member = tarfile.TarInfo(f"{number:09}{ending}")
            member.size = len(part)
            self._shard.addfile(member, io.BytesIO(part))

    def _end(self) -> None:
        if self._shard is not None:
            self._shard.close()
            self._shard = None
            self._store.publish(self._begun, self._name((self._count - 1) // self._size))

    def finish(self) -> None:
        self._end()

    def close(self) -> None:
        if self._shard is not None:
            self._shard.close()
            self._begun.unlink(missing_ok=True)


class Sidecars(Writer):
    """A .txt for each picture, beside it or in the same place below another folder.

    A file that is there stays, unless it is to be written over. A picture of a shard has its text in a
    folder named after the shard. Several answers are lines.
    """

    def __init__(self, folder: Path, roots: Sequence[str], overwrite: bool) -> None:
        """For pictures of some folders: `roots` are those that were given."""
        self._folder, self._overwrite = folder, overwrite
        self._roots = sorted((os.path.abspath(root) for root in roots), key=len, reverse=True)

    def place(self, path: str, key: str | None = None) -> Path:
        """Where a picture's text goes."""
        path = os.path.abspath(path) if "://" not in path else path
        below = os.path.basename(path)
        for root in self._roots:
            if path.startswith(os.path.join(root, "")):
                below = os.path.relpath(path, root)
                break
        if key is not None:
            below = os.path.join(_without_suffix(below), *Path(key.replace("..", "__")).parts)
        return self._folder / (_without_suffix(below.lstrip("/")) + ".txt")

    def check(self, paths: Sequence[str]) -> None:
        """See that no two pictures have one place.

        Raises:
            Blip2Error: names two.
        """
        taken: dict[Path, str] = {}
        for path in paths:
            if (other := taken.setdefault(self.place(path), path)) != path:
                raise Blip2Error(
                    f"{other} and {path} would both have their text in {self.place(path)}",
                    "rename one, or give `input_dir` the folder that holds the folders of both",
                )

    def add(self, number: int, lines: Lines, picture: Picture | None) -> None:  # noqa: ARG002
        answers = [line["answer"] for line in lines if "error" not in line]
        if not answers:
            return
        place = self.place(lines[0]["path"], lines[0].get("key"))
        if place.exists() and not self._overwrite:
            return
        place.parent.mkdir(parents=True, exist_ok=True)
        begun = _begun(place)
        begun.write_text("\n".join(answers) + "\n", encoding="utf-8")
        _publish(begun, place)


def of_pictures(lines: Iterator[dict[str, Any]], questions: int) -> Iterator[Lines]:
    """The lines of each picture: one with "error", or one a question."""
    for line in lines:
        more = 0 if "error" in line else questions - 1
        yield [line, *itertools.islice(lines, more)]


def _in_unicode(line: dict[str, Any]) -> dict[str, Any]:
    """A line whose names are text: what is none in them is escaped."""
    return {
        name: value.encode("utf-8", "backslashreplace").decode() if type(value) is str else value
        for name, value in line.items()
    }


def _begun(path: Path) -> Path:
    """Where a file lies until it is whole."""
    return path.with_name(path.name + ".part")


def _begun_in(path: Path, store: Store) -> Path:
    """Where a text that can be read while it grows does so."""
    return _begun(path) if store.is_remote else path


def _publish(begun: Path, path: Path) -> None:
    with open(begun, "r+b") as file:
        os.fsync(file.fileno())
    os.replace(begun, path)


def _without_suffix(path: str) -> str:
    return os.path.splitext(path)[0]


def explained(place: str, error: OSError) -> Blip2Error:
    """What to say where a writer fails."""
    return cannot_write(error.filename or place, error)
