"""Launches of this suite's kernels, and their compilation ahead, many side by side.

    with compile_ahead():
        stage(example)           # launches nothing of ours: compiles, in threads, what it would launch
    stage(pictures)              # waits for what it needs of it

A process that finds nothing compiled would otherwise compile one kernel after another, each when it
is first launched.
"""

from __future__ import annotations

import collections
import contextlib
import functools
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import ContextVar
from typing import Any

import torch

from blip2.devices import launches_dependently

_THREADS = 8

_is_ahead: ContextVar[bool] = ContextVar("compiling ahead", default=False)
# Of each Triton kernel: what is being compiled, by what Triton tells its variants apart by.
_compiling: dict[Any, dict[tuple, Future]] = collections.defaultdict(dict)


@contextlib.contextmanager
def compile_ahead() -> Iterator[None]:
    """Within, this thread has kernels compiled instead of launched: outputs stay as they were."""
    token = _is_ahead.set(True)
    try:
        yield
    finally:
        _is_ahead.reset(token)


def is_ahead() -> bool:
    """Whether this thread is within `compile_ahead`."""
    return _is_ahead.get()


def launch(
    kernel: Any, grid: tuple[int, ...], *arguments: Any, device: torch.device, **options: Any
) -> None:
    """Launch a Triton kernel, dependent on the one before where the GPU can (PDL, Hopper and later).

    Within `compile_ahead`, have it compiled.

    Args:
        kernel: what `triton.jit` makes; it has a constexpr PDL.
        grid: of programs.
        arguments: the kernel's, in order.
        device: the GPU.
        options: its constexprs, and Triton's own such as num_warps.
    """
    options |= _dependent_options(device)
    if is_ahead():
        variant = (*map(_kind, arguments), *sorted(options.items()))
        if variant not in _compiling[kernel]:
            _compiling[kernel][variant] = submit(_compile, device, kernel, grid, arguments, options)
        return
    for compiled in _compiling.pop(kernel, {}).values():
        compiled.result()
    kernel[grid](*arguments, **options)


def submit(function: Callable[..., Any], *arguments: Any) -> Future:
    """Have something compiled in another thread."""
    return _threads().submit(function, *arguments)


@functools.cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_THREADS)


@functools.cache
def _dependent_options(device: torch.device) -> dict[str, bool]:
    dependent = launches_dependently(device)
    return {"PDL": True, "launch_pdl": True} if dependent else {"PDL": False}


def _compile(
    device: torch.device,
    kernel: Any,
    grid: tuple[int, ...],
    arguments: tuple[Any, ...],
    options: dict[str, Any],
) -> None:
    with torch.cuda.device(device):
        compiled = kernel.warmup(*arguments, grid=grid, **options)
        _ = compiled.run  # loads it, and compiles what passes its arguments


def _kind(argument: Any) -> tuple[Any, ...]:
    """What Triton compiles a kernel anew for, at least."""
    if isinstance(argument, torch.Tensor):
        return (argument.dtype, argument.data_ptr() % 16 == 0)
    if isinstance(argument, int):
        return (int, argument == 1, argument % 16 == 0, argument.bit_length() > 31)
    if hasattr(argument, "block_shape"):  # a descriptor of a tensor
        return (argument.base.dtype, tuple(argument.block_shape))
    return (type(argument),)
