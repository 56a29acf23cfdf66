"""Read a checkpoint of OPT into weights that are ready to compute with."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError

from blip2 import artifacts, memory
from blip2.artifacts.tensor_files import FiniteChecks, Loader, UnknownType, read_header
from blip2.checkpoints import OPTConfig, open_checkpoint
from blip2.errors import Blip2Error
from blip2.float8 import DTYPE as FLOAT8
from blip2.float8 import quantise
from blip2.language.conversion import ConversionOptions, Source, target_config
from blip2.language.native.linear import Linear
from blip2.language.trtllm_format import (
    PRECISIONS,
    QUANT_BITS,
    OPTCheckpointConfig,
    scales_of,
    tensor_specs,
)
from blip2.layout import CONVERT, OPT_WEIGHTS

_HEAD_BITS = 8

Placer = Callable[[torch.Tensor], torch.Tensor]
Packer = Callable[..., Linear]  # see load_weights


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

    def linears(self) -> Iterator[Linear]:
        """The layers' linears, and the head."""
        for layer in self.layers:
            yield from (layer.qkv, layer.dense, layer.fc, layer.proj)
        yield self.head


class OPTTensors(Protocol):
    """An OPT's tensors by TensorRT-LLM's names, however a checkpoint has them.

    Opening one reads descriptions, and raises Blip2Error where a tensor is missing or has another
    shape than the configuration says.
    """

    config: OPTCheckpointConfig
    where: Path
    mend: str  # what to do about a damaged one

    def read(self, name: str, load: Loader) -> torch.Tensor:
        """One tensor, where `load` brings it.

        Raises:
            Blip2Error: it cannot be read.
        """


class TRTLLMTensors:
    """Those of a TensorRT-LLM checkpoint for one GPU."""

    mend = f"make it again with: {CONVERT}"

    def __init__(self, directory: Path) -> None:
        """Read config.json, and which tensors there are.

        Raises:
            Blip2Error: a file is missing, unreadable, truncated or of another size than its
                description says; it is no OPT, or split over several GPUs; tensors are missing,
                extra or wrongly shaped.
        """
        self.config = read_config(directory)
        self.where = directory / OPT_WEIGHTS
        if artifacts.sidecar_path(self.where).exists():  # TensorRT-LLM's own converter writes none.
            artifacts.read_sidecar(self.where, CONVERT)
        try:
            self._stored = read_header(self.where)
        except (OSError, SafetensorError, UnknownType) as error:
            if memory.exhausted(error):
                raise
            raise self._unreadable(error) from None
        self._check_shapes()

    def _check_shapes(self) -> None:
        for name, spec in tensor_specs(self.config).items():
            found = self._stored.get(name)
            if found is not None and spec.dtype not in (None, found.dtype):
                raise Blip2Error(
                    f"{self.where} has {name} in {_kind(found.dtype)}, its config.json calls for"
                    f" {_kind(spec.dtype)}",
                    f"{self.mend}",
                )
        stored = {name: tensor.shape for name, tensor in self._stored.items()}
        expected = {name: spec.shape for name, spec in tensor_specs(self.config).items()}
        for name in sorted(stored.keys() | expected.keys()):
            if stored.get(name) != expected.get(name):
                has = f"shape {list(stored[name])}" if name in stored else "nothing"
                wants = f"shape {list(expected[name])}" if name in expected else "no such tensor"
                raise Blip2Error(
                    f"{self.where} has {has} as {name}, its config.json calls for {wants}",
                    f"{self.mend}",
                )

    def read(self, name: str, load: Loader) -> torch.Tensor:
        try:
            return load(self._stored[name])
        except (OSError, ValueError) as error:
            if memory.exhausted(error):
                raise
            raise self._unreadable(error) from None

    def _unreadable(self, error: Exception) -> Blip2Error:
        return Blip2Error(
            f"cannot read {self.where}: {error}",
            f"it is missing, truncated or damaged: {self.mend}",
        )


class CheckpointTensors:
    """Those of a BLIP-2 or OPT as Hugging Face has it, as a conversion would write them."""

    def __init__(self, directory: Path, quant_algo: str | None = None) -> None:
        """Read the configuration, and which tensors there are.

        Raises:
            Blip2Error: as `open_checkpoint` and `target_config`.
        """
        checkpoint = open_checkpoint(directory)
        self.config = target_config(checkpoint, ConversionOptions(quant_algo=quant_algo))
        self.where, self.mend = checkpoint.path, checkpoint.mend
        self._source = Source(checkpoint, OPTConfig.of(checkpoint))
        self._specs = tensor_specs(self.config)
        self._scales: dict[str, torch.Tensor] = {}  # of weights that were read, until they are too

    def read(self, name: str, load: Loader) -> torch.Tensor:
        """As the protocol says; scales only once their weight was read."""
        if name in self._scales:
            return self._scales.pop(name)
        parts = self._source.parts(name, load)
        weight = parts[0] if len(parts) == 1 else torch.cat(parts)  # of one it would be a copy
        weight = weight.to(self.config.torch_dtype)
        if self._specs[name].dtype != FLOAT8:
            return weight
        values, scales = quantise(weight)
        self._scales[scales_of(name)] = scales[:, 0]
        return values


