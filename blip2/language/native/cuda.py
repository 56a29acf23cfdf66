"""OPT on an NVIDIA GPU: the model of `model.py` with kernels of its own, in float16.

`prompt.py` reads prompts; `fused_step.py` appends a token to one row, `layered_step.py` to more.
Each is prepared once for a size and kept.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import torch

from blip2.language.native.checkpoint import OPTWeights, load_weights
from blip2.language.native.cuda_cache import CudaCache
from blip2.language.native.layered_step import LayeredStep
from blip2.language.native.model import OPTModel
from blip2.language.native.packing import INPUTS_MULTIPLE, PackedLinear
from blip2.language.native.prompt import Prompt
from blip2.language.trtllm_format import OPTCheckpointConfig

# A cache is made for a multiple of this many tokens, and a prompt, so that few sizes are prepared.
_CACHE_MULTIPLE = 128
_PROMPT_MULTIPLE = 16

_MOST_CACHES = 4  # kept, each with its step and prompts
_MOST_PROMPTS = 4  # kept a cache
_MOST_KEPT_TOKENS = 8192  # of all prompts: the buffers of larger ones are freed at once


@dataclasses.dataclass
class _Prepared:
    cache: CudaCache
    step: Callable[[torch.Tensor], torch.Tensor]
    prompts: dict[tuple[int, int, int], Prompt] = dataclasses.field(default_factory=dict)


class CudaModel(OPTModel):
    """OPT whose layers normalise first, for one GPU."""

    steps_between_checks = 4
    max_batch_size = 64  # larger ones are hardly faster a request, and their cache is large

    @staticmethod
    def runs(config: OPTCheckpointConfig) -> bool:
        """Whether the kernels take such an OPT."""
        widths = (config.hidden_size, config.ffn_size)
        return (
            config.do_layer_norm_before
            and config.hidden_act == "relu"
            and all(width % INPUTS_MULTIPLE == 0 for width in widths)
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
        self._prepared: dict[tuple[int, int], _Prepared] = {}

    def new_cache(self, lengths: torch.Tensor, num_beams: int, max_new_tokens: int) -> CudaCache:
        """The cache for so many rows and tokens, emptied; the one before it becomes invalid."""
        longest = int(lengths.max())
        needed = max(longest + max_new_tokens, _rounded(longest, _PROMPT_MULTIPLE))
        max_len = min(_rounded(needed, _CACHE_MULTIPLE), self.config.max_position_embeddings)
        key = (len(lengths) * num_beams, max_len)
        if key not in self._prepared:
            while len(self._prepared) >= _MOST_CACHES:
                _forget_oldest(self._prepared)  # a cache may be gigabytes
            cache = CudaCache(self.config, *key, device=lengths.device)
            self._prepared[key] = _Prepared(cache, self._make_step(cache))
        cache = self._prepared[key].cache
        cache.reset(lengths, num_beams)
        return cache

    def _make_step(self, cache: CudaCache) -> Callable[[torch.Tensor], torch.Tensor]:
        device = cache.keys.device
        if device.type == "cuda":
            from blip2.language.native.fused_step import FusedStep, macros_for

            macros = macros_for(self.config, self.weights, cache.rows, device)
            if macros is not None:
                return FusedStep(self.config, self.weights, cache, macros)
        return LayeredStep(self.config, self.weights, cache)

    def prefill(
        self,
        input_ids: torch.Tensor,
        lengths: torch.Tensor,
        prompt_table: torch.Tensor,
        cache: CudaCache,
    ) -> torch.Tensor:
        """As in the base class; the logits returned are overwritten by the next prompts."""
        length = min(_rounded(input_ids.shape[1], _PROMPT_MULTIPLE), cache.max_len)
        shape = (len(input_ids), length, prompt_table.shape[1])
        prompts = self._prepared[cache.rows, cache.max_len].prompts
        prompt = prompts.get(shape)
        if prompt is None:
            prompt = Prompt(self.config, self.weights, cache, self._embed, shape)
            if shape[0] * length <= _MOST_KEPT_TOKENS:
                while len(prompts) >= _MOST_PROMPTS:
                    _forget_oldest(prompts)
                prompts[shape] = prompt
        return prompt(input_ids, lengths, prompt_table)

    def step(self, tokens: torch.Tensor, cache: CudaCache) -> torch.Tensor:
        """As in the base class; the logits returned are overwritten by the next step."""
        return self._prepared[cache.rows, cache.max_len].step(tokens)


def _rounded(number: int, multiple: int) -> int:
    return math.ceil(number / multiple) * multiple


def _forget_oldest(kept: dict) -> None:
    del kept[next(iter(kept))]
