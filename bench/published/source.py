"""Where the checkpoint comes from: a directory, or the hub, with what is still to be downloaded."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blip2 import artifacts
from blip2.checkpoints import hub
from blip2.errors import Blip2Error, first_line

_BLOCK = 1 << 22


@dataclasses.dataclass(frozen=True)
class RemoteFile:
    """A file of the hub: its bytes, the hash that its content has, and whether it is here."""

    name: str
    size: int
    algorithm: str
    hash: str
    is_here: bool


@dataclasses.dataclass(frozen=True)
class Source:
    """A checkpoint that may not be here yet.

    Attributes:
        name: as it was given.
        config: its config.json.
        files: what the hub has of it; empty of a directory, and of a repository that is in the
            cache while the hub cannot be reached.
        commit: the hub's.
        directory: of one that is here.
    """

    name: str
    config: Mapping[str, Any]
    files: tuple[RemoteFile, ...] = ()
    commit: str | None = None
    directory: Path | None = None

    @property
    def missing_bytes(self) -> int:
        """What is to be downloaded."""
        return sum(file.size for file in self.files if not file.is_here)

    def fetch(self) -> Path:
        """The checkpoint's directory, downloaded if need be.

        Raises:
            Blip2Error: it cannot be downloaded. Files that are whole stay for the next try.
        """
        if self.directory is not None:
            return self.directory
        if self.missing_bytes:
            print(f"downloading {self.missing_bytes / 1e9:.2f} GB of {self.name}", flush=True)
        try:
            return hub.download(self.name)
        except Blip2Error as error:
            raise Blip2Error(
                error.problem,
                "the same command goes on with it, and keeps the files that are whole; without a"
                " network give `model_dir` a directory",
            ) from None

    def verify(self, directory: Path, known: Path) -> str:
        """Compare the files with the hub's hashes; those compared before are listed in `known`.

        Returns:
            What was compared, for the report.

        Raises:
            Blip2Error: a file is another; it is removed, so that it is downloaded again.
        """
        if not self.files:
            return "not compared with the hub's hashes"
        stamps = json.loads(known.read_text()) if known.is_file() else {}
        for file in self.files:
            path = directory / file.name
            stamp = [path.stat().st_size, path.stat().st_mtime_ns, file.hash]
            if stamps.get(str(path)) == stamp:
                continue
            found = _hash(path, file.algorithm)
            if found != file.hash:
                path.resolve().unlink()
                path.unlink(missing_ok=True)  # a link into the cache
                raise Blip2Error(
                    f"{file.name} of {self.name} came damaged: its {file.algorithm} is"
                    f" {found[:12]}…, the hub's {file.hash[:12]}…; it was removed",
                    "the same command downloads it again",
                )
            stamps[str(path)] = stamp
        with artifacts.staging(known.parent, is_ours=lambda _: True) as stage:
            (stage / known.name).write_text(json.dumps(stamps))
        return f"{len(self.files)} files have the hub's hashes, commit {self.commit}"


def find(model: str) -> Source:
    """Look at a checkpoint's directory, or ask the hub for a repository, without its weights.

    Raises:
        Blip2Error: there is no such directory or repository, or no network and nothing in the cache.
    """
    from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache

    directory = Path(model)
    if directory.exists():
        return Source(model, _config(directory / "config.json"), directory=directory)
    try:
        info = HfApi().model_info(model, files_metadata=True)
        wanted = hub.wanted(sibling.rfilename for sibling in info.siblings)
        files = []
        for sibling in info.siblings:
            if sibling.rfilename not in wanted:
                continue
            here = try_to_load_from_cache(model, sibling.rfilename, revision=info.sha)
            lfs = sibling.lfs
            kind, value = ("sha256", lfs.sha256) if lfs else ("git-sha1", sibling.blob_id)
            size = sibling.size or 0
            files.append(RemoteFile(sibling.rfilename, size, kind, value, isinstance(here, str)))
        config = hf_hub_download(model, "config.json")
    except Exception as error:  # Which library's errors come out depends on the hub's version.
        return _cached(model, error)
    return Source(model, _config(Path(config)), tuple(files), info.sha)


def _cached(model: str, error: Exception) -> Source:
    """What an earlier download left, where the hub cannot be reached."""
    from huggingface_hub import snapshot_download

    with contextlib.suppress(Exception):
        directory = Path(snapshot_download(model, local_files_only=True))
        if any(hub.is_weights(path.name) for path in directory.iterdir()):
            return Source(model, _config(directory / "config.json"), directory=directory)
    raise Blip2Error(
        f"{model} is no directory, and the hub cannot be asked for it ({first_line(error)})",
        "without a network, copy the checkpoint here and give `model_dir` its directory",
    )


def _config(path: Path) -> dict[str, Any]:
    return artifacts.read_json(path, "downloading the checkpoint again")


def _hash(path: Path, algorithm: str) -> str:
    """SHA-256 of a file, or SHA-1 of what git makes of it: its length, then its content."""
    digest = hashlib.sha256()
    if algorithm == "git-sha1":
        digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
