"""CUDA graphs: what is queued for a GPU again and again over the same buffers, replayed at once."""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

from blip2 import memory
from blip2.gpu.kernel_launch import is_ahead

_capturing = threading.Lock()  # PyTorch captures one graph at a time


class Graph:
    """What is queued over static buffers, a replay of one CUDA graph from the second call on.

    The first call queues it as it is: kernels are compiled and cuBLAS sets itself up then, which a
    capture must not do, and what is called once does not pay for one. Where memory does not suffice
    for a graph, which has its own, all calls do so.
    """

    def __init__(self, pool: Any = None) -> None:
        """`pool` is what `capture` takes."""
        self._pool = pool
        self._calls = 0
        self._replay: Callable[[], None] | None = None

    def __call__(self, launch: Callable[[], None]) -> None:
        """`launch` queues the same each time. Not kept: it may own this graph, and gigabytes."""
        if is_ahead():  # nothing runs that could be captured
            launch()
            return
        if self._calls == 1:
            self._replay = _capture_if_it_fits(launch, self._pool)
        self._calls += 1
        run = self._replay or launch
        run()


def _capture_if_it_fits(launch: Callable[[], None], pool: Any) -> Callable[[], None] | None:
    try:
        return capture(launch, pool)
    except Exception as error:
        if not memory.exhausted(error):
            raise
    memory.release()  # not in the handler, where the error holds what the capture had made
    return None


def capture(
    launch: Callable[[], None], pool: Any = None, stream: torch.cuda.Stream | None = None
) -> Callable[[], None]:
    """Record what `launch` queues, without executing it; return what replays it.

    Args:
        launch: has run before, and queues nothing that allocates or waits.
        pool: memory of `torch.cuda.graph_pool_handle()` that several graphs may share of which no
            two run at the same time. None is memory of its own.
        stream: on which to record, which the default one does not allow; None is torch's for that.
    """
    graph = torch.cuda.CUDAGraph()
    # Of this thread alone: others may be pinning memory for the next batch, which CUDA forbids
    # while a thread captures for all.
    mode = "thread_local"
    with (
        _capturing,
        _nothing_collected(),
        torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode=mode),
    ):
        launch()
    return graph.replay


@contextlib.contextmanager
def _nothing_collected() -> Iterator[None]:
    """Within, Python collects no garbage, of which an older graph may be part.

    Destroying a graph ends in an error what its thread is capturing, and PyTorch, which then takes the
    capture for unfinished, gives no memory back for as long as the process lives.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
