"""A decoding step for one row as one kernel, step.cu: the weights stream in without a pause."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import torch

from blip2.gpu.compiled import CompiledKernel, load_kernel
from blip2.language.native.checkpoint import Norm, OPTWeights
from blip2.language.native.cuda_cache import CudaCache
from blip2.language.native.packing import PackedLinear
from blip2.language.trtllm_format import OPTCheckpointConfig

SOURCE = Path(__file__).with_name("step.cu")

_MOST_WARPS = 11  # what registers suffice for
_FEWEST_WARPS = 8  # fewer cannot keep up with the memory
_INPUTS = 64  # of a warp at a time, at most
_CHANNELS = 16  # of a tile
_MOST_TILES = 8  # summed up at a time
_STAGE = 16  # bits of a packed stage for each input and channel: two slabs of 8 bits
# Copies under way in each block: enough to keep the memory busy. With more, what blocks write for one
# another waits behind them.
_BYTES_UNDER_WAY = 44 << 10
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
        """Lay out buffers for a `cache` of one row; `macros` are from `macros_for`."""
        device, width = cache.keys.device, config.hidden_size

        # Each word that blocks write for one another carries a mark (docs/step.md). All are zeros at
        # first: with the mark that the first step does not wait for.
        def marked(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self._cache, self._macros = cache, macros
        self._addresses = _addresses(weights).to(device)
        self._weights = weights  # what the addresses are of
        self._qkv, self._attended = marked(3 * width), marked(width)
        self._hidden = marked(config.ffn_size, dtype=torch.float16)
        self._slots = marked(macros["SLOTS"], width)
        self._first_mark = torch.ones(1, dtype=torch.int32, device=device)
        shape = (1, config.vocab_size)
        self._logits = torch.empty(shape, dtype=torch.float32, device=device)
        self._kernel: CompiledKernel = load_kernel(SOURCE, "step", tuple(macros.items()))

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens: 1, int64 → logits: 1 x vocab_size, float32, overwritten by the next."""
        cache, macros = self._cache, self._macros
        self._kernel(
            (macros["BLOCKS"], 1),
            32 * (macros["WARPS"] + 1),  # one copies
            self._addresses,
            tokens,
            cache.lengths,
            cache.keys,
            cache.values,
            self._qkv,
            self._attended,
            self._hidden,
            self._slots,
            self._logits,
            self._first_mark,
            cache.max_len,
            shared_bytes=macros["SHARED"],
            together=True,
            dependent=False,
        )
        return self._logits


def macros_for(
    config: OPTCheckpointConfig, weights: OPTWeights, rows: int, device: torch.device
) -> dict[str, int] | None:
    """How step.cu is to be compiled for these weights and rows, or None where it does not pay."""
    properties = torch.cuda.get_device_properties(device)
    bits = {layer.qkv.bits for layer in weights.layers}
    # With more rows the kernels of layers.py are faster; bulk copies are Hopper's and later ones'.
    if rows > 1 or properties.major < 9 or len(bits) > 1:
        return None
    return shape_macros(
        config,
        (bits.pop(), weights.head.bits),
        properties.multi_processor_count,
        properties.shared_memory_per_block_optin,
        weights.layers[0].qkv.is_float8,
    )


def shape_macros(
    config: OPTCheckpointConfig,
    bits: tuple[int, int],
    multiprocessors: int,
    shared_bytes: int,
    float8: bool = False,
) -> dict[str, int] | None:
    """The macros for a GPU of so many multiprocessors, with so much shared memory for a block.

    `bits` are those of the layers' weights and of the head's; `float8` says that the layers' 8 bits
    are E4M3. None where the model or the GPU does not fit. step.cu does not compile with macros that
    break what it rests on.
    """
    width, ffn, heads = config.hidden_size, config.ffn_size, config.num_attention_heads
    groups = math.gcd(width, ffn) // _INPUTS
    counts = [n for n in range(_FEWEST_WARPS, _MOST_WARPS + 1) if groups % n == 0]
    head_size = width // heads
    if not counts or width % heads or head_size % 8 or head_size > 256:
        return None
    # The marks of ReLU's results are where other functions' would have a sign.
    if config.hidden_act != "relu" or not config.do_layer_norm_before:
        return None
    if bits[1] == 16 and config.vocab_size % _CHANNELS:
        return None
    warps = counts[-1]
    shared = shared_bytes - _STATIC_BYTES
    tiles = min(_MOST_TILES, 32 * warps // _CHANNELS)
    parts = 4 * tiles * warps * _CHANNELS
    inputs = 2 * max(width, ffn)
    attention = 4 * (2 * head_size + 2 * warps + 2 + warps * head_size)
    # As step.cu lays a stage out: for each warp 64 inputs of 16 channels, or of packed ones more.
    stage = 16 * (128 * warps + 64) if 16 in bits else 128 * _STAGE * warps
    depth = (shared - parts - max(inputs, attention)) // stage
    if depth < 2:
        return None
    # Every block has to have a share of qkv and of fc (docs/step.md says why).
    blocks = min(multiprocessors, 3 * width // _CHANNELS, ffn // _CHANNELS)
    splits = [_split(width, inputs, warps, blocks) for inputs in (width, ffn)]
    most_tiles, slots = map(max, zip(*splits, strict=True))
    if most_tiles > tiles:
        return None
    return {
        "BITS": bits[0],
        "FLOAT8": int(float8),
        "HEAD_BITS": bits[1],
        "WARPS": warps,
        "BLOCKS": blocks,
        # The same for dense and proj, which take turns in the slots.
        "SLOTS": slots,
        "STAGE": _STAGE,
        "DEPTH": depth,
        "UNDER_WAY": max(1, min(depth, _BYTES_UNDER_WAY // stage)),
        "SHARED": shared,
        "WIDTH": width,
        "FFN": ffn,
        "HEADS": heads,
        "LAYERS": config.num_hidden_layers,
        "VOCAB": config.vocab_size,
    }


def _split(channels: int, inputs: int, warps: int, blocks: int) -> tuple[int, int]:
    """How blocks share dense or proj: the most tiles of a block, and slots for the blocks of a tile.

    A tile has so many slabs (64 inputs for each warp), and slabs are dealt out evenly.
    """
    tiles, slabs = channels // _CHANNELS, inputs // (_INPUTS * warps)
    dealt = tiles * slabs
    sharers = min(dealt, blocks)
    ends = [block * dealt // sharers for block in range(sharers + 1)]
    most_tiles = max((end - 1) // slabs - start // slabs + 1 for start, end in pairwise(ends))
    return most_tiles, min(math.ceil(sharers / tiles) + 1, slabs)


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