def open_tensors(directory: Path, precision: str | None = None) -> OPTTensors:
    """The OPT in a directory: of a TensorRT-LLM checkpoint, or of Hugging Face's.

    Args:
        directory: of the checkpoint.
        precision: one of PRECISIONS; None is what the checkpoint has, float16 of Hugging Face's.

    Raises:
        Blip2Error: as the two classes; or a TensorRT-LLM checkpoint has another precision.
    """
    if precision is not None and precision not in PRECISIONS:
        raise Blip2Error(f"`precision` is {precision!r}", f"give one of {', '.join(PRECISIONS)}")
    quant_algo = None if precision is None else PRECISIONS[precision]
    if not (directory / OPT_WEIGHTS).is_file():
        return CheckpointTensors(directory, quant_algo)
    tensors = TRTLLMTensors(directory)
    if precision is not None and tensors.config.quant_algo != quant_algo:
        raise Blip2Error(
            f"{directory} was not converted to {precision}",
            "leave out `precision`, or give the checkpoint that it was converted from",
        )
    return tensors


def read_config(directory: Path) -> OPTCheckpointConfig:
    """Read config.json.

    Raises:
        Blip2Error: missing, unreadable, not of an OPT, or of a checkpoint split over several GPUs.
    """
    path = directory / "config.json"
    config = OPTCheckpointConfig.from_json(artifacts.read_json(path, CONVERT), path)
    if config.tp_size != 1:
        raise Blip2Error(
            f"{directory} is split over {config.tp_size} GPUs, the native session runs on one",
            f"make it again with: {CONVERT} --tp_size 1",
        )
    return config


def load_weights(
    tensors: OPTTensors,
    device: torch.device,
    place: Placer,
    pack: Packer,
    place_embedding: Placer | None = None,
    dtype: torch.dtype | None = None,
    *,
    rounds: bool = False,
) -> OPTWeights:
    """Read the weights tensor by tensor, quantising the layers' linears as the configuration says.

    Where the layers are in INT8 or INT4 the head gets 8 bits: it is a tenth to a sixth of what a step
    reads, and its rounding is less than theirs.

    Args:
        tensors: the checkpoint's.
        device: they are brought to it as they are stored, in several threads.
        place: converts a tensor to the type that the model computes in.
        pack: makes a linear layer of a weight (out x in), a bias (out) and a number of bits, or of
            None bits for the checkpoint's own precision; of a weight in FP8 its scales (out) come
            behind them.
        place_embedding: converts the table of words, if otherwise than `place`.
        dtype: the type that all must be finite in, if not their own.
        rounds: whether the layers' weights in float16 are rounded to bfloat16 while they are read.

    Raises:
        Blip2Error: a tensor cannot be read, or holds NaN or Inf.
    """
    load, checks = Loader(device), FiniteChecks(dtype)

    def read(name: str) -> torch.Tensor:
        return checks.add(name, tensors.read(name, load))

    def read_weight(name: str) -> torch.Tensor:
        weight = tensors.read(name, load)
        keep = checks.add_rounded if rounds and weight.dtype == torch.float16 else checks.add
        return keep(name, weight)

    place_embedding = place_embedding or place
    weights = _build(tensors.config, read, read_weight, place, pack, place_embedding, load)
    if (name := checks.first_not_finite()) is not None:
        kind = "" if dtype is None else f" in {_kind(dtype)}"
        raise Blip2Error(f"{tensors.where} has NaN or Inf in {name}{kind}", f"{tensors.mend}")
    return weights


def _build(
    config: OPTCheckpointConfig,
    read: Callable[[str], torch.Tensor],
    read_weight: Callable[[str], torch.Tensor],
    place: Placer,
    pack: Packer,
    place_embedding: Placer,
    load: Loader,
) -> OPTWeights:
    bits = QUANT_BITS[config.quant_algo]

    def linear(name: str) -> Linear:
        weight, bias = read_weight(f"{name}.weight"), read(f"{name}.bias")
        if config.is_float8:
            return pack(weight, bias, bits, read(scales_of(f"{name}.weight")))
        return pack(weight, bias, bits)

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
    tied = _are_same(embedding, head)
    embedding = place_embedding(embedding)
    # Before the layers, while there is room for what packing the largest weight takes besides.
    head_bits = None if bits is None or config.is_float8 else _HEAD_BITS
    head = pack(embedding if tied else head, None, head_bits)
    with load.pool() as pool:
        layers = tuple(pool.map(layer, range(config.num_hidden_layers)))
    return OPTWeights(
        embedding=embedding,
        positions=place(read("transformer.position_embedding.weight")),
        layers=layers,
        final_norm=norm("transformer.ln_f") if config.do_layer_norm_before else None,
        head=head,
    )


def _are_same(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Bit by bit, which of half precision on a CPU takes a quarter of the time."""
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    first, second = (tensor.contiguous().view(torch.int16) for tensor in (first, second))
    return torch.equal(first, second)


def _kind(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
