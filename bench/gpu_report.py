"""What bench.gpu measures with, and how it says what it measured."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable

import torch

from bench.random_blip2 import DEVICE

_SHORT_MS, _MOST_REPEATS = 200, 30


class Report:
    """Prints figures and keeps them."""

    def __init__(self) -> None:
        self.figures: dict[str, float | str] = {"device": torch.cuda.get_device_name()}
        self.bandwidth = self.flops = math.nan

    def limits(self) -> None:
        """Measure what the GPU can do at best."""
        source = torch.randint(-99, 99, (1 << 32,), dtype=torch.int8, device=DEVICE)
        target = torch.empty_like(source)
        self.bandwidth = 2 * source.numel() / median_ms(target.copy_, source) * 1e3
        a, b = (torch.randn(8192, 8192, device=DEVICE).half() for _ in range(2))
        self.flops = 2 * 8192**3 / median_ms(torch.mm, a, b) * 1e3
        self.figures["copy TB/s"] = self.bandwidth / 1e12
        self.figures["product TFLOP/s"] = self.flops / 1e12
        print(f"copy {self.bandwidth / 1e12:.2f} TB/s, product {self.flops / 1e12:.0f} TFLOP/s")

    def add(
        self,
        name: str,
        ms: float,
        theirs: float | None = None,
        read: float | None = None,
        flops: float | None = None,
    ) -> None:
        """One line: milliseconds, bytes read or operations and their share, transformers' ms."""
        self.figures[name] = ms
        line = f"{name:<34} {ms:>8.3f} ms"
        if read is not None:
            line += f" {read / ms / 1e6:>6.0f} GB/s    {read / ms * 1e3 / self.bandwidth:>4.0%}"
        elif flops is not None:
            line += f" {flops / ms / 1e9:>6.0f} TFLOP/s {flops / ms * 1e3 / self.flops:>4.0%}"
        else:
            line += " " * 20
        if theirs is not None:
            self.figures[name + ", transformers"] = theirs
            line += f"   transformers {theirs:>8.2f} ms  {theirs / ms:>5.1f}x"
        print(line, flush=True)


def median_ms(run: Callable, *arguments, repeats: int = 7, inner: int = 1, **options) -> float:
    """Device milliseconds of one call, after two to warm up."""
    for _ in range(2):
        run(*arguments, **options)
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(inner):
            run(*arguments, **options)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / inner)
    return statistics.median(times)


def median_wall_ms(run: Callable, *arguments, repeats: int = 5, **options) -> float:
    """Milliseconds of a call by the host's clock, after two to warm up: the second captures graphs.

    What is short is run more often than `repeats`: the host's part of it varies, and takes longer at
    first.
    """
    for _ in range(2):
        run(*arguments, **options)
    times: list[float] = []
    while len(times) < repeats or (len(times) < _MOST_REPEATS and sum(times) < _SHORT_MS):
        torch.cuda.synchronize()
        started = time.perf_counter()
        run(*arguments, **options)
        torch.cuda.synchronize()
        times.append((time.perf_counter() - started) * 1e3)
    return statistics.median(times)
