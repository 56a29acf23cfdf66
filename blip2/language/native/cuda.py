"""OPT on an NVIDIA GPU: the model of `model.py` with a decoding step of fused Triton kernels.

Prompts go through PyTorch (cuBLAS and SDPA) in float16, all at once. Each further token is one
CUDA graph of the kernels in `kernels.py`, captured once per number of rows and cache size.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import torch
import triton
from torch.nn import functional

from blip2.language.native import kernels
from blip2.language.native.checkpoint import Layer, Norm, OPTWeights, load_weights
from blip2.language.native.compiled import load_kernel
from blip2.language.native.linear import Linear, quantize
from blip2.language.native.model import NORM_EPS, OPTModel
from blip2.language.trtllm_format import OPTCheckpointConfig

# A cache is made for a multiple of this many tokens, so that few sizes of graph are captured.
_LENGTH_STEP = 128

_MOST_STEPS = 4  # graphs kept, each with its cache

_INPUTS_MULTIPLE = 64  # inputs of a linear: what the kernel reads at a time with 4 bits

SOURCE = Path(__file__).with_name("linear.cu")
_TILES = (1, 2, 3, 5, 8)  # tiles of 8 rows that the kernel is compiled for
_WIDEST_NORM = 6144  # inputs whose norm fits the kernel's shared memory
_WIDEST_STAGED = 16384  # inputs that fit it without
_MOST_ROWS = 64  # above this, cuBLAS is faster for float16


@dataclasses.dataclass(frozen=True)
class PackedLinear(Linear):
    """A weight in 16, 8 or 4 bits, for the kernel in linear.cu.

    16 bits: N x K float16, as it comes. Fewer: uint8, blocks of 512 bytes for each 16 channels and
    32 (64 where 4 bits) inputs, in which every thread finds its 16 bytes in a row; `_order` has
    the details. Values are biased by half their range, so that they are unsigned.
    """

    weight: torch.Tensor
    scales: torch.Tensor | None
    bias: torch.Tensor | None
    bits: int
    shape: tuple[int, int]

    @classmethod
    def pack(
        cls, weight: torch.Tensor, bias: torch.Tensor | None, bits: int | None
    ) -> PackedLinear:
        shape = tuple(weight.shape)
        if bits is None:
            return cls(weight.half().contiguous(), None, bias, 16, shape)
        values, scales = quantize(weight, bits)
        unsigned = (values.short() + (1 << (bits - 1))).to(torch.uint8)
        unsigned = functional.pad(unsigned, (0, 0, 0, -shape[0] % _CHANNELS))
        return cls(_PACKED[bits](unsigned), scales.half(), bias, bits, shape)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Through cuBLAS, for the many rows of a prompt."""
        return functional.linear(x, self.unpacked(), self.bias)

    def unpacked(self) -> torch.Tensor:
        """The float16 weight, N x K, that the stored one stands for."""
        if self.scales is None:
            return self.weight
        channels, inputs = self.shape
        unsigned = _UNPACKED[self.bits](self.weight, inputs)[:channels]
        values = unsigned.half() - (1 << (self.bits - 1))
        return values * self.scales[:, None]


# A block's 512 bytes by thread: lane = 4 g + t holds, of channels g and g + 8, inputs 8t .. 8t + 7.
# 8 bits: 16 bytes, channel g first. 4 bits: two such groups of inputs, 8 inputs in 4 bytes.
_CHANNELS = 16


def _pack8(unsigned: torch.Tensor) -> torch.Tensor:
    blocks = unsigned.unflatten(1, (-1, 4, 8)).unflatten(0, (-1, 2, 8))
    return blocks.permute(0, 3, 2, 4, 1, 5).contiguous()  # tile, group, g, t, near/far, input


def _unpack8(packed: torch.Tensor, inputs: int) -> torch.Tensor:
    return packed.permute(0, 4, 2, 1, 3, 5).reshape(-1, inputs)


