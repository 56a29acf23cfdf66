"""What tests have other processes do: those import where it is defined, and little with this."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import numpy as np

from blip2.images import Preprocessing
from blip2.many import inputs
from blip2.many.decoders import decode_picture


def die_of(picture: inputs.Picture, bad: list[bytes], pids: Path) -> np.ndarray | str:
    """A picture's pixels; of those in `bad` the end of the process, as when memory runs out."""
    if os.fsencode(picture.path) in bad:
        with pids.open("a") as file:
            file.write(f"{os.getpid()}\n")
        os.kill(os.getpid(), signal.SIGKILL)
    return decode_picture(picture, Preprocessing(4, 4))


def die(_picture: inputs.Picture, *_arguments: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def repeated(number: int, count: int) -> tuple[int, bytes]:
    time.sleep(0.005)
    return os.getpid(), bytes([number]) * count
