"""The CPU: how many threads may compute on it, and what its instructions multiply fast."""

from __future__ import annotations

import functools
import math
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")
CPUINFO = Path("/proc/cpuinfo")

# The instructions that matter here, by Linux's names; ARM's have the short ones.
INSTRUCTIONS = {
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx_vnni": "AVX-VNNI",
    "avx512_vnni": "AVX512-VNNI",
    "avx512_bf16": "AVX512-BF16",
    "avx512_fp16": "AVX512-FP16",
    "amx_bf16": "AMX-BF16",
    "amx_int8": "AMX-INT8",
    "asimd": "NEON",
    "sve": "SVE",
    "bf16": "BF16",
    "i8mm": "I8MM",
}
_BFLOAT16 = {"avx512_bf16", "bf16"}
_WORTH = 1.2  # times as fast as float32 is what bfloat16 has to be, or its rounding buys nothing


def cores(cgroups: Path = CGROUPS, own_cgroups: Path = OWN_CGROUPS) -> int:
    """How many processors this process may use: those it is bound to, within its cgroups' quotas."""
    bound = getattr(os, "sched_getaffinity", None)  # macOS and Windows bind nobody
    count = len(bound(0)) if bound else os.cpu_count() or 1
    return max(1, math.floor(min([count, *_quotas(cgroups, own_cgroups)])))


def _quotas(cgroups: Path, own_cgroups: Path) -> list[float]:
    """Processors by the quota of each cgroup that this process is in, and of those around it."""
    try:
        lines = own_cgroups.read_text().splitlines()
    except OSError:
        return []
    quotas = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        root = cgroups / controllers if controllers else cgroups  # version 1 has one for each
        # Within a container the path may be the one outside of it, of which only the root is here.
        inner = root / path.lstrip("/")
        for directory in {root, inner, *inner.parents}:
            if directory.is_relative_to(root):
                quotas += _quota(directory)
    return quotas


def _quota(cgroup: Path) -> list[float]:
    """Processors that a cgroup may use, in a list, which is empty where nothing limits it."""
    try:
        if (cgroup / "cpu.max").exists():
            quota, period = (cgroup / "cpu.max").read_text().split()
        else:
            quota, period = (
                (cgroup / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period")
            )
        return [int(quota) / int(period)] if int(quota) > 0 else []
    except (OSError, ValueError, ZeroDivisionError):  # no such file, or no limit: "max"
        return []


def limit_threads() -> None:
    """Have PyTorch compute on no more threads than this process has processors.

    It knows of those that the process is bound to, but of no quota. Who sets OMP_NUM_THREADS has
    chosen already, and so has who gave it fewer.
    """
    import torch

    if "OMP_NUM_THREADS" not in os.environ and torch.get_num_threads() > cores():
        torch.set_num_threads(cores())


_of_thread = threading.local()
_sharing = threading.Lock()  # while it holds, PyTorch's number may be a share


def threads() -> int:
    """How many threads PyTorch computes on, also for a thread that has a share of them only."""
    import torch

    return getattr(_of_thread, "shared", None) or torch.get_num_threads()


def sharing_pool(most: int) -> ThreadPoolExecutor:
    """As many threads as PyTorch computes on, `most` at most, each of which has its share of those.

    By default what it computes in one of them would take all cores again, and they would wait for one
    another.
    """
    import torch

    with _sharing:
        shared = torch.get_num_threads()
        count = min(most, shared)
        pool, all_run = ThreadPoolExecutor(count), threading.Barrier(count)

        def take_share(_: int) -> None:
            _of_thread.shared = shared
            torch.get_num_threads()  # from now on this thread's number is its own
            torch.set_num_threads(max(1, shared // count))
            all_run.wait()

        list(pool.map(take_share, range(count)))
        torch.set_num_threads(shared)  # that has set what threads begin with, too
    return pool


def instructions(cpuinfo: Path = CPUINFO) -> frozenset[str]:
    """Those of INSTRUCTIONS that the CPU has; none where it is not Linux that lists them."""
    try:
        text = cpuinfo.read_text()
    except OSError:
        return frozenset()
    listed = (line.partition(":") for line in text.splitlines())
    flags = next((f for key, _, f in listed if key.strip() in ("flags", "Features")), "")
    return frozenset(flags.split()) & INSTRUCTIONS.keys()


def model_name(cpuinfo: Path = CPUINFO) -> str:
    """What the CPU calls itself, and the instructions that it has."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        lines = []
    name = next((line.partition(":")[2].strip() for line in lines if "model name" in line), "CPU")
    known = instructions(cpuinfo)
    return f"{name} ({', '.join(INSTRUCTIONS[flag] for flag in INSTRUCTIONS if flag in known)})"


@functools.cache
def is_fast_in_bfloat16() -> bool:
    """Whether linear layers are clearly faster in bfloat16 here than in float32.

    With AMX they are; with other instructions for it that depends on the CPU, and is measured, for
    some tens of milliseconds. ONEDNN_MAX_CPU_ISA, which keeps the library that multiplies from
    using instructions, counts.
    """
    allowed = os.environ.get("ONEDNN_MAX_CPU_ISA", "ALL").upper()
    known = instructions()
    if "amx_bf16" in known and (allowed in ("ALL", "DEFAULT") or "AMX" in allowed):
        return True
    is_allowed = allowed in ("ALL", "DEFAULT") or any(
        name in allowed for name in ("BF16", "FP16", "AMX", "AVX10")
    )
    return bool(known & _BFLOAT16) and is_allowed and _bfloat16_gain() >= _WORTH


def _bfloat16_gain() -> float:
    """How many times as fast as in float32 a linear layer of a ViT's size is in bfloat16."""
    import torch
    from torch.nn import functional

    def seconds(dtype: torch.dtype) -> float:
        x, weight = torch.ones(257, 1408, dtype=dtype), torch.ones(1408, 1408, dtype=dtype)
        times = []
        for _ in range(6):  # the first of which finds the kernel
            started = time.perf_counter()
            functional.linear(x, weight)
            times.append(time.perf_counter() - started)
        return min(times)

    with torch.inference_mode():
        return seconds(torch.float32) / seconds(torch.bfloat16)
