"""Linear layers in FP8 on an NVIDIA GPU: what makes their inputs, and their products.

Whatever makes an input of a product rounds it to E4M3, with a scale a token. Products by rows and
columns with their own scales cannot be added to the residual in place: a LayerNorm adds the one
before it as it reads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
import triton

from blip2.float8 import DTYPE
from blip2.gpu import float8_kernels
from blip2.gpu.kernel_launch import launch

_MANY_ROWS = 4096  # from here on a program normalises several rows


@dataclasses.dataclass
class Residual:
    """The residual stream, rows x width, and a product that is still to be added to it."""

    hidden: torch.Tensor
    product: torch.Tensor | None = None

    def summed(self) -> torch.Tensor:
        """The stream itself, once the product is added."""
        if self.product is not None:
            self.hidden += self.product
            self.product = None
        return self.hidden

    def normed(self, norm: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """A LayerNorm of the stream itself."""
        return norm(self.summed())


@dataclasses.dataclass(frozen=True)
class Float8:
    """A product's inputs: values, rows x width in E4M3, and a float32 scale for each row."""

    values: torch.Tensor
    scales: torch.Tensor

    @classmethod
    def like(cls, x: torch.Tensor) -> Float8:
        """Not yet written, for x of rows x width."""
        return cls(torch.empty_like(x, dtype=DTYPE), x.new_empty(len(x), dtype=torch.float32))

    @classmethod
    def of(cls, x: torch.Tensor, activation: str = "") -> Float8:
        """x of rows x width, or its activation: "gelu" or "relu"."""
        out, width = cls.like(x), x.shape[1]
        low = 1 << max(0, (width - 1).bit_length() - 1)
        launch(
            float8_kernels.to_float8_kernel,
            (len(x),),
            x,
            out.values,
            out.scales,
            width,
            LOW=low,
            HIGH=triton.next_power_of_2(width - low),
            ACTIVATION=activation,
            num_warps=4 if width <= 2048 else 8,
            device=x.device,
        )
        return out


@dataclasses.dataclass(frozen=True)
class Float8Norm:
    """LayerNorm of a residual stream + shift, in FP8."""

    weight: torch.Tensor
    bias: torch.Tensor
    eps: float
    shift: torch.Tensor  # float32

    def __call__(self, residual: Residual) -> Float8:
        """The stream has its product added on the way."""
        x, product = residual.hidden, residual.product
        out = Float8.like(x)
        rows, width = x.shape
        rows_each = 1 if rows < _MANY_ROWS else 4
        launch(
            float8_kernels.norm_to_float8_kernel,
            (triton.cdiv(rows, rows_each),),
            x,
            x if product is None else product,
            self.shift,
            self.weight,
            self.bias,
            out.values,
            out.scales,
            rows,
            width,
            self.eps,
            ROWS=rows_each,
            BLOCK=triton.next_power_of_2(width),
            ADDS=product is not None,
            device=x.device,
        )
        residual.product = None
        return out


@dataclasses.dataclass(frozen=True)
class Float8Product:
    """x Wᵀ [+ bias] in 16 bits, W in E4M3."""

    weight: torch.Tensor  # channels x inputs
    scales: torch.Tensor  # channels, float32
    bias: torch.Tensor | None  # of `product_dtype`

    @classmethod
    def of(
        cls, weight: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None
    ) -> Float8Product:
        """With a bias of any type."""
        return cls(weight, scales, None if bias is None else bias.to(product_dtype(bias.device)))

    def __call__(self, x: Float8) -> torch.Tensor:
        """rows x channels"""
        # Fast sums keep 14 bits: off by some 1e-3, where E4M3 makes 4e-2, and up to a fifth faster.
        return torch._scaled_mm(
            x.values,
            self.weight.T,
            x.scales[:, None],
            self.scales[None],
            self.bias,
            out_dtype=product_dtype(self.weight.device),
            use_fast_accum=True,
        )


def product_dtype(device: torch.device) -> torch.dtype:
    """What products with a scale for each row and column yield in 16 bits.

    On Hopper cuBLAS (from CUDA 12.9 on) multiplies, elsewhere a kernel of PyTorch's that has
    bfloat16 alone.
    """
    with_cublas = torch.cuda.get_device_capability(device) == (9, 0) and _cuda() >= (12, 9)
    return torch.float16 if with_cublas else torch.bfloat16


def _cuda() -> tuple[int, ...]:
    return tuple(map(int, torch.version.cuda.split(".")[:2]))
