"""What a GPU's results are compared with: OPT in float64, on the very weights that its kernels read.

An error is the norm of the difference over that of the truth. float16 keeps 11 bits: a result that
is exact but for the rounding at its end is off by 2.1e-4.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from torch.nn import functional

from blip2 import float8
from blip2.language.native.checkpoint import Layer, Norm, OPTWeights
from blip2.language.native.layers import Layers
from blip2.language.native.linear import dequantize, quantize
from blip2.language.native.packing import PackedLinear
from blip2.language.trtllm_format import OPTCheckpointConfig

HALF = (
    3e-4  # the error of one rounding to float16, and of what else is in a kernel that ends with one
)
SUMS = 5e-5  # of thousands of products, added up in float32


def relative_error(found: torch.Tensor, truth: torch.Tensor) -> float:
    """|found - truth| / |truth|; NaN where either has one, which is below no bound."""
    return float((found.double() - truth).norm() / truth.norm())


def settle() -> None:
    """Before a launch of one kernel alone: it may read weights while the kernel before still writes.

    In the product whatever is read so early was written by launches long before.
    """
    torch.cuda.synchronize()


def bits_of(tensor: torch.Tensor) -> torch.Tensor:
    """To see that numbers are the same ones, NaN too."""
    return tensor.view({2: torch.int16, 4: torch.int32}[tensor.itemsize])


def fill_free_memory_with_nan(device: torch.device) -> None:
    """Let what PyTorch hands out next hold NaN: who reads what nobody wrote will show it."""
    if device.type != "cuda":
        return
    torch.cuda.empty_cache()
    sizes = [1 << 30] * 2 + [1 << 25] * 16 + [1 << 21] * 64 + [1 << 18] * 64 + [1 << 13] * 256
    blocks = [torch.full((size // 4,), math.nan, device=device) for size in sizes]
    torch.cuda.synchronize()
    del blocks


def opt_config(
    width: int, heads: int, layers: int = 3, vocab_size: int = 50272
) -> OPTCheckpointConfig:
    """An OPT of a real one's widths with few layers."""
    return OPTCheckpointConfig(
        dtype="float16",
        num_hidden_layers=layers,
        num_attention_heads=heads,
        hidden_size=width,
        vocab_size=vocab_size,
        max_position_embeddings=1024,
    )