def _pack4(unsigned: torch.Tensor) -> torch.Tensor:
    blocks = unsigned.unflatten(1, (-1, 2, 4, 4, 2)).unflatten(0, (-1, 2, 8))
    # tile, near/far, g, group, half, t, pair, which of the pair: nibbles 0-3 are the firsts of the
    # four pairs, nibbles 4-7 the seconds; byte b holds nibbles 2b (low) and 2b + 1 (high).
    nibbles = blocks.permute(0, 3, 2, 5, 4, 1, 7, 6).flatten(6).unflatten(6, (4, 2))
    return (nibbles[..., 0] | nibbles[..., 1] << 4).contiguous()


def _unpack4(packed: torch.Tensor, inputs: int) -> torch.Tensor:
    nibbles = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(6).unflatten(6, (2, 4))
    return nibbles.permute(0, 5, 2, 1, 4, 3, 7, 6).reshape(-1, inputs)


_PACKED = {8: _pack8, 4: _pack4}
_UNPACKED = {8: _unpack8, 4: _unpack4}


class CudaCache:
    """Keys and values, layers x rows x heads x max_len x D in float16, and who shares what.

    `sources[row, slot]` is the cache row in which that slot of a row lies: a request's beams share
    the prompt of their first row, and a beam that continues another one only changes this table.
    """

    def __init__(self, config: OPTCheckpointConfig, rows: int, max_len: int, device) -> None:
        heads, layers = config.num_attention_heads, config.num_hidden_layers
        shape = (layers, rows, heads, max_len, config.hidden_size // heads)
        self.keys = torch.zeros(shape, dtype=torch.float16, device=device)
        self.values = torch.zeros_like(self.keys)
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=device)
        self.sources = torch.zeros((rows, max_len), dtype=torch.int32, device=device)
        self._slots = torch.arange(max_len, device=device)
        self._own = torch.arange(rows, dtype=torch.int32, device=device)[:, None]
        self._num_beams = 1

    @property
    def rows(self) -> int:
        return self.keys.shape[1]

    @property
    def max_len(self) -> int:
        return self.keys.shape[3]

    def reset(self, prompt_lengths: torch.Tensor, num_beams: int) -> None:
        """Start over with prompts of these lengths (requests)."""
        self._num_beams = num_beams
        self.lengths.copy_(prompt_lengths.repeat_interleave(num_beams))
        first = self._own // num_beams * num_beams
        self.sources.copy_(torch.where(self._slots < self.lengths[:, None], first, self._own))

    def write_prompt(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Store the prompts' keys and values, requests x heads x T x D."""
        for cache, prompt in ((self.keys, keys), (self.values, values)):
            cache[layer, :: self._num_beams, :, : prompt.shape[2]] = prompt

    def reorder(self, source_rows: torch.Tensor) -> None:
        """Let each row continue another row of the same request."""
        inherited = self.sources.index_select(0, source_rows)
        answered = self._slots < self.lengths[:, None]
        self.sources.copy_(torch.where(answered, inherited, self._own))


class CudaModel(OPTModel):
    """OPT whose layers normalise first, for one GPU. Keeps one cache and graph a (rows, length)."""

    steps_between_checks = 4
    max_batch_size = 64  # larger ones are hardly faster a request, and their cache is large

    @staticmethod
    def runs(config: OPTCheckpointConfig) -> bool:
        """Whether the kernels take such an OPT."""
        widths = (config.hidden_size, config.ffn_size)
        return (
            config.do_layer_norm_before
            and config.hidden_act == "relu"
            and all(width % _INPUTS_MULTIPLE == 0 for width in widths)
        )

    @classmethod
    def load(cls, directory: Path, config: OPTCheckpointConfig, device: torch.device) -> CudaModel:
        """Read a checkpoint onto a GPU, to compute in float16 with float32 sums and residuals.

        Raises:
            UserError: the checkpoint is damaged; see `load_weights`.
        """

        def place(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(device).half()

        def pack(weight: torch.Tensor, bias: torch.Tensor | None, bits: int | None) -> PackedLinear:
            bias = None if bias is None else place(bias)
            return PackedLinear.pack(weight.to(device), bias, bits)

        return cls(config, load_weights(directory, config, place, pack))

    def __init__(self, config: OPTCheckpointConfig, weights: OPTWeights) -> None:
        super().__init__(config, weights)
        self._steps: dict[tuple[int, int], Step] = {}

    def new_cache(self, lengths: torch.Tensor, num_beams: int, max_new_tokens: int) -> CudaCache:
        """The cache for so many rows and tokens, emptied; the one before it becomes invalid."""
        needed = int(lengths.max()) + max_new_tokens
        max_len = min(
            math.ceil(needed / _LENGTH_STEP) * _LENGTH_STEP, self.config.max_position_embeddings
        )
        key = (len(lengths) * num_beams, max_len)
        if key not in self._steps:
            while len(self._steps) >= _MOST_STEPS:
                del self._steps[next(iter(self._steps))]  # the oldest: its cache may be gigabytes
            self._steps[key] = Step(self.config, self.weights, *key, device=lengths.device)
        cache = self._steps[key].cache
        cache.reset(lengths, num_beams)
        return cache

    def _logits(self, x: torch.Tensor) -> torch.Tensor:
        # In float32, as the steps' are: in float16 close tokens would tie.
        normed = functional.layer_norm(
            x, x.shape[-1:], self.weights.final_norm.weight, self.weights.final_norm.bias, NORM_EPS
        )
        head = self.weights.head.unpacked()
        if x.device.type == "cpu":
            return normed.float() @ head.float().T
        return torch.mm(normed, head.T, out_dtype=torch.float32)

    def step(self, tokens: torch.Tensor, cache: CudaCache) -> torch.Tensor:
        """As in the base class; the logits returned are overwritten by the next step."""
        return self._steps[cache.rows, cache.max_len](tokens)


class Step:
    """One token for each of `rows` rows: static buffers, the kernels, and their CUDA graph."""

    def __init__(
        self,
        config: OPTCheckpointConfig,
        weights: OPTWeights,
        rows: int,
        max_len: int,
        device: torch.device,
    ) -> None:
        def buffer(width: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
            return torch.empty((rows, width), dtype=dtype, device=device)

        width = config.hidden_size
        self._config, self._weights, self._rows = config, weights, rows
        self.cache = CudaCache(config, rows, max_len, device)
        self._tokens = torch.zeros(rows, dtype=torch.int64, device=device)
        self._x = buffer(width, torch.float32)
        self._normed = buffer(width)
        self._qkv = buffer(3 * width)
        self._attended = buffer(width)
        self._hidden = buffer(config.ffn_size)
        self._logits = buffer(config.vocab_size, torch.float32)
        # Dependent launches exist from Hopper on; Triton's interpreter has no devices at all.
        self._pdl = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9
        self._compiled = device.type == "cuda"
        self._graph = self._capture() if device.type == "cuda" else None

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens: rows, int64 → logits: rows x vocab_size, float32, overwritten by the next."""
        self._tokens.copy_(tokens)
        if self._graph is None:
            self._launch()
        else:
            self._graph.replay()
        return self._logits

    def _capture(self) -> torch.cuda.CUDAGraph:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._launch()  # compiles the kernels, which a capture must not do
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._launch()
        return graph

    def _launch(self) -> None:
        """Queue the whole step."""
        width, cache = self._config.hidden_size, self.cache
        kernels.embed_kernel[(self._rows, triton.cdiv(width, 1024))](
            self._tokens,
            cache.lengths,
            self._weights.embedding,
            self._weights.positions,
            self._x,
            width,
            BLOCK=1024,
            **self._pdl_options(),
        )
        for index, layer in enumerate(self._weights.layers):
            self._layer(index, layer)
        self._linear(self._x, self._weights.head, self._logits, norm=self._weights.final_norm)
        cache.lengths += 1

    def _layer(self, index: int, layer: Layer) -> None:
        self._linear(self._x, layer.qkv, self._qkv, norm=layer.input_norm)
        self._attend(index)
        self._linear(self._attended, layer.dense, self._x, residual=True)
        self._linear(self._x, layer.fc, self._hidden, norm=layer.post_norm, relu=True)
        self._linear(self._hidden, layer.proj, self._x, residual=True)

    def _attend(self, index: int) -> None:
        heads, cache = self._config.num_attention_heads, self.cache
        head_size = self._config.hidden_size // heads
        kernels.attention_kernel[(self._rows, heads)](
            self._qkv,
            cache.keys[index],
            cache.values[index],
            cache.lengths,
            cache.sources,
            self._attended,
            cache.max_len,
            head_size**-0.5,
            D=head_size,
            BLOCK_D=triton.next_power_of_2(head_size),
            BLOCK_L=64,
            **self._pdl_options(),
        )

    def _linear(
        self,
        x: torch.Tensor,
        linear: PackedLinear,
        out: torch.Tensor,
        *,
        norm: Norm | None = None,
        relu: bool = False,
        residual: bool = False,
    ) -> None:
        """out = [ReLU](norm(x) Wᵀ + b), or added to out where `residual`."""
        # One row is normalised by every block of the linear kernel; more rows once, beforehand.
        norm_inside = norm is not None and self._rows == 1 and self._compiled
        norm_inside = norm_inside and linear.shape[1] <= _WIDEST_NORM
        if norm is not None and not norm_inside:
            self._norm(x, norm)
            x = self._normed
        if not self._compiled or (linear.bits == 16 and self._rows > _MOST_ROWS):
            y = linear(x)
            y = y.relu() if relu else y
            out.add_(y) if residual else out.copy_(y)
            return
        tiles = next((n for n in _TILES if 8 * n >= self._rows), _TILES[-1])
        channels, inputs = linear.shape
        warps = _warps(channels, tiles)
        macros = {
            "BITS": linear.bits,
            "TILES": tiles,
            "WARPS": warps,
            "WIDTH": inputs,
            "NORM": norm_inside,
            "STAGED": norm_inside or (self._rows == 1 and inputs <= _WIDEST_STAGED),
            "RELU": relu,
            "RESIDUAL": residual,
            "OUT_FLOAT": out.dtype == torch.float32,
            "HAS_BIAS": linear.bias is not None,
        }
        kernel = load_kernel(
            SOURCE,
            "linear",
            tuple((name, int(value)) for name, value in macros.items()),
        )
        kernel(
            (triton.cdiv(channels, _CHANNELS), triton.cdiv(self._rows, 8 * tiles)),
            32 * warps,
            x,
            *((norm.weight, norm.bias) if norm_inside else (None, None)),
            linear.weight,
            linear.scales,
            linear.bias,
            out,
            self._rows,
            channels,
            float(NORM_EPS),
        )

    def _norm(self, x: torch.Tensor, norm: Norm) -> None:
        width = self._config.hidden_size
        kernels.norm_kernel[(self._rows,)](
            x,
            norm.weight,
            norm.bias,
            self._normed,
            width,
            NORM_EPS,
            BLOCK=triton.next_power_of_2(width),
            **self._pdl_options(),
        )

    def _pdl_options(self) -> dict[str, bool]:
        return {"PDL": True, "launch_pdl": True} if self._pdl else {"PDL": False}


def _warps(channels: int, tiles: int) -> int:
    """Warps that share a block's 16 channels: so many that all blocks are on the GPU at once.

    The kernel leaves room for about 20 warps on a multiprocessor.
    """
    return 4 if channels >= 4096 and tiles == 1 else 8
