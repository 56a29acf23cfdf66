"""OPT sessions: one file per engine, one interface; the artifact in a directory chooses."""

from __future__ import annotations

import dataclasses
import importlib
import shlex
from collections.abc import Callable
from pathlib import Path

from blip2.artifacts import UserError
from blip2.checkpoints import is_checkpoint
from blip2.language.session import (
    Beam,
    Generation,
    GenerationOptions,
    LanguageSession,
    Limits,
)
from blip2.language.trtllm_format import MADE_BY

__all__ = [
    "Beam",
    "Generation",
    "GenerationOptions",
    "LanguageSession",
    "Limits",
    "artifacts_of",
    "holds_engine",
    "open_language_session",
]


@dataclasses.dataclass(frozen=True)
class Engine:
    """What opens an artifact, what says that a directory has it, and the files with a sidecar."""

    module: str
    session: str
    is_in: Callable[[Path], bool]
    files: tuple[str, ...] = ()


def _has(file: str) -> Callable[[Path], bool]:
    return lambda directory: (directory / file).is_file()


# The first whose artifact is found decides. Engines are imported only when they are chosen.
ENGINES = {
    "rank0.engine": Engine(
        "blip2.language.tensorrt_llm", "TensorRTLLMSession", _has("rank0.engine")
    ),
    "rank0.safetensors": Engine(
        "blip2.language.native.session",
        "NativeSession",
        _has("rank0.safetensors"),
        ("rank0.safetensors",),
    ),
    "a BLIP-2 or OPT checkpoint": Engine(
        "blip2.language.native.session", "NativeSession", is_checkpoint
    ),
}


def _engine_of(directory: Path) -> Engine | None:
    return next((engine for engine in ENGINES.values() if engine.is_in(directory)), None)


def holds_engine(directory: Path) -> bool:
    """Whether some engine here can run what `directory` holds."""
    return _engine_of(directory) is not None


def artifacts_of(directory: Path) -> dict[Path, str]:
    """The files that a session reads and that have sidecars, each with the command that makes it.

    TensorRT-LLM gives its engines none.
    """
    engine = _engine_of(directory)
    return {directory / file: MADE_BY for file in engine.files} if engine else {}


def open_language_session(directory: Path) -> LanguageSession:
    """Open the OPT in `directory` with the engine that its artifact is for; `load` reads weights.

    Raises:
        UserError: no such directory, no artifact in it, or one that its engine cannot take.
    """
    engine = _engine_of(directory)
    if engine is None:
        what = "holds no OPT" if directory.is_dir() else "does not exist"
        # What is there already is something else, which a checkpoint does not belong into.
        filled = directory.is_dir() and any(directory.iterdir())
        command = (
            MADE_BY if filled else shlex.join([*MADE_BY.split(), "--output_dir", str(directory)])
        )
        raise UserError(f"{directory} {what} ({' or '.join(ENGINES)}); make one with: {command}")
    return getattr(importlib.import_module(engine.module), engine.session)(directory)
