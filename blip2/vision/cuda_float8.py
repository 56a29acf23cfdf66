"""A ViT's layer with weights in FP8 on a GPU: what `float8.py` computes, without its copies."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from blip2.gpu.float8 import Float8, Float8Norm, Float8Product, Residual
from blip2.vision import modules
from blip2.vision.float8 import Float8Linear

Attend = Callable[[torch.Tensor], torch.Tensor]  # qkv, rows x 3 · width → rows x width


@dataclasses.dataclass(frozen=True)
class Float8VisionLayer:
    """A layer whose four products are in FP8; attention between them is in 16 bits."""

    norm1: Float8Norm
    qkv: Float8Product
    projection: Float8Product
    norm2: Float8Norm
    fc1: Float8Product
    fc2: Float8Product
    activation: Callable[[torch.Tensor], torch.Tensor]

    @classmethod
    def of(
        cls, layer: modules.VisionLayer, shift1: torch.Tensor, shift2: torch.Tensor
    ) -> Float8VisionLayer:
        """shift1, shift2: what is to be added to the stream for each LayerNorm: width, float32."""
        return cls(
            _norm(layer.layer_norm1, shift1),
            _product(layer.self_attn.qkv, adds_bias=True),
            _product(layer.self_attn.projection, adds_bias=False),
            _norm(layer.layer_norm2, shift2),
            _product(layer.mlp.fc1, adds_bias=True),
            _product(layer.mlp.fc2, adds_bias=False),
            layer.activation,
        )

    def __call__(self, residual: Residual, attend: Attend) -> None:
        mixed = attend(self.qkv(self.norm1(residual)))
        residual.product = self.projection(Float8.of(mixed))
        inner = self.fc1(self.norm2(residual))
        if self.activation is F.gelu:
            rounded = Float8.of(inner, "gelu")
        else:
            rounded = Float8.of(self.activation(inner))
        residual.product = self.fc2(rounded)


def _norm(norm: nn.LayerNorm, shift: torch.Tensor) -> Float8Norm:
    return Float8Norm(norm.weight, norm.bias, norm.eps, shift)


def _product(linear: Float8Linear, *, adds_bias: bool) -> Float8Product:
    bias = linear.bias if adds_bias else None
    return Float8Product.of(linear.weight, linear.weight_scale, bias)
