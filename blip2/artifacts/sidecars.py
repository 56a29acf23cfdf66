"""Descriptions beside artifacts: of `a/b.onnx`, `a/b.json`."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from blip2.errors import Blip2Error


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
        Blip2Error: artifact or sidecar missing, unreadable, or not of one another.
    """
    if not path.is_file():
        raise Blip2Error(f"{path} does not exist", f"make it with: {made_by}")
    facts = read_json(sidecar_path(path), made_by)
    check_size(path, facts, made_by)
    return facts


@contextlib.contextmanager
def reading_sidecar(path: Path, made_by: str) -> Iterator[None]:
    """Within, a sidecar of `path` without an entry, or with one that makes no sense, is an error."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise Blip2Error(
            f"{sidecar_path(path)} does not describe {path.name} ({type(error).__name__}: {error})",
            f"make both again with: {made_by}",
        ) from None


def check_size(path: Path, described: Any, made_by: str) -> None:
    """Compare a file's size with its description's (see `describe_file`); Blip2Error if it differs."""
    if not path.is_file():
        raise Blip2Error(f"{path} does not exist", f"make it with: {made_by}")
    size = path.stat().st_size
    recorded = described.get("size") if isinstance(described, dict) else None
    if recorded != size:
        raise Blip2Error(
            f"{path} has {size} bytes, its description says {recorded}: it is"
            " truncated or was replaced",
            f"make it again with: {made_by}",
        )


def same_source(made_by: str, described: dict[Path, dict[str, Any]]) -> None:
    """Check that artifacts, given with their sidecars, come from one checkpoint.

    Raises:
        Blip2Error: names two files that do not belong together, or one that does not say.
    """
    fingerprints = {}
    for path, facts in described.items():
        with reading_sidecar(path, made_by):
            fingerprints[path] = facts["source"]["fingerprint"]
    (first, fingerprint), *others = fingerprints.items()
    for path, other in others:
        if other != fingerprint:
            raise Blip2Error(
                f"{first} and {path} come from different checkpoints",
                f"make both again with: {made_by}",
            )


def described_files(artifact: Path) -> Iterator[tuple[Path, Any]]:
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
    """Read a JSON object; raise Blip2Error, naming the command `made_by`, where that fails."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Blip2Error(f"{path} does not exist", f"make it with: {made_by}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise Blip2Error(f"cannot read {path}: {error}", f"make it again with: {made_by}") from None
    if not isinstance(content, dict):
        raise Blip2Error(f"{path} holds no JSON object", f"make it again with: {made_by}")
    return content
