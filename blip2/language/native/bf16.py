"""Weights in bfloat16 on a CPU that multiplies such, through oneDNN, which PyTorch brings.

oneDNN would first put the whole weight into its own order, for each product anew. Of few rows it
need not: with the factors exchanged it reads the weight as it lies, once, as fast as memory gives it.
With the first product of many rows the weight is put into that order, and stays in it, which few
rows are as fast in. So whoever asks a single question does not wait for that.
"""

from __future__ import annotations

import dataclasses

import torch
from torch.nn import functional

from blip2 import bfloat16
from blip2.language.native.linear import Linear

_FEW_ROWS = 64  # up to which the factors are exchanged


@dataclasses.dataclass
class Bfloat16Linear(Linear):
    """A weight of shape out x in, and inputs, in bfloat16; sums, bias and output in float32.

    Of a float16 weight's 11 digits 8 are left.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    has_met_many: bool = False

    @classmethod
    def pack(
        cls, weight: torch.Tensor, bias: torch.Tensor | None, bits: int | None
    ) -> Bfloat16Linear:
        if bits is not None:
            raise ValueError(
                f"a bfloat16 linear keeps its weight, it does not round to {bits} bits"
            )
        return cls(bfloat16.rounded(weight), None if bias is None else bias.float())

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1]).bfloat16()
        if len(rows) > _FEW_ROWS and not self.has_met_many:
            self.weight, self.has_met_many = bfloat16.packed(self.weight), True
        if len(rows) > _FEW_ROWS or self.weight.is_mkldnn:
            y = bfloat16.linear(rows, self.weight)
        else:
            # A single row would go another way, which is slower.
            columns = functional.pad(rows, (0, 0, 0, 1)).T if len(rows) == 1 else rows.T
            y = torch.mm(self.weight, columns)[:, : len(rows)].T.contiguous()
        y = y.float() if self.bias is None else y + self.bias
        return y.view(*x.shape[:-1], -1)
