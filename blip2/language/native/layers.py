"""OPT's layers on a GPU, one kernel an operation: for prompts, and for steps of more rows than
`fused_step.py` takes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import triton

from blip2.gpu.kernel_launch import launch
from blip2.language.native import kernels
from blip2.language.native.checkpoint import Norm, OPTWeights
from blip2.language.native.many_rows import products_for
from blip2.language.native.model import NORM_EPS
from blip2.language.native.packing import CHANNELS, PackedLinear
from blip2.language.native.span import Span, macros_for
from blip2.language.trtllm_format import OPTCheckpointConfig

SOURCE = Path(__file__).with_name("linear.cu")
HOPPER_SOURCE = Path(__file__).with_name("linear_hopper.cu")
HOPPER_PACKED_SOURCE = Path(__file__).with_name("linear_hopper_packed.cu")
_TILES = (1, 2, 3, 5, 8)  # tiles of 8 rows that linear.cu is compiled for
_HOPPER_TILES = (2, 4, 6, 8)  # and the linears of hopper.cuh, which are faster where they run
_MOST_ROWS = 64  # with more `many_rows.py` is faster
_SEPARATE_ROWS = 32  # up to here they are faster than what `Span` joins
FEW_ROWS = 8  # up to here linear.cu is faster than they are
_HOPPER_STEP = 128  # bytes of a row of inputs, at a time
_HOPPER_WARPS = 8  # of a block of theirs, each with CHANNELS
_HOPPER_BLOCKS = 2  # on a multiprocessor
_HOPPER_SHARED = 110 << 10  # bytes of each
_HOPPER_PACKED_DEPTH = 4  # steps copied ahead; more gain nothing
_SPLITS = (1, 2, 4, 8)  # blocks in a cluster; of other sizes fewer are on the GPU at once

Attention = Callable[[int, torch.Tensor, torch.Tensor], None]


class Layers:
    """The layers and the head over static buffers for so many tokens, float16 but for sums.

    `x`, tokens x hidden_size in float32, is the residual stream: to be filled before `run`.
    """

    def __init__(
        self, config: OPTCheckpointConfig, weights: OPTWeights, tokens: int, device: torch.device
    ) -> None:
        def buffer(width: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
            return torch.empty((tokens, width), dtype=dtype, device=device)

        width = config.hidden_size
        self._weights, self._tokens = weights, tokens
        self.x = buffer(width, torch.float32)
        self._normed, self._attended = buffer(width), buffer(width)
        self._qkv, self._hidden = buffer(3 * width), buffer(config.ffn_size)
        # What is still to be added to x: a linear's product without its bias, or parts of it.
        self._pending: tuple[torch.Tensor, torch.Tensor | None] | None = None
        properties = torch.cuda.get_device_properties(device)
        self._hopper = properties.major == 9
        self._multiprocessors = properties.multi_processor_count
        self._many = None if self._few_rows else products_for(weights, device)
        self._span: Span | None = None
        if tokens > _SEPARATE_ROWS and weights:
            macros = macros_for(config, weights, tokens, device)
            if macros:
                buffers = (self.x, self._normed, self._attended, self._hidden, self._qkv)
                self._span = Span(weights, macros, *buffers)

    def run(self, attention: Attention) -> None:
        """Queue all layers.

        `attention(layer, qkv, attended)` fills `attended`, tokens x width, from tokens x 3 x width.
        """
        self._to_last_attention(attention)
        self._mlp(len(self._weights.layers) - 1)

    def run_prompts(self, attention: Attention, last: torch.Tensor, rest: Layers) -> None:
        """The same, but of the tokens `last` (int64) alone what follows the last attention.

        That goes on in `rest`, which has as many tokens.
        """
        self._to_last_attention(attention)
        torch.index_select(self.x, 0, last, out=rest.x)
        torch.index_select(self._attended, 0, last, out=rest._attended)
        rest._mlp(len(self._weights.layers) - 1)

    def _to_last_attention(self, attention: Attention) -> None:
        self._attend(0, attention)
        for index in range(len(self._weights.layers) - 1):
            if self._span:
                self._span(index)
                attention(index + 1, self._qkv, self._attended)
            else:
                self._mlp(index)
                self._attend(index + 1, attention)

    def _attend(self, index: int, attention: Attention) -> None:
        layer = self._weights.layers[index]
        self.linear(self._norm(layer.input_norm), layer.qkv, self._qkv)
        attention(index, self._qkv, self._attended)

    def _mlp(self, index: int) -> None:
        """Add attention's output, projected, to x; then the MLP's."""
        layer = self._weights.layers[index]
        self._add(self._attended, layer.dense)
        self.linear(self._norm(layer.post_norm), layer.fc, self._hidden, relu=True)
        self._add(self._hidden, layer.proj)

    def logits(self, out: torch.Tensor) -> None:
        """Queue the final norm and the head of every token; out: tokens x vocab_size, float32."""
        self.linear(self._norm(self._weights.final_norm), self._weights.head, out)

    def _add(self, x: torch.Tensor, linear: PackedLinear) -> None:
        """self.x += x Wᵀ + b, now or together with the next norm."""
        if self._few_rows:
            self._launch(x, linear, self.x, residual=True)
        else:
            is_ordered = self._many.is_ordered and x is self._hidden  # attention has no such order
            self._pending = (self._many.parts(x, linear, is_ordered=is_ordered), linear.bias)

    def _norm(self, norm: Norm) -> torch.Tensor:
        width = self.x.shape[1]
        parts, bias = self._pending or (None, None)
        launch(
            kernels.norm_kernel,
            (self._tokens,),
            self.x,
            parts,
            bias,
            norm.weight,
            norm.bias,
            self._normed,
            width,
            NORM_EPS,
            PARTS=0 if parts is None else parts.numel() // self.x.numel(),
            ADD_BIAS=bias is not None,
            ORDERED=self._many is not None and self._many.is_ordered,
            BLOCK=triton.next_power_of_2(width),
            device=self.x.device,
        )
        self._pending = None
        return self._normed

    def linear(
        self, x: torch.Tensor, linear: PackedLinear, out: torch.Tensor, *, relu: bool = False
    ) -> None:
        """out = [ReLU](x Wᵀ + b)."""
        if self._few_rows:
            self._launch(x, linear, out, relu=relu)
        else:
            self._many.linear(x, linear, out, relu=relu)

    @property
    def _few_rows(self) -> bool:
        return self._tokens <= _MOST_ROWS

    def _launch(
        self,
        x: torch.Tensor,
        linear: PackedLinear,
        out: torch.Tensor,
        relu: bool = False,
        residual: bool = False,
        row_scales: torch.Tensor | None = None,
    ) -> None:
        """out [+]= [ReLU](x Wᵀ + b); `row_scales` are those of an x in FP8."""
        from blip2.gpu.compiled import load_kernel

        channels, inputs = linear.shape
        macros = {
            "WIDTH": inputs,
            "RELU": relu,
            "RESIDUAL": residual,
            "OUT_FLOAT": out.dtype == torch.float32,
            "HAS_BIAS": linear.bias is not None,
        }
        sizes = (self._tokens, channels)
        arguments = (x, linear.weight, linear.scales, linear.bias, out, *sizes)
        if self._hopper and self._tokens > FEW_ROWS:
            source, more, shared_bytes = hopper_kernel(
                linear.shape, linear.bits, self._tokens, self._multiprocessors, linear.is_float8
            )
            if source == HOPPER_SOURCE:
                arguments += (row_scales,)
            kernel = load_kernel(source, "linear", _as_macros(macros | more))
            split = more["SPLIT"]
            kernel(
                (split, triton.cdiv(channels, CHANNELS * _HOPPER_WARPS)),
                32 * _HOPPER_WARPS,
                *arguments,
                shared_bytes=shared_bytes,
                cluster=split,
            )
            return
        tiles = _enough(_TILES, self._tokens)
        warps = _warps(channels, tiles)
        macros |= {"BITS": linear.bits, "FLOAT8": linear.is_float8, "TILES": tiles, "WARPS": warps}
        kernel = load_kernel(SOURCE, "linear", _as_macros(macros))
        grid = (triton.cdiv(channels, CHANNELS), triton.cdiv(self._tokens, 8 * tiles))
        kernel(grid, 32 * warps, *arguments)


def hopper_kernel(
    shape: tuple[int, int], bits: int, rows: int, multiprocessors: int, float8: bool = False
) -> tuple[Path, dict[str, int], int]:
    """The source of a linear of channels x inputs for some rows, its macros, a block's shared bytes."""
    tiles = _enough(_HOPPER_TILES, rows)
    steps = triton.cdiv(shape[1] * (1 if float8 else 2), _HOPPER_STEP)
    split = _split(shape[0], steps, multiprocessors)
    macros = {
        "BITS": bits,
        "FLOAT8": int(float8),
        "TILES": tiles,
        "WARPS": _HOPPER_WARPS,
        "SPLIT": split,
    }
    if bits == 16 or float8:
        place = _HOPPER_STEP * (CHANNELS * _HOPPER_WARPS + 8 * tiles)
        depth = _HOPPER_SHARED // place
        return HOPPER_SOURCE, macros | {"DEPTH": depth}, depth * place
    # Two steps of inputs, and DEPTH of what each thread copies.
    depth = _HOPPER_PACKED_DEPTH
    copied = 16 * 32 * _HOPPER_WARPS * (bits // 4 + triton.cdiv(tiles, 4))
    shared_bytes = 2 * _HOPPER_STEP * 8 * tiles + depth * copied
    return HOPPER_PACKED_SOURCE, macros | {"DEPTH": depth}, shared_bytes


def _enough(tiles: tuple[int, ...], rows: int) -> int:
    return next((n for n in tiles if 8 * n >= rows), tiles[-1])


def _warps(channels: int, tiles: int) -> int:
    """Warps that share the 16 channels of a block of linear.cu: so many that all blocks are on the
    GPU at once.

    The kernel leaves room for about 20 warps on a multiprocessor.
    """
    return 4 if channels >= 4096 and tiles == 1 else 8


def _split(channels: int, steps: int, multiprocessors: int) -> int:
    """How many blocks on a Hopper share the inputs of their channels.

    As many as there is room for at once; where there is none, so many that the last wave is full.
    """
    at_once = _HOPPER_BLOCKS * multiprocessors
    blocks = triton.cdiv(channels, CHANNELS * _HOPPER_WARPS)
    splits = [n for n in _SPLITS if n <= steps]
    fitting = [n for n in splits if blocks * n <= at_once]
    return fitting[-1] if fitting else min(splits, key=lambda n: -blocks * n % at_once)


def _as_macros(macros: dict[str, int]) -> tuple[tuple[str, int], ...]:
    return tuple((name, int(value)) for name, value in macros.items())
