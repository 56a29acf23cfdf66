"""What to look at: folders, patterns, lists, tar shards and pictures, in a fixed order.

    entries = list_entries(["photos", "more/*.jpg", "list.txt", "shard-000.tar"])
    for picture in read_pictures(entries):
        picture.path, picture.key

Folders are searched recursively for picture files and shards, sorted by path. Links to folders are
not followed: they may lead in circles. A shard's pictures are read through webdataset, one after
the other, so a shard may be larger than the memory.
"""

from __future__ import annotations

import dataclasses
import glob
import os
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from blip2.artifacts import UserError

SUFFIXES = (
    *(".bmp", ".gif", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm"),
    *(".tif", ".tiff", ".webp"),
)
_URLS = ("http://", "https://")


@dataclasses.dataclass(frozen=True)
class Picture:
    """One picture, not decoded: a file or URL, or with `key` and `content` a file in a shard.

    `error` says why there is nothing to decode: what could be read of a shard ends there.
    """

    path: str
    key: str | None = None
    content: bytes | None = None
    error: str | None = None

    @property
    def name(self) -> dict[str, str]:
        """What tells it from the others, as the output's lines have it."""
        return {"path": self.path} if self.key is None else {"path": self.path, "key": self.key}


def is_picture(name: str) -> bool:
    """Whether a file's name is one of a picture."""
    return name.lower().endswith(SUFFIXES)


def is_shard(name: str) -> bool:
    """Whether a file's name is one of a tar shard."""
    return name.lower().endswith(".tar")


def _is_url(source: str) -> bool:
    return source.lower().startswith(_URLS)


def is_collection(source: str) -> bool:
    """Whether `source` may stand for several pictures."""
    if _is_url(source):
        return False
    listed = source.lower().endswith((".tar", ".txt"))
    pattern = glob.has_magic(source) and not os.path.exists(source)
    return listed or os.path.isdir(source) or pattern


def list_entries(sources: Sequence[str]) -> list[str]:
    """The pictures and shards that the sources of a command line stand for, in order.

    Raises:
        UserError: a source that does not exist, or holds no picture.
    """
    return [entry for source in sources for entry in _entries_of(source)]


def _entries_of(source: str) -> list[str]:
    path = Path(source)
    if _is_url(source):
        return [source]
    if path.is_dir():
        entries = _entries_in(source)
    elif path.is_file() and source.lower().endswith(".txt"):
        entries = _listed_in(path)
    elif path.is_file():
        if source.endswith(".pt"):
            raise UserError(f"{source} is a tensor; with --output give --input_dir the pictures")
        return [source]
    elif glob.has_magic(source):
        matches = sorted(glob.glob(source, recursive=True))
        folders = [match for match in matches if os.path.isdir(match)]
        # "photos/**" matches a folder and what is in it: each file counts once.
        nested = {entry for folder in folders for entry in _entries_in(folder)}
        entries = sorted(nested | {m for m in matches if is_picture(m) or is_shard(m)})
    else:
        raise UserError(f"{source} does not exist; check --input_dir")
    if not entries:
        raise UserError(
            f"{source} holds no picture ({', '.join(SUFFIXES)}) and no .tar; check --input_dir"
        )
    return entries


def _entries_in(folder: str) -> list[str]:
    def refuse(error: OSError) -> None:
        raise UserError(f"cannot read {error.filename}: {error.strerror}; check its permissions")

    return sorted(
        os.path.join(directory, name)
        for directory, _, names in os.walk(folder, onerror=refuse)
        for name in names
        if is_picture(name) or is_shard(name)
    )


def _listed_in(path: Path) -> list[str]:
    try:
        # Names need not be UTF-8; os.fsdecode keeps their bytes.
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check its permissions") from None
    return [os.fsdecode(line) for line in lines if line.strip()]


def read_pictures(entries: Sequence[str]) -> Iterator[Picture]:
    """The pictures of every entry; a shard that breaks off ends with a Picture of its `error`.

    Raises:
        UserError: there is a shard, but no webdataset to read it with.
    """
    for entry in entries:
        if is_shard(entry) and not _is_url(entry):
            yield from _read_shard(entry)
        else:
            yield Picture(entry)


def _read_shard(path: str) -> Iterator[Picture]:
    try:
        from webdataset.tariterators import tar_file_expander
    except ImportError:
        raise UserError(
            f"{path} needs webdataset; install it with: pip install webdataset"
        ) from None
    try:
        with open(path, "rb") as stream:
            files = tar_file_expander(
                [{"url": path, "stream": stream}], select_files=is_picture, eof_value=None
            )
            for file in files:
                yield Picture(path, file["fname"], file["data"])
    except (OSError, EOFError, tarfile.TarError, ValueError) as error:
        reason = str(error.args[0]) if error.args else type(error).__name__
        if isinstance(error, OSError) and error.strerror:
            reason = error.strerror
        # webdataset adds the stream's repr, which tells a reader nothing.
        reason = reason.split(" @ ")[0]
        yield Picture(
            path, error=f"{path} is damaged or cannot be read: {reason}; replace the file"
        )


def count_pictures(entries: Sequence[str]) -> int:
    """How many pictures there are, by the headers of the shards: for a progress bar, not exact."""
    return sum(_count_in(e) if is_shard(e) and not _is_url(e) else 1 for e in entries)


def _count_in(path: str) -> int:
    count = 0
    try:
        with tarfile.open(path) as shard:
            for member in shard:
                count += member.isreg() and is_picture(member.name)
                shard.members = []  # tarfile keeps every header it has seen otherwise
    except (OSError, EOFError, tarfile.TarError):
        count += 1  # the line that will say so
    return count
