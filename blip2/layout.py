"""Where the parts of an export lie: what `--engine_dir` names, and what is found around it."""

from __future__ import annotations

from pathlib import Path

from blip2 import vision

ENGINES = ("plan", "onnx")  # in an export's directory; the first that holds something is taken


def engines_in(directory: Path) -> Path:
    """The directory if it holds a ViT and a Q-Former, else the one below it that does, else itself."""
    choices = [directory, *(directory / name for name in ENGINES)]
    return next(filter(vision.holds_engine, choices), directory)


def find_beside(engine_dir: Path, name: str) -> Path:
    """A file of the export: with the engines, beside their directory, or in the current one.

    Where there is none, the place where the export would have put it.
    """
    around = [engine_dir / name, engine_dir.parent / name, Path(name)]
    expected = around[1] if engine_dir.is_dir() else around[2]
    return next((path for path in around if path.exists()), expected)
