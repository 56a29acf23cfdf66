"""Find the fastest tiles of the decoding kernels on this GPU.

    python -m bench.tune_linear                 # OPT-2.7B's shapes; prints the best tiles of each

Every candidate runs in a CUDA graph over several copies of its weight, together larger than the
L2 cache, each launch dependent on the one before it, as in a decoding step. What is printed is
the time of one launch and the bandwidth of its weights.
"""

from __future__ import annotations

import itertools
import math
import multiprocessing
import statistics

import torch
import triton

from blip2 import cli
from blip2.language.native import kernels
from blip2.language.native.cuda import PackedLinear, RowsTile, RowTile
from blip2.language.native.model import NORM_EPS

SHAPES = {  # name: channels, inputs, norm, relu, residual
    "qkv": (7680, 2560, True, False, False),
    "dense": (2560, 2560, False, False, True),
    "fc": (10240, 2560, True, True, False),
    "proj": (2560, 10240, False, False, True),
    "head": (50272, 2560, True, False, False),
}
COPIES_BYTES = 400e6


def candidates(shape: str, bits: int, rows: int) -> list[RowTile | RowsTile]:
    channels, inputs, *_ = SHAPES[shape]
    stored = inputs // 2 if bits == 4 else inputs
    if rows == 1:
        sizes = itertools.product((2, 4, 8, 16, 32), (256, 512, 1024), (2, 4, 8))
        return [
            RowTile(n, k, warps)
            for n, k, warps in sizes
            if stored % k == 0 and 16 <= n * k // (32 * warps) <= 64 and channels / n < 20_000
        ]
    block_rows = min(max(16, triton.next_power_of_2(rows)), 64)
    sizes = itertools.product((16, 32, 64), (64, 128, 256), (3, 5), (2, 4))
    return [
        RowsTile(block_rows, n, k, stages, warps)
        for n, k, stages, warps in sizes
        if stored % k == 0 and n * k >= 2048 and n * k * stages <= 64 * 1024
    ]


def launch(x, linear, out, norm, tile, rows: int, relu: bool, residual: bool, warm: bool = False):
    channels, inputs = linear.shape
    common = {
        "K": inputs,
        "BITS": linear.bits,
        "BIAS": linear.bias is not None,
        "RELU": relu,
        "RESIDUAL": residual,
        "PDL": True,
        "launch_pdl": True,
        "num_warps": tile.num_warps,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
    }
    packed = (linear.weight, linear.scales, linear.bias, out)
    if rows == 1:
        kernel = kernels.row_linear_kernel
        arguments = (x, *(norm or (None, None)), *packed, channels)
        common |= {
            "eps": NORM_EPS,
            "NORM": norm is not None,
            "NORM_BLOCK": triton.next_power_of_2(inputs),
        }
        grid = (triton.cdiv(channels, tile.block_n),)
    else:
        kernel = kernels.rows_linear_kernel
        arguments = (x, *packed, rows, channels)
        common |= {"ROWS": tile.rows, "STAGES": tile.stages}
        grid = (triton.cdiv(channels, tile.block_n), triton.cdiv(rows, tile.rows))
    if warm:
        return kernel.warmup(*arguments, grid=grid, **common)
    return kernel[grid](*arguments, **common)


def make(shape: str, bits: int, rows: int, copies: int):
    channels, inputs, has_norm, relu, residual = SHAPES[shape]
    stored = inputs // 2 if bits == 4 else inputs
    dtype = {16: torch.float16, 8: torch.int8, 4: torch.uint8}[bits]

    def weight() -> torch.Tensor:
        if bits == 16:
            return torch.randn(channels, inputs, device="cuda", dtype=dtype) * 0.02
        low, high = (-128, 128) if bits == 8 else (0, 256)
        return torch.randint(low, high, (channels, stored), device="cuda", dtype=dtype)

    half = {"dtype": torch.float16, "device": "cuda"}
    scales = None if bits == 16 else torch.rand(channels, **half)
    bias = None if shape == "head" else torch.randn(channels, **half)
    linears = [PackedLinear(weight(), scales, bias, bits) for _ in range(copies)]
    normed_here = has_norm and rows == 1
    x = torch.randn(rows, inputs, device="cuda", dtype=torch.float32 if normed_here else torch.float16)
    wide = residual or shape == "head"
    out = torch.zeros(rows, channels, device="cuda", dtype=torch.float32 if wide else torch.float16)
    norm = (torch.randn(inputs, **half), torch.randn(inputs, **half)) if normed_here else None
    return x, linears, out, norm, relu, residual


def warm(job: tuple[str, int, int]) -> None:
    """Compile all candidates of one case into Triton's cache on disk."""
    shape, bits, rows = job
    x, [linear], out, norm, relu, residual = make(shape, bits, rows, 1)
    for tile in candidates(shape, bits, rows):
        launch(x, linear, out, norm, tile, rows, relu, residual, warm=True)


def measure(shape: str, bits: int, rows: int) -> list[tuple[float, RowTile | RowsTile]]:
    """Microseconds a launch for each candidate, fastest first."""
    channels, inputs, *_ = SHAPES[shape]
    size = channels * inputs * bits // 8
    copies = math.ceil(COPIES_BYTES / size)
    x, linears, out, norm, relu, residual = make(shape, bits, rows, copies)
    timed = []
    for tile in candidates(shape, bits, rows):
        try:
            launch(x, linears[0], out, norm, tile, rows, relu, residual)
        except Exception as error:
            print(f"  {shape} {bits} {rows} {tile}: {str(error).splitlines()[0]}")
            continue
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for linear in linears:
                launch(x, linear, out, norm, tile, rows, relu, residual)
        timed.append((replay_time(graph) / copies * 1e6, tile))
    return sorted(timed, key=lambda pair: pair[0])


def replay_time(graph: torch.cuda.CUDAGraph, repeats: int = 7) -> float:
    """Median seconds of one replay."""
    graph.replay()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def main() -> None:
    parser = cli.ArgumentParser("Find the fastest tiles of the decoding kernels.")
    parser.add_argument("--rows", type=cli.positive_int, nargs="+", default=[1, 8, 40])
    parser.add_argument("--bits", type=int, nargs="+", default=[16, 8, 4])
    parser.add_argument("--show", type=cli.positive_int, default=3)
    args = parser.parse_args()
    jobs = [
        (shape, bits, rows)
        for rows, bits, shape in itertools.product(args.rows, args.bits, SHAPES)
        if not (shape == "head" and bits == 4)
    ]
    with multiprocessing.get_context("spawn").Pool(14) as pool:
        pool.map(warm, jobs, chunksize=1)
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        target.copy_(source)
    limit = 2 * source.numel() / replay_time(graph)
    print(f"{torch.cuda.get_device_name()}: copy {limit / 1e12:.2f} TB/s")
    for shape, bits, rows in jobs:
        channels, inputs, *_ = SHAPES[shape]
        size = channels * inputs * bits / 8
        for microseconds, tile in measure(shape, bits, rows)[: args.show]:
            rate = size / microseconds * 1e6
            print(
                f"rows {rows:3} int{bits:<2} {shape:5} {microseconds:7.1f} us {rate / 1e12:5.2f} TB/s"
                f" {rate / limit:5.0%}  {tile}",
                flush=True,
            )


if __name__ == "__main__":
    cli.run(main)
