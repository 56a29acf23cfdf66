"""OPT's forward pass: whole prompts at once, then one token a row."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch.nn import functional

from blip2 import cpu
from blip2.activations import ACTIVATIONS
from blip2.language.decoding import Strategy, log_probs, make_strategy
from blip2.language.native.bf16 import Bfloat16Linear
from blip2.language.native.cache import KVCache, RowPool
from blip2.language.native.checkpoint import (
    Layer,
    Norm,
    OPTTensors,
    OPTWeights,
    Packer,
    load_weights,
)
from blip2.language.native.fp16 import Float16Linear
from blip2.language.native.linear import FloatLinear, Linear
from blip2.language.native.nbits import NBitsLinear, NBitsPacker, torch_on_one_thread
from blip2.language.sampling import draw_tokens
from blip2.language.session import GenerationOptions
from blip2.language.trtllm_format import OPTCheckpointConfig

NORM_EPS = 1e-5
_HALVES = (torch.float16, torch.bfloat16)

Attention = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class OPTModel:
    """OPT with LayerNorm before (most sizes) or after (350M) attention and MLP.

    `steps_ahead` is how many steps to queue before reading whether every answer had ended by then:
    none where host and device are the same. `has_kernels` says that it is compiled when it is first
    used.
    """

    steps_ahead = 0
    has_kernels = False
    max_batch_size: int | None = None

    def __init__(self, config: OPTCheckpointConfig, weights: OPTWeights) -> None:
        self.config = config
        self.weights = weights
        self._activation = ACTIVATIONS[config.hidden_act]

    @classmethod
    def load(cls, tensors: OPTTensors, device: torch.device) -> OPTModel:
        """Read a checkpoint onto a device, to compute in float32.

        On a CPU weights stay in 16, 8 and 4 bits; those of 8 and 4 are multiplied with inputs of 8,
        those of 16 with inputs in bfloat16 where the CPU is fast in it.

        Raises:
            Blip2Error: the checkpoint is damaged; see `load_weights`.
        """

        def place(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.float()

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            return tensor

        config = tensors.config
        is_packed = config.quant_algo is not None
        rounds = device.type == "cpu" and not is_packed and cpu.is_fast_in_bfloat16()
        with packing(config, device) as pack:
            return cls(config, load_weights(tensors, device, place, pack, keep, rounds=rounds))

    def release(self) -> None:
        """Let go what is kept for batches of the sizes that came."""

    def computing(self) -> contextlib.AbstractContextManager[None]:
        """What prompts and steps run within."""
        shares_cores = isinstance(self.weights.head, NBitsLinear)
        return torch_on_one_thread() if shares_cores else contextlib.nullcontext()

    def new_cache(
        self,
        lengths: torch.Tensor,
        num_beams: int,
        max_new_tokens: int,
        longest: int | None = None,  # noqa: ARG002 - of a CPU it can be asked at once
    ) -> KVCache:
        """A cache for prompts of these lengths, of which the host may know the longest."""
        heads = self.config.num_attention_heads
        head_size = self.config.hidden_size // heads
        layers = self.config.num_hidden_layers
        return KVCache(layers, heads, head_size, lengths, num_beams, max_new_tokens)

    def new_pool(self, capacity: int, max_len: int, device: torch.device) -> RowPool:
        """A cache whose rows requests take and leave: see `Rows`."""
        return RowPool(self, capacity, max_len, device)

    def new_strategy(
        self,
        options: GenerationOptions,
        input_ids: Sequence[torch.Tensor],
        first_request: int,
        device: torch.device,
    ) -> Strategy:
        """What chooses the tokens of these requests: see `make_strategy`."""
        return make_strategy(options, input_ids, self.config.vocab_size, first_request, device)

    def cache_bytes(self, rows: int, max_len: int) -> int:
        """What keys and values of so many rows of so many tokens take."""
        config, itemsize = self.config, self.weights.positions.itemsize
        return 2 * config.num_hidden_layers * config.hidden_size * rows * max_len * itemsize

    def likeliest(self, scores: torch.Tensor) -> torch.Tensor:
        """Of scores, rows x vocab_size, each row's likeliest token and whether all are finite.

        2 x rows, int64.
        """
        finite = torch.isfinite(scores.float().sum(dim=1))
        return torch.stack([scores.argmax(dim=-1), finite.long()])

    def log_probs(self, logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """As in `decoding`, for requests that share steps."""
        return log_probs(logits, tokens)

    def draw_tokens(
        self, scores: torch.Tensor, settings: torch.Tensor, drawn: torch.Tensor
    ) -> torch.Tensor:
        """As in `decoding`, for requests that share steps."""
        return draw_tokens(scores, settings, drawn)

    def prefill(
        self,
        input_ids: torch.Tensor,
        lengths: torch.Tensor,
        prompt_table: torch.Tensor,
        cache: KVCache,
    ) -> torch.Tensor:
        """Read the prompts into the cache; return the logits after each, B x vocab_size.

        Args:
            input_ids: B x T, padded on the right with anything valid; an id of vocab_size + r
                stands for row r of the request's prompt table.
            lengths: B, how many ids count.
            prompt_table: B x n x hidden_size.
            cache: an empty one for these lengths.
        """

        def attend(
            layer: int, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
        ) -> torch.Tensor:
            cache.write_prompt(layer, keys, values)
            # Padding stands behind what counts, so causality already hides it.
            return functional.scaled_dot_product_attention(query, keys, values, is_causal=True)

        x = embed(self.config, self.weights, input_ids, prompt_table)
        x = x + self.weights.positions[: input_ids.shape[1]]
        x = self._layers(x, attend)
        last = x[torch.arange(len(x), device=x.device), lengths - 1]
        return self._logits(last)

    def step(self, tokens: torch.Tensor, cache: KVCache) -> torch.Tensor:
        """Append one token to each row; return the logits after it, rows x vocab_size."""
        visible = cache.visible()

        def attend(
            layer: int, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
        ) -> torch.Tensor:
            keys, values = cache.append(layer, keys[:, :, 0], values[:, :, 0])
            return functional.scaled_dot_product_attention(query, keys, values, attn_mask=visible)

        x = _words(self.weights, tokens) + self.weights.positions[cache.lengths]
        x = self._layers(x[:, None], attend)[:, 0]
        cache.advance()
        return self._logits(x)

    def _layers(self, x: torch.Tensor, attend: Attention) -> torch.Tensor:
        """Rows x T x hidden_size through all layers; `attend` knows where keys are kept."""
        for index, layer in enumerate(self.weights.layers):
            x = self._layer(index, layer, x, attend)
        return x

    def _layer(self, index: int, layer: Layer, x: torch.Tensor, attend: Attention) -> torch.Tensor:
        norm_first = self.config.do_layer_norm_before
        residual = x
        x = _norm(x, layer.input_norm) if norm_first else x
        qkv = layer.qkv(x).unflatten(-1, (3, self.config.num_attention_heads, -1))
        query, keys, values = qkv.permute(2, 0, 3, 1, 4)
        attended = attend(index, query, keys, values).transpose(1, 2).flatten(2)
        x = residual + layer.dense(attended)
        x = x if norm_first else _norm(x, layer.input_norm)

        residual = x
        x = _norm(x, layer.post_norm) if norm_first else x
        x = residual + layer.proj(self._activation(layer.fc(x)))
        return x if norm_first else _norm(x, layer.post_norm)

    def _logits(self, x: torch.Tensor) -> torch.Tensor:
        if self.weights.final_norm is not None:
            x = _norm(x, self.weights.final_norm)
        return self.weights.head(x)


def embed(
    config: OPTCheckpointConfig,
    weights: OPTWeights,
    input_ids: torch.Tensor,
    prompt_table: torch.Tensor,
) -> torch.Tensor:
    """B x T x hidden_size, words and image rows, without positions; see `OPTModel.prefill`."""
    image_rows = input_ids - config.vocab_size
    is_image = (image_rows >= 0)[:, :, None]
    text = _words(weights, input_ids.clamp(max=config.vocab_size - 1))
    if not prompt_table.shape[1]:
        return text
    requests = torch.arange(len(input_ids), device=input_ids.device)[:, None]
    images = prompt_table.to(text)[requests, image_rows.clamp(min=0)]
    return torch.where(is_image, images, text)


def _words(weights: OPTWeights, tokens: torch.Tensor) -> torch.Tensor:
    # The embedding may be in the checkpoint's type; positions are in the one computed in.
    return weights.embedding[tokens].to(weights.positions.dtype)


@contextlib.contextmanager
def packing(config: OPTCheckpointConfig, device: torch.device) -> Iterator[Packer]:
    """Within, what packs the linears of an OPT for a device; leaving it makes them ready for use."""
    nbits = NBitsPacker(4 * config.num_hidden_layers + 1)  # a layer's, and the head

    def pack(weight: torch.Tensor, bias: torch.Tensor | None, bits: int | None) -> Linear:
        if device.type == "cpu" and bits is not None:
            return nbits.pack(weight, bias, bits)
        if device.type == "cpu" and weight.dtype in _HALVES and cpu.is_fast_in_bfloat16():
            return Bfloat16Linear.pack(weight, bias, bits)
        if device.type == "cpu" and Float16Linear.takes(weight.dtype):
            return Float16Linear.pack(weight, bias, bits)
        return FloatLinear.pack(weight, bias, bits)

    yield pack
    nbits.finish()


def _norm(x: torch.Tensor, norm: Norm) -> torch.Tensor:
    return functional.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, NORM_EPS)
