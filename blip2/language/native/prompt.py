"""Whole prompts on a GPU, read into the cache of the steps that follow."""

from __future__ import annotations

import math

import torch
import triton

from blip2.gpu.cuda_graphs import Graph
from blip2.gpu.kernel_launch import launch
from blip2.language.native import kernels
from blip2.language.native.checkpoint import OPTWeights
from blip2.language.native.cuda_cache import CudaCache
from blip2.language.native.float8_layers import layers_for
from blip2.language.native.model import embed
from blip2.language.trtllm_format import OPTCheckpointConfig

_CAPTURED_TOKENS = 1024  # at most: the GPU is busy with more for longer than their launches take
_CAPTURED_MULTIPLE = 16  # of a captured prompt's tokens, so that there are few
_TOKENS_MULTIPLE = 8  # of all prompts' tokens together: cuBLAS is slower where they are no such


def is_captured(shape: tuple[int, ...]) -> bool:
    """Whether prompts of a shape (B, T, …) are a CUDA graph, worth keeping."""
    return shape[0] * shape[1] <= _CAPTURED_TOKENS


def padded_length(requests: int, length: int) -> int:
    """What prompts of `length` tokens at most are padded to."""
    padded = -(-length // _CAPTURED_MULTIPLE) * _CAPTURED_MULTIPLE
    if is_captured((requests, padded)):
        return padded
    multiple = _TOKENS_MULTIPLE // math.gcd(requests, _TOKENS_MULTIPLE)
    return -(-length // multiple) * multiple


class Prompt:
    """B prompts of up to T tokens, their image features n rows each, over static buffers."""

    def __init__(
        self,
        config: OPTCheckpointConfig,
        weights: OPTWeights,
        cache: CudaCache,
        shape: tuple[int, int, int],
    ) -> None:
        """Make buffers for `shape` (B, T, n), of a graph where it pays."""
        requests, length, image_rows = shape
        device, width = cache.keys.device, config.hidden_size
        self._config, self._weights, self._cache = config, weights, cache
        self._input_ids = torch.zeros((requests, length), dtype=torch.int64, device=device)
        self._last = torch.zeros(requests, dtype=torch.int64, device=device)
        self._table = torch.zeros(
            (requests, image_rows, width), dtype=weights.embedding.dtype, device=device
        )
        self._starts = torch.arange(requests, device=device) * length
        self._layers = layers_for(config, weights, requests * length, device)
        self._last_layers = layers_for(config, weights, requests, device)
        self._logits = torch.empty((requests, config.vocab_size), device=device)
        self._graph = Graph() if is_captured(shape) else None

    def __call__(
        self, input_ids: torch.Tensor, lengths: torch.Tensor, prompt_table: torch.Tensor
    ) -> torch.Tensor:
        """As `OPTModel.prefill`, for at most T tokens; the next call overwrites the logits."""
        self._input_ids[:, : input_ids.shape[1]] = input_ids
        self._table.copy_(prompt_table)
        torch.add(self._starts, lengths - 1, out=self._last)
        if self._graph is None:
            self._launch()
        else:
            self._graph(self._launch)
        return self._logits

    def _launch(self) -> None:
        x = embed(self._config, self._weights, self._input_ids, self._table)
        x = x + self._weights.positions[: self._input_ids.shape[1]]
        self._layers.x.copy_(x.flatten(0, 1))
        self._layers.run_prompts(self._attend, self._last, self._last_layers)
        self._last_layers.logits(self._logits)

    def _attend(self, layer: int, qkv: torch.Tensor, attended: torch.Tensor) -> None:
        heads, cache = self._config.num_attention_heads, self._cache
        head_size = self._config.hidden_size // heads
        requests, length = self._input_ids.shape
        block = 16 if length <= 64 else 64  # with more blocks each reads again what is before it
        launch(
            kernels.prompt_attention_kernel,
            (triton.cdiv(length, block), heads, requests),
            qkv,
            cache.keys[layer],
            cache.values[layer],
            attended,
            length,
            cache.rows // requests,
            cache.max_len,
            head_size**-0.5,
            D=head_size,
            BLOCK_D=max(16, triton.next_power_of_2(head_size)),
            BLOCK=block,
            num_warps=block // 16 if block > 16 else 2,
            device=qkv.device,
        )
