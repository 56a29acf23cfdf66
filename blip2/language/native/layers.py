"""OPT's layers on a GPU, one kernel an operation: for prompts, and for steps of more rows than
`fused_step.py` takes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import triton

from blip2.language.native import kernels
from blip2.language.native.checkpoint import Norm, OPTWeights
from blip2.language.native.model import NORM_EPS
from blip2.language.native.packing import CHANNELS, PackedLinear
from blip2.language.trtllm_format import OPTCheckpointConfig

SOURCE = Path(__file__).with_name("linear.cu")
_TILES = (1, 2, 3, 5, 8)  # tiles of 8 rows that the kernel is compiled for
_MOST_ROWS = 64  # with more cuBLAS is faster, though packed weights are unpacked for it first

Attend = Callable[[int, torch.Tensor, torch.Tensor], None]


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
        self._normed, self._attended, self._added = buffer(width), buffer(width), buffer(width)
        self._qkv, self._hidden = buffer(3 * width), buffer(config.ffn_size)
        # What is still to be added to x: a linear's product, of which cuBLAS leaves the bias out.
        self._pending: tuple[torch.Tensor, torch.Tensor | None] | None = None
        self._on_gpu = device.type == "cuda"  # else in Triton's interpreter
        self.pdl_options = pdl_options(device)

    def run(self, attend: Attend) -> None:
        """Queue all layers; `attend(layer, qkv, attended)` fills `attended` from tokens x 3 x width."""
        for index, layer in enumerate(self._weights.layers):
            self.linear(self._norm(layer.input_norm), layer.qkv, self._qkv)
            attend(index, self._qkv, self._attended)
            self._add(self._attended, layer.dense)
            self.linear(self._norm(layer.post_norm), layer.fc, self._hidden, relu=True)
            self._add(self._hidden, layer.proj)

    def logits(self, out: torch.Tensor) -> None:
        """Queue the final norm and the head of every token; out: tokens x vocab_size, float32."""
        self.linear(self._norm(self._weights.final_norm), self._weights.head, out)

    def last_logits(self, last: torch.Tensor, rest: Layers, out: torch.Tensor) -> None:
        """Queue the same for the tokens `last` (int64) alone, in the buffers of `rest`."""
        x = self.x.index_select(0, last)
        if self._pending is not None:
            product, bias = self._pending
            x += product.index_select(0, last)
            x += 0 if bias is None else bias
            self._pending = None
        rest.x.copy_(x)
        rest.logits(out)

    def _add(self, x: torch.Tensor, linear: PackedLinear) -> None:
        """self.x += x Wᵀ + b, now or together with the next norm."""
        if self._few_rows:
            self._launch(x, linear, self.x, residual=True)
        else:
            torch.mm(x, linear.unpacked().T, out=self._added)
            self._pending = (self._added, linear.bias)

    def _norm(self, norm: Norm) -> torch.Tensor:
        width = self.x.shape[1]
        product, bias = self._pending or (None, None)
        kernels.norm_kernel[(self._tokens,)](
            self.x,
            product,
            bias,
            norm.weight,
            norm.bias,
            self._normed,
            width,
            NORM_EPS,
            ADD=product is not None,
            ADD_BIAS=bias is not None,
            BLOCK=triton.next_power_of_2(width),
            **self.pdl_options,
        )
        self._pending = None
        return self._normed

    def linear(
        self, x: torch.Tensor, linear: PackedLinear, out: torch.Tensor, *, relu: bool = False
    ) -> None:
        """out = [ReLU](x Wᵀ + b)."""
        if self._few_rows:
            self._launch(x, linear, out, relu=relu)
        elif relu and linear.bias is not None:
            # The product's own epilogue: no other function of PyTorch asks cuBLAS for it.
            torch.ops.aten._addmm_activation.out(linear.bias, x, linear.unpacked().T, out=out)
        else:
            y = linear(x)
            out.copy_(y.relu() if relu else y)

    @property
    def _few_rows(self) -> bool:
        return self._on_gpu and self._tokens <= _MOST_ROWS

    def _launch(
        self,
        x: torch.Tensor,
        linear: PackedLinear,
        out: torch.Tensor,
        relu: bool = False,
        residual: bool = False,
    ) -> None:
        from blip2.language.native.compiled import load_kernel

        tiles = next((n for n in _TILES if 8 * n >= self._tokens), _TILES[-1])
        channels, inputs = linear.shape
        warps = _warps(channels, tiles)
        macros = {
            "BITS": linear.bits,
            "TILES": tiles,
            "WARPS": warps,
            "WIDTH": inputs,
            "RELU": relu,
            "RESIDUAL": residual,
            "OUT_FLOAT": out.dtype == torch.float32,
            "HAS_BIAS": linear.bias is not None,
        }
        kernel = load_kernel(
            SOURCE, "linear", tuple((name, int(value)) for name, value in macros.items())
        )
        kernel(
            (triton.cdiv(channels, CHANNELS), triton.cdiv(self._tokens, 8 * tiles)),
            32 * warps,
            x,
            linear.weight,
            linear.scales,
            linear.bias,
            out,
            self._tokens,
            channels,
        )


def pdl_options(device: torch.device) -> dict[str, bool]:
    """For a Triton launch: dependent launches exist from Hopper on, and not in the interpreter."""
    pdl = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9
    return {"PDL": True, "launch_pdl": True} if pdl else {"PDL": False}


def _warps(channels: int, tiles: int) -> int:
    """Warps that share a block's 16 channels: so many that all blocks are on the GPU at once.

    The kernel leaves room for about 20 warps on a multiprocessor.
    """
    return 4 if channels >= 4096 and tiles == 1 else 8
