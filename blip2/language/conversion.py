"""Hugging Face's OPT, alone or inside a BLIP-2, into TensorRT-LLM's checkpoint format.

Tensors are read, cut or rounded to FP8, and written one after the other: memory holds little more
than the largest.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path

import torch

from blip2 import artifacts
from blip2.artifacts.safetensors_writer import SafetensorsWriter
from blip2.artifacts.tensor_files import Stored, mapped
from blip2.checkpoints import Checkpoint, OPTConfig
from blip2.errors import Blip2Error
from blip2.float8 import DTYPE as FLOAT8
from blip2.float8 import quantise
from blip2.language.trtllm_format import (
    DTYPES,
    INPUTS_MULTIPLE,
    SCALES,
    OPTCheckpointConfig,
    Spec,
    is_description,
    scales_of,
    tensor_specs,
)

# BLIP-2's OPT; OPT alone as transformers names it now; OPT alone in files of 2022.
_DECODER_PREFIXES = ("language_model.model.decoder.", "model.decoder.", "decoder.")
_LAYER_SOURCES = {
    "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.dense": ("self_attn.out_proj",),
    "mlp.fc": ("fc1",),
    "mlp.proj": ("fc2",),
    "input_layernorm": ("self_attn_layer_norm",),
    "post_layernorm": ("final_layer_norm",),
}
_UNUSED_POSITIONS = 2
_FILES = ("config.json", "rank*.safetensors", "rank*.json")


@dataclasses.dataclass(frozen=True)
class ConversionOptions:
    """What the converted checkpoint should be like; names are those of the command line."""

    dtype: str = "float16"
    quant_algo: str | None = None
    tp_size: int = 1
    use_parallel_embedding: bool = False
    embedding_sharding_dim: int = 0


def target_config(checkpoint: Checkpoint, options: ConversionOptions) -> OPTCheckpointConfig:
    """The converted checkpoint's configuration, once it is clear that it can be made.

    Raises:
        Blip2Error: the format, the model or the number of ranks rules it out, or the checkpoint
            lacks a tensor or has one of another shape than its config.json says.
    """
    opt = OPTConfig.of(checkpoint)
    config = OPTCheckpointConfig(
        num_hidden_layers=opt.num_hidden_layers,
        num_attention_heads=opt.num_attention_heads,
        hidden_size=opt.hidden_size,
        vocab_size=opt.vocab_size,
        max_position_embeddings=opt.max_position_embeddings,
        hidden_act=opt.activation_function,
        do_layer_norm_before=opt.do_layer_norm_before,
        intermediate_size=0 if opt.ffn_dim == 4 * opt.hidden_size else opt.ffn_dim,
        **dataclasses.asdict(options),
    )
    _check_expressible(opt, checkpoint)
    if config.is_float8:
        _check_float8(opt, config)
    _check_splits(opt, config)
    Source(checkpoint, opt).check_shapes(dataclasses.replace(config, tp_size=1, quant_algo=None))
    return config


def convert(
    checkpoint: Checkpoint, config: OPTCheckpointConfig, output_dir: Path, workers: int = 1
) -> dict[str, float]:
    """Write config.json, and for each rank its tensors and a description of where they are from.

    `workers` threads each hold one tensor at a time. `output_dir` changes only at the end.

    Returns:
        How far each weight that was rounded to FP8 is off, by its name: |off| / |weight|.

    Raises:
        Blip2Error: a source tensor cannot be read or has values the target type cannot hold, or
            `output_dir` cannot be written.
    """
    source = Source(checkpoint, OPTConfig.of(checkpoint))
    specs = tensor_specs(config)
    layout = {n: (spec.dtype or DTYPES[config.dtype], spec.shape) for n, spec in specs.items()}
    errors: dict[str, float] = {}
    with artifacts.staging(output_dir, _FILES, is_ours=is_description) as stage:
        files = [stage / f"rank{rank}.safetensors" for rank in range(config.tp_size)]
        with contextlib.ExitStack() as stack:
            writers = [stack.enter_context(SafetensorsWriter(file, layout)) for file in files]

            def convert_one(name: str) -> None:
                if name.endswith(SCALES):  # written with its weight
                    return
                parts = source.parts(name)
                if specs[name].dtype == FLOAT8:
                    parts, scales, errors[name] = rounded_to_float8(parts)
                    _write(writers[0], scales_of(name), scales, checkpoint)
                for rank, writer in enumerate(writers):
                    cuts = [cut(part, specs[name], rank, config.tp_size) for part in parts]
                    _write(writer, name, cuts, checkpoint)

            with concurrent.futures.ThreadPoolExecutor(workers) as pool:
                for _ in pool.map(convert_one, specs):
                    pass
        for file in files:
            artifacts.write_sidecar(
                file,
                source={
                    "model": str(checkpoint.path),
                    "kind": checkpoint.kind,
                    "fingerprint": checkpoint.fingerprint,
                },
                dtype=config.dtype,
                quant_algo=config.quant_algo,
                **({"float8_errors": dict(sorted(errors.items()))} if errors else {}),
                versions={"torch": torch.__version__},
            )
        text = json.dumps(config.to_json(), indent=4)
        (stage / "config.json").write_text(text + "\n", encoding="utf-8")
    return errors


def rounded_to_float8(
    parts: list[torch.Tensor],
) -> tuple[list[torch.Tensor], list[torch.Tensor], float]:
    """Parts of a weight in E4M3, the scales of each one's channels, and |off| / |weight| of all."""
    values, scales, off, norm = [], [], 0.0, 0.0
    for part in parts:
        rounded, scale = quantise(part)
        values.append(rounded)
        scales.append(scale[:, 0])
        exact = part.float()
        off += float((rounded.float() * scale).sub_(exact).square_().sum())
        norm += float(exact.square().sum())
    return values, scales, math.sqrt(off / norm) if norm else 0.0


