"""How both sides are asked, and timed, so that their answers can be compared."""

from __future__ import annotations

import hashlib
import time

import torch

MAX_OUTPUT_LEN = 20  # tokens
DECODINGS = {"greedy": {"num_beams": 1}, "beams": {"num_beams": 5}}


class Timed:
    """Appends the seconds that its body took, on a GPU to the end of what it started."""

    def __init__(self, seconds: list[float]) -> None:
        self._seconds = seconds

    def __enter__(self) -> None:
        self._begun = now()

    def __exit__(self, *_: object) -> None:
        self._seconds.append(now() - self._begun)


def now() -> float:
    """Seconds, once a GPU has done what it was given."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def digest(pixel_values: torch.Tensor) -> str:
    """SHA-256 of a picture's pixel_values, 3 x S x S, float32."""
    return hashlib.sha256(pixel_values.float().cpu().contiguous().numpy().tobytes()).hexdigest()
