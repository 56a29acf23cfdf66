"""Running out of memory, the host's or a GPU's, as one sentence: who wanted it, and what to lower.

with memory.needed("to open the ViT", "close other programs"):
    ...                                  # OutOfMemory, whatever a library raised
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import re
import sys
from collections.abc import Iterator
from typing import Any

from blip2.errors import Blip2Error

# Each library has its own exception, and most have only RuntimeError: the words tell them apart.
_EXHAUSTED = re.compile(
    r"out of memory|can(?:'t|not) allocate memory|unable to allocate|bad[ _]alloc"
    r"|failed to allocate memory|ALLOC_FAILED|MemoryAllocation|can't start new thread",
    re.IGNORECASE,
)


class OutOfMemory(Blip2Error):
    """There is not enough memory for what was asked; it was done in part or not at all."""


def exhausted(error: BaseException) -> str | None:
    """ "GPU" or "host" where `error`, of whatever library, says that memory ran out; else None."""
    text = f"{type(error).__name__}: {error}"
    on_gpu = re.search("cuda|cublas|cudnn|GPU", text, re.IGNORECASE)
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return "host"
    if type(error).__name__ == "OutOfMemoryError" or _EXHAUSTED.search(text):
        return "GPU" if on_gpu else "host"
    return None


@contextlib.contextmanager
def needed(purpose: str, advice: str) -> Iterator[None]:
    """Within, running out of memory is an OutOfMemory that says for what, and what to do.

    Args:
        purpose: what the memory is needed for: "to …" or "for …".
        advice: what to lower or to do.
    """
    try:
        yield
    except Blip2Error:
        raise
    except Exception as error:
        kind = exhausted(error)
        if kind is None:
            raise
        raise OutOfMemory(f"not enough {kind} memory {purpose}", f"{advice}") from None


def release() -> None:
    """Give cached GPU memory back, where torch holds any, and what only cycles hold.

    An error that came out of a capture is in one, with the tensors of every function it went through.
    """
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def free_gpu_bytes(device: Any) -> int:
    """What a GPU has free, torch's reserve of this process included."""
    torch = sys.modules["torch"]
    reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + reserve


def trim() -> None:
    """Give freed memory back to the system, where the C library keeps it (glibc does).

    It keeps what lies below a block that is still in use: after a model was packed, gigabytes.
    """
    trim_heap = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim_heap is not None:
        trim_heap(0)
