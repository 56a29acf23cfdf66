"""The device that this suite's own engines run on."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from contextvars import ContextVar

import torch

from blip2 import cpu
from blip2.errors import Blip2Error

_OLDEST = 8  # compute capability: Ampere, which the kernels are written for

_chosen: ContextVar[torch.device | None] = ContextVar("device", default=None)


def best_device() -> torch.device:
    """The device of `chosen`; else the current GPU where the kernels run on it; else the CPU."""
    device = _chosen.get()
    if device is None and _runs_kernels(None):
        device = torch.device("cuda", torch.cuda.current_device())
    return device or torch.device("cpu")


def _runs_kernels(gpu: int | None) -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability(gpu)[0] >= _OLDEST


@functools.cache
def launches_dependently(gpu: torch.device | int) -> bool:
    """Whether a kernel there may start while the one before drains (PDL): Hopper and later."""
    return torch.cuda.get_device_capability(gpu)[0] >= 9


def has_float8(device: torch.device) -> bool:
    """Whether it multiplies in FP8: GPUs from Ada on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def half_dtype(device: torch.device) -> torch.dtype:
    """What products of float16 weights are computed in there: the fastest that is near enough."""
    if device.type == "cuda":
        return torch.float16
    return torch.bfloat16 if cpu.is_fast_in_bfloat16() else torch.float32


def sent(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """A tensor on a device. From the host's pageable memory a copy would wait for all queued there."""
    if tensor.device.type == "cpu" and torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def fetched(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Tensors of one device on the host. Waits for the device once, not for each of them."""
    copies = [tensor.to("cpu", non_blocking=True) for tensor in tensors]
    if tensors[0].is_cuda:
        torch.cuda.current_stream(tensors[0].device).synchronize()
    return copies


def describe(device: torch.device) -> str:
    """The device as messages call it."""
    return "a CPU" if device.type == "cpu" else f"an {torch.cuda.get_device_name(device)}"


@contextlib.contextmanager
def chosen(device: str | torch.device | None) -> Iterator[None]:
    """Within, engines are opened on `device`: "cpu", "cuda", "cuda:1"; None is the best there is.

    Raises:
        Blip2Error: there is no such device, or the kernels do not run on it.
    """
    token = _chosen.set(None if device is None else _checked(device))
    try:
        yield
    finally:
        _chosen.reset(token)


def _checked(device: str | torch.device) -> torch.device:
    try:
        wanted = torch.device(device)
    except (RuntimeError, TypeError):
        wanted = torch.device("meta")
    if wanted.type not in ("cpu", "cuda"):
        raise Blip2Error(f"`device` is {device!r}", "give 'cpu', 'cuda' or 'cuda:N'")
    if wanted.type == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if not count or (wanted.index or 0) >= count:
        raise Blip2Error(
            f"`device` is {device!r}, and there are {count} NVIDIA GPUs here",
            "give another, or leave it out",
        )
    number = torch.cuda.current_device() if wanted.index is None else wanted.index
    if not _runs_kernels(number):
        raise Blip2Error(
            f"`device` is {device!r}, which is older than Ampere", "give 'cpu', or leave it out"
        )
    return torch.device("cuda", number)
