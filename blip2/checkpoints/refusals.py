"""Checkpoints that would be answered from wrongly: each is named, with what would do instead."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from blip2.errors import Blip2Error

_INSTEAD = "give a BLIP-2 with OPT, such as Salesforce/blip2-opt-2.7b"
_MODELS = {
    "blip": "BLIP, not BLIP-2",
    "blip_2_qformer": "BLIP-2's Q-Former alone",
    "blip_2_vision_model": "BLIP-2's ViT alone",
    "instructblip": "InstructBLIP, whose Q-Former reads the question too",
    "instructblipvideo": "InstructBLIP for videos, whose Q-Former reads the question too",
}
_ARCHITECTURES = {
    "Blip2ForImageTextRetrieval": "a BLIP-2 that matches pictures with texts and answers nothing",
    "Blip2TextModelWithProjection": "the text half of a BLIP-2 that matches pictures with texts",
    "Blip2VisionModelWithProjection": "the picture half of a BLIP-2 that matches them with texts",
}
_MATCHING_HEADS = ("vision_projection.", "text_projection.", "itm_head.")

_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
_ADAPTER_NAME = re.compile(
    r"^base_model\.model\.|(^|\.)(lora_\w+|base_layer|modules_to_save|original_module"
    r"|ia3_l|hada_\w+|lokr_\w+|oft_\w+|boft_\w+|vera_\w+)(\.|$)"
)
_MERGE = "merge it with PEFT (merge_and_unload(), then save_pretrained()) and give that directory"

# bitsandbytes in 8 and 4 bits, GPTQ and AWQ, compressed-tensors and FP8.
_QUANTISED_NAME = re.compile(
    r"\.(SCB|weight_format|(nested_)?(absmax|quant_map)|quant_state\.\w+|qweight|qzeros|g_idx"
    r"|(weight|input)_scale(_inv)?|weight_(zero_point|packed|shape))$"
)
_COMPUTED_WITH = (".weight", ".bias", "query_tokens", "_embedding")
_PLAIN = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_DEQUANTISE = (
    "give the checkpoint it was made from, or what transformers' dequantize() and save_pretrained()"
    " make of it; opt/convert_checkpoint.py --use_weight_only quantises here"
)


def check_directory(directory: Path) -> None:
    """Refuse adapters, which transformers puts on and this suite does not.

    Raises:
        Blip2Error: an adapter lies in the directory, beside a whole model or alone.
    """
    for name in _ADAPTER_FILES:
        if (directory / name).is_file():
            raise Blip2Error(
                f"{directory} has an adapter ({name}) that is not merged into the weights",
                f"{_MERGE}",
            )


def check_config(path: Path, config: Mapping[str, Any]) -> None:
    """Refuse by config.json, found at `path`: other models, quantised ones, parts set apart.

    Raises:
        Blip2Error: it is not of a plain BLIP-2 with OPT, or OPT.
    """
    kind = config.get("model_type")
    if kind not in ("blip-2", "opt"):
        what = _MODELS.get(kind) if isinstance(kind, str) else None
        if what is not None:
            raise Blip2Error(f"{path} describes {what}", f"{_INSTEAD}")
        raise Blip2Error(
            f"{path} describes a model of type {kind!r}",
            "give a checkpoint of BLIP-2 (blip-2) or of OPT (opt)",
        )
    for name in _strings(config.get("architectures")):
        if name in _ARCHITECTURES:
            raise Blip2Error(f"{path} describes {name}, {_ARCHITECTURES[name]}", f"{_INSTEAD}")
    text = config.get("text_config")
    language = text.get("model_type", "opt") if isinstance(text, dict) else "opt"
    if kind == "blip-2" and language != "opt":
        raise Blip2Error(
            f"the language model in {path.parent} is {language}, not OPT", f"{_INSTEAD}"
        )
    for part, fields in _parts(config):
        if quantised := fields.get("quantization_config"):
            method = quantised.get("quant_method") if isinstance(quantised, dict) else None
            raise Blip2Error(f"{path.parent} is quantised ({method or part})", f"{_DEQUANTISE}")
        for key, meaning in (
            ("per_layer_config", "layers that differ from one another"),
            ("transformers_weights", "weights in a file of another name"),
        ):
            if fields.get(key):
                raise Blip2Error(
                    f"{path} asks for {meaning} ({key}), which this suite does not know",
                    "save the model without it",
                )


def check_tensors(path: Path, kind: str, dtypes: Mapping[str, torch.dtype]) -> None:
    """Refuse by the tensors' names and types what config.json may leave unsaid.

    Raises:
        Blip2Error: an adapter's weights among them, quantised ones, or a BLIP-2 that only matches.
    """
    for name, dtype in dtypes.items():
        if _ADAPTER_NAME.search(name):
            raise Blip2Error(
                f"{path} has an adapter's weights ({name}), not merged into the model's",
                f"{_MERGE}",
            )
        if _QUANTISED_NAME.search(name):
            raise Blip2Error(f"{path} is quantised (it has {name})", f"{_DEQUANTISE}")
        if name.endswith(_COMPUTED_WITH) and dtype not in _PLAIN:
            stored = str(dtype).removeprefix("torch.")
            raise Blip2Error(f"{path} is quantised ({name} is {stored})", f"{_DEQUANTISE}")
    if kind == "blip-2" and "language_projection.weight" not in dtypes:
        heads = [name for name in dtypes if name.startswith(_MATCHING_HEADS)]
        if heads:
            what = _ARCHITECTURES["Blip2ForImageTextRetrieval"]
            raise Blip2Error(f"{path} is {what} (it has {heads[0]})", f"{_INSTEAD}")


def _parts(config: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    yield "quantization_config", config
    for name in ("vision_config", "qformer_config", "text_config"):
        if isinstance(config.get(name), dict):
            yield name, config[name]


def _strings(values: Any) -> list[str]:
    return [v for v in values if isinstance(v, str)] if isinstance(values, list) else []
