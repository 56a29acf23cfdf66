"""A decoding step for one row as one kernel, step.cu: the weights stream in without a pause."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from blip2.language.native.checkpoint import Norm, OPTWeights
from blip2.language.native.compiled import CompiledKernel, load_kernel
from blip2.language.native.cuda_cache import CudaCache
from blip2.language.native.packing import PackedLinear
from blip2.language.trtllm_format import OPTCheckpointConfig

SOURCE = Path(__file__).with_name("step.cu")

_MOST_ROWS = 1  # with more, the kernels of layers.py are faster
_MOST_WARPS = 11  # what registers suffice for
_FEWEST_WARPS = 8  # fewer cannot keep up with the memory
_INPUTS = 64  # of a warp at a time, at most
_CHANNELS = 16  # of a tile
_MOST_TILES = 8  # summed up at a time
_STAGE = 8  # bits of a packed stage for each input and channel: as large as a slab of 8 bits
# Copies under way in each block, by the weights' bits: enough to keep the memory busy. With more,
# whatever blocks tell one another waits behind them.
_BYTES_UNDER_WAY = {16: 44 << 10, 8: 32 << 10, 4: 52 << 10}
_STATIC_BYTES = 9 << 10  # shared memory that step.cu declares itself, at most, and the driver's own


class FusedStep:
    """Runs step.cu over static buffers."""

    def __init__(
        self,
        config: OPTCheckpointConfig,
        weights: OPTWeights,
        cache: CudaCache,
        macros: dict[str, int],
    ) -> None:
        """Lay out buffers for the rows of `cache`; `macros` are from `macros_for`."""
        device, rows, width = cache.keys.device, cache.rows, config.hidden_size

        def buffer(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        self._cache, self._macros = cache, macros
        self._addresses = _addresses(weights).to(device)
        self._weights = weights  # what the addresses are of
        self._qkv, self._attended = buffer(rows, 3 * width), buffer(rows, width)
        self._hidden = buffer(rows, config.ffn_size)
        self._parts = buffer(_slots(macros), rows, width, dtype=torch.float32)
        self._logits = buffer(rows, config.vocab_size, dtype=torch.float32)
        self._barriers = torch.zeros(2, dtype=torch.int32, device=device)
        self._kernel: CompiledKernel = load_kernel(SOURCE, "step", tuple(macros.items()))

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens: rows, int64 → logits: rows x vocab_size, float32, overwritten by the next."""
        cache, macros = self._cache, self._macros
        self._kernel(
            (macros["BLOCKS"], 1),
            32 * (macros["WARPS"] + 1),  # one copies
            self._addresses,
            tokens,
            cache.lengths,
            cache.sources,
            cache.keys,
            cache.values,
            self._qkv,
            self._attended,
            self._hidden,
            self._parts,
            self._logits,
            self._barriers,
            cache.max_len,
            shared_bytes=macros["SHARED"],
            together=True,
        )
        return self._logits


def macros_for(
    config: OPTCheckpointConfig, weights: OPTWeights, rows: int, device: torch.device
) -> dict[str, int] | None:
    """How step.cu is to be compiled for these weights and rows, or None where it does not pay."""
    properties = torch.cuda.get_device_properties(device)
    bits = {layer.qkv.bits for layer in weights.layers}
    if rows > _MOST_ROWS or properties.major < 9 or len(bits) > 1:  # bulk copies: Hopper and later
        return None
    return shape_macros(
        config,
        rows,
        (bits.pop(), weights.head.bits),
        properties.multi_processor_count,
        properties.shared_memory_per_block_optin,
    )


def shape_macros(
    config: OPTCheckpointConfig,
    rows: int,
    bits: tuple[int, int],
    multiprocessors: int,
    shared_bytes: int,
) -> dict[str, int] | None:
    """The macros for a GPU of so many multiprocessors, with so much shared memory for a block.

    `bits` are those of the layers' weights and of the head's. None where the shapes do not fit.
    """
    width, ffn, heads = config.hidden_size, config.ffn_size, config.num_attention_heads
    groups = math.gcd(width, ffn) // _INPUTS
    counts = [n for n in range(_FEWEST_WARPS, _MOST_WARPS + 1) if groups % n == 0]
    head_size = width // heads
    if not counts or head_size % 8 or head_size > 256:
        return None
    if bits[1] == 16 and config.vocab_size % _CHANNELS:
        return None
    warps = counts[-1]
    shared = shared_bytes - _STATIC_BYTES
    tiles = min(_MOST_TILES, 32 * warps // (_CHANNELS * rows))
    parts = 4 * tiles * warps * _CHANNELS * rows
    inputs = 2 * rows * (ffn + 32)
    attention = 4 * (3 * head_size + 2 * warps + warps * head_size)
    # As step.cu lays a stage out: for each warp 64 inputs of 16 channels, or of packed ones more.
    stage = 16 * (128 * warps + 64) if 16 in bits else 128 * _STAGE * warps
    depth = (shared - parts - max(inputs, attention)) // stage
    if depth < 2:
        return None
    return {
        "ROWS": rows,
        "BITS": bits[0],
        "HEAD_BITS": bits[1],
        "WARPS": warps,
        "BLOCKS": multiprocessors,
        "STAGE": _STAGE,
        "DEPTH": depth,
        "UNDER_WAY": max(1, min(depth, _BYTES_UNDER_WAY[bits[0]] // stage)),
        "SHARED": shared,
        "WIDTH": width,
        "FFN": ffn,
        "HEADS": heads,
        "LAYERS": config.num_hidden_layers,
        "VOCAB": config.vocab_size,
    }


def _slots(macros: dict[str, int]) -> int:
    """At least as many blocks as share a tile of dense or proj."""
    return math.ceil(macros["BLOCKS"] * _CHANNELS / macros["WIDTH"]) + 1


def _addresses(weights: OPTWeights) -> torch.Tensor:
    """The struct Model of step.cu."""

    def linear(linear: PackedLinear) -> list[torch.Tensor | None]:
        return [linear.weight, linear.scales, linear.bias]

    def norm(norm: Norm) -> list[torch.Tensor]:
        return [norm.weight, norm.bias]

    tensors: list[torch.Tensor | None] = []
    for layer in weights.layers:
        for part in (layer.qkv, layer.dense, layer.fc, layer.proj):
            tensors += linear(part)
        tensors += norm(layer.input_norm) + norm(layer.post_norm)
    tensors += linear(weights.head) + norm(weights.final_norm)
    tensors += [weights.embedding, weights.positions]
    return torch.tensor([0 if t is None else t.data_ptr() for t in tensors], dtype=torch.int64)
