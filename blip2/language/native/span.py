"""What lies between two attentions, for some tens of rows on a Hopper, as one kernel: span.cu."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from blip2.gpu.boxes import Boxes
from blip2.language.native.checkpoint import OPTWeights
from blip2.language.native.model import NORM_EPS
from blip2.language.native.packing import PackedLinear
from blip2.language.trtllm_format import OPTCheckpointConfig

SOURCE = Path(__file__).with_name("span.cu")
ROWS = 64  # at most

_SPLIT = 4  # blocks that share out the inputs of dense's and proj's channels
_CHANNELS = 16  # a tile's are a multiple
_MOST_CHANNELS = 80  # of a tile, OPT-2.7B's on an H100: with more it was never timed
_STEP = 128  # inputs that are copied and multiplied at a time
_INPUTS_DEPTH = 3  # steps of inputs that are copied ahead
_UNPACKED_DEPTH = 10  # halves of steps of weights that are unpacked ahead
_WARPS, _PACKED_WARPS = 6, 24  # of span.cu
# Weights under way in each block: enough to keep the memory busy. With more, what blocks write for one
# another waits behind them.
_BYTES_UNDER_WAY = 44 << 10


class Span:
    """Runs span.cu for each layer but the last, over the buffers of `Layers`."""

    def __init__(
        self,
        weights: OPTWeights,
        macros: dict[str, int],
        x: torch.Tensor,
        normed: torch.Tensor,
        attended: torch.Tensor,
        hidden: torch.Tensor,
        qkv: torch.Tensor,
    ) -> None:
        """`macros` are from `macros_for`; `x` is the residual stream, rows x hidden_size in float32."""
        self._macros = macros
        self._weights, self._x, self._qkv = weights, x, qkv
        self._normed, self._attended, self._hidden = normed, attended, hidden
        parts = (macros["SPLIT"], ROWS, x.shape[1])
        self._parts = torch.empty(parts, device=x.device)
        self._counters = torch.zeros(4, dtype=torch.int64, device=x.device)

    def __call__(self, index: int) -> None:
        """Queue what follows the attention of a layer, up to what the next one's needs."""
        from blip2.gpu.compiled import load_kernel

        layer, following, macros = *self._weights.layers[index : index + 2], self._macros
        linears = (layer.dense, layer.fc, layer.proj, following.qkv)
        tiles = (macros[f"{name}_TILE"] for name in ("DENSE", "FC", "PROJ", "QKV"))
        kernel = load_kernel(SOURCE, "span", tuple(macros.items()))
        kernel(
            (macros["BLOCKS"], 1),
            32 * (_WARPS if macros["BITS"] == 16 else _PACKED_WARPS),
            *(Boxes(x, ROWS) for x in (self._attended, self._normed, self._hidden)),
            *map(_weight, linears, tiles),
            *(linear.scales for linear in linears),
            *(linear.bias for linear in linears),
            layer.post_norm.weight,
            layer.post_norm.bias,
            following.input_norm.weight,
            following.input_norm.bias,
            self._x,
            self._parts,
            self._normed,
            self._hidden,
            self._qkv,
            self._counters,
            len(self._x),
            NORM_EPS,
            shared_bytes=macros["SHARED"],
            together=True,
        )


def macros_for(
    config: OPTCheckpointConfig, weights: OPTWeights, rows: int, device: torch.device
) -> dict[str, int] | None:
    """How span.cu is to be compiled for these weights and rows, or None where it does not pay."""
    properties = torch.cuda.get_device_properties(device)
    *linears, _head = weights.linears()
    bits = {linear.bits for linear in linears}
    is_float8 = any(linear.is_float8 for linear in linears)
    if rows > ROWS or properties.major != 9 or len(bits) > 1 or is_float8:
        return None
    return shape_macros(
        config,
        bits.pop(),
        properties.multi_processor_count,
        properties.shared_memory_per_block_optin,
    )


def shape_macros(
    config: OPTCheckpointConfig, bits: int, multiprocessors: int, shared: int
) -> dict[str, int] | None:
    """The macros for a GPU of so many multiprocessors, with so much shared memory for a block.

    None where the model does not fit.
    """
    width, ffn = config.hidden_size, config.ffn_size
    if width % _STEP or ffn % _STEP:
        return None
    split = min(_SPLIT, width // _STEP)

    def tile(channels: int) -> int:
        """So that every block has one tile."""
        return _CHANNELS * math.ceil(channels / (_CHANNELS * multiprocessors))

    tiles = {
        "DENSE_TILE": tile(width * split),
        "FC_TILE": tile(ffn),
        "PROJ_TILE": tile(width * split),
        "QKV_TILE": tile(3 * width),
    }
    most_channels = max(tiles.values())
    if most_channels > _MOST_CHANNELS:
        return None
    # As span.cu lays them out, each place with two barriers of 8 bytes.
    stage = _STEP * most_channels
    unpacked_depth = 0 if bits == 16 else _UNPACKED_DEPTH
    rest = _INPUTS_DEPTH * (2 * _STEP * ROWS + 16) + unpacked_depth * (stage + 16) + 32
    depth = (shared - rest) // (stage + 16)
    return {
        "BITS": bits,
        "WIDTH": width,
        "FFN": ffn,
        "BLOCKS": multiprocessors,
        "SPLIT": split,
        **tiles,
        "WEIGHTS_DEPTH": depth,
        "INPUTS_DEPTH": _INPUTS_DEPTH,
        "UNPACKED_DEPTH": unpacked_depth,
        "UNDER_WAY": max(1, min(depth, _BYTES_UNDER_WAY // stage)),
        "SHARED": shared,
    }


def _weight(linear: PackedLinear, tile: int) -> torch.Tensor | Boxes:
    return Boxes(linear.weight, tile) if linear.bits == 16 else linear.weight
