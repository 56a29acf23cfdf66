"""Products in bfloat16 on a CPU that multiplies it, through oneDNN, which PyTorch brings.

weight = packed(rounded(weight))         # once
y = linear(x.bfloat16(), weight, bias)   # each time
"""

from __future__ import annotations

import torch
from torch.nn import functional

_PIECE = 1 << 18  # numbers that are 1 MB in float32: with both halves a core's cache holds them


def rounded(tensor: torch.Tensor) -> torch.Tensor:
    """A CPU's tensor in bfloat16, row by row in memory."""
    if tensor.dtype != torch.float16:
        return tensor.to(torch.bfloat16).contiguous()
    return rounded_and_sum(tensor)[0]


def rounded_and_sum(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same of float16, and the sum of it, a float32: finite only if all of the tensor is.

    By way of float32, a piece at a time: PyTorch's own conversion takes twice as long, and the tensor
    is read from memory once for both.
    """
    if not tensor.is_contiguous():
        if tensor.ndim == 2 and tensor.T.is_contiguous():
            result, total = rounded_and_sum(tensor.T)
            return result.T.contiguous(), total
        return rounded_and_sum(tensor.contiguous())
    result = torch.empty_like(tensor, dtype=torch.bfloat16)
    exact = torch.empty(min(_PIECE, tensor.numel()))
    pieces = tensor.view(-1).split(_PIECE), result.view(-1).split(_PIECE)
    sums = []
    for piece, of_result in zip(*pieces, strict=True):
        of_result.copy_(exact[: len(piece)].copy_(piece))
        sums.append(exact[: len(piece)].sum())
    return result, torch.stack(sums).sum()


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
