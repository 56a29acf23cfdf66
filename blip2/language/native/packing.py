"""Linear layers in 16, 8 or 4 bits, laid out as the GPU's kernels read them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch.nn import functional

from blip2.float8 import DTYPE as FLOAT8
from blip2.language.native.linear import Linear, quantize

CHANNELS = 16  # of a block of packed weights

SOURCE = Path(__file__).with_name("unpack.cu")


@dataclasses.dataclass(frozen=True)
class PackedLinear(Linear):
    """A weight in 16, 8 or 4 bits, for the kernels of fragments.cuh.

    16 bits: N x K float16, as it comes. FP8: N x K E4M3, as it comes, with float32 scales. Else 8 or 4
    bits: uint8, blocks of 512 bytes for each 16 channels and 32 (64 where 4 bits) inputs, in which
    every thread finds its 16 bytes in a row. Values are biased by half their range, so that they are
    unsigned.
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
        unsigned = functional.pad(unsigned, (0, 0, 0, -shape[0] % CHANNELS))
        return cls(_PACKED[bits](unsigned), scales.half(), bias, bits, shape)

    @classmethod
    def of_float8(
        cls, weight: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None
    ) -> PackedLinear:
        """N x K E4M3, and N float32 scales: what a channel's values are to be multiplied with."""
        return cls(weight, scales, bias, 8, tuple(weight.shape))

    @property
    def is_float8(self) -> bool:
        """Whether its 8 bits are E4M3."""
        return self.weight.dtype == FLOAT8

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Through cuBLAS, for the many rows of a prompt."""
        return functional.linear(x, self.unpacked(), self.bias)

    def unpacked(self) -> torch.Tensor:
        """The float16 weight, N x K, that the stored one stands for."""
        if self.scales is None:
            return self.weight
        if self.is_float8:
            return (self.weight.float() * self.scales[:, None]).half()
        from blip2.gpu.compiled import load_kernel

        weight = torch.empty(self.shape, dtype=torch.float16, device=self.weight.device)
        kernel = load_kernel(SOURCE, "unpack_weight", (("BITS", self.bits),))
        threads, blocks = 256, self.weight.numel() // 512
        grid = (-(-blocks * 32 // threads), 1)
        kernel(grid, threads, self.weight, self.scales, weight, *self.shape)
        return weight


# A block's 512 bytes by thread: lane = 4 g + t holds, of channels g and g + 8, inputs 8t .. 8t + 7.
# 8 bits: 16 bytes, channel g first. 4 bits: two such groups of inputs, 8 inputs in 4 bytes.


def _pack8(unsigned: torch.Tensor) -> torch.Tensor:
    blocks = unsigned.unflatten(1, (-1, 4, 8)).unflatten(0, (-1, 2, 8))
    return blocks.permute(0, 3, 2, 4, 1, 5).contiguous()  # tile, group, g, t, near/far, input


def _pack4(unsigned: torch.Tensor) -> torch.Tensor:
    blocks = unsigned.unflatten(1, (-1, 2, 4, 4, 2)).unflatten(0, (-1, 2, 8))
    # tile, near/far, g, group, half, t, pair, which of the pair: nibbles 0-3 are the firsts of the
    # four pairs, nibbles 4-7 the seconds; byte b holds nibbles 2b (low) and 2b + 1 (high).
    nibbles = blocks.permute(0, 3, 2, 5, 4, 1, 7, 6).flatten(6).unflatten(6, (4, 2))
    return (nibbles[..., 0] | nibbles[..., 1] << 4).contiguous()


_PACKED = {8: _pack8, 4: _pack4}
