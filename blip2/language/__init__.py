"""OPT sessions: one file per engine, one interface; the artifact in a directory chooses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from blip2.artifacts import UserError
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


def holds_engine(directory: Path) -> bool:
    """Whether some engine here can run what `directory` holds."""
    return any((directory / artifact).is_file() for artifact in _ENGINES)


def artifacts_of(directory: Path) -> dict[Path, str]:
    """The files that a session reads and that have sidecars, each with the command that makes it.

    TensorRT-LLM gives its engines none.
    """
    files = {directory / name: MADE_BY for name in _ENGINES if name.endswith(".safetensors")}
    return {path: command for path, command in files.items() if path.is_file()}


def open_language_session(directory: Path) -> LanguageSession:
    """Open the OPT that lies in `directory` with the engine that its artifact is for.

    Raises:
        UserError: no such directory, no artifact in it, or one that its engine cannot load.
    """
    for artifact, open_session in _ENGINES.items():
        if (directory / artifact).is_file():
            return open_session(directory)
    what = "holds no OPT" if directory.is_dir() else "does not exist"
    raise UserError(
        f"{directory} {what} ({' or '.join(_ENGINES)}); make one with:"
        f" python opt/convert_checkpoint.py --output_dir {directory}"
    )


def _open_tensorrt_llm(directory: Path) -> LanguageSession:
    from blip2.language.tensorrt_llm import TensorRTLLMSession

    return TensorRTLLMSession(directory)


def _open_native(directory: Path) -> LanguageSession:
    from blip2.language.native.session import NativeSession

    return NativeSession(directory)


# The first artifact found decides. Engines are imported only when they are chosen.
_ENGINES: dict[str, Callable[[Path], LanguageSession]] = {
    "rank0.engine": _open_tensorrt_llm,
    "rank0.safetensors": _open_native,
}
