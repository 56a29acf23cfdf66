"""CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable

import torch


def capture(launch: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """What `launch` queues over static buffers, as one replay of a CUDA graph.

    Queues it twice: the first time compiles kernels and sets up cuBLAS, which a capture must not.
    On a CPU, `launch` itself.
    """
    if device.type != "cuda":
        return launch
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        launch()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    return graph.replay
