"""OPT's layers on a GPU with weights and inputs in FP8: for prompts, and steps of some rows.

Up to FEW_ROWS rows inputs stay in float16: a step reads the same weights, and rounds less.
"""

from __future__ import annotations

import torch

from blip2.gpu.float8 import Float8, Float8Norm, Float8Product, Residual
from blip2.language.native.checkpoint import Norm, OPTWeights
from blip2.language.native.layers import FEW_ROWS, Attention, Layers
from blip2.language.native.model import NORM_EPS
from blip2.language.native.packing import PackedLinear
from blip2.language.trtllm_format import OPTCheckpointConfig


def layers_for(
    config: OPTCheckpointConfig, weights: OPTWeights, tokens: int, device: torch.device
) -> Layers:
    """What computes so many tokens with these weights."""
    in_float8 = tokens > FEW_ROWS and weights.layers[0].qkv.is_float8
    return (Float8Layers if in_float8 else Layers)(config, weights, tokens, device)


class Float8Layers(Layers):
    """As `Layers`, but what is multiplied with the layers' weights is rounded to E4M3 by token."""

    def __init__(
        self, config: OPTCheckpointConfig, weights: OPTWeights, tokens: int, device: torch.device
    ) -> None:
        super().__init__(config, weights, tokens, device)
        shift = torch.zeros(config.hidden_size, device=device)

        def in_float8(norm: Norm) -> Float8Norm:
            return Float8Norm(norm.weight, norm.bias, NORM_EPS, shift)

        self._norms = [
            (in_float8(layer.input_norm), in_float8(layer.post_norm)) for layer in weights.layers
        ]
        self._residual = Residual(self.x)
        self._has_kernel = self._hopper and self._few_rows

    def logits(self, out: torch.Tensor) -> None:
        """As in the base class."""
        if self._residual.product is not None:
            self._pending, self._residual.product = (self._residual.product, None), None
        super().logits(out)

    def _attend(self, index: int, attention: Attention) -> None:
        layer, (norm, _) = self._weights.layers[index], self._norms[index]
        qkv = self._multiply(norm(self._residual), layer.qkv, self._qkv)
        if qkv.dtype != self._qkv.dtype:
            qkv = self._qkv.copy_(qkv)
        attention(index, qkv, self._attended)

    def _mlp(self, index: int) -> None:
        layer, (_, norm) = self._weights.layers[index], self._norms[index]
        self._add(self._attended, layer.dense)
        hidden = self._multiply(norm(self._residual), layer.fc, self._hidden)
        self._add(hidden, layer.proj, "relu")

    def _add(self, x: torch.Tensor, linear: PackedLinear, activation: str = "") -> None:
        """Add the linear of x, or of its activation, to the stream; as in the base class."""
        rounded = Float8.of(x, activation)
        if self._has_kernel:
            values, scales = rounded.values, rounded.scales
            self._launch(values, linear, self.x, residual=True, row_scales=scales)
        else:
            self._residual.product = _product(linear)(rounded)

    def _multiply(self, x: Float8, linear: PackedLinear, out: torch.Tensor) -> torch.Tensor:
        """x Wᵀ + b, in `out` or elsewhere."""
        if not self._has_kernel:
            return _product(linear)(x)
        self._launch(x.values, linear, out, row_scales=x.scales)
        return out


def _product(linear: PackedLinear) -> Float8Product:
    return Float8Product.of(linear.weight, linear.scales, linear.bias)
