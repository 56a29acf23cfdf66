"""Products in bfloat16 on a CPU that multiplies it, through oneDNN, which PyTorch brings.

weight = packed(rounded(weight))         # once
y = linear(x.bfloat16(), weight, bias)   # each time
"""

from __future__ import annotations

import torch
from torch.nn import functional

_PIECE = 1 << 19  # numbers that are 2 MB in float32, which a core's cache holds


def rounded(tensor: torch.Tensor) -> torch.Tensor:
    """A CPU's tensor in bfloat16, row by row in memory.

    Of float16 by way of float32, a piece at a time: PyTorch's own conversion takes three times as long.
    """
    if tensor.dtype != torch.float16:
        return tensor.to(torch.bfloat16).contiguous()
    if not tensor.is_contiguous():
        transposed = tensor.ndim == 2 and tensor.T.is_contiguous()
        return (rounded(tensor.T).T if transposed else tensor.bfloat16()).contiguous()
    result = torch.empty_like(tensor, dtype=torch.bfloat16)
    for piece, of_result in zip(
        tensor.view(-1).split(_PIECE), result.view(-1).split(_PIECE), strict=True
    ):
        of_result.copy_(piece.float())
    return result


def packed(weight: torch.Tensor) -> torch.Tensor:
    """A weight, out x in, in oneDNN's own order, into which it would else bring it for each product.

    It stays as it is where PyTorch has no such order, or this CPU has it not in the weight's type.
    """
    try:
        return _reorder(weight)
    except (AttributeError, RuntimeError):
        return weight


def _reorder(weight: torch.Tensor) -> torch.Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight, None)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x · weightᵀ + bias (… x in → … x out), of a weight that may be `packed`, all in one type."""
    if weight.is_mkldnn:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return functional.linear(x, weight, bias)
