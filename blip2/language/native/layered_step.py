"""A decoding step as a CUDA graph of the kernels of `layers.py`, for any number of rows."""

from __future__ import annotations

import torch
import triton

from blip2.language.native import kernels
from blip2.language.native.checkpoint import OPTWeights
from blip2.language.native.cuda_cache import CudaCache
from blip2.language.native.graphs import capture
from blip2.language.native.layers import Layers
from blip2.language.trtllm_format import OPTCheckpointConfig


class LayeredStep:
    """One token for each of a cache's rows."""

    def __init__(self, config: OPTCheckpointConfig, weights: OPTWeights, cache: CudaCache) -> None:
        """Make buffers for the rows of `cache`, and capture the graph."""
        device = cache.keys.device
        self._config, self._weights, self._cache = config, weights, cache
        self._layers = Layers(config, weights, cache.rows, device)
        self._tokens = torch.zeros(cache.rows, dtype=torch.int64, device=device)
        shape = (cache.rows, config.vocab_size)
        self._logits = torch.empty(shape, dtype=torch.float32, device=device)
        self._run = capture(self._launch, device)

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens: rows, int64 → logits: rows x vocab_size, float32, overwritten by the next."""
        self._tokens.copy_(tokens)
        self._run()
        return self._logits

    def _launch(self) -> None:
        width = self._config.hidden_size
        kernels.embed_kernel[(self._cache.rows, triton.cdiv(width, 1024))](
            self._tokens,
            self._cache.lengths,
            self._weights.embedding,
            self._weights.positions,
            self._layers.x,
            width,
            BLOCK=1024,
            **self._layers.pdl_options,
        )
        self._layers.run(self._attend)
        self._layers.logits(self._logits)
        self._cache.lengths += 1

    def _attend(self, layer: int, qkv: torch.Tensor, attended: torch.Tensor) -> None:
        heads, cache = self._config.num_attention_heads, self._cache
        head_size = self._config.hidden_size // heads
        kernels.attention_kernel[(cache.rows, heads)](
            qkv,
            cache.keys[layer],
            cache.values[layer],
            cache.lengths,
            cache.sources,
            attended,
            cache.max_len,
            head_size**-0.5,
            D=head_size,
            BLOCK_D=triton.next_power_of_2(head_size),
            BLOCK_L=64,
            **self._layers.pdl_options,
        )
