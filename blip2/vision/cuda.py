"""The ViT and the Q-Former on an NVIDIA GPU: what `modules.py` computes, in fewer and faster kernels.

Built from the loaded modules. cuBLAS multiplies, but for one picture on a Hopper (`cuda_picture.py`);
the Triton kernels of `kernels.py` do the rest and the Q-Former's products of few rows. Biases and all
else that is known when the weights are is folded in there and then.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
import triton
from torch import nn
from triton.tools.tensor_descriptor import TensorDescriptor

from blip2.gpu.float8 import Residual
from blip2.gpu.kernel_launch import launch
from blip2.vision import kernels, modules
from blip2.vision.cuda_float8 import Attend, Float8VisionLayer
from blip2.vision.cuda_picture import MOST_ROWS, PartsResidual, PictureLayer

_LOG2_E = math.log2(math.e)
_ALIGNMENT = 8  # rows and columns: cuBLAS is slower where these are no multiple of it
_MANY_ROWS = 4096  # from here on a program normalises several rows
_FEW_ROWS = 64  # up to here the Q-Former's weights are read by few_rows_linear_kernel


@dataclasses.dataclass(frozen=True)
class _Norm:
    """LayerNorm of x + shift."""

    weight: torch.Tensor
    bias: torch.Tensor
    eps: float
    shift: torch.Tensor  # float32

    @classmethod
    def of(cls, norm: nn.LayerNorm, shift: torch.Tensor) -> _Norm:
        return cls(norm.weight, norm.bias, norm.eps, shift)

    def __call__(
        self, x: torch.Tensor, parts: torch.Tensor | None = None, *, keeps_sum: bool = False
    ) -> torch.Tensor:
        """x: rows x width; parts: n x rows x width, float32, to add to it, in place if `keeps_sum`."""
        rows, width = x.shape
        out = torch.empty_like(x)
        rows_each = 1 if rows < _MANY_ROWS else 4
        launch(
            kernels.norm_kernel,
            (triton.cdiv(rows, rows_each),),
            x,
            x if parts is None else parts,
            self.shift,
            self.weight,
            self.bias,
            out,
            rows,
            width,
            self.eps,
            ROWS=rows_each,
            BLOCK=triton.next_power_of_2(width),
            PARTS=0 if parts is None else len(parts),
            KEEP=keeps_sum,
            device=x.device,
        )
        return out


@dataclasses.dataclass(frozen=True)
class _VisionLayer:
    """A layer in 16 bits, whose products cuBLAS adds to the residual in place."""

    norm1: _Norm
    qkv: nn.Linear
    projection: torch.Tensor
    norm2: _Norm
    fc1: nn.Linear
    fc2: torch.Tensor
    activation: Callable[[torch.Tensor], torch.Tensor]

    @classmethod
    def of(cls, layer: modules.VisionLayer, shift1: torch.Tensor, shift2: torch.Tensor):
        return cls(
            _Norm.of(layer.layer_norm1, shift1),
            layer.self_attn.qkv,
            layer.self_attn.projection.weight,
            _Norm.of(layer.layer_norm2, shift2),
            layer.mlp.fc1,
            layer.mlp.fc2.weight,
            layer.activation,
        )

    def __call__(self, residual: Residual, attend: Attend) -> None:
        hidden = residual.summed()
        hidden.addmm_(attend(self.qkv(self.norm1(hidden))), self.projection.T)
        hidden.addmm_(self._expand(self.norm2(hidden)), self.fc2.T)

    def _expand(self, x: torch.Tensor) -> torch.Tensor:
        """activation(fc1(x))"""
        if self.activation is not F.gelu:
            return self.activation(self.fc1(x))
        # cuBLAS has GELU's tanh approximation as an epilogue: a tenth of what float16 rounds.
        return torch._addmm_activation(self.fc1.bias, x, self.fc1.weight.T, use_gelu=True)


class CudaVisionTransformer:
    """`modules.VisionTransformer`: pixel_values B x 3 x S x S → image_embeds B x T x hidden_size.

    The residual stream leaves out the biases of the linears that are added to it, so that cuBLAS
    adds their products in place: the sum of those so far is the same for every token, and the next
    LayerNorm adds it as it reads.
    """

    @staticmethod
    def takes(module: modules.VisionTransformer) -> bool:
        """Whether a head's columns can be copied by a tensor's descriptor: in 16 bytes at a time."""
        layer = module.encoder.layers[0]
        return layer.layer_norm1.weight.shape[0] // layer.num_heads % 8 == 0

    def __init__(self, module: modules.VisionTransformer) -> None:
        """Takes over the module's weights, where they are and in their dtype."""
        embeddings, layers = module.embeddings, module.encoder.layers
        convolution = embeddings.patch_embedding
        width = convolution.out_channels
        self._patch = convolution.kernel_size[0]
        weight = convolution.weight.detach().flatten(1)
        self._patch_weight = F.pad(weight, (0, -weight.shape[1] % _ALIGNMENT))
        start = embeddings.position_embedding[0].detach().float().clone()
        start[0] += embeddings.class_embedding[0, 0].float()
        start[1:] += convolution.bias.float()
        self._start = start.to(weight.dtype)
        self._heads = layers[0].num_heads
        shift = torch.zeros(width, device=weight.device)
        # Of one picture and of several, where there are two kinds.
        self._picture_layers, self._layers = [], []
        for layer in layers:
            shift2 = shift + layer.self_attn.projection.bias.float()
            kind = Float8VisionLayer if layer.is_float8 else _VisionLayer
            self._layers.append(kind.of(layer, shift, shift2))
            if PictureLayer.takes(layer):
                norms = _Norm.of(layer.layer_norm1, shift), _Norm.of(layer.layer_norm2, shift2)
                self._picture_layers.append(PictureLayer.of(layer, *norms))
            shift = shift2 + layer.mlp.fc2.bias.float()
        self._norm = _Norm.of(module.post_layernorm, shift)

    @torch.inference_mode()
    def __call__(self, pixel_values: torch.Tensor) -> torch.Tensor:
        images, tokens = len(pixel_values), len(self._start)
        hidden = self._embed(pixel_values)
        mixed = torch.zeros_like(hidden)  # the rows of no token stay so
        layers, residual = self._layers, Residual(hidden)
        if images == 1 and len(hidden) <= MOST_ROWS and len(self._picture_layers) == len(layers):
            layers, residual = self._picture_layers, PartsResidual(hidden)

        def attend(qkv: torch.Tensor) -> torch.Tensor:
            self._attend(qkv, images, mixed)
            return mixed

        for layer in layers:
            layer(residual, attend)
        out = residual.normed(self._norm)
        return out[: images * tokens].unflatten(0, (images, tokens))

    def _embed(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """The tokens' embeddings, less what `_norm`s add: B · T, and some more, x hidden_size."""
        pixel_values = pixel_values.contiguous()
        (tokens, width), padded = self._start.shape, self._patch_weight.shape[1]
        images = len(pixel_values)
        rows = images * tokens
        rows += -rows % _ALIGNMENT
        patches = pixel_values.new_zeros(rows, padded)
        hidden = pixel_values.new_zeros(rows, width)
        launch(
            kernels.patches_kernel,
            (tokens, images),
            pixel_values,
            self._start,
            patches,
            hidden,
            pixel_values.shape[-1],
            width,
            padded,
            PATCH=self._patch,
            BLOCK=triton.next_power_of_2(padded),
            BLOCK_WIDTH=triton.next_power_of_2(width),
            device=hidden.device,
        )
        return hidden.addmm_(patches, self._patch_weight.T)

    def _attend(self, qkv: torch.Tensor, images: int, out: torch.Tensor) -> None:
        """Into `out`, rows x hidden_size, from qkv, rows x 3 · hidden_size."""
        heads, tokens = self._heads, len(self._start)
        head_size = out.shape[1] // heads
        # A head's columns as two powers of two: 88 = 64 + 24 takes 64 + 32, not 128.
        low = max(16, 1 << ((head_size - 1).bit_length() - 1))
        high = max(16, triton.next_power_of_2(max(1, head_size - low)))
        # Blocks as large as leave enough programs for the whole GPU.
        many = images >= 16
        block_m, block_n = 128 if many else 64, 128 if images == 1 else 64
        by_head = qkv.view(-1, 3 * heads, head_size)
        launch(
            kernels.attention_kernel,
            (triton.cdiv(tokens - 1, block_m) + 1, heads, images),
            TensorDescriptor.from_tensor(by_head, [block_n, 1, low]),
            TensorDescriptor.from_tensor(by_head, [block_n, 1, high]),
            qkv,
            out,
            tokens,
            head_size**-0.5 * _LOG2_E,
            D=head_size,
            D_LOW=low,
            D_HIGH=high,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            EVEN=(tokens - 1) % block_n == 0,
            num_warps=8 if images == 1 else 4,
            num_stages=3 if many else 2,
            device=qkv.device,
        )


class _QFormerLinear:
    """A product in TF32. Few rows read a float16 weight where it is finite: TF32 keeps no more."""

    def __init__(self, weight: torch.Tensor) -> None:
        """weight: channels x inputs, float32."""
        self.weight = weight
        self._few_rows_weight = _half_if_finite(weight)

    def parts(self, x: torch.Tensor) -> torch.Tensor:
        """x Wᵀ for x of rows x inputs, float32, as n x rows x channels, to be added up."""
        rows, inputs = x.shape
        if rows > _FEW_ROWS:
            return F.linear(x, self.weight)[None]
        channels = len(self.weight)
        block_m, block_n, block_k = 32, 64, 256
        out = x.new_empty(triton.cdiv(inputs, block_k), rows, channels)
        grid = (triton.cdiv(channels, block_n), len(out), triton.cdiv(rows, block_m))
        launch(
            kernels.few_rows_linear_kernel,
            grid,
            x,
            self._few_rows_weight,
            out,
            rows,
            channels,
            inputs,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            BLOCK_K=block_k,
            num_warps=8,
            device=x.device,
        )
        return out

    def __call__(
        self, x: torch.Tensor, bias: torch.Tensor, dtype: torch.dtype, gelu: bool = False
    ) -> torch.Tensor:
        """[GELU](x Wᵀ + bias) in `dtype`, rows x channels; x: rows x inputs, float32."""
        parts = self.parts(x)
        _, rows, channels = parts.shape
        out = x.new_empty(rows, channels, dtype=dtype)
        block = 512 if rows <= _FEW_ROWS else 2048
        launch(
            kernels.sum_kernel,
            (triton.cdiv(out.numel(), block),),
            parts,
            bias,
            out,
            out.numel(),
            channels,
            PARTS=len(parts),
            GELU=gelu,
            BLOCK=block,
            device=x.device,
        )
        return out


def _half_if_finite(weight: torch.Tensor) -> torch.Tensor:
    half = weight.half()
    return half if torch.isfinite(half).all() else weight


@dataclasses.dataclass(frozen=True)
class _QFormerAttention:
    """`input` yields queries, and in self-attention keys and values behind them.

    Neither keys nor values have a bias: softmax does not see that of the keys, and that of the
    values reaches every output alike, so `norm` adds it with the output's.
    """

    input: _QFormerLinear
    query_bias: torch.Tensor
    output: _QFormerLinear
    norm: _Norm

    @classmethod
    def of(cls, module: modules.QFormerAttention, *, crosses: bool) -> _QFormerAttention:
        inner, dense = module.attention, module.output.dense
        weights = (inner.query,) if crosses else (inner.query, inner.key, inner.value)
        return cls(
            _QFormerLinear(torch.cat([linear.weight for linear in weights])),
            inner.query.bias,
            _QFormerLinear(dense.weight),
            _Norm.of(module.output.LayerNorm, dense.bias + dense.weight @ inner.value.bias),
        )


@dataclasses.dataclass(frozen=True)
class _QFormerLayer:
    attention: _QFormerAttention
    crossattention: _QFormerAttention | None
    fc1: _QFormerLinear
    fc1_bias: torch.Tensor
    fc2: _QFormerLinear
    norm: _Norm


class CudaQFormer:
    """`modules.QFormer` for its own query tokens: image_embeds B x T x H_v → B x n x H_lm.

    Computes in TF32 with float32 sums, LayerNorms and residuals, and yields the dtype of
    image_embeds. What precedes the first look at the picture is computed once, beforehand.
    """

    def __init__(self, module: modules.QFormer, query_tokens: torch.Tensor) -> None:
        """Takes over the module's float32 weights, where they are; query_tokens: 1 x n x H_q."""
        layers = module.qformer.encoder.layer
        self._heads = layers[0].attention.num_heads
        self._activation = layers[0].activation
        with torch.inference_mode():
            hidden = module.qformer.layernorm(query_tokens.float())
            self._start = layers[0].attention(hidden, hidden)[0]
            self._layers = [
                _QFormerLayer(
                    _QFormerAttention.of(layer.attention, crosses=False),
                    layer.crossattention
                    and _QFormerAttention.of(layer.crossattention, crosses=True),
                    _QFormerLinear(layer.intermediate_query.dense.weight),
                    layer.intermediate_query.dense.bias,
                    _QFormerLinear(layer.output_query.dense.weight),
                    _Norm.of(layer.output_query.LayerNorm, layer.output_query.dense.bias),
                )
                for layer in layers
            ]
            seen = [layer.crossattention.attention for layer in layers if layer.crossattention]
            weights = [linear.weight for inner in seen for linear in (inner.key, inner.value)]
            self._image_weight = _half_if_finite(torch.cat(weights))
            self._projection = _QFormerLinear(module.language_projection.weight)
            self._projection_bias = module.language_projection.bias

    @torch.inference_mode()
    def __call__(self, image_embeds: torch.Tensor) -> torch.Tensor:
        images, tokens, _ = image_embeds.shape
        hidden = self._start.repeat(images, 1)
        width = hidden.shape[1]
        # Keys and values of all layers at once, each layer's side by side.
        seen = iter(self._look(image_embeds.flatten(0, 1)).split(2 * width, dim=1))
        for index, layer in enumerate(self._layers):
            if index > 0:
                attention = layer.attention
                qkv = attention.input.parts(hidden)
                queries = len(self._start)
                mixed = self._attend(qkv, attention.query_bias, qkv[:, :, width:], queries)
                hidden = attention.norm(hidden, attention.output.parts(mixed))
            if layer.crossattention is not None:
                attention = layer.crossattention
                query = attention.input.parts(hidden)
                mixed = self._attend(query, attention.query_bias, next(seen)[None], tokens)
                hidden = attention.norm(hidden, attention.output.parts(mixed))
            hidden = layer.norm(hidden, self._feed_forward(layer, hidden))
        out = self._projection(hidden, self._projection_bias, image_embeds.dtype)
        return out.unflatten(0, (images, -1))

    def _look(self, image: torch.Tensor) -> torch.Tensor:
        """Every layer's keys and values of the pictures: B · T x …, float32."""
        weight = self._image_weight
        if weight.dtype == image.dtype == torch.float16:
            return torch.mm(image, weight.T, out_dtype=torch.float32)
        return image.float() @ weight.float().T

    def _attend(
        self,
        query: torch.Tensor,
        query_bias: torch.Tensor,
        keys_values: torch.Tensor,
        tokens: int,
    ) -> torch.Tensor:
        """B · n x hidden_size.

        Args:
            query: parts x B · n x at least hidden_size.
            query_bias: hidden_size.
            keys_values: parts x B · tokens x 2 · hidden_size, rows a view of wider ones.
            tokens: keys of each picture.
        """
        rows, width = query.shape[1], len(query_bias)
        queries = len(self._start)
        head_size = width // self._heads
        out = query.new_empty(rows, width)
        launch(
            kernels.query_attention_kernel,
            (self._heads, rows // queries),
            query,
            query_bias,
            keys_values,
            keys_values[:, :, width:],
            out,
            queries,
            tokens,
            query.stride(1),
            keys_values.stride(1),
            head_size**-0.5 * _LOG2_E,
            QUERY_PARTS=len(query),
            KEY_PARTS=len(keys_values),
            D=head_size,
            BLOCK_D=max(16, triton.next_power_of_2(head_size)),
            BLOCK_M=max(16, triton.next_power_of_2(queries)),
            BLOCK_N=32 if tokens <= 32 else 64,
            num_stages=2 if tokens <= 32 else 3,  # in shared memory, which many parts fill
            device=query.device,
        )
        return out

    def _feed_forward(self, layer: _QFormerLayer, hidden: torch.Tensor) -> torch.Tensor:
        gelu = self._activation is F.gelu
        inner = layer.fc1(hidden, layer.fc1_bias, torch.float32, gelu=gelu)
        return layer.fc2.parts(inner if gelu else self._activation(inner))
