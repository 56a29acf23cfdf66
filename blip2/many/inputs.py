"""What to look at: folders, patterns, lists, tar shards and pictures, in a fixed order.

    entries = list_entries(["photos", "more/*.jpg", "list.txt", "shard-000.tar"])
    for picture in read_pictures(entries):
        picture.path, picture.key

Folders are searched recursively for picture files and shards, sorted by path; hidden folders in them
are left out. Links to folders are not followed: they may lead in circles. What macOS leaves beside
pictures (`._name`, `__MACOSX/`) are none. `{000..009}` and `{a,b}` stand for names, as in webdataset.
Of a shard only the headers are read, and whoever decodes a picture reads that; a compressed one is read
from its begin to its end, picture by picture. So a shard may be larger than the memory.
"""

from __future__ import annotations

import codecs
import dataclasses
import glob
import lzma
import os
import re
import sys
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from blip2.errors import Blip2Error, first_line
from blip2.images import MAX_FILE_BYTES, SUFFIXES

_URLS = ("http://", "https://")
_BRACES = re.compile(r"\{(?:(\d+)\.\.(\d+)|([^{},]*(?:,[^{},]*)+))\}")
_MOST_NAMES = 10_000_000  # of one pair of braces
_SHARDS = (".tar", ".tar.gz", ".tgz")
_ENCODINGS = {  # of a list, by its byte order mark
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}


@dataclasses.dataclass(frozen=True)
class Picture:
    """One picture, not decoded: a file or URL, or with `key` a file in a shard.

    Of the latter `content` are the bytes, of a compressed shard, or `place` says where they lie: offset
    and size. `error` says why there is nothing to decode: of a file in a shard, or where a shard breaks
    off.
    """

    path: str
    key: str | None = None
    content: bytes | None = None
    error: str | None = None
    place: tuple[int, int] | None = None

    @property
    def name(self) -> dict[str, str]:
        """What tells it from the others, as the output's lines have it."""
        return {"path": self.path} if self.key is None else {"path": self.path, "key": self.key}

    def read(self) -> bytes:
        """The bytes of a file in a shard.

        Raises:
            Blip2Error: the shard cannot be read, or is not what it was.
        """
        if self.content is not None:
            return self.content
        offset, size = self.place
        try:
            with open(self.path, "rb") as shard:
                shard.seek(offset)
                content = shard.read(size)
        except OSError as error:
            raise Blip2Error(
                f"cannot read {self.path}: {error.strerror}", "check its permissions"
            ) from None
        if len(content) < size:
            raise Blip2Error(f"{self.path} has become shorter", "replace the file")
        return content


def is_picture(path: str) -> bool:
    """Whether a file is a picture, by its path."""
    return path.lower().endswith(SUFFIXES) and not _is_of_macos(path)


def is_shard(path: str) -> bool:
    """Whether a file is a tar shard, by its path."""
    return path.lower().endswith(_SHARDS) and not _is_of_macos(path)


def _is_of_macos(path: str) -> bool:
    """Whether a path is one under which macOS keeps a file's attributes where nothing else can."""
    *folders, name = re.split(r"[/\\]" if os.sep == "\\" else "/", path)
    return name.startswith("._") or "__MACOSX" in folders


def _is_url(source: str) -> bool:
    return source.lower().startswith(_URLS)


def is_collection(source: str) -> bool:
    """Whether `source` may stand for several pictures."""
    if _is_url(source):
        return False
    listed = source.lower().endswith((*_SHARDS, ".txt"))
    pattern = (glob.has_magic(source) or _BRACES.search(source)) and not os.path.exists(source)
    return listed or os.path.isdir(source) or bool(pattern)


def list_entries(sources: Sequence[str]) -> list[str]:
    """The pictures and shards that the sources of a command line stand for, in order.

    Raises:
        Blip2Error: a source that does not exist, or holds no picture.
    """
    return [entry for source in sources for name in expand(source) for entry in _entries_of(name)]


def expand(source: str) -> list[str]:
    """The names that braces in a source stand for: {000..009}, {a,b}; itself if a file has it."""
    found = None if os.path.lexists(source) else _BRACES.search(source)
    if not found:
        return [source]
    first, last, words = found.groups()
    if words is not None:
        values = words.split(",")
    else:
        padded = any(len(number) > 1 and number[0] == "0" for number in (first, last))
        width = max(len(first), len(last)) if padded else 0
        if abs(int(last) - int(first)) > _MOST_NAMES:
            raise Blip2Error(f"{source} stands for more than {_MOST_NAMES} names", "give fewer")
        step = 1 if int(first) <= int(last) else -1
        values = [f"{n:0{width}}" for n in range(int(first), int(last) + step, step)]
    before, after = source[: found.start()], source[found.end() :]
    return [name for value in values for name in expand(f"{before}{value}{after}")]


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
            raise Blip2Error(f"{source} is a tensor", "give `input_dir` the pictures")
        return [source]
    elif glob.has_magic(source):
        matches = sorted(glob.glob(source, recursive=True))
        folders = [match for match in matches if os.path.isdir(match)]
        # "photos/**" matches a folder and what is in it: each file counts once.
        nested = {entry for folder in folders for entry in _entries_in(folder)}
        entries = sorted(nested | {m for m in matches if is_picture(m) or is_shard(m)})
    else:
        raise Blip2Error(f"{source} does not exist", "check `input_dir`")
    if not entries:
        raise Blip2Error(
            f"{source} holds no picture ({', '.join(SUFFIXES)}) and no .tar", "check `input_dir`"
        )
    return entries


