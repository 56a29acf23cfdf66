"""Read a TensorRT-LLM checkpoint of OPT into weights that are ready to compute with."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from blip2 import artifacts, memory
from blip2.artifacts import UserError
from blip2.language.native.linear import Linear
from blip2.language.trtllm_format import MADE_BY, QUANT_BITS, OPTCheckpointConfig, tensor_specs

WEIGHTS_FILE = "rank0.safetensors"

_HEAD_BITS = 8

Placer = Callable[[torch.Tensor], torch.Tensor]
Packer = Callable[[torch.Tensor, "torch.Tensor | None", "int | None"], Linear]


@dataclasses.dataclass(frozen=True)
class Norm:
    """A LayerNorm's weight and bias, each of shape hidden_size."""

    weight: torch.Tensor
    bias: torch.Tensor


@dataclasses.dataclass(frozen=True)
class Layer:
    """One decoder layer; q, k and v are one linear layer."""

    input_norm: Norm
    qkv: Linear
    dense: Linear
    post_norm: Norm
    fc: Linear
    proj: Linear


@dataclasses.dataclass(frozen=True)
class OPTWeights:
    """Embeddings (vocab_size x hidden_size, max_position_embeddings x hidden_size) and layers.

    `final_norm` is None where the layers normalise after themselves.
    """

    embedding: torch.Tensor
    positions: torch.Tensor
    layers: tuple[Layer, ...]
    final_norm: Norm | None
    head: Linear


def read_config(directory: Path) -> OPTCheckpointConfig:
    """Read config.json.

    Raises:
        UserError: missing, unreadable, not of an OPT, or of a checkpoint split over several GPUs.
    """
    path = directory / "config.json"
    config = OPTCheckpointConfig.from_json(artifacts.read_json(path, MADE_BY), path)
    if config.tp_size != 1:
        raise UserError(
            f"{directory} is split over {config.tp_size} GPUs, the native session runs on one;"
            f" make it again with: {MADE_BY} --tp_size 1"
        )
    return config


def load_weights(
    directory: Path,
    config: OPTCheckpointConfig,
    place: Placer,
    pack: Packer,
    place_embedding: Placer | None = None,
    at_once: int = 1,
) -> OPTWeights:
    """Read the weights tensor by tensor, quantising the layers' linears as the configuration says.

    Where the layers have 8 or 4 bits the head gets 8: it is a tenth to a sixth of what a step
    reads, and its rounding is less than theirs.

    Args:
        directory: holds the checkpoint.
        config: its configuration.
        place: moves a tensor to the device and type that the model computes in.
        pack: makes a linear layer of a weight (out x in), a bias (out) and a number of bits, or of
            None bits for the checkpoint's own precision.
        place_embedding: moves the table of words, if otherwise than `place`.
        at_once: layers that are read and packed side by side, each with a weight beside its packed
            one in memory.

    Raises:
        UserError: file missing, truncated, of another size than its description says, with
            missing, extra or wrongly shaped tensors, or with NaN or Inf in one.
    """
    path = directory / WEIGHTS_FILE
    if artifacts.sidecar_path(path).exists():  # TensorRT-LLM's own converter writes none.
        artifacts.read_sidecar(path, MADE_BY)
    try:
        _check_shapes(path, config)
        read = functools.partial(_read, path)
        return _build(config, read, place, pack, place_embedding or place, at_once)
    except (OSError, SafetensorError) as error:
        if memory.exhausted(error):
            raise
        raise UserError(
            f"cannot read {path}: {error}; it is missing, truncated or damaged: make it again with:"
            f" {MADE_BY}"
        ) from None


def _check_shapes(path: Path, config: OPTCheckpointConfig) -> None:
    with safe_open(path, framework="pt") as file:
        stored = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    expected = {name: spec.shape for name, spec in tensor_specs(config).items()}
    for name in sorted(stored.keys() | expected.keys()):
        if stored.get(name) != expected.get(name):
            has = f"shape {list(stored[name])}" if name in stored else "nothing"
            wants = f"shape {list(expected[name])}" if name in expected else "no such tensor"
            raise UserError(
                f"{path} has {has} as {name}, its config.json calls for {wants}; make it again"
                f" with: {MADE_BY}"
            )


def _read(path: Path, name: str) -> torch.Tensor:
    # Opened anew for each tensor: the file is mapped as long as a tensor of it lives, and what was
    # read of it would stay in memory beside what is made of it.
    with safe_open(path, framework="pt") as file:
        tensor = file.get_tensor(name)
    if not torch.isfinite(torch.stack(torch.aminmax(tensor))).all():
        raise UserError(f"{path} has NaN or Inf in {name}; make it again with: {MADE_BY}")
    return tensor


def _build(
    config: OPTCheckpointConfig,
    read: Callable[[str], torch.Tensor],
    place: Placer,
    pack: Packer,
    place_embedding: Placer,
    at_once: int,
) -> OPTWeights:
    bits = QUANT_BITS[config.quant_algo]

    def linear(name: str) -> Linear:
        return pack(read(f"{name}.weight"), read(f"{name}.bias"), bits)

    def norm(name: str) -> Norm:
        return Norm(place(read(f"{name}.weight")), place(read(f"{name}.bias")))

    def layer(index: int) -> Layer:
        prefix = f"transformer.layers.{index}"
        return Layer(
            input_norm=norm(f"{prefix}.input_layernorm"),
            qkv=linear(f"{prefix}.attention.qkv"),
            dense=linear(f"{prefix}.attention.dense"),
            post_norm=norm(f"{prefix}.post_layernorm"),
            fc=linear(f"{prefix}.mlp.fc"),
            proj=linear(f"{prefix}.mlp.proj"),
        )

    embedding, head = read("transformer.vocab_embedding.weight"), read("lm_head.weight")
    # The format stores the tied head twice; memory need not.
    tied = torch.equal(embedding, head)
    embedding = place_embedding(embedding)
    # Before the layers, while there is room for what packing the largest weight takes besides.
    head = pack(embedding if tied else head, None, None if bits is None else _HEAD_BITS)
    with ThreadPoolExecutor(at_once) as pool:
        layers = tuple(pool.map(layer, range(config.num_hidden_layers)))
    return OPTWeights(
        embedding=embedding,
        positions=place(read("transformer.position_embedding.weight")),
        layers=layers,
        final_norm=norm("transformer.ln_f") if config.do_layer_norm_before else None,
        head=head,
    )
