"""Weights in bfloat16 on a CPU that multiplies such, through oneDNN, which PyTorch brings."""

from __future__ import annotations

import dataclasses

import torch

from blip2 import bfloat16
from blip2.language.native.linear import Linear


@dataclasses.dataclass(frozen=True)
class Bfloat16Linear(Linear):
    """A weight of shape out x in, and inputs, in bfloat16; sums, bias and output in float32.

    Of a float16 weight's 11 digits 8 are left. The weight is in oneDNN's own order, where it has one:
    it would be brought into that for each product, which for few rows takes longer than the product.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None

    @classmethod
    def pack(
        cls, weight: torch.Tensor, bias: torch.Tensor | None, bits: int | None
    ) -> Bfloat16Linear:
        """As in the base class."""
        if bits is not None:
            raise ValueError(
                f"a bfloat16 linear keeps its weight, it does not round to {bits} bits"
            )
        weight = bfloat16.packed(bfloat16.rounded(weight))
        return cls(weight, None if bias is None else bias.float())

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        y = bfloat16.linear(x.bfloat16(), self.weight)
        return y.float() if self.bias is None else y + self.bias
