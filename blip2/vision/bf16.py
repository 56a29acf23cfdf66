"""The ViT and Q-Former on a CPU that multiplies bfloat16: linear layers in it, all else in float32.

Attention lies between two linear layers, and is in bfloat16 too. What layers add up, and what they
normalise, keeps float32's digits: it costs nothing, and halves the error.
"""

from __future__ import annotations

import torch
from torch import nn

from blip2 import bfloat16


class Bfloat16Linear(nn.Linear):
    """x (… x in) → x · weightᵀ + bias (… x out) in bfloat16; sums in float32."""

    def __init__(self, linear: nn.Linear) -> None:
        """Rounds a layer's weights, or takes its shapes if it is on the meta device."""
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = nn.Parameter(linear.weight.detach().bfloat16(), requires_grad=False)
        bias = linear.bias
        bias = None if bias is None else nn.Parameter(bias.detach().bfloat16(), requires_grad=False)
        self.register_parameter("bias", bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return bfloat16.linear(x.bfloat16(), self.weight, self.bias)


def use_bfloat16(module: nn.Module) -> None:
    """Replace every linear layer in `module` by a Bfloat16Linear of the same weights."""
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, Bfloat16Linear(child))
        else:
            use_bfloat16(child)


def packed_weights(module: nn.Module) -> set[str]:
    """The names of the weights in `module` that may be in oneDNN's own order: see `bfloat16.linear`."""
    return {
        f"{name}.weight" if name else "weight"
        for name, child in module.named_modules()
        if isinstance(child, Bfloat16Linear)
    }
