"""Linear layers in FP8 (E4M3: 3 bits of mantissa, up to 448), as Hopper and later multiply them.

Weights are rounded once, each output channel with its own scale; inputs as they come, each token
with its own, so that a picture's result does not depend on the others of its batch. Products are
added up in float32. Scales are the largest magnitude over 448, in float32.
"""

from __future__ import annotations

import torch
from torch import nn

DTYPE = torch.float8_e4m3fn
LARGEST = 448.0
_SMALLEST = 1e-30  # that a row's largest is taken for: of zeros it is 0
SCALE = "weight_scale"  # what a checkpoint has beside a weight, as compressed-tensors names it
MULTIPLE = 16  # of channels and inputs, which the products need


def quantise(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x (… x width) in E4M3, and what times it is x: … x 1, float32."""
    x = x.float()
    largest = x.abs().amax(dim=-1, keepdim=True).clamp_min(_SMALLEST)
    return (x * (LARGEST / largest)).to(DTYPE), largest / LARGEST


class Float8Linear(nn.Module):
    """x (… x in) → x · weightᵀ + bias (… x out), in the dtype of x.

    Attributes:
        weight: out x in, E4M3.
        weight_scale: out, float32: a channel's weights are its values times this.
        bias: out, or None.
    """

    def __init__(self, linear: nn.Linear) -> None:
        """Rounds a layer's weights, or takes its shapes if it is on the meta device."""
        super().__init__()
        values, scales = quantise(linear.weight.detach())
        self.register_buffer("weight", values)
        self.register_buffer(SCALE, scales[:, 0])
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        values, scale = quantise(x)
        y = nn.functional.linear(values.float(), self.weight.float()) * (scale * self.weight_scale)
        return (y if self.bias is None else y + self.bias.float()).to(x.dtype)


def quantise_linears(module: nn.Module) -> None:
    """Replace every linear layer in `module` by a Float8Linear of the same weights."""
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, Float8Linear(child))
        else:
            quantise_linears(child)