def _entries_in(folder: str) -> list[str]:
    def refuse(error: OSError) -> None:
        raise Blip2Error(f"cannot read {error.filename}: {error.strerror}", "check its permissions")

    paths = []
    for directory, below, names in os.walk(folder, onerror=refuse):
        below[:] = [name for name in below if not name.startswith(".")]
        paths += (os.path.join(directory, name) for name in names)
    return sorted(path for path in paths if is_picture(path) or is_shard(path))


def _listed_in(path: Path) -> list[str]:
    """A list's lines: in the encoding of its byte order mark, else in that of file names.

    Those that begin with "#" are comments, unless a file has that name.

    Raises:
        Blip2Error: it cannot be read.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise Blip2Error(f"cannot read {path}: {error.strerror}", "check its permissions") from None
    mark = next((mark for mark in _ENCODINGS if content.startswith(mark)), b"")
    encoding = _ENCODINGS.get(mark, sys.getfilesystemencoding())
    try:
        # Names need not be valid in it: their bytes are kept, as the system's own names are.
        text = content[len(mark) :].decode(encoding, "surrogateescape")
    except UnicodeDecodeError as error:
        raise Blip2Error(f"cannot read {path}: {error}", "save it as UTF-8") from None
    lines = [_without_blanks(line) for line in re.split(r"\r\n|\r|\n", text) if line.strip()]
    return [line for line in lines if not line.startswith("#") or os.path.lexists(line)]


def _without_blanks(line: str) -> str:
    """A line without the blanks around it, unless they belong to a file's name."""
    stripped = line.strip()
    return line if line != stripped and os.path.lexists(line) else stripped


def read_pictures(entries: Sequence[str]) -> Iterator[Picture]:
    """The pictures of every entry; a shard that breaks off ends with a Picture of its `error`."""
    for entry in entries:
        if is_shard(entry) and not _is_url(entry):
            yield from _read_shard(entry)
        else:
            yield Picture(entry)


class _Member(tarfile.TarInfo):
    """A member of a tar file that must not break off: tarfile takes damage for the file's end.

    The end is a block of zeros. Behind it another tar file may follow, as `cat` joins them.
    """

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> tarfile.TarInfo:
        """The next member.

        Raises:
            tarfile.ReadError: the file is damaged, or is over without its end.
            tarfile.HeaderError: it is over, or there are zeros instead of a member.
        """
        try:
            member = super().fromtarfile(archive)
        except tarfile.EOFHeaderError:
            archive.has_ended = True
            raise
        except (tarfile.EmptyHeaderError, tarfile.TruncatedHeaderError):
            if getattr(archive, "has_ended", False):
                raise tarfile.EmptyHeaderError from None
            raise tarfile.ReadError(_CUT) from None
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(first_line(error)) from None
        archive.has_ended = False
        return member


def _open_shard(path: str, mode: str) -> tarfile.TarFile:
    return tarfile.open(path, mode, tarinfo=_Member, ignore_zeros=True)


def _is_plain(path: str) -> bool:
    """Whether a shard's files lie in it as they are: by its first header, which says "ustar"."""
    with open(path, "rb") as shard:
        return shard.read(512)[257:262] == b"ustar"


def _pictures_in(shard: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    for member in shard:
        if not member.isdir() and is_picture(member.name):
            yield member
        shard.members = []  # tarfile keeps every header it has seen otherwise


_CUT = "unexpected end of data"  # tarfile's own words for a member that breaks off
# What damaged shards make tarfile and the decompressors behind it raise.
_DAMAGES = (OSError, EOFError, tarfile.TarError, ValueError, zlib.error, lzma.LZMAError)


def _read_shard(path: str) -> Iterator[Picture]:
    try:
        if not _is_plain(path):
            with _open_shard(path, "r|*") as shard:
                for member in _pictures_in(shard):
                    yield _refused(path, member) or Picture(
                        path, member.name, shard.extractfile(member).read()
                    )
            return
        size = os.path.getsize(path)
        with _open_shard(path, "r:") as shard:
            for member in _pictures_in(shard):
                if member.offset_data + member.size > size:
                    raise tarfile.ReadError(_CUT)
                place = (member.offset_data, member.size)
                yield _refused(path, member) or Picture(path, member.name, place=place)
    except _DAMAGES as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        what = "truncated" if reason == _CUT or isinstance(error, EOFError) else "damaged"
        yield Picture(path, error=f"{path} is {what} ({reason}); replace the file")


def _refused(path: str, member: tarfile.TarInfo) -> Picture | None:
    """What is said instead of a file that is none, or too large."""
    name = f"{path}/{member.name}"
    if not member.isreg():
        error = f"{name} is a link or a device, not a file; make the shard of files"
        return Picture(path, member.name, error=error)
    if member.size > MAX_FILE_BYTES:
        error = f"{name} is larger than {MAX_FILE_BYTES >> 20} MiB; give a smaller file"
        return Picture(path, member.name, error=error)
    return None


def count_pictures(entries: Sequence[str]) -> int:
    """How many pictures there are, by the headers of the shards: for a progress bar, not exact."""
    return sum(_count_in(e) if is_shard(e) and not _is_url(e) else 1 for e in entries)


def _count_in(path: str) -> int:
    count = 0
    try:
        with _open_shard(path, "r:*") as shard:
            for _ in _pictures_in(shard):
                count += 1
    except _DAMAGES:
        count += 1  # the line that will say so
    return count
