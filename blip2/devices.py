"""The device that this suite's own engines run on."""

from __future__ import annotations

import torch

_OLDEST = 8  # compute capability: Ampere, which the kernels are written for


def best_device() -> torch.device:
    """The current GPU where its kernels run on it, else the CPU."""
    if torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= _OLDEST:
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
