"""What the tests of many pictures share: scenes that tell the truth, run.py's command, processes."""

from __future__ import annotations

import json
import time
from pathlib import Path

from conftest import ROOT

from demo import scenes

CHECKPOINT = ROOT / "demo" / "checkpoint"
SCENES = 9  # in the fixture `photos`


def scene(number: int):
    """A scene that the demo checkpoint was not trained on."""
    return scenes.draw(scenes.EVALUATION_SEED + number)


def command(opt: Path, output: Path, *arguments: object) -> list[str]:
    """run.py with the demo checkpoint, from pictures to lines."""
    return [
        "run.py",
        *("--engine_dir", str(CHECKPOINT), "--opt_engine_dir", str(opt), "--workers", "2"),
        *("--max_output_len", "40", "--output", str(output), *map(str, arguments)),
    ]


def read(output: Path) -> list[dict]:
    """The lines of an output."""
    return [json.loads(line) for line in output.read_text().splitlines()]


def processes_of(marker: str) -> list[int]:
    """The processes that have `marker` in their environment, other than zombies."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if marker.encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def wait_for(condition, seconds: float) -> bool:
    """Whether `condition()` comes true in time."""
    end = time.monotonic() + seconds
    while not (met := condition()) and time.monotonic() < end:
        time.sleep(0.01)
    return met
