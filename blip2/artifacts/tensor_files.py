"""Tensors in files: where their bytes lie, and the ways into memory and onto a GPU.

tensors = read_header(Path("model.safetensors"))     # no weights are read
load = Loader(torch.device("cuda"))
weight = load(tensors["lm_head.weight"])             # on the GPU, in the type of the file
"""

from __future__ import annotations

import dataclasses
import json
import math
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, ClassVar

import numpy as np
import torch
from safetensors import safe_open

from blip2 import bfloat16, cpu

# Pinned memory that a thread reads through. Copies from pageable memory reach 7 GB/s on an H100
# however many threads make them; eight threads with two such buffers each reach 25.
_BUFFER_BYTES = 4 << 20
_BUFFERS = 2
_GPU_THREADS = 8  # more are hardly faster
_CPU_THREADS = 4  # each may hold a weight in float32 beside what is made of it
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class UnknownType(ValueError):
    """A tensor's elements are of a type that torch has not, or that no checkpoint here has."""

    def __init__(self, name: str, dtype: str) -> None:
        super().__init__(f"{name} as {dtype}")
        self.name, self.dtype = name, dtype


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: its bytes begin at `offset`, row by row.

    `transposed` is one of two dimensions that lies there column by column.
    """

    file: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    transposed: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize

    def mapped(self) -> torch.Tensor:
        """The tensor, backed by the file: do not write into it.

        Pages are read when they are touched, and let go with the tensor.

        Raises:
            OSError: the file cannot be read.
            ValueError: it ends before the tensor does.
        """
        if not self.nbytes:
            return torch.empty(self.shape, dtype=self.dtype)
        content = np.memmap(self.file, np.uint8, mode="c", offset=self.offset, shape=self.nbytes)
        return self._shaped(torch.from_numpy(content))

    def _shaped(self, content: torch.Tensor) -> torch.Tensor:
        """The tensor over its bytes."""
        content = content.view(self.dtype)
        return content.view(self.shape[::-1]).T if self.transposed else content.view(self.shape)


@dataclasses.dataclass(frozen=True)
class ScaledTensor:
    """A weight in integers, out x in, and what those of each channel are to be multiplied with, out."""

    values: StoredTensor
    scales: StoredTensor
    dtype: ClassVar = torch.float32  # of what they stand for

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def file(self) -> Path:
        return self.values.file

    def mapped(self) -> torch.Tensor:
        """What they stand for, in memory of its own.

        Raises:
            OSError, ValueError: as of a `StoredTensor`.
        """
        return self.values.mapped().float() * self.scales.mapped()[:, None]


# What a checkpoint has by a name: pickled tensors are mapped when their file is opened.
Stored = StoredTensor | ScaledTensor | torch.Tensor


def mapped(stored: Stored) -> torch.Tensor:
    """A stored tensor in memory, backed by its file where it has one; see `StoredTensor.mapped`."""
    return stored if isinstance(stored, torch.Tensor) else stored.mapped()


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a .safetensors file, by name.

    Raises:
        OSError, SafetensorError: it cannot be read, or is no such file, or not a whole one.
        UnknownType: a tensor's elements are of a type that no checkpoint here has.
    """
    with safe_open(file, framework="pt"):
        pass  # the format's own reader has seen that the header fits the file
    with file.open("rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(size))
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in _DTYPES:
            raise UnknownType(name, entry["dtype"])
        start = 8 + size + entry["data_offsets"][0]
        shape = tuple(entry["shape"])
        tensors[name] = StoredTensor(file, start, _DTYPES[entry["dtype"]], shape)
    return tensors


class Loader:
    """Brings stored tensors to a device, as they are stored. Several threads may call it at once."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._buffers = threading.local()

    def pool(self) -> ThreadPoolExecutor:
        """Threads to load in side by side, as many as are best."""
        if self.device.type == "cuda":
            return ThreadPoolExecutor(_GPU_THREADS)
        return cpu.sharing_pool(_CPU_THREADS)

    def __call__(self, stored: Stored) -> torch.Tensor:
        """The tensor on the device; on a CPU it is backed by the file.

        Raises:
            OSError: the file cannot be read.
            ValueError: it ends before the tensor does.
        """
        in_one_piece = isinstance(stored, StoredTensor) and stored.nbytes
        if self.device.type != "cuda" or not in_one_piece:
            return mapped(stored).to(self.device)
        return stored._shaped(self._read(stored))

    def _read(self, stored: StoredTensor) -> torch.Tensor:
        """The bytes of a tensor on the GPU."""
        content = torch.empty(stored.nbytes, dtype=torch.uint8, device=self.device)
        stream, buffers = self._of_thread()
        # The memory may be what other kernels have just finished with.
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with open(stored.file, "rb", buffering=0) as file, torch.cuda.stream(stream):
            file.seek(stored.offset)
            for index, (start, size) in enumerate(_blocks(stored.nbytes)):
                buffer, copied = buffers[index % _BUFFERS]
                copied.synchronize()
                _read_into(buffer[:size].numpy(), file)
                content[start : start + size].copy_(buffer[:size], non_blocking=True)
                copied.record()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        return content

    def _of_thread(self) -> tuple[torch.cuda.Stream, list[tuple[torch.Tensor, torch.cuda.Event]]]:
        """This thread's stream, and pinned buffers with what says that each was copied."""
        own = self._buffers
        if not hasattr(own, "stream"):
            own.stream = torch.cuda.Stream(self.device)
            own.buffers = [
                (
                    torch.empty(_BUFFER_BYTES, dtype=torch.uint8, pin_memory=True),
                    torch.cuda.Event(),
                )
                for _ in range(_BUFFERS)
            ]
        return own.stream, own.buffers


def _blocks(size: int) -> Iterator[tuple[int, int]]:
    for start in range(0, size, _BUFFER_BYTES):
        yield start, min(_BUFFER_BYTES, size - start)


def _read_into(buffer: np.ndarray, file: BinaryIO) -> None:
    content = memoryview(buffer)
    while content:
        count = file.readinto(content)
        if not count:
            raise ValueError("the file ends before the tensor does")
        content = content[count:]


def is_finite(tensor: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Whether no element is NaN or Inf, in another type if one is given: a flag on its device.

    The extremes are found in one pass, which torch's isfinite is not; in half precision on a CPU it
    takes six times as long.
    """
    if not tensor.numel():
        return torch.tensor(True, device=tensor.device)
    if tensor.dtype == torch.float8_e4m3fn:  # no Inf, and NaN is all ones behind the sign
        return (tensor.view(torch.uint8) & 127).amax() < 127
    extremes = torch.stack(torch.aminmax(tensor))
    return torch.isfinite(extremes if dtype is None else extremes.to(dtype)).all()


class FiniteChecks:
    """Whether tensors are finite, found while others load and asked once, as a GPU is waited for."""

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        """`dtype` is the type in which they are to be finite, if not their own."""
        self._dtype = dtype
        self._flags: list[tuple[str, torch.Tensor]] = []

    def add(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Have a tensor checked; returns it."""
        self._flags.append((name, is_finite(tensor, self._dtype)))
        return tensor

    def add_rounded(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Have a CPU's tensor checked; returns it in bfloat16, and reads it once for both."""
        if tensor.dtype != torch.float16:
            return bfloat16.rounded(self.add(name, tensor))
        result, total = bfloat16.rounded_and_sum(tensor)
        self._flags.append((name, total.isfinite()))
        return result

    def first_not_finite(self) -> str | None:
        """The name of the first tensor that holds NaN or Inf. Waits for the checks."""
        finite = torch.stack([flag for _, flag in self._flags]).tolist()
        return next((n for (n, _), fine in zip(self._flags, finite, strict=True) if not fine), None)
