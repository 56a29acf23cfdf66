"""Linear layers in every precision a checkpoint can ask for, each behind the same two methods.

Weight-only quantisation is TensorRT-LLM's: symmetric, one scale for each output channel, rounded
to the nearest integer with halves away from zero, the scale kept in the checkpoint's type.
"""

from __future__ import annotations

import abc
import dataclasses

import torch
from torch.nn import functional


class Linear(abc.ABC):
    """y = x Wᵀ + b, however W is stored."""

    @classmethod
    @abc.abstractmethod
    def pack(cls, weight: torch.Tensor, bias: torch.Tensor | None, bits: int | None) -> Linear:
        """Store a weight of shape out x in, in the checkpoint's type, and a bias of shape out.

        `bits` 8 or 4 rounds the weight; None keeps it.
        """

    @abc.abstractmethod
    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """... x in → ... x out."""


@dataclasses.dataclass(frozen=True)
class FloatLinear(Linear):
    """Arithmetic in float32, on weights kept in float32 once they are rounded: the reference."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    @classmethod
    def pack(cls, weight: torch.Tensor, bias: torch.Tensor | None, bits: int | None) -> FloatLinear:
        if bits is not None:
            values, scales = quantize(weight, bits)
            weight = dequantize(values, scales.to(weight.dtype))
        return cls(weight.float(), None if bias is None else bias.float())

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self.weight, self.bias)


# The largest float32 below 0.5: added to the float32 just below a half, 0.5 itself would round up.
_BELOW_HALF = 0.5 - 2**-25


def quantize(weight: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Round a weight of shape out x in to signed integers of `bits` bits.

    Returns the integers (out x in, int8) and the scales (out, float32): absmax / 2^(bits - 1), so
    that the largest positive value may be clipped, by TensorRT-LLM's choice.
    """
    limit = 1 << (bits - 1)
    weight = weight.float()
    lowest, highest = weight.aminmax(dim=1)
    scales = torch.maximum(-lowest, highest) / limit
    # A row of zeros has scale 0; dividing by 1 instead leaves its zeros alone.
    scaled = weight / torch.where(scales > 0, scales, 1.0)[:, None]
    # Halves away from zero, which torch.round takes to even: the conversion cuts the fraction off.
    scaled.add_(scaled.sign(), alpha=_BELOW_HALF)
    return scaled.clamp_(-limit, limit - 1).to(torch.int8), scales


def dequantize(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The float32 weight (out x in) that integers and scales stand for."""
    return values.float() * scales.float()[:, None]
