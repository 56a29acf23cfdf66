"""The ViT's linear layers in FP8, and what that costs each layer; how is in blip2/float8.py."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import nn

from blip2.float8 import quantise

# Of what a layer adds to the residual, off by so much of it: from here on it stays in 16 bits. Where
# no value is much larger than the others of its token or channel it is 0.04 to 0.06.
LAYER_BOUND = 0.1
_SMALLEST = 1e-30  # that what a layer adds to a token is taken for


class Float8Linear(nn.Module):
    """x (… x in) → x · weightᵀ + bias (… x out), in the dtype of x.

    Its tensors are buffers, for they keep their dtypes when a network's parameters change theirs.

    Attributes:
        weight: out x in, E4M3.
        weight_scale: out, float32: a channel's weights are its values times this.
        bias: out, float32, or None.
    """

    def __init__(self, linear: nn.Linear) -> None:
        """Rounds a layer's weights, or takes its shapes if it is on the meta device."""
        super().__init__()
        values, scales = quantise(linear.weight.detach())
        self.register_buffer("weight", values)
        self.register_buffer("weight_scale", scales[:, 0])
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().float())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        values, scale = quantise(x)
        y = F.linear(values.float(), self._float_weight()) * scale
        return (y if self.bias is None else y + self.bias).to(x.dtype)

    def _float_weight(self) -> torch.Tensor:
        if not torch.onnx.is_in_onnx_export():
            return self.weight.float() * self.weight_scale[:, None]
        from torch.onnx import ops  # whoever exports has waited for more

        # By this node, which the exporter does not compute beforehand as it does the product above.
        return ops.symbolic(
            "::DequantizeLinear",
            (self.weight, self.weight_scale),
            attrs={"axis": 0},
            dtype=torch.float32,
            shape=self.weight.shape,
        )


def quantise_linears(module: nn.Module) -> None:
    """Replace every linear layer in `module` by a Float8Linear of the same weights."""
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, Float8Linear(child))
        else:
            quantise_linears(child)


def views(pixel_values: torch.Tensor) -> torch.Tensor:
    """A picture, 1 x 3 x S x S, then mirrored, and its four quarters enlarged: 6 x 3 x S x S."""
    top, bottom = pixel_values.tensor_split(2, dim=2)
    quarters = [*top.tensor_split(2, dim=3), *bottom.tensor_split(2, dim=3)]
    size = pixel_values.shape[2:]
    enlarged = [F.interpolate(q, size, mode="bilinear", align_corners=False) for q in quarters]
    return torch.cat([pixel_values, pixel_values.flip(3), *enlarged])


@torch.inference_mode()
def layer_errors(vit: nn.Module, pixel_values: torch.Tensor) -> list[float]:
    """How far each layer's linears in FP8 would take it from itself.

    Args:
        vit: a `modules.VisionTransformer` in float32.
        pixel_values: B x 3 x S x S, the pictures to measure with.

    Returns:
        For each layer, of what it adds to the residual, |off| / |exact|: the mean over all tokens,
        for some have values a hundred times as large as others.
    """
    errors = []
    hidden = vit.embeddings(pixel_values)
    for layer in vit.encoder.layers:
        rounded = copy.deepcopy(layer)
        quantise_linears(rounded)
        exact = layer(hidden)
        off, added = (rounded(hidden) - exact).norm(dim=-1), (exact - hidden).norm(dim=-1)
        errors.append(float((off / added.clamp_min(_SMALLEST)).mean()))
        hidden = exact
    return errors
