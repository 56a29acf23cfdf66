"""A sampled token as one kernel, which sorts nothing."""

from __future__ import annotations

from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("draw.cu")
THREADS = 1024
_MOST_HELD = 32  # logits that a thread has registers for


def draw_tokens(scores: torch.Tensor, settings: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
    """As `decoding.draw_tokens`, of contiguous float32 scores on a GPU.

    Equal scores stay or go together, where a sort lets go of some.
    """
    from blip2.gpu.compiled import load_kernel

    rows, vocab_size = scores.shape
    elements = -(-vocab_size // THREADS)
    held = min(elements, _MOST_HELD)
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
        shared_bytes=(elements - held) * THREADS * scores.itemsize,
    )
    return tokens
