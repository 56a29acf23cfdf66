"""Linears for more rows than the kernels of `layers.py` take: prompts, and steps of many rows."""

from __future__ import annotations

import functools
import itertools
import math
from pathlib import Path
from typing import NamedTuple, Protocol

import torch

from blip2.gpu.boxes import Boxes
from blip2.language.native.checkpoint import OPTWeights
from blip2.language.native.packing import CHANNELS, PackedLinear

SOURCE = Path(__file__).with_name("linear_many.cu")

_STEP = 64  # inputs that are copied and multiplied at a time; a block takes steps by twos
_ROWS = (96, 128, 160, 192, 224, 256)  # of a tile
_SPLITS = (1, 2, 3, 4, 5, 6)  # blocks that share out the inputs of a tile
# An H100's clocks, as measured: of a step of a block with one or two groups of four warps, and for
# each row; for what begins and ends a tile; and the bytes of parts that are written and read in one.
_STEP_CLOCKS = {1: (250, 1.65), 2: (150, 4.55)}
_TILE_CLOCKS = 2400
_PART_BYTES = 4000
_CROWDED = 0.1  # by how much blocks with one group slow one another down, a tile of rows more


class Tile(NamedTuple):
    """What a block computes at a time."""

    rows: int
    groups: int  # of four warps, each with 64 channels
    splits: int  # blocks that share out its inputs


class Products(Protocol):
    """How many rows are multiplied. x is rows x inputs in float16."""

    is_ordered: bool  # inputs are wanted in the weights' order, of which linear_many.cu tells

    def linear(
        self, x: torch.Tensor, linear: PackedLinear, out: torch.Tensor, *, relu: bool
    ) -> None:
        """out = [ReLU](x Wᵀ + b), rows x channels: in float16, behind ReLU in that order, if any.

        Of a linear without a bias in float32.
        """

    def parts(self, x: torch.Tensor, linear: PackedLinear, *, is_ordered: bool) -> torch.Tensor:
        """What adds up to x Wᵀ, n x rows x channels; `is_ordered` says whether this x is."""


def products_for(weights: OPTWeights, device: torch.device) -> Products:
    """What is fastest there, for such weights."""
    is_hopper = torch.cuda.get_device_properties(device).major == 9
    if is_hopper and all(_takes(linear) for linear in weights.linears()):
        return PackedProducts()
    return CublasProducts()


def _takes(linear: PackedLinear) -> bool:
    return linear.bits < 16 and not linear.is_float8 and linear.shape[1] % (2 * _STEP) == 0


class CublasProducts:
    """Through cuBLAS, for which packed weights are unpacked first."""

    is_ordered = False

    def linear(
        self, x: torch.Tensor, linear: PackedLinear, out: torch.Tensor, *, relu: bool
    ) -> None:
        """As in `Products`."""
        if linear.bias is None:
            out.copy_(linear(x))  # the head's: float16 to float32
        elif relu:
            # The product's own epilogue: no other function of PyTorch asks cuBLAS for it.
            torch.ops.aten._addmm_activation.out(linear.bias, x, linear.unpacked().T, out=out)
        else:
            torch.addmm(linear.bias, x, linear.unpacked().T, out=out)

    def parts(self, x: torch.Tensor, linear: PackedLinear, *, is_ordered: bool) -> torch.Tensor:
        """As in `Products`: one part, in float16."""
        if is_ordered:
            raise ValueError("cuBLAS takes inputs as they come")
        return torch.mm(x, linear.unpacked().T)[None]


class PackedProducts:
    """On a Hopper from weights in 8 or 4 bits as they are: linear_many.cu."""

    is_ordered = True

    def linear(
        self, x: torch.Tensor, linear: PackedLinear, out: torch.Tensor, *, relu: bool
    ) -> None:
        """As in `Products`."""
        tile = tile_for(linear.shape, len(x), x.device, has_parts=False)
        _launch(x, linear, out, tile, relu=relu, is_ordered=True)

    def parts(self, x: torch.Tensor, linear: PackedLinear, *, is_ordered: bool) -> torch.Tensor:
        """As in `Products`: as many as share out the inputs, in float32."""
        tile = tile_for(linear.shape, len(x), x.device, has_parts=True)
        out = x.new_empty(tile.splits, len(x), linear.shape[0], dtype=torch.float32)
        _launch(x, linear, out, tile, relu=False, is_ordered=is_ordered)
        return out


