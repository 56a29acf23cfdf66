"""Write a safetensors file piece by piece; the library's own writer wants all tensors at once.

    with SafetensorsWriter(path, {"weight": (torch.float16, (3, 2))}) as writer:
        writer.write("weight", [first_row, other_rows])

The format: 8 bytes of header length, a JSON header of names, types, shapes and offsets, then the
tensors' bytes in C order (https://huggingface.co/docs/safetensors).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType

import torch

from blip2.artifacts.tensor_files import is_finite

DTYPE_NAMES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
}
_BLOCK = 1 << 20


class SafetensorsWriter:
    """A safetensors file whose tensors are written in any order, from any thread, in parts.

    Every tensor must be written whole before the block ends: ValueError otherwise.
    """

    def __init__(
        self, path: Path, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
    ) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        self._places: dict[str, tuple[torch.dtype, int, int]] = {}
        for name, (dtype, shape) in tensors.items():
            start, end = end, end + math.prod(shape) * dtype.itemsize
            self._places[name] = (dtype, start, end)
            header[name] = {
                "dtype": DTYPE_NAMES[dtype],
                "shape": list(shape),
                "data_offsets": [start, end],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # Tensors start aligned, as the library leaves them.
        self._start = 8 + len(text)
        self._unwritten = set(self._places)
        self._file = path.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)
        self._file.flush()

    def write(self, name: str, parts: Iterable[torch.Tensor]) -> None:
        """Write one tensor as the concatenation of `parts`, converted to its declared type.

        Converts block by block, so that no second copy of a large tensor exists.

        Raises:
            ValueError: the parts do not fill the tensor exactly, or a value that is written is
                NaN or Inf, which a conversion to float16 can make of a finite one.
        """
        dtype, start, end = self._places[name]
        offset = start
        for part in parts:
            for block in part.contiguous().view(-1).split(_BLOCK):
                block = block.to(dtype)
                if not is_finite(block):
                    raise ValueError(
                        f"{name} has values that are NaN, Inf or too large for {dtype}"
                    )
                data = block.view(torch.uint8).numpy().data
                if offset + len(data) > end:
                    raise ValueError(f"more bytes than {name} has were written to it")
                offset += _write_all(self._file.fileno(), data, self._start + offset)
        if offset != end:
            raise ValueError(f"{name} has {end - start} bytes, {offset - start} were written")
        self._unwritten.discard(name)

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()
        if error is None and self._unwritten:
            raise ValueError(f"never written: {sorted(self._unwritten)}")


def _write_all(file: int, data: memoryview, position: int) -> int:
    """pwrite, which may stop early, until everything is written; return the number of bytes."""
    written = 0
    while written < len(data):
        written += os.pwrite(file, data[written:], position + written)
    return written
