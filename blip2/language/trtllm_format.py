"""TensorRT-LLM's checkpoint format for OPT: which tensors, of which shapes, split how.

A directory holds config.json and one rank{r}.safetensors for each GPU. The converter writes it,
trtllm-build and the native session read it. Linear weights are [out, in]; position embeddings
lack OPT's two unused rows; weight-only quantisation is named in the config and done by the reader.
FP8 is done by the converter: E4M3 weights, and for each a `per_channel_scale` (float32, [out]) that a
channel's values are multiplied with.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from blip2.errors import Blip2Error
from blip2.float8 import DTYPE as FLOAT8
from blip2.layout import CONVERT

ARCHITECTURE = "OPTForCausalLM"
DTYPES = {"float16": torch.float16, "float32": torch.float32, "bfloat16": torch.bfloat16}
# Far above every model there is: what a damaged file says must not decide how long we compute.
_LARGEST_SIZE, _MOST_LAYERS = 1 << 24, 1000
FLOAT8_ALGO = "FP8_PER_CHANNEL_PER_TOKEN"
QUANT_BITS = {None: None, "W8A16": 8, "W4A16": 4, FLOAT8_ALGO: 8}
# Of weights, as Python calls them.
PRECISIONS = {"float16": None, "int8": "W8A16", "int4": "W4A16", "float8": FLOAT8_ALGO}
SCALES = ".per_channel_scale"  # the end of their names
INPUTS_MULTIPLE = 64  # of a quantised weight's inputs


@dataclasses.dataclass(frozen=True)
class OPTCheckpointConfig:
    """config.json of a TensorRT-LLM OPT checkpoint. `intermediate_size` 0 means 4 x hidden_size."""

    dtype: str
    num_hidden_layers: int
    num_attention_heads: int
    hidden_size: int
    vocab_size: int
    max_position_embeddings: int
    hidden_act: str = "relu"
    do_layer_norm_before: bool = True
    intermediate_size: int = 0
    quant_algo: str | None = None
    tp_size: int = 1
    use_parallel_embedding: bool = False
    embedding_sharding_dim: int = 0

    @property
    def torch_dtype(self) -> torch.dtype:
        """`dtype` as torch names it."""
        return DTYPES[self.dtype]

    @property
    def is_float8(self) -> bool:
        """Whether the layers' linears are in FP8."""
        return self.quant_algo == FLOAT8_ALGO

    @property
    def ffn_size(self) -> int:
        """Width of the layer between fc and proj."""
        return self.intermediate_size or 4 * self.hidden_size

    def to_json(self) -> dict[str, Any]:
        """The dictionary that config.json holds."""
        fields = {
            "architecture": ARCHITECTURE,
            "dtype": self.dtype,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "hidden_size": self.hidden_size,
            "vocab_size": self.vocab_size,
            "position_embedding_type": "learned_absolute",
            "max_position_embeddings": self.max_position_embeddings,
            "hidden_act": self.hidden_act,
            "quantization": {"quant_algo": self.quant_algo},
            "mapping": {"world_size": self.tp_size, "tp_size": self.tp_size, "pp_size": 1},
            "use_parallel_embedding": self.use_parallel_embedding,
            "embedding_sharding_dim": self.embedding_sharding_dim,
            "share_embedding_table": False,
            "do_layer_norm_before": self.do_layer_norm_before,
        }
        if self.intermediate_size:
            fields["intermediate_size"] = self.intermediate_size
        return fields

    @classmethod
    def from_json(cls, fields: dict[str, Any], path: Path) -> OPTCheckpointConfig:
        """Read what `to_json` or TensorRT-LLM's own converter wrote; `path` is for messages.

        Raises:
            Blip2Error: not an OPT checkpoint, or a value that is missing or makes no sense.
        """
        mapping, quantization = fields.get("mapping") or {}, fields.get("quantization") or {}
        for name, value in (("mapping", mapping), ("quantization", quantization)):
            if not isinstance(value, dict):
                raise _bad_config(path, f"{name} is {value!r}")
        values = {
            **fields,
            "tp_size": mapping.get("tp_size", 1),
            "quant_algo": quantization.get("quant_algo"),
            "intermediate_size": fields.get("intermediate_size") or 0,
        }
        known = {field.name: field for field in dataclasses.fields(cls)}
        try:
            config = cls(**{name: values[name] for name in known if name in values})
        except TypeError as error:
            raise _bad_config(path, str(error)) from None
        world_size = mapping.get("world_size", config.tp_size)
        sizes = ("num_hidden_layers", "num_attention_heads", "hidden_size", "vocab_size")
        checks = {
            "architecture": fields.get("architecture") == ARCHITECTURE,
            "dtype": config.dtype in list(DTYPES),
            "quantization": config.quant_algo in list(QUANT_BITS),
            "mapping": world_size == config.tp_size,
            **{name: _is_size(getattr(config, name)) for name in (*sizes, "tp_size")},
            "max_position_embeddings": _is_size(config.max_position_embeddings),
            "intermediate_size": config.intermediate_size == 0
            or _is_size(config.intermediate_size),
            "hidden_act": isinstance(config.hidden_act, str),
            "do_layer_norm_before": isinstance(config.do_layer_norm_before, bool),
        }
        for name, valid in checks.items():
            if not valid:
                raise _bad_config(path, f"{name} is {fields.get(name)!r}")
        if config.num_hidden_layers > _MOST_LAYERS:
            raise _bad_config(path, f"num_hidden_layers is {config.num_hidden_layers}")
        if config.hidden_size % config.num_attention_heads:
            raise _bad_config(path, "hidden_size is no multiple of num_attention_heads")
        return config