@dataclasses.dataclass(frozen=True)
class ExactLinear:
    """y = x Wᵀ + b in float64."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    @classmethod
    def of(
        cls, weight: torch.Tensor, bias: torch.Tensor | None, bits: int | str | None
    ) -> tuple[ExactLinear, PackedLinear]:
        """float16 weights and biases so and as the kernels read them, rounded to `bits`: 8, 4 or
        "float8"; None leaves them."""
        exact_bias = None if bias is None else bias.double()
        if bits == "float8":
            values, scales = float8.quantise(weight)
            packed = PackedLinear.of_float8(values, scales[:, 0], bias)
            return cls(values.double() * scales.double(), exact_bias), packed
        packed = PackedLinear.pack(weight, bias, bits)
        if bits is not None:
            values, scales = quantize(weight, bits)
            weight = dequantize(values, scales.half())
        return cls(weight.double(), exact_bias), packed

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self.weight, self.bias)


class ExactOPT:
    """OPT in float64 over whole texts, without a cache of its own."""

    def __init__(self, config: OPTCheckpointConfig, weights: OPTWeights) -> None:
        self.config, self.weights = config, weights

    def words(self, tokens: torch.Tensor) -> torch.Tensor:
        """... ids → ... x hidden_size, without positions."""
        return self.weights.embedding[tokens].double()

    def read(
        self,
        x: torch.Tensor,
        keys: torch.Tensor | None = None,
        values: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Read texts behind what was read before.

        Args:
            x: B x T x hidden_size, words and image features without positions.
            keys: layers x B x heads x n x D of the n tokens before; values alike.

        Returns:
            The residual stream behind the last layer, B x T x hidden_size, and all keys and values
            by now.
        """
        rows, length, width = x.shape
        heads = self.config.num_attention_heads
        if keys is None:
            keys = values = x.new_zeros(len(self.weights.layers), rows, heads, 0, width // heads)
        past = keys.shape[3]
        x = x + self.weights.positions[past : past + length].double()
        slots = torch.arange(past + length, device=x.device)
        hidden_slots = slots > slots[past:, None]
        all_keys, all_values = [], []
        for layer, old_keys, old_values in zip(self.weights.layers, keys, values, strict=True):
            qkv = layer.qkv(exact_norm(x, layer.input_norm)).unflatten(-1, (3, heads, -1))
            query, key, value = qkv.permute(2, 0, 3, 1, 4)
            all_keys.append(torch.cat((old_keys, key), 2))
            all_values.append(torch.cat((old_values, value), 2))
            scores = query @ all_keys[-1].transpose(2, 3) * query.shape[3] ** -0.5
            weights = scores.masked_fill(hidden_slots, -math.inf).softmax(-1)
            x = x + layer.dense((weights @ all_values[-1]).transpose(1, 2).flatten(2))
            x = x + layer.proj(layer.fc(exact_norm(x, layer.post_norm)).relu())
        return x, torch.stack(all_keys), torch.stack(all_values)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """... x hidden_size behind the last layer → ... x vocab_size."""
        return self.weights.head(exact_norm(x, self.weights.final_norm))


def exact_norm(x: torch.Tensor, norm: Norm) -> torch.Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scale = (centred.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    return centred * scale * norm.weight + norm.bias


def random_opt(
    config: OPTCheckpointConfig, bits: int | str | None, device: torch.device, seed: int = 0
) -> tuple[ExactOPT, OPTWeights]:
    """The same random weights for the truth and for the kernels.

    Every bias and every score of attention counts, and so does the first LayerNorm's epsilon:
    words have a variance of its size.
    """
    draw = drawing(device, seed)
    width, ffn, vocab_size = config.hidden_size, config.ffn_size, config.vocab_size

    def linear(channels: int, inputs: int, spread: float = 1.0):
        weight = draw(channels, inputs, spread=spread * inputs**-0.5)
        return ExactLinear.of(weight, draw(channels, spread=0.5), bits)

    def norm() -> tuple[Norm, Norm]:
        kept = Norm(1 + draw(width, spread=0.2), draw(width, spread=0.2))
        return Norm(kept.weight.double(), kept.bias.double()), kept

    layers = []
    for _ in range(config.num_hidden_layers):
        parts = {
            "input_norm": norm(),
            "qkv": linear(3 * width, width, 1.4),
            "dense": linear(width, width),
            "post_norm": norm(),
            "fc": linear(ffn, width, 1.4),
            "proj": linear(width, ffn),
        }
        layers.append([Layer(**{n: pair[side] for n, pair in parts.items()}) for side in (0, 1)])
    embedding, positions = (
        draw(count, width, spread=0.003) for count in (vocab_size, config.max_position_embeddings)
    )
    head_weight = draw(vocab_size, width, spread=width**-0.5)
    final_norm, head = norm(), ExactLinear.of(head_weight, None, 8 if bits in (8, 4) else None)
    exact, packed = (
        OPTWeights(embedding, positions, tuple(sides), final_norm[side], head[side])
        for side, sides in enumerate(zip(*layers, strict=True))
    )
    return ExactOPT(config, exact), packed


def drawing(device: torch.device, seed: int = 0) -> Callable[..., torch.Tensor]:
    """`draw(*shape, spread=1.0)`: normally distributed float16 values."""
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*shape: int, spread: float = 1.0) -> torch.Tensor:
        return (torch.randn(shape, generator=generator, device=device) * spread).half()

    return draw


class SameAttention:
    """Has mixed the same at every layer; keeps what it is asked."""

    def __init__(self, mixed: torch.Tensor) -> None:
        self.mixed, self.qkv = mixed, []

    def __call__(self, _layer: int, qkv: torch.Tensor, attended: torch.Tensor) -> None:
        self.qkv.append(qkv.double())
        attended.copy_(self.mixed)


def check_results_do_not_depend_on_timing(layers: Layers, rows: int) -> None:
    """All up to the last attention of some rows, twenty times: the same bits."""
    draw, width = drawing(layers.x.device), layers.x.shape[1]
    stream, attention = draw(rows, width).float(), SameAttention(draw(rows, width))
    found = []
    for _ in range(20):
        layers.x.copy_(stream)
        layers._to_last_attention(attention)
        found.append((layers.x.clone(), layers._qkv.clone()))
    for x, qkv in found[1:]:
        assert torch.equal(x, found[0][0])
        assert torch.equal(qkv, found[0][1])
