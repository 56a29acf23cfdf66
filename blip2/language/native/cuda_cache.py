"""The GPU's key-value cache."""

from __future__ import annotations

import copy

import torch
import triton

from blip2.gpu.kernel_launch import launch
from blip2.language.native import beam_kernels
from blip2.language.trtllm_format import OPTCheckpointConfig

_REORDERED = 1024  # entries of `sources` that a program of reorder_kernel takes


class CudaCache:
    """Keys and values, layers x rows x heads x max_len x D in float16, and who shares what.

    `sources[row, slot]` is the cache row in which that slot of a row lies: a request's beams share
    the prompt of their first row, and a beam that continues another one only changes this table.
    """

    def __init__(
        self, config: OPTCheckpointConfig, rows: int, max_len: int, device: torch.device
    ) -> None:
        heads, layers = config.num_attention_heads, config.num_hidden_layers
        shape = (layers, rows, heads, max_len, config.hidden_size // heads)
        self.keys = torch.zeros(shape, dtype=torch.float16, device=device)
        self.values = torch.zeros_like(self.keys)
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=device)
        self.sources = torch.zeros((rows, max_len), dtype=torch.int32, device=device)
        self._slots = torch.arange(max_len, device=device)
        self._own = torch.arange(rows, dtype=torch.int32, device=device)[:, None]
        self._num_beams = 1

    def part(self, first: int, count: int) -> CudaCache:
        """So many of its rows, for prompts to be read into."""
        part = copy.copy(self)
        part.keys, part.values = (
            tensor[:, first : first + count] for tensor in (self.keys, self.values)
        )
        return part

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

    def reorder(self, source_rows: torch.Tensor) -> None:
        """Let each row continue another row of the same request."""
        beams = triton.next_power_of_2(self._num_beams)
        block = max(1, _REORDERED // beams)
        grid = (self.rows // self._num_beams, triton.cdiv(self.max_len, block))
        launch(
            beam_kernels.reorder_kernel,
            grid,
            self.sources,
            source_rows,
            self.lengths,
            self._num_beams,
            self.max_len,
            BEAMS=beams,
            BLOCK=block,
            device=self.keys.device,
        )