def is_description(path: Path) -> bool:
    """Whether this is the config.json of a TensorRT-LLM checkpoint, not that of a model or engine."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        return fields["architecture"] == ARCHITECTURE and "mapping" in fields
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return False


def _is_size(value: object) -> bool:
    return type(value) is int and 1 <= value <= _LARGEST_SIZE


def _bad_config(path: Path, what: str) -> Blip2Error:
    return Blip2Error(f"in {path}, {what}", f"make a checkpoint of OPT with: {CONVERT}")


@dataclasses.dataclass(frozen=True)
class Spec:
    """A tensor's shape on one rank, and how it is cut from the whole.

    `split` is the dimension that is cut, padded with zeros where it does not divide, or None where
    every rank has the whole. q, k and v are cut one by one and stacked afterwards. Checkpoints in FP8
    are not split.
    """

    shape: tuple[int, ...]
    split: int | None = None
    dtype: torch.dtype | None = None  # where it is not the checkpoint's


def tensor_specs(config: OPTCheckpointConfig) -> dict[str, Spec]:
    """Every tensor of one rank's file, in the file's order."""
    ranks, hidden, ffn = config.tp_size, config.hidden_size, config.ffn_size
    embedding_split = config.embedding_sharding_dim if config.use_parallel_embedding else None
    specs = {
        "transformer.vocab_embedding.weight": Spec((config.vocab_size, hidden), embedding_split),
        "transformer.position_embedding.weight": Spec(
            (config.max_position_embeddings, hidden), embedding_split
        ),
    }
    layer = {
        "attention.qkv.weight": Spec((3 * hidden, hidden), 0),
        "attention.qkv.bias": Spec((3 * hidden,), 0),
        "attention.dense.weight": Spec((hidden, hidden), 1),
        "attention.dense.bias": Spec((hidden,)),
        "mlp.fc.weight": Spec((ffn, hidden), 0),
        "mlp.fc.bias": Spec((ffn,), 0),
        "mlp.proj.weight": Spec((hidden, ffn), 1),
        "mlp.proj.bias": Spec((hidden,)),
        "input_layernorm.weight": Spec((hidden,)),
        "input_layernorm.bias": Spec((hidden,)),
        "post_layernorm.weight": Spec((hidden,)),
        "post_layernorm.bias": Spec((hidden,)),
    }
    if config.is_float8:
        layer = _in_float8(layer)
    for index in range(config.num_hidden_layers):
        specs |= {f"transformer.layers.{index}.{name}": spec for name, spec in layer.items()}
    if config.do_layer_norm_before:
        specs["transformer.ln_f.weight"] = specs["transformer.ln_f.bias"] = Spec((hidden,))
    specs["lm_head.weight"] = Spec((config.vocab_size, hidden), 0)
    return {name: _on_one_rank(spec, ranks) for name, spec in specs.items()}


def _in_float8(layer: dict[str, Spec]) -> dict[str, Spec]:
    """A layer's tensors, with each linear's weight in E4M3 and its scales behind it."""
    specs = {}
    for name, spec in layer.items():
        specs[name] = spec
        if len(spec.shape) == 2:
            specs[name] = dataclasses.replace(spec, dtype=FLOAT8)
            specs[scales_of(name)] = Spec(spec.shape[:1], dtype=torch.float32)
    return specs


def scales_of(name: str) -> str:
    """The name of the scales of a weight in FP8."""
    return name.removesuffix(".weight") + SCALES


def _on_one_rank(spec: Spec, ranks: int) -> Spec:
    if spec.split is None:
        return spec
    shape = list(spec.shape)
    shape[spec.split] = -(-shape[spec.split] // ranks)
    return dataclasses.replace(spec, shape=tuple(shape))
