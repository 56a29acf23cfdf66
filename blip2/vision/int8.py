"""Linear layers in INT8 for ONNX, as CPUs run them.

Weights are rounded once, each output channel with its own scale; inputs as they come, each token
with its own, so that a picture's result does not depend on the others of its batch. All of it is
standard ONNX (QuantizeLinear, MatMulInteger), which ONNX Runtime fuses.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.onnx import ops

# Of a weight's eight bits, seven: without VNNI, x86 adds two products in 16 bits, which saturate.
# 2 · 255 · 64 just fits.
LARGEST_WEIGHT = 64
LARGEST_INPUT = 127
ZERO = 128  # what stands for 0 in uint8, the type of inputs for which x86 has instructions


def quantize_linears(module: nn.Module) -> None:
    """Replace every linear layer in `module` by an Int8Linear of the same weights."""
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, Int8Linear(child))
        else:
            quantize_linears(child)


class Int8Linear(nn.Module):
    """x (… x in, float32) → x · weightᵀ + bias (… x out, float32). To be exported, not to be run."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        # A channel of zeros has scale 0; dividing by 1 instead leaves its zeros alone.
        scales = weight.abs().amax(dim=1) / LARGEST_WEIGHT
        values = weight / torch.where(scales > 0, scales, 1.0)[:, None]
        self.register_buffer("values", values.round().to(torch.int8).t().contiguous())
        self.register_buffer("scales", scales)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().float())
        self.register_buffer("step", torch.tensor(1 / LARGEST_INPUT))
        self.register_buffer("zero", torch.tensor(ZERO, dtype=torch.uint8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        largest = x.abs().amax(dim=-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
        inputs = ops.symbolic(
            "::QuantizeLinear",
            (x / largest, self.step, self.zero),
            dtype=torch.uint8,
            shape=x.shape,
        )
        product = ops.symbolic(
            "::MatMulInteger",
            (inputs, self.values, self.zero),
            dtype=torch.int32,
            shape=(*x.shape[:-1], self.values.shape[1]),
        )
        y = product.float() * (self.step * self.scales) * largest
        return y if self.bias is None else y + self.bias
