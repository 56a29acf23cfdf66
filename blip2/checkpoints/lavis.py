"""LAVIS's BLIP-2 with OPT (salesforce-lavis 1.0.2) by Hugging Face's names.

A LAVIS .pth holds what was trained: the Q-Former, ln_vision, the query tokens, opt_proj, and the ViT
where that was not frozen. A frozen ViT is in eva_vit_g.pth, the same for all; OPT is facebook's.

Source of names and constants: lavis.models.blip2_models.blip2_opt, lavis.models.eva_vit.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from blip2 import artifacts, memory
from blip2.errors import Blip2Error, first_line

MODEL_TYPES = (
    "pretrain_opt2.7b",
    "caption_coco_opt2.7b",
    "pretrain_opt6.7b",
    "caption_coco_opt6.7b",
)
VIT_FILE = "eva_vit_g.pth"
_URL = "https://storage.googleapis.com/sfr-vision-language-research/LAVIS/models/BLIP2/"
VIT_URL = _URL + VIT_FILE
_OPT_BY_HIDDEN_SIZE = {2560: "facebook/opt-2.7b", 4096: "facebook/opt-6.7b"}

# What no tensor's shape says. The file of ViT-g may hold more blocks; LAVIS leaves out the last.
_VIT_BLOCKS = 39
_VIT_HEAD_SIZE = 88
_QFORMER_HEAD_SIZE = 64
_LN_VISION_EPS = 1e-5  # PyTorch's default; the ViT's own norms have 1e-6

_VIT = "visual_encoder."
_BLOCK = r"^vision_model\.encoder\.layers\.(\d+)\."
# Applied to a name one after the other.
_RENAMES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^opt_proj\.", "language_projection."),
        (r"^ln_vision\.", "vision_model.post_layernorm."),
        (r"^visual_encoder\.cls_token$", "vision_model.embeddings.class_embedding"),
        (r"^visual_encoder\.pos_embed$", "vision_model.embeddings.position_embedding"),
        (r"^visual_encoder\.patch_embed\.proj\.", "vision_model.embeddings.patch_embedding."),
        (r"^visual_encoder\.blocks\.", "vision_model.encoder.layers."),
        (_BLOCK + r"norm([12])\.", r"vision_model.encoder.layers.\1.layer_norm\2."),
        (_BLOCK + r"attn\.proj\.", r"vision_model.encoder.layers.\1.self_attn.projection."),
        (_BLOCK + r"attn\.", r"vision_model.encoder.layers.\1.self_attn."),
        (r"^Qformer\.bert\.embeddings\.LayerNorm\.", "qformer.layernorm."),
        (r"^Qformer\.bert\.", "qformer."),
        (r"^(qformer\..*attention)\.self\.", r"\1.attention."),
    )
)

State = Mapping[str, torch.Tensor]


def load_state_dict(model_type: str) -> dict[str, torch.Tensor]:
    """Have LAVIS load its model of that type; return its tensors, in float32, but those of OPT.

    Raises:
        Blip2Error: LAVIS is not installed, has no such model, or cannot load it.
    """
    if model_type not in MODEL_TYPES:
        raise Blip2Error(
            f"LAVIS has no BLIP-2 {model_type} with OPT",
            f"give one of {', '.join(MODEL_TYPES)}, or a .pth without --source lavis",
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its old dependencies, not of this program
        try:
            from lavis.models import load_model_and_preprocess
        except ImportError as error:
            raise Blip2Error(
                f"LAVIS cannot be imported here ({error})",
                "run this in its own environment, made from requirements-lavis.txt",
            ) from None
        try:
            with memory.needed(
                f"to build LAVIS's {model_type}", "give `model_dir` its .pth instead"
            ):
                model, _, _ = load_model_and_preprocess("blip2_opt", model_type, is_eval=True)
        except Blip2Error:
            raise
        except Exception as error:  # downloads and damaged files raise nearly anything
            raise Blip2Error(
                f"LAVIS cannot load {model_type}: {first_line(error)}",
                "if it cannot download, bring its files here and give `model_dir` the .pth",
            ) from None
    state = model.state_dict()
    return {name: state[name] for name in state if not name.startswith("opt_model.")}


def state_dict(content: Mapping[str, Any], file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a LAVIS .pth, by LAVIS's names.

    Raises:
        Blip2Error: it is of another model than BLIP-2 with OPT.
    """
    state = content.get("model", content)
    if not isinstance(state, dict) or "opt_proj.weight" not in state:
        raise Blip2Error(
            f"{file} holds no opt_proj.weight, so it is no BLIP-2 with OPT of LAVIS",
            "give"
            " blip2_pretrained_opt2.7b.pth, blip2_caption_opt2.7b.pth or what was trained from them",
        )
    return _tensors(state)


def holds_vit(state: State) -> bool:
    """Whether the ViT was trained too, and is in the .pth."""
    return any(name.startswith(_VIT) for name in state)


