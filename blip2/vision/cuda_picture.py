"""A ViT's layers for one picture on a Hopper, whose tokens are few: picture_linear.cu.

With several pictures cuBLAS is as fast. Each kernel is launched dependent on the one before (PDL),
which cuBLAS's are not: the weights are on their way while that one ends.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from blip2.gpu.boxes import Boxes
from blip2.gpu.float8 import Residual
from blip2.vision import modules
from blip2.vision.cuda_float8 import Attend

SOURCE = Path(__file__).with_name("picture_linear.cu")
MOST_ROWS = 272  # of two tiles

_ROWS, _CHANNELS, _STEP = 136, 64, 64  # of a tile, of four warps, and inputs at a time: see there
_MOST_PARTS = 4  # that a LayerNorm has to add up

Norm = Callable[..., torch.Tensor]  # (x, parts, keeps_sum=…): see `cuda._Norm`


class PartsResidual(Residual):
    """A residual stream to which parts of a product are to be added, n x rows x width in float32."""

    def normed(self, norm: Norm) -> torch.Tensor:
        """LayerNorm of the stream, once they are added, which is the same kernel's work."""
        parts, self.product = self.product, None
        return norm(self.hidden, parts, keeps_sum=parts is not None)


@dataclasses.dataclass(frozen=True)
class PictureLinear:
    """x Wᵀ + b, or its GELU, rows x channels; without a bias parts of x Wᵀ, to be added up, n x rows x
    channels in float32.

    x is rows x inputs in float16, of at most MOST_ROWS rows.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    gelu: bool = False

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        from blip2.gpu.compiled import load_kernel

        (rows, _), channels = x.shape, len(self.weight)
        macros = macros_for(self.weight, rows, has_parts=self.bias is None)
        groups, row_tiles = macros["WARPGROUPS"], macros["ROW_TILES"]
        if self.bias is None:
            out = x.new_empty(macros["SPLIT"], rows, channels, dtype=torch.float32)
        else:
            out = x.new_empty(rows, channels)
        kernel = load_kernel(SOURCE, "linear", (*macros.items(), ("GELU", int(self.gelu))))
        kernel(
            (channels // (_CHANNELS * groups) * row_tiles, macros["SPLIT"]),
            32 * (4 * groups + 1),
            Boxes(x, _ROWS),
            Boxes(self.weight, _CHANNELS * groups // row_tiles),
            self.bias,
            out,
            rows,
            shared_bytes=macros["SHARED"],
            cluster=row_tiles,
        )
        return out


def macros_for(weight: torch.Tensor, rows: int, *, has_parts: bool) -> dict[str, int]:
    """How picture_linear.cu is to be compiled for a weight and so many rows, but for GELU.

    Blocks have as few channels as lets all of them run at once, and share out their inputs where there
    is room for more of them.
    """
    properties = torch.cuda.get_device_properties(weight.device)
    multiprocessors = properties.multi_processor_count
    (channels, inputs), row_tiles = weight.shape, -(-rows // _ROWS)
    blocks = channels // _CHANNELS * row_tiles
    groups = 2 if blocks > multiprocessors and channels % (2 * _CHANNELS) == 0 else 1
    split = 1
    if has_parts:
        split = max(1, min(multiprocessors * groups // blocks, inputs // _STEP, _MOST_PARTS))
    shared = properties.shared_memory_per_block_optin
    stage = 2 * _STEP * (_CHANNELS * groups + _ROWS)
    return {
        "INPUTS": inputs,
        "CHANNELS": channels,
        "WARPGROUPS": groups,
        "ROW_TILES": row_tiles,
        "SPLIT": split,
        "DEPTH": shared // (stage + 16),  # with two barriers of 8 bytes each
        "SHARED": shared,
        "PARTS": int(has_parts),
    }


@dataclasses.dataclass(frozen=True)
class PictureLayer:
    """A layer in float16."""

    norm1: Norm
    qkv: PictureLinear
    projection: PictureLinear
    norm2: Norm
    fc1: PictureLinear
    fc2: PictureLinear

    @staticmethod
    def takes(layer: modules.VisionLayer) -> bool:
        """Whether the current GPU has the kernel, for such a layer."""
        if layer.activation is not F.gelu or layer.self_attn.qkv.bias is None:
            return False
        weight = layer.mlp.fc1.weight
        return (
            weight.dtype == torch.float16
            and all(size % _CHANNELS == 0 for size in weight.shape)
            and torch.cuda.get_device_properties(weight.device).major == 9
        )

    @classmethod
    def of(cls, layer: modules.VisionLayer, norm1: Norm, norm2: Norm) -> PictureLayer:
        def linear(module: nn.Linear, gelu: bool = False) -> PictureLinear:
            return PictureLinear(module.weight.detach(), module.bias.detach(), gelu)

        attention, mlp = layer.self_attn, layer.mlp
        return cls(
            norm1,
            linear(attention.qkv),
            PictureLinear(attention.projection.weight.detach()),
            norm2,
            linear(mlp.fc1, gelu=True),
            PictureLinear(mlp.fc2.weight.detach()),
        )

    def __call__(self, residual: PartsResidual, attend: Attend) -> None:
        mixed = attend(self.qkv(residual.normed(self.norm1)))
        residual.product = self.projection(mixed)
        residual.product = self.fc2(self.fc1(residual.normed(self.norm2)))
