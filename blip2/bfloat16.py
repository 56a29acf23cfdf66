"""Products in bfloat16 on a CPU that multiplies it, through oneDNN, which PyTorch brings.

weight = packed(rounded(weight))         # once
y = linear(x.bfloat16(), weight, bias)   # each time
"""

from __future__ import annotations

import threading

import torch
from torch.nn import functional

_PIECE = 1 << 18  # numbers that are 1 MB in float32: with both halves a core's cache holds them


def rounded(tensor: torch.Tensor) -> torch.Tensor:
    """A CPU's tensor in bfloat16, row by row in memory.

    Of float16 by way of float32, a piece at a time: PyTorch's own conversion takes twice as long.
    """
    if tensor.dtype != torch.float16:
        return tensor.to(torch.bfloat16).contiguous()
    if not tensor.is_contiguous():
        transposed = tensor.ndim == 2 and tensor.T.is_contiguous()
        return (rounded(tensor.T).T if transposed else tensor.bfloat16()).contiguous()
    return _rounded_into(torch.empty_like(tensor, dtype=torch.bfloat16), tensor)


def _rounded_into(result: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """Both row by row in memory, of one shape."""
    exact = torch.empty(min(_PIECE, tensor.numel()))
    pieces = tensor.view(-1).split(_PIECE), result.view(-1).split(_PIECE)
    for piece, of_result in zip(*pieces, strict=True):
        of_result.copy_(exact[: len(piece)].copy_(piece))
    return result


class Packer:
    """Rounds and packs weights, several threads at once.

    Each thread rounds into one place, as long as the packer lives: taking memory for a gigabyte from
    the system anew costs more than rounding it.
    """

    def __init__(self) -> None:
        self._own = threading.local()

    def __call__(self, weight: torch.Tensor) -> torch.Tensor:
        """As `packed(rounded(weight))`."""
        if weight.dtype != torch.float16 or not weight.is_contiguous():
            return packed(rounded(weight))
        place = getattr(self._own, "place", None)
        if place is None or place.numel() < weight.numel():
            place = self._own.place = torch.empty(weight.numel(), dtype=torch.bfloat16)
        here = _rounded_into(place[: weight.numel()].view(weight.shape), weight)
        result = packed(here)
        return here.clone() if result is here else result


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