def cut(part: torch.Tensor, spec: Spec, rank: int, ranks: int) -> torch.Tensor:
    """One rank's share of a tensor, or of q, k or v, which are stacked afterwards."""
    if spec.split is None or ranks == 1:
        return part
    dim = spec.split
    total = part.shape[dim]
    size = -(-total // ranks)
    start, end = min(rank * size, total), min((rank + 1) * size, total)
    share = part.narrow(dim, start, end - start)
    if end - start == size:
        return share
    missing = list(part.shape)
    missing[dim] = size - (end - start)
    return torch.cat((share, part.new_zeros(missing)), dim)


def _write(
    writer: SafetensorsWriter, name: str, parts: list[torch.Tensor], checkpoint: Checkpoint
) -> None:
    try:
        writer.write(name, parts)
    except ValueError as error:
        raise Blip2Error(
            f"cannot convert {checkpoint.path}: {error}",
            "check the checkpoint, or try another `dtype`",
        ) from None


class Source:
    """The OPT in a checkpoint, by the names of the target's tensors."""

    def __init__(self, checkpoint: Checkpoint, opt: OPTConfig) -> None:
        self.checkpoint = checkpoint
        self.opt = opt
        found = (p for p in _DECODER_PREFIXES if f"{p}embed_positions.weight" in checkpoint)
        self.prefix = next(found, _DECODER_PREFIXES[checkpoint.kind == "opt"])
        self.projects = opt.word_embed_proj_dim != opt.hidden_size
        outside = self.prefix.removesuffix("model.decoder.").removesuffix("decoder.")
        self.embedding, self.head = f"{self.prefix}embed_tokens.weight", f"{outside}lm_head.weight"
        # As transformers 5: a head that is stored counts, even where it should be the embedding's
        # and is not; of tied ones either may be left out.
        if opt.tie_word_embeddings:
            if self.head not in checkpoint:
                self.head = self.embedding
            elif self.embedding not in checkpoint:
                self.embedding = self.head

    def parts(
        self, name: str, load: Callable[[Stored], torch.Tensor] = mapped
    ) -> list[torch.Tensor]:
        """A target tensor, whole; q, k and v apart from one another. For `load` see `Checkpoint`.

        Raises:
            Blip2Error: it cannot be read.
        """

        def read(source: str) -> torch.Tensor:
            return self.checkpoint.tensor(self.prefix + source, load)

        if name == "transformer.vocab_embedding.weight":
            embedding = self.checkpoint.tensor(self.embedding, load)
            if self.projects:
                embedding = embedding.float() @ read("project_in.weight").float().T
            return [embedding]
        if name == "transformer.position_embedding.weight":
            return [read("embed_positions.weight")[_UNUSED_POSITIONS:]]
        if name == "lm_head.weight":
            head = self.checkpoint.tensor(self.head, load)
            if self.projects:
                head = head.float() @ read("project_out.weight").float()
            return [head]
        return [read(source) for source in _decoder_names(name)]

    def check_shapes(self, config: OPTCheckpointConfig) -> None:
        """Compare every tensor's shape with the unsplit configuration, without reading any.

        Raises:
            Blip2Error: the first tensor that is missing or of another shape.
        """
        opt = self.opt
        embedding = (opt.vocab_size, opt.word_embed_proj_dim)
        expected = {
            self.embedding: embedding,
            f"{self.prefix}embed_positions.weight": (
                opt.max_position_embeddings + _UNUSED_POSITIONS,
                opt.hidden_size,
            ),
            self.head: embedding,
        }
        if self.projects:
            width, projected = opt.hidden_size, opt.word_embed_proj_dim
            expected[f"{self.prefix}project_in.weight"] = (width, projected)
            expected[f"{self.prefix}project_out.weight"] = (projected, width)
        for name, spec in tensor_specs(config).items():
            if name.startswith(("transformer.layers.", "transformer.ln_f.")):
                sources = _decoder_names(name)
                shape = (spec.shape[0] // len(sources), *spec.shape[1:])
                expected |= {f"{self.prefix}{source}": shape for source in sources}
        for name, shape in expected.items():
            stored = self.checkpoint.shape(name)
            if stored != shape:
                raise Blip2Error(
                    f"{name} in {self.checkpoint.path} has shape {list(stored)}, its"
                    f" config.json calls for {list(shape)}",
                    "download the checkpoint again",
                )


def _decoder_names(name: str) -> list[str]:
    """Hugging Face's names, below the decoder, of a tensor of a layer or of the last LayerNorm."""
    module, kind = name.removeprefix("transformer.").rsplit(".", 1)
    if module == "ln_f":
        return [f"final_layer_norm.{kind}"]
    _, index, module = module.split(".", 2)
    return [f"layers.{index}.{source}.{kind}" for source in _LAYER_SOURCES[module]]


def _check_expressible(opt: OPTConfig, checkpoint: Checkpoint) -> None:
    missing = [
        what
        for what, present in (
            ("biases", opt.enable_bias),
            ("LayerNorm weights", opt.layer_norm_elementwise_affine),
            ("last LayerNorm", opt.has_final_layer_norm or not opt.do_layer_norm_before),
        )
        if not present
    ]
    if missing:
        raise Blip2Error(
            f"the OPT in {checkpoint.path} has no {missing[0]}, which TensorRT-LLM's format"
            " cannot express",
            "use an OPT as facebook or Salesforce publish it",
        )


def _check_splits(opt: OPTConfig, config: OPTCheckpointConfig) -> None:
    """Raise Blip2Error where the ranks or the quantisation do not fit the model."""
    ranks = config.tp_size
    sizes = {
        "num_attention_heads": opt.num_attention_heads,
        "hidden_size": opt.hidden_size,
        "ffn_dim": opt.ffn_dim,
    }
    for name, size in sizes.items():
        if size % ranks:
            raise Blip2Error(
                f"`tp_size` {ranks} does not divide this model's {name} of {size}",
                "choose one that does",
            )
    if config.use_parallel_embedding and opt.word_embed_proj_dim != opt.hidden_size:
        raise Blip2Error(
            "this model projects its embeddings, which TensorRT-LLM cannot split",
            "leave out `use_parallel_embedding`",
        )
    if config.quant_algo is None:
        return
    flag = "quantization" if config.is_float8 else "use_weight_only"
    if config.dtype == "float32":
        raise Blip2Error(
            f"`{flag}` goes with float16 and bfloat16: TensorRT-LLM quantises no float32",
            "give another `dtype`",
        )
    for name in ("hidden_size", "ffn_dim"):
        if sizes[name] % (INPUTS_MULTIPLE * ranks):
            raise Blip2Error(
                f"`{flag}` needs a {name} that is a multiple of {INPUTS_MULTIPLE} x tp_size ="
                f" {INPUTS_MULTIPLE * ranks}, this model's is {sizes[name]}",
                "leave it out or lower `tp_size`",
            )


def _check_float8(opt: OPTConfig, config: OPTCheckpointConfig) -> None:
    """Raise Blip2Error for an OPT that nothing would run in FP8."""
    if config.tp_size != 1:
        raise Blip2Error(
            f"`quantization` fp8 goes with one GPU, `tp_size` is {config.tp_size}", "leave one out"
        )
    if opt.activation_function != "relu" or not opt.do_layer_norm_before:
        raise Blip2Error(
            "`quantization` fp8 takes an OPT with ReLU, whose layers normalise first",
            "leave it out",
        )