def _launch(
    x: torch.Tensor,
    linear: PackedLinear,
    out: torch.Tensor,
    tile: Tile,
    *,
    relu: bool,
    is_ordered: bool,
) -> None:
    from blip2.gpu.compiled import load_kernel

    properties = torch.cuda.get_device_properties(x.device)
    shared, has_parts = properties.shared_memory_per_block_optin, out.dtype == torch.float32
    macros = macros_for(
        linear.bits, tile, shared, is_ordered=is_ordered, has_parts=has_parts, relu=relu
    )
    pieces, piece_bytes = _pieces(linear.bits, tile)
    load_kernel(SOURCE, "linear", tuple(macros.items()))(
        (min(_units(linear.shape, len(x), tile), properties.multi_processor_count), 1),
        128 * tile.groups + (128 if tile.groups > 1 else 32),
        Boxes(x, tile.rows),
        Boxes(linear.weight.flatten(1).view(torch.int32), pieces, piece_bytes),
        linear.scales,
        None if has_parts else linear.bias,
        out,
        len(x),
        *linear.shape,
        tile.splits,
        shared_bytes=shared,
    )


def macros_for(
    bits: int,
    tile: Tile,
    shared: int,
    *,
    is_ordered: bool,
    has_parts: bool,
    relu: bool,
) -> dict[str, int]:
    """How linear_many.cu is to be compiled, for a GPU with so much shared memory for a block."""
    pieces, piece_bytes = _pieces(bits, tile)
    stage = 2 * _STEP * tile.rows + pieces * piece_bytes
    return {
        "BITS": bits,
        "ROWS": tile.rows,
        "WARPGROUPS": tile.groups,
        "DEPTH": shared // (stage + 16),  # with two barriers of 8 bytes each
        "SHARED": shared,
        "INPUTS_ORDERED": int(is_ordered),
        "PARTS": int(has_parts),
        "RELU": int(relu),
    }


def _pieces(bits: int, tile: Tile) -> tuple[int, int]:
    """Of a step's weights in a block: how many pieces of 16 channels, and the bytes of each."""
    return 4 * tile.groups, _STEP * CHANNELS * bits // 8


@functools.cache
def tile_for(shape: tuple[int, int], rows: int, device: torch.device, *, has_parts: bool) -> Tile:
    """The one that takes the fewest clocks; `shape` is channels x inputs."""
    channels, inputs = shape
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count

    def clocks(tile: Tile) -> float:
        waves = math.ceil(_units(shape, rows, tile) / multiprocessors)
        begin, each = _STEP_CLOCKS[tile.groups]
        step = begin + each * tile.rows
        if tile.groups == 1:
            step *= 1 + _CROWDED * (math.ceil(rows / tile.rows) - 1)
        # More blocks than there are steps by twos never win: they would write parts for nothing.
        steps = 2 * math.ceil(inputs // (2 * _STEP) / tile.splits)
        parts = 8 * tile.splits * rows * channels / _PART_BYTES if has_parts else 0
        return waves * (steps * step + _TILE_CLOCKS) + parts

    splits = _SPLITS if has_parts else (1,)
    return min(itertools.starmap(Tile, itertools.product(_ROWS, _STEP_CLOCKS, splits)), key=clocks)


def _units(shape: tuple[int, int], rows: int, tile: Tile) -> int:
    """What blocks share out."""
    tiles = math.ceil(shape[0] / (4 * CHANNELS * tile.groups)) * math.ceil(rows / tile.rows)
    return tiles * tile.splits
