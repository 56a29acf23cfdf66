"""A decoding step as a CUDA graph of the kernels of `layers.py`, for any number of rows."""

from __future__ import annotations

from pathlib import Path

import torch
import triton

from blip2.gpu.cuda_graphs import Graph
from blip2.gpu.kernel_launch import launch
from blip2.language.native import kernels
from blip2.language.native.checkpoint import OPTWeights
from blip2.language.native.cuda_cache import CudaCache
from blip2.language.native.float8_layers import layers_for
from blip2.language.trtllm_format import OPTCheckpointConfig

ATTENTION_SOURCE = Path(__file__).with_name("attention.cu")
_MANY_HEADS = 1024  # of all rows: with so many one warp each keeps the memory busy
_FEW_HEADS_WARPS = 4


class LayeredStep:
    """One token for each of the first rows of a cache."""

    def __init__(
        self, config: OPTCheckpointConfig, weights: OPTWeights, cache: CudaCache, rows: int
    ) -> None:
        """Make buffers for the first `rows` of `cache`."""
        device = cache.keys.device
        self._config, self._weights, self._cache, self._rows = config, weights, cache, rows
        self._layers = layers_for(config, weights, rows, device)
        self._tokens = torch.zeros(rows, dtype=torch.int64, device=device)
        shape = (rows, config.vocab_size)
        self._logits = torch.empty(shape, dtype=torch.float32, device=device)
        self._graph = Graph()

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens: rows, int64 → logits: rows x vocab_size, float32, overwritten by the next."""
        self._tokens.copy_(tokens)
        self._graph(self._launch)
        return self._logits

    def _launch(self) -> None:
        width = self._config.hidden_size
        launch(
            kernels.embed_kernel,
            (self._rows, triton.cdiv(width, 1024)),
            self._tokens,
            self._cache.lengths,
            self._weights.embedding,
            self._weights.positions,
            self._layers.x,
            width,
            BLOCK=1024,
            device=self._tokens.device,
        )
        self._layers.run(self._attend)
        self._layers.logits(self._logits)
        self._cache.lengths[: self._rows] += 1

    def _attend(self, layer: int, qkv: torch.Tensor, attended: torch.Tensor) -> None:
        cache = self._cache
        keys, values = cache.keys[layer], cache.values[layer]
        heads, head_size = keys.shape[1], keys.shape[3]
        from blip2.gpu.compiled import load_kernel

        warps = 1 if self._rows * heads >= _MANY_HEADS else _FEW_HEADS_WARPS
        macros = (("HEAD_SIZE", head_size), ("WARPS", warps))
        kernel = load_kernel(ATTENTION_SOURCE, "attention", macros)
        kernel(
            (heads, self._rows),
            32 * warps,
            qkv,
            keys,
            values,
            cache.lengths,
            cache.sources,
            attended,
            cache.max_len,
            head_size**-0.5,
        )
