"""A thing to time on a CPU, and models of random weights to make it of."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from bench.cpu_limits import Run


@dataclasses.dataclass
class Work:
    """Something to time: `start(rows)` prepares a run; `cost(rows)` is its bytes, or operations."""

    start: Callable[[int], Run]
    cost: Callable[[int], float]


_POOL = torch.empty(1 << 24).normal_(0, 0.02, generator=torch.Generator().manual_seed(0))


def fill(tensor: torch.Tensor) -> torch.Tensor:
    """Overwrite with random values from a pool: drawing billions would take minutes.

    Each call begins elsewhere in the pool, or ONNX Runtime would keep equal weights once.
    """
    flat = tensor.view(-1)
    first = torch.randint(len(_POOL), ()).item()
    for start in range(-first, len(flat), len(_POOL)):
        part = flat[max(start, 0) : start + len(_POOL)]
        part.copy_(_POOL[max(-start, 0) :][: len(part)])
    return tensor


def filled(model: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """A module made on the meta device, with random weights on the CPU."""
    buffers = {name: buffer for name, buffer in model.named_buffers() if not buffer.is_meta}
    model = model.to(dtype).to_empty(device="cpu").eval().requires_grad_(False)
    for name, buffer in model.named_buffers():
        if name in buffers:
            buffer.copy_(buffers[name])
        elif "position_ids" in name:
            buffer.copy_(torch.arange(buffer.numel()).view_as(buffer))
    for name, parameter in model.named_parameters():
        fill(parameter.data)
        if "norm" in name.lower() and name.endswith("weight"):
            parameter.data += 1
    return model
