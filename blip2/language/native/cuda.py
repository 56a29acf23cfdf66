"""OPT on an NVIDIA GPU: the model of `model.py` with kernels of its own, in float16.

`prompt.py` reads prompts; `fused_step.py` appends a token to one row, `layered_step.py` to more.
Each is prepared once for a size and kept.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import torch

from blip2.language.decoding import Strategy
from blip2.language.native.checkpoint import OPTTensors, OPTWeights, load_weights
from blip2.language.native.cuda_cache import CudaCache
from blip2.language.native.cuda_decoding import (
    CudaBeamSearch,
    CudaGreedy,
    CudaSampling,
    likeliest,
    log_probs,
)
from blip2.language.native.cuda_pool import CudaPool
from blip2.language.native.drawing import draw_tokens
from blip2.language.native.layered_step import LayeredStep
from blip2.language.native.model import OPTModel
from blip2.language.native.packing import PackedLinear
from blip2.language.native.prompt import Prompt, is_captured, padded_length
from blip2.language.session import GenerationOptions
from blip2.language.trtllm_format import INPUTS_MULTIPLE, OPTCheckpointConfig

_CACHE_MULTIPLE = 128  # a cache is made for such a number of tokens, so that few are prepared
_MOST_CACHES = 4  # kept, each with its step and prompts
_MOST_PROMPTS = 4  # kept a cache


@dataclasses.dataclass
class _Prepared:
    cache: CudaCache
    step: Callable[[torch.Tensor], torch.Tensor]
    prompts: dict[tuple[int, int, int], Prompt] = dataclasses.field(default_factory=dict)


class CudaModel(OPTModel):
    """OPT whose layers normalise first, for one GPU."""

    steps_ahead = 1  # one is enough for the GPU never to wait for the host
    has_kernels = True
    max_batch_size = 64  # larger ones are hardly faster a request, and their cache is large

    @staticmethod
    def runs(config: OPTCheckpointConfig) -> bool:
        """Whether the kernels take such an OPT."""
        widths = (config.hidden_size, config.ffn_size)
        head_size = config.hidden_size // config.num_attention_heads
        return (
            config.do_layer_norm_before
            and config.hidden_act == "relu"
            and all(width % INPUTS_MULTIPLE == 0 for width in widths)
            and head_size % 8 == 0
            and head_size <= 256
        )

    @classmethod
    def load(cls, tensors: OPTTensors, device: torch.device) -> CudaModel:
        """Read a checkpoint onto a GPU, to compute in float16 with float32 sums and residuals.

        Raises:
            Blip2Error: the checkpoint is damaged; see `load_weights`.
        """

        def pack(
            weight: torch.Tensor,
            bias: torch.Tensor | None,
            bits: int | None,
            scales: torch.Tensor | None = None,
        ) -> PackedLinear:
            bias = None if bias is None else bias.half()
            if scales is not None:
                return PackedLinear.of_float8(weight, scales, bias)
            return PackedLinear.pack(weight, bias, bits)

        weights = load_weights(tensors, device, torch.Tensor.half, pack, dtype=torch.float16)
        return cls(tensors.config, weights)

    def __init__(self, config: OPTCheckpointConfig, weights: OPTWeights) -> None:
        super().__init__(config, weights)
        self._prepared: dict[tuple[int, int], _Prepared] = {}

    def release(self) -> None:
        """Forget the caches, and with each its step and prompts: the next ones are made anew."""
        self._prepared.clear()

    def new_cache(
        self,
        lengths: torch.Tensor,
        num_beams: int,
        max_new_tokens: int,
        longest: int | None = None,
    ) -> CudaCache:
        """The cache for so many rows and tokens, emptied; the one before it becomes invalid.

        The host has to know the longest prompt: if it does not, it waits for all that is queued.
        """
        longest = int(lengths.max()) if longest is None else longest
        needed = max(longest + max_new_tokens, padded_length(len(lengths), longest))
        max_len = math.ceil(needed / _CACHE_MULTIPLE) * _CACHE_MULTIPLE
        max_len = min(max_len, self.config.max_position_embeddings)
        key = (len(lengths) * num_beams, max_len)
        if key not in self._prepared:
            while len(self._prepared) >= _MOST_CACHES:
                _forget_oldest(self._prepared)  # a cache may be gigabytes
            cache = CudaCache(self.config, *key, device=lengths.device)
            self._prepared[key] = _Prepared(cache, self._make_step(cache))
        cache = self._prepared[key].cache
        cache.reset(lengths, num_beams)
        return cache

    def new_strategy(
        self,
        options: GenerationOptions,
        input_ids: Sequence[torch.Tensor],
        first_request: int,
        device: torch.device,
    ) -> Strategy:
        """As in the base class; what is searched for, by kernels."""
        vocab_size = self.config.vocab_size
        if options.num_beams > 1:
            return CudaBeamSearch(options, input_ids, vocab_size, device)
        if options.samples:
            return CudaSampling(options, input_ids, vocab_size, device, first_request)
        return CudaGreedy(options, input_ids, vocab_size, device)

    def likeliest(self, scores: torch.Tensor) -> torch.Tensor:
        """As in the base class."""
        return likeliest(scores)

    def log_probs(self, logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """As in the base class."""
        return log_probs(logits, tokens)

    def draw_tokens(
        self, scores: torch.Tensor, settings: torch.Tensor, drawn: torch.Tensor
    ) -> torch.Tensor:
        """As in the base class."""
        return draw_tokens(scores, settings, drawn)

    def new_pool(self, capacity: int, max_len: int, device: torch.device) -> CudaPool:
        """As in the base class."""
        return CudaPool(self, capacity, max_len, device)

    def _make_step(self, cache: CudaCache) -> Callable[[torch.Tensor], torch.Tensor]:
        step = self.fused_step(cache)
        return step or LayeredStep(self.config, self.weights, cache, cache.rows)

    def fused_step(self, cache: CudaCache) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """A step as one kernel, where that pays for a cache of so many rows."""
        from blip2.language.native.fused_step import FusedStep, macros_for

        macros = macros_for(self.config, self.weights, cache.rows, cache.keys.device)
        return None if macros is None else FusedStep(self.config, self.weights, cache, macros)

    def prefill(
        self,
        input_ids: torch.Tensor,
        lengths: torch.Tensor,
        prompt_table: torch.Tensor,
        cache: CudaCache,
    ) -> torch.Tensor:
        """As in the base class; the logits returned are overwritten by the next prompts."""
        length = min(padded_length(*input_ids.shape), cache.max_len)
        shape = (len(input_ids), length, prompt_table.shape[1])
        prompts = self._prepared[cache.rows, cache.max_len].prompts
        prompt = prompts.get(shape)
        if prompt is None:
            prompt = Prompt(self.config, self.weights, cache, shape)
            if is_captured(shape):
                while len(prompts) >= _MOST_PROMPTS:
                    _forget_oldest(prompts)
                prompts[shape] = prompt
        return prompt(input_ids, lengths, prompt_table)

    def step(self, tokens: torch.Tensor, cache: CudaCache) -> torch.Tensor:
        """As in the base class; the logits returned are overwritten by the next step."""
        return self._prepared[cache.rows, cache.max_len].step(tokens)


def _forget_oldest(kept: dict) -> None:
    del kept[next(iter(kept))]