def vit_state_dict(content: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors of VIT_FILE, named as they are in a .pth that holds the ViT."""
    return {_VIT + name: tensor for name, tensor in _tensors(content).items()}


def trained_image_size(content: Mapping[str, Any]) -> int | None:
    """Side of the pictures that a LAVIS .pth was trained on, in pixels, if it says so."""
    config = content.get("config")
    model = config.get("model") if isinstance(config, dict) else None
    return model.get("image_size") if isinstance(model, dict) else None


def _tensors(content: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    return {
        name: value
        for name, value in content.items()
        if isinstance(name, str) and artifacts.is_plain(value)
    }


def hugging_face_tensors(state: State) -> dict[str, torch.Tensor]:
    """The same tensors by Hugging Face's names. LAVIS's q_bias and v_bias are one with k's zeros."""
    tensors = {}
    for name, tensor in state.items():
        if name.endswith("attn.v_bias"):
            continue
        if name.endswith("attn.q_bias"):
            value = state.get(name.replace("q_bias", "v_bias"), tensor.new_empty(0))
            name = name.replace("q_bias", "qkv.bias")
            tensor = torch.cat([x.flatten() for x in (tensor, torch.zeros_like(tensor), value)])
        for pattern, replacement in _RENAMES:
            name = pattern.sub(replacement, name)
        tensors[name] = tensor
    return tensors


def hugging_face_config(
    state: State, path: Path, image_size: int | None = None
) -> tuple[dict[str, Any], str | None]:
    """What Hugging Face's config.json would say of these tensors, and the hub id of their OPT.

    Args:
        state: by LAVIS's names, with the ViT.
        path: where it is from, for messages.
        image_size: of the pictures it was trained on, in pixels, where that is known.

    Returns:
        The configuration, without OPT's; None for an OPT of a size that was not published.

    Raises:
        Blip2Error: a tensor that tells a size is missing or cannot be LAVIS's, or the ViT is for
            pictures of another size than `image_size`.
    """
    width, _, patch_size, _ = _shape(state, "visual_encoder.patch_embed.proj.weight", 4, path)
    _, positions, _ = _shape(state, "visual_encoder.pos_embed", 3, path)
    vit_ffn, _ = _shape(state, "visual_encoder.blocks.0.mlp.fc1.weight", 2, path)
    _, num_query_tokens, hidden_size = _shape(state, "query_tokens", 3, path)
    layer = "Qformer.bert.encoder.layer."
    ffn, _ = _shape(state, f"{layer}0.intermediate_query.dense.weight", 2, path)
    opt_width, _ = _shape(state, "opt_proj.weight", 2, path)
    side = math.isqrt(max(positions - 1, 0))
    for name, size, head_size in (
        ("visual_encoder.pos_embed", width, _VIT_HEAD_SIZE),
        ("query_tokens", hidden_size, _QFORMER_HEAD_SIZE),
    ):
        if size % head_size:
            raise Blip2Error(
                f"{path}: {name} has width {size}, no multiple of LAVIS's head size {head_size}",
                "download the checkpoint again",
            )
    if image_size not in (None, side * patch_size):
        raise Blip2Error(
            f"{path} was trained on pictures of {image_size} x {image_size}, {VIT_FILE} is for"
            f" {side * patch_size} x {side * patch_size}",
            "train it with freeze_vit: False, so that its own ViT is saved",
        )
    config = {
        "model_type": "blip-2",
        "num_query_tokens": num_query_tokens,
        "vision_config": {
            "hidden_size": width,
            "intermediate_size": vit_ffn,
            "num_hidden_layers": min(_count(state, "visual_encoder.blocks."), _VIT_BLOCKS),
            "num_attention_heads": width // _VIT_HEAD_SIZE,
            "image_size": side * patch_size,
            "patch_size": patch_size,
            "layer_norm_eps": 1e-6,
            "post_layernorm_eps": _LN_VISION_EPS,
        },
        "qformer_config": {
            "hidden_size": hidden_size,
            "intermediate_size": ffn,
            "num_hidden_layers": _count(state, layer),
            "num_attention_heads": hidden_size // _QFORMER_HEAD_SIZE,
            "cross_attention_frequency": 2,
        },
    }
    return config, _OPT_BY_HIDDEN_SIZE.get(opt_width)


def _shape(state: State, name: str, rank: int, path: Path) -> tuple[int, ...]:
    if name not in state:
        raise Blip2Error(f"{path} has no tensor {name}", "it is incomplete: download it again")
    shape = tuple(state[name].shape)
    if len(shape) != rank:
        raise Blip2Error(
            f"{path}: {name} has shape {shape}, not {rank} dimensions", "download it again"
        )
    return shape


def _count(state: State, prefix: str) -> int:
    """How many blocks there are by the names that begin with `prefix` and an index."""
    found = (re.match(rf"{re.escape(prefix)}(\d+)\.", name) for name in state)
    return 1 + max(int(match[1]) for match in found if match)
