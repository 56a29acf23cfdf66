"""Weights in 16 bits on a CPU, multiplied in float32, through FBGEMM's kernel that torch brings.

It reads float16 weights once, widens them in registers and takes few rows and many alike. On two
cores without AVX-512, at 10240 x 2560 and 1, 5, 8 and 40 rows, it takes 2.5, 3.2, 5.3 and 16 ms;
float32 weights 5.9, 24, 23 and 40, torch's linear of float16 2.7, 11, 17 and 84.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch

from blip2.language.native.linear import Linear

_LARGEST_EXPONENT = 15  # float16's largest value is just below 2^16


@dataclasses.dataclass(frozen=True)
class Float16Linear(Linear):
    """A weight of shape out x in, kept by FBGEMM as float16 in its own order.

    A bfloat16 weight is kept as float16 times `scale`, a power of two that brings it into
    float16's range: what is lost is below 2^-38 of the largest weight, float32's own digits end
    at 2^-24.
    """

    packed: Any
    scale: float

    @staticmethod
    def takes(dtype: torch.dtype) -> bool:
        """Whether weights of this type can be kept so: FBGEMM wants x86 with AVX2."""
        supported = torch.backends.quantized.engine in ("x86", "fbgemm")
        return supported and dtype in (torch.float16, torch.bfloat16)

    @classmethod
    def pack(
        cls, weight: torch.Tensor, bias: torch.Tensor | None, bits: int | None
    ) -> Float16Linear:
        if bits is not None:
            raise ValueError(f"a float16 linear keeps its weight, it does not round to {bits} bits")
        wide, scale = weight.float(), 1.0
        if weight.dtype == torch.bfloat16:
            _, exponent = math.frexp(float(weight.abs().max()))
            scale = 2.0 ** (exponent - _LARGEST_EXPONENT)
            wide = wide / scale
        bias = None if bias is None else bias.float()
        return cls(torch.ops.quantized.linear_prepack_fp16(wide, bias), scale)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        x = x if self.scale == 1 else x * self.scale
        return torch.ops.quantized.linear_dynamic_fp16(x, self.packed)
