"""A sampled token as one kernel, which sorts nothing."""

from __future__ import annotations

from pathlib import Path

import torch

from blip2.language import sampling

SOURCE = Path(__file__).with_name("draw.cu")
THREADS = 1024
_MOST_HELD = 32  # logits that a thread has registers for
_OWN_SHARED = 10 << 10  # bytes that the kernel needs besides


def draw_tokens(scores: torch.Tensor, settings: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
    """As `sampling.draw_tokens`, of contiguous float32 scores on a GPU.

    Equal scores stay or go together, where a sort lets go of some. Vocabularies that do not fit into
    a multiprocessor, 57,000 tokens of the smallest, are sorted.
    """
    from blip2.gpu.compiled import load_kernel

    rows, vocab_size = scores.shape
    elements = -(-vocab_size // THREADS)
    held = min(elements, _MOST_HELD)
    shared_bytes = (elements - held) * THREADS * scores.itemsize
    properties = torch.cuda.get_device_properties(scores.device)
    if shared_bytes > properties.shared_memory_per_block_optin - _OWN_SHARED:
        return sampling.draw_tokens(scores, settings, drawn)
    tokens = torch.empty(rows, dtype=torch.int64, device=scores.device)
    kernel = load_kernel(SOURCE, "draw", (("ELEMENTS", elements), ("HELD", held)))
    kernel(
        (rows, 1),
        THREADS,
        scores.contiguous(),
        settings,
        drawn,
        tokens,
        vocab_size,
        shared_bytes=shared_bytes,
    )
    return tokens
