"""Rounding to FP8 (E4M3: 3 bits of mantissa, up to 448), as GPUs from Ada on multiply it.

Weights are rounded once, each output channel with its own scale; inputs as they come, each token
with its own, so that a token's result does not depend on the others of its batch. Products are added
up in float32. Scales are the largest magnitude over 448, in float32.
"""

from __future__ import annotations

import torch

DTYPE = torch.float8_e4m3fn
LARGEST = 448.0
MULTIPLE = 16  # of channels and inputs, which the products of GPUs need

_SMALLEST = 1e-30  # that a row's largest is taken for: of zeros it is 0


def quantise(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x (… x width) in E4M3, and what times it is x: … x 1, float32."""
    x = x.float()
    largest = x.abs().amax(dim=-1, keepdim=True).clamp_min(_SMALLEST)
    return (x * (LARGEST / largest)).to(DTYPE), largest / LARGEST
