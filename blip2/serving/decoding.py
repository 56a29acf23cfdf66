"""The process that decodes pictures that strangers sent: one at a time, within bounds.

It may take too long, or die; then it is ended, and another takes its place.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from blip2 import images, memory
from blip2.errors import Blip2Error
from blip2.images import Preprocessing
from blip2.serving.frames import Channel
from blip2.serving.slots import SharedMemory

MAX_PIXELS = 50_000_000  # some 400 MB while they are decoded
_NICE = 10  # where processors are short the engines and HTTP have them first: others wait for those
_MEMORY = 4 << 30  # bytes: what a decoder may make of a picture that lies


def run(channel: Channel, memory: SharedMemory) -> None:
    """Decode what comes until the server has gone; raises EOFError or OSError then.

    A frame has the picture's file, and the slot of `memory` for its pixels; the first one the
    preprocessing. The answer has the pixels' shape, 3 x S x S, or the code of what is wrong.
    """
    _limit_memory()
    os.nice(_NICE)
    frame = channel.read()
    preprocessing = Preprocessing.from_dict(frame.message["preprocessing"])
    channel.write({})
    while True:
        frame = channel.read()
        pixels = decode(bytes(frame.content), preprocessing)
        if isinstance(pixels, str):
            channel.write({"wrong": pixels})
        else:
            slot = memory.slot(frame.message["slot"], pixels.nbytes)
            np.copyto(np.frombuffer(slot, np.uint8).reshape(pixels.shape), pixels)
            channel.write({"shape": list(pixels.shape)})


def decode(content: bytes, preprocessing: Preprocessing) -> np.ndarray | str:
    """A file's pixels at the ViT's size, 3 x S x S, uint8; or "unknown", "large" or "damaged".

    Of an animation that is its first frame, whatever follows; turned as EXIF says, transparency over
    white: as `blip2.images` does it everywhere.
    """
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            try:
                opened = Image.open(io.BytesIO(content), formats=[*images.FORMATS, "DIB"])
            except Image.DecompressionBombError:
                return "large"
            except Image.UnidentifiedImageError:
                return "unknown"
            if opened.width * opened.height > MAX_PIXELS:
                return "large"
            image = images.decode_image(content, "the picture")
            return images.resized_pixels(image, preprocessing)
    except (MemoryError, memory.OutOfMemory):
        return "large"
    except Blip2Error:  # which says why in the decoder's own words
        return "damaged"
    except Exception:  # Pillow's parsers raise whatever comes up
        return "damaged"


def _limit_memory() -> None:
    if sys.platform != "linux":
        return
    import resource

    # Beside what libraries have reserved, which is more the more processors there are.
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    wanted = pages * resource.getpagesize() + _MEMORY
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    with contextlib.suppress(ValueError, OSError):  # a lower one is set already
        resource.setrlimit(resource.RLIMIT_AS, (wanted, most))


def first_message(preprocessing: Preprocessing) -> dict[str, Any]:
    """What a decoding process is told before anything else."""
    return {"preprocessing": dataclasses.asdict(preprocessing)}
