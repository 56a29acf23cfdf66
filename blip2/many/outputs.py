"""Where answers go, by the name of --output, and what they are made of when a run goes on.

A `.jsonl` is its own journal. Any other form has one beside it, `captions.csv.journal`, which grows by
a batch at a time; the outputs are made of it, from the first picture on, each time a run is continued.
So they may be in any form, and routed by any rule, and still neither lack an answer nor have one twice.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from blip2 import remote
from blip2.errors import Blip2Error
from blip2.many import inputs
from blip2.many.formats import (
    Csv,
    JsonLines,
    Lines,
    Parquet,
    Sidecars,
    Store,
    TarShards,
    Writer,
    explained,
    of_pictures,
)
from blip2.many.journal import Journal, check_place

_FORMS = {".csv": Csv, ".parquet": Parquet, ".tar": TarShards}


@dataclasses.dataclass(frozen=True)
class Rule:
    """Which lines are rejected: those of a lower score, or with one of some flags."""

    min_score: float | None = None
    flags: Sequence[str] = ()

    def __bool__(self) -> bool:
        return self.min_score is not None or bool(self.flags)

    def rejects(self, line: dict[str, Any]) -> bool:
        """Whether it does; no error is."""
        if "error" in line:
            return False
        low = self.min_score is not None and line["score"] < self.min_score
        return low or not set(self.flags).isdisjoint(line["flags"])


@dataclasses.dataclass(frozen=True)
class Target:
    """What --output names: a file, whose suffix is its form, or a folder for .txt sidecars.

    Attributes:
        path: of the file or folder; of a `.tar` the shards have numbers in their names. Of a file in
            an object store what is not whole yet, and the journal, in the current directory.
        rule: what goes to the file of rejected lines instead.
        shard_size: pictures of a `.tar`.
        overwrite: write over sidecars that are there.
        is_folder: whether it is a folder.
    """

    path: Path
    rule: Rule = Rule()
    shard_size: int = 1000
    overwrite: bool = False
    is_folder: bool = False
    url: str = ""  # of the store's folder

    @classmethod
    def of(cls, text: str, **settings: Any) -> Target:
        """What a command line's word means: a folder is there already, or ends by a slash.

        Raises:
            Blip2Error: it is a folder in an object store.
        """
        if remote.is_remote(text):
            folder, _, name = text.rpartition("/")
            if not name:
                raise Blip2Error(
                    f"{text} is a folder in an object store, where no sidecars can be written",
                    "name a .jsonl, .csv, .parquet or .tar in it",
                )
            return cls(Path(name), url=folder + "/", **settings)
        is_folder = text.endswith(("/", os.sep)) or os.path.isdir(text)
        return cls(Path(text), is_folder=is_folder, **settings)

    @property
    def journal(self) -> Path:
        """The file that a run goes on with."""
        if self.is_folder:
            return self.path / "captions.journal"
        is_its_own = not (self.path.suffix.lower() in _FORMS or self.rule or self.url)
        return self.path if is_its_own else self.path.with_name(self.path.name + ".journal")

    @property
    def rejected(self) -> Path:
        """The file of rejected lines."""
        if self.is_folder:
            return self.path / "rejected.jsonl"
        return self.path.with_name(self.path.stem + ".rejected.jsonl")

    def files(self) -> dict[str, Path]:
        """The files that are written of the journal, by what they are called in messages."""
        files = {} if self.is_folder or self.journal == self.path else {"`output`": self.path}
        return files | ({"the file of rejected lines": self.rejected} if self.rule else {})

    def check(self) -> None:
        """See, before anything is opened, that no file would be replaced that a run has not made.

        Raises:
            Blip2Error: names it.
        """
        if not (self.is_folder or self.url):
            check_place(self.path)
        check_place(self.journal)
        if self.journal.is_file():
            return
        names = [path.name for path in self.files().values()]
        if self._is_shards:
            names += self.store.shards(self.path)
        for name in names:
            if self.store.exists(name):
                raise Blip2Error(
                    f"{self.store.shown(name)} exists and has no {self.journal.name} beside it, so no"
                    " run can go on with it",
                    "remove it, or choose another `output`",
                )

    @property
    def shown(self) -> str:
        """How it is called in messages."""
        return self.url + self.path.name if self.url else str(self.path)

    @property
    def store(self) -> Store:
        """Where whole files go."""
        return Store(self.path if self.is_folder else self.path.parent, self.url)

    def made_with(self) -> dict[str, Any]:
        """What must stay the same for a run to go on, by flag."""
        return {"--shard_size": self.shard_size} if self._is_shards else {}

    @property
    def _is_shards(self) -> bool:
        return self.path.suffix.lower() == ".tar" and not self.is_folder

    def forget_shards(self) -> None:
        """Remove shards, to be made again of other answers."""
        if self._is_shards:
            for name in self.store.shards(self.path):
                self.store.remove(name)

    def check_pictures(self, sources: Sequence[str], entries: Sequence[str]) -> None:
        """See that each picture has a place of its own.

        Raises:
            Blip2Error: names two that have not.
        """
        if self.is_folder:
            files = dict.fromkeys(entry for entry in entries if not inputs.is_shard(entry))
            self._sidecars(sources).check(list(files))

    def _sidecars(self, sources: Sequence[str]) -> Sidecars:
        folders = [source for source in sources if os.path.isdir(source)]
        return Sidecars(self.path, folders, self.overwrite)

    def writers(self, sources: Sequence[str]) -> list[Writer]:
        """What writes the lines that are kept, and those that are rejected if any are.

        Raises:
            Blip2Error: a file cannot be made.
        """
        made: list[Writer] = []
        try:
            if self.is_folder:
                made.append(self._sidecars(sources))
            elif self._is_shards:
                made.append(TarShards(self.path, self.store, self.shard_size))
            else:
                form = _FORMS.get(self.path.suffix.lower(), JsonLines)
                made.append(form(self.path, self.store))
            if self.rule:
                made.append(JsonLines(self.rejected, self.store))
        except OSError as error:
            raise explained(self.shown, error) from None
        return made

    @contextlib.contextmanager
    def following(
        self, journal: Journal, sources: Sequence[str], entries: Sequence[str], questions: int
    ) -> Iterator[Journal | Following]:
        """What a run appends lines to: the journal, or outputs with it, which end whole.

        Raises:
            Blip2Error: an output cannot be written.
        """
        if self.journal == self.path:
            yield journal
            return
        with contextlib.ExitStack() as stack:
            writers = [stack.enter_context(writer) for writer in self.writers(sources)]
            following = Following(self, journal, writers, entries, questions)
            following.catch_up()
            yield following
            following.finish()


class Following:
    """A journal, and outputs that get what it gets: see `Target.following`."""

    def __init__(
        self,
        target: Target,
        journal: Journal,
        writers: Sequence[Writer],
        entries: Sequence[str],
        questions: int,
    ) -> None:
        self.path, self.done, self.failed = target.path, journal.done, journal.failed
        self._target, self._journal, self._questions = target, journal, questions
        self._kept, self._rejected = writers[0], writers[1:]
        self._pictures = inputs.read_pictures(entries) if self._kept.needs_pictures else None
        self._count = 0

    def catch_up(self) -> None:
        """Write what earlier runs have answered."""
        with open(self._journal.path, "rb") as lines:
            self._add(map(json.loads, lines))

    def append(self, lines: Lines) -> None:
        """As `Journal.append`, and then to the outputs.

        Raises:
            Blip2Error: one of them cannot be written.
        """
        self._journal.append(list(lines))
        self._add(iter(lines))

    def _add(self, lines: Iterator[dict[str, Any]]) -> None:
        rule = self._target.rule
        with self._explaining():
            for of_picture in of_pictures(lines, self._questions):
                picture = next(self._pictures) if self._pictures else None
                kept = [line for line in of_picture if not rule.rejects(line)]
                self._kept.add(self._count, kept, picture)
                for writer in self._rejected:
                    writer.add(self._count, list(filter(rule.rejects, of_picture)), None)
                self._count += 1
            for writer in (self._kept, *self._rejected):
                writer.flush()

    def finish(self) -> None:
        """Have all outputs whole."""
        with self._explaining():
            for writer in (self._kept, *self._rejected):
                writer.finish()

    @contextlib.contextmanager
    def _explaining(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise explained(self._target.shown, error) from None
