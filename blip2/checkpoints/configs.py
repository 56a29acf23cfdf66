"""What a checkpoint's config.json says of its three models, checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from blip2.checkpoints.reader import Checkpoint
from blip2.errors import Blip2Error
from blip2.images import MAX_SIDE

# Far above every model there is: what a damaged file says must not decide how long we compute.
_LARGEST = {"num_hidden_layers": 1000, "image_size": MAX_SIDE}
_LARGEST_SIZE = 1 << 24


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """BLIP-2's ViT. The defaults are those of transformers, whose files may leave them out."""

    hidden_size: int = 1408
    intermediate_size: int = 6144
    num_hidden_layers: int = 39
    num_attention_heads: int = 16
    image_size: int = 224
    patch_size: int = 14
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6
    post_layernorm_eps: float = 1e-6  # as layer_norm_eps, but in LAVIS's
    qkv_bias: bool = True

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> VisionConfig:
        """Read it from a BLIP-2 checkpoint's config.json."""
        fields = dict(_sub_config(checkpoint, "vision_config"))
        for name in ("image_size", "patch_size"):
            if isinstance(fields.get(name), list):
                fields[name] = _square(checkpoint, name, fields[name])
        if not checkpoint.is_of_lavis:  # transformers has one for all norms
            fields["post_layernorm_eps"] = fields.get("layer_norm_eps", cls.layer_norm_eps)
        return _read_config(cls, fields, checkpoint)

    @property
    def num_tokens(self) -> int:
        """Rows of image_embeds: the patches and one class token."""
        return (self.image_size // self.patch_size) ** 2 + 1


@dataclasses.dataclass(frozen=True)
class QFormerConfig:
    """BLIP-2's Q-Former, with the number of its query tokens."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    cross_attention_frequency: int = 2
    encoder_hidden_size: int = 1408
    num_query_tokens: int = 32

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> QFormerConfig:
        """Read it from a BLIP-2 checkpoint's config.json.

        `encoder_hidden_size` is the ViT's width: transformers sets it so, whatever is stored.
        """
        fields = dict(_sub_config(checkpoint, "qformer_config"))
        fields["encoder_hidden_size"] = VisionConfig.of(checkpoint).hidden_size
        fields["num_query_tokens"] = checkpoint.config.get("num_query_tokens", 32)
        return _read_config(cls, fields, checkpoint)


@dataclasses.dataclass(frozen=True)
class OPTConfig:
    """OPT, alone or as BLIP-2's language model. `word_embed_proj_dim` 0 means hidden_size."""

    vocab_size: int = 50272
    hidden_size: int = 768
    ffn_dim: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 2048
    word_embed_proj_dim: int = 0
    activation_function: str = "relu"
    do_layer_norm_before: bool = True
    _remove_final_layer_norm: bool = False
    enable_bias: bool = True
    layer_norm_elementwise_affine: bool = True
    tie_word_embeddings: bool = True

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> OPTConfig:
        """Read it from config.json of an OPT or of a BLIP-2 with an OPT."""
        if checkpoint.is_of_lavis:
            raise Blip2Error(
                f"{checkpoint.path} is of LAVIS, which leaves OPT out",
                "give the OPT that it was"
                f" trained with: {checkpoint.opt_location or 'its directory'}",
            )
        if checkpoint.kind == "opt":
            fields = dict(checkpoint.config)
        else:
            fields = dict(_sub_config(checkpoint, "text_config"))
        if not fields.get("word_embed_proj_dim"):
            fields["word_embed_proj_dim"] = fields.get("hidden_size", cls.hidden_size)
        return _read_config(cls, fields, checkpoint)

    @property
    def has_final_layer_norm(self) -> bool:
        """Whether a LayerNorm stands between the last layer and the head."""
        return self.do_layer_norm_before and not self._remove_final_layer_norm


def image_token_index(checkpoint: Checkpoint) -> int | None:
    """Id of `<image>` in a BLIP-2's tokenizer; None in checkpoints older than that token."""
    config = checkpoint.config
    return config.get("image_token_index", config.get("image_token_id"))


def _sub_config(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    if checkpoint.kind != "blip-2":
        raise Blip2Error(
            f"{checkpoint.path} is an OPT checkpoint, which has no {name}",
            "give a BLIP-2 checkpoint, such as Salesforce/blip2-opt-2.7b",
        )
    fields = checkpoint.config.get(name)
    if fields is None:
        return {}
    if not isinstance(fields, dict):
        raise _bad_config(checkpoint, f"{name} is {fields!r}")
    return fields


def _square(checkpoint: Checkpoint, name: str, sides: list[Any]) -> Any:
    if len(set(sides)) != 1:
        raise _bad_config(checkpoint, f"{name} is {sides}, not square")
    return sides[0]


def _read_config(cls: Any, fields: Mapping[str, Any], checkpoint: Checkpoint) -> Any:
    """Build a config dataclass from the fields it knows, checking each one's type."""
    values = {}
    for field in dataclasses.fields(cls):
        value = fields.get(field.name, field.default)
        kind = type(field.default)
        if kind is float and type(value) is int:
            value = float(value)
        largest = _LARGEST.get(field.name, _LARGEST_SIZE)
        if type(value) is not kind or (kind is int and not 1 <= value <= largest):
            raise _bad_config(checkpoint, f"{field.name} is {value!r}")
        values[field.name] = value
    if values["hidden_size"] % values["num_attention_heads"]:
        raise _bad_config(
            checkpoint,
            f"hidden_size {values['hidden_size']} is no multiple of num_attention_heads"
            f" {values['num_attention_heads']}",
        )
    return cls(**values)


def _bad_config(checkpoint: Checkpoint, what: str) -> Blip2Error:
    return Blip2Error(
        f"in {checkpoint.path / 'config.json'}, {what}", "download the checkpoint again"
    )
