"""BLIP-2's ViT and Q-Former in PyTorch, with Hugging Face's parameter names.

Used to export and, as the reference, to check what was exported. Attention scales q before q·kᵀ
(Hugging Face's eager attention scales after it, where fp16 can overflow), LayerNorm stays one
operation, and the Q-Former may compute in another precision than its inputs and outputs have.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from blip2.activations import ACTIVATIONS
from blip2.artifacts.tensor_files import FiniteChecks, Loader
from blip2.bfloat16 import packed
from blip2.checkpoints import Checkpoint, QFormerConfig, VisionConfig
from blip2.errors import Blip2Error
from blip2.vision import bf16
from blip2.vision.float8 import Float8Linear, quantise_linears


class VisionTransformer(nn.Module):
    """ViT: pixel_values B x 3 x S x S → image_embeds B x (1 + patches) x hidden_size."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.embeddings = PatchEmbeddings(config)
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(
            VisionLayer(config) for _ in range(config.num_hidden_layers)
        )
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.post_layernorm_eps)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        hidden = self.embeddings(pixel_values)
        for layer in self.encoder.layers:
            hidden = layer(hidden)
        return self.post_layernorm(hidden)


class PatchEmbeddings(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        width, patch = config.hidden_size, config.patch_size
        positions = (config.image_size // patch) ** 2 + 1
        self.class_embedding = nn.Parameter(torch.empty(1, 1, width))
        self.patch_embedding = nn.Conv2d(3, width, kernel_size=patch, stride=patch)
        self.position_embedding = nn.Parameter(torch.empty(1, positions, width))

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        patches = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
        first = self.class_embedding.expand(patches.shape[0], -1, -1)
        return torch.cat([first, patches], dim=1) + self.position_embedding


class VisionLayer(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        self.num_heads = config.num_attention_heads
        self.activation = ACTIVATIONS[config.hidden_act]
        self.layer_norm1 = nn.LayerNorm(width, eps=eps)
        self.self_attn = nn.Module()
        self.self_attn.qkv = nn.Linear(width, 3 * width, bias=config.qkv_bias)
        self.self_attn.projection = nn.Linear(width, width)
        self.layer_norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = nn.Module()
        self.mlp.fc1 = nn.Linear(width, config.intermediate_size)
        self.mlp.fc2 = nn.Linear(config.intermediate_size, width)

    @property
    def is_float8(self) -> bool:
        """Whether the weights of its linears are in E4M3: of all four, or of none."""
        return isinstance(self.mlp.fc1, Float8Linear)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        qkv = self.self_attn.qkv(self.layer_norm1(hidden)).chunk(3, dim=-1)
        hidden = hidden + self.self_attn.projection(attention(*qkv, self.num_heads))
        return hidden + self.mlp.fc2(self.activation(self.mlp.fc1(self.layer_norm2(hidden))))


class QFormer(nn.Module):
    """Q-Former and the projection to OPT's hidden size, as one stage.

    query_tokens B x n x H_q, image_embeds B x T x H_v, image_atts B x T (int64, 0 hides an
    embedding; None hides none) → query_output B x n x H_lm in the dtype of image_embeds. Computes
    in the dtypes of its own parameters: Hugging Face and LAVIS keep the Q-Former in float32.
    """

    def __init__(self, config: QFormerConfig, language_hidden_size: int) -> None:
        super().__init__()
        self.qformer = nn.Module()
        self.qformer.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.qformer.encoder = nn.Module()
        self.qformer.encoder.layer = nn.ModuleList(
            QFormerLayer(config, crosses=index % config.cross_attention_frequency == 0)
            for index in range(config.num_hidden_layers)
        )
        self.language_projection = nn.Linear(config.hidden_size, language_hidden_size)

    def forward(
        self,
        query_tokens: torch.Tensor,
        image_embeds: torch.Tensor,
        image_atts: torch.Tensor | None,
    ) -> torch.Tensor:
        layers = self.qformer.encoder.layer
        visible = None
        if image_atts is not None:
            # Expanded over queries: ONNX Runtime's Attention (opset 23) does not broadcast a mask.
            visible = (image_atts != 0)[:, None, None, :].expand(-1, -1, query_tokens.shape[1], -1)
        image = image_embeds.to(layers[0].crossattention.attention.key.weight.dtype)
        norm = self.qformer.layernorm
        hidden = norm(query_tokens.to(norm.weight.dtype))
        for layer in layers:
            hidden = layer(hidden, image, visible)
        return self.language_projection(hidden).to(image_embeds.dtype)


class QFormerLayer(nn.Module):
    def __init__(self, config: QFormerConfig, crosses: bool) -> None:
        super().__init__()
        self.attention = QFormerAttention(config, config.hidden_size)
        self.crossattention = (
            QFormerAttention(config, config.encoder_hidden_size) if crosses else None
        )
        self.activation = ACTIVATIONS[config.hidden_act]
        self.intermediate_query = nn.Module()
        self.intermediate_query.dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.output_query = ResidualOutput(config, config.intermediate_size)

    def forward(
        self, hidden: torch.Tensor, image: torch.Tensor, visible: torch.Tensor | None
    ) -> torch.Tensor:
        hidden = self.attention(hidden, hidden)
        if self.crossattention is not None:
            hidden = self.crossattention(hidden, image, visible)
        return self.output_query(self.activation(self.intermediate_query.dense(hidden)), hidden)


class QFormerAttention(nn.Module):
    def __init__(self, config: QFormerConfig, source_width: int) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.attention = nn.Module()
        self.attention.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.attention.key = nn.Linear(source_width, config.hidden_size)
        self.attention.value = nn.Linear(source_width, config.hidden_size)
        self.output = ResidualOutput(config, config.hidden_size)

    def forward(
        self, hidden: torch.Tensor, source: torch.Tensor, visible: torch.Tensor | None = None
    ) -> torch.Tensor:
        query = self.attention.query(hidden)
        key, value = self.attention.key(source), self.attention.value(source)
        return self.output(attention(query, key, value, self.num_heads, visible), hidden)


class ResidualOutput(nn.Module):
    """BERT's post-LN: LayerNorm(dense(x) + residual)."""

    def __init__(self, config: QFormerConfig, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return self.LayerNorm(self.dense(x) + residual)


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    num_heads: int,
    visible: torch.Tensor | None = None,
) -> torch.Tensor:
    """Multi-head attention over B x T x (heads · head_size); `visible` is B x 1 x T x T_key bool."""
    query, key, value = (
        x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (query, key, value)
    )
    mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=visible)
    return mixed.transpose(1, 2).flatten(2)


CPU = torch.device("cpu")


def load_vision_transformer(
    checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device = CPU
) -> VisionTransformer:
    """The ViT of a BLIP-2 checkpoint in `dtype`, ready for inference on a device.

    Layers whose weights have scales are in FP8. In bfloat16 are linear layers alone.

    Raises:
        Blip2Error: a tensor is missing, has another shape than config.json says, or is not finite.
    """
    module = _vision_transformer(checkpoint)
    return _filled(module, checkpoint, dtype, device, "vision_model.")


def _vision_transformer(checkpoint: Checkpoint) -> VisionTransformer:
    config = VisionConfig.of(checkpoint)
    _check_activation(config.hidden_act, "vision_config")
    with torch.device("meta"):
        module = VisionTransformer(config)
    for index, layer in enumerate(module.encoder.layers):
        if f"vision_model.encoder.layers.{index}.mlp.fc1.weight_scale" in checkpoint:
            quantise_linears(layer)
    _check_shapes(_shapes(module, "vision_model."), checkpoint)
    return module


def load_qformer(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device = CPU) -> QFormer:
    """The Q-Former and language projection of a BLIP-2 checkpoint, computing in `dtype` on a device.

    Raises:
        Blip2Error: as `load_vision_transformer`.
    """
    return _filled(_qformer(checkpoint), checkpoint, dtype, device, "")


def _qformer(checkpoint: Checkpoint) -> QFormer:
    config = QFormerConfig.of(checkpoint)
    _check_activation(config.hidden_act, "qformer_config")
    language_hidden_size = checkpoint.shape("language_projection.weight")[0]
    with torch.device("meta"):
        module = QFormer(config, language_hidden_size)
    query_tokens = {"query_tokens": (1, config.num_query_tokens, config.hidden_size)}
    _check_shapes(_shapes(module) | query_tokens, checkpoint)
    return module


def check_checkpoint(checkpoint: Checkpoint) -> None:
    """See that a BLIP-2 checkpoint has every tensor of both networks, without reading any.

    Raises:
        Blip2Error: a tensor is missing or has another shape than config.json says.
    """
    _vision_transformer(checkpoint)
    _qformer(checkpoint)


def _check_activation(name: str, where: str) -> None:
    if name not in ACTIVATIONS:
        raise Blip2Error(
            f"config.json names the activation {name!r} in {where}",
            f"this suite knows {', '.join(ACTIVATIONS)}",
        )


def _shapes(module: nn.Module, prefix: str = "") -> dict[str, tuple[int, ...]]:
    return {prefix + name: tuple(value.shape) for name, value in module.state_dict().items()}


def _check_shapes(expected: dict[str, tuple[int, ...]], checkpoint: Checkpoint) -> None:
    for name, shape in expected.items():
        stored = checkpoint.shape(name)
        if stored != shape:
            raise Blip2Error(
                f"{checkpoint.path}: {name} has shape {stored}, config.json asks for {shape}",
                f"{checkpoint.mend}",
            )


def _filled(
    module: nn.Module,
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device,
    prefix: str,
):
    """Replace every meta parameter by the checkpoint's, brought to the device as it is stored."""
    load, checks = Loader(device), FiniteChecks(dtype)
    own = {name: buffer.dtype for name, buffer in module.named_buffers()}  # of layers in FP8
    if dtype == torch.bfloat16:
        bf16.use_bfloat16(module)
        own |= {name: tensor.dtype for name, tensor in module.named_parameters()}
    packs = bf16.packed_weights(module)

    def parameter(name: str) -> torch.Tensor:
        stored, wanted = checkpoint.tensor(prefix + name, load), own.get(name, dtype)
        if wanted == torch.bfloat16:
            weight = checks.add_rounded(prefix + name, stored)
            return packed(weight) if name in packs else weight
        return checks.add(prefix + name, stored).to(wanted).contiguous()

    names = list(module.state_dict())
    with load.pool() as pool:
        state = dict(zip(names, pool.map(parameter, names), strict=True))
    if (name := checks.first_not_finite()) is not None:
        raise Blip2Error(
            f"{checkpoint.path}: {name} holds NaN or Inf in {str(dtype).removeprefix('torch.')}",
            f"{checkpoint.mend}, or use --dtype float32",
        )
    module.load_state_dict(state, assign=True)
    return module.eval().requires_grad_(False)
