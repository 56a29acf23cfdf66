"""The files of onnx_export.py, and which engine they call for.

    onnx/visual_encoder/visual_encoder.onnx   .onnx.data   .json
    onnx/Qformer/Qformer.onnx                 .onnx.data   .json
    query_tokens.pt                                        .json

Each graph's sidecar tells its tensors, the network's configuration, and where each weight lies, by
Hugging Face's names. So a GPU runs the weights with kernels of its own, and needs no reader of ONNX;
ONNX Runtime runs the graphs on a CPU.
"""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import torch

from blip2 import artifacts
from blip2.artifacts.tensor_files import ScaledTensor, Stored, StoredTensor
from blip2.checkpoints import Checkpoint
from blip2.devices import best_device, describe, half_dtype, has_float8
from blip2.errors import Blip2Error
from blip2.images import Preprocessing
from blip2.layout import EXPORT, QFORMER_ONNX, VIT_ONNX
from blip2.vision.session import VisionSession

# What checkpoints put before the names of the networks' own parameters.
VIT_PREFIX, QFORMER_PREFIX = "vision_model.", ""
DTYPES = {"float16": torch.float16, "float32": torch.float32}
_WEIGHT_DTYPES = DTYPES | {"float8_e4m3fn": torch.float8_e4m3fn, "int8": torch.int8}


@dataclasses.dataclass(frozen=True)
class OnnxFiles:
    """An export's files, each with what its sidecar says; no weights are read yet."""

    vit: Path
    qformer: Path
    query_tokens: Path
    vit_facts: dict[str, Any]
    qformer_facts: dict[str, Any]
    dtype: torch.dtype
    compute_dtype: str
    preprocessing: Preprocessing

    @classmethod
    def open(cls, engine_dir: Path, query_tokens: Path) -> OnnxFiles:
        """Read the descriptions of the graphs in `engine_dir` and of the query tokens.

        Raises:
            Blip2Error: a file is missing, truncated, or from another checkpoint than the others.
        """
        vit, qformer = engine_dir / VIT_ONNX, engine_dir / QFORMER_ONNX
        facts = {path: read_graph_sidecar(path) for path in (vit, qformer)}
        facts[query_tokens] = artifacts.read_sidecar(query_tokens, EXPORT)
        artifacts.same_source(EXPORT, facts)
        with artifacts.reading_sidecar(vit, EXPORT):
            return cls(
                *(vit, qformer, query_tokens, facts[vit], facts[qformer]),
                DTYPES[facts[vit]["dtype"]],
                facts[vit]["compute_dtype"],
                Preprocessing.from_dict(facts[vit]["preprocessing"]),
            )

    @property
    def has_weights(self) -> bool:
        """Whether the sidecars say where weights lie, as those of old exports do not."""
        return "weights" in self.vit_facts and "weights" in self.qformer_facts

    def load_query_tokens(self) -> torch.Tensor:
        """1 x n x H_q."""
        return artifacts.load_tensor(self.query_tokens, EXPORT)

    def checkpoint(self) -> Checkpoint:
        """The weights as those of a BLIP-2 checkpoint without its OPT.

        Raises:
            Blip2Error: a sidecar does not say where they lie, as those of old exports.
        """
        tensors: dict[str, Stored] = {"query_tokens": self.load_query_tokens()}
        config: dict[str, Any] = {"model_type": "blip-2"}
        for path, facts, name, prefix in (
            (self.vit, self.vit_facts, "vision_config", VIT_PREFIX),
            (self.qformer, self.qformer_facts, "qformer_config", QFORMER_PREFIX),
        ):
            with artifacts.reading_sidecar(path, EXPORT):
                config[name] = facts[name]
                tensors |= _stored_weights(path, facts["weights"], prefix)
        config["num_query_tokens"] = tensors["query_tokens"].shape[1]
        return Checkpoint(
            self.vit.parent.parent,
            config,
            tensors,
            opt_location=None,
            mend=f"make it again with: {EXPORT}",
        )


def _stored_weights(path: Path, weights: dict[str, Any], prefix: str) -> dict[str, Stored]:
    """Where a sidecar says that a graph's weights lie.

    Raises:
        LookupError, TypeError, ValueError: it says nothing that can be.
    """
    stored = {
        prefix + name: StoredTensor(
            path.parent / facts["file"],
            facts["offset"],
            _WEIGHT_DTYPES[facts["dtype"]],
            tuple(facts["shape"]),
            facts["transposed"],
        )
        for name, facts in weights.items()
    }
    files = {path, artifacts.data_path(path)}
    sizes = {file: file.stat().st_size for file in files}
    # Two weights may be the same bytes, if they are equal; otherwise none lies within another.
    places = sorted({(str(s.file), s.offset, s.offset + s.nbytes) for s in stored.values()})
    for (file, start, end), (other, next_start, _) in itertools.pairwise([*places, ("", 0, 0)]):
        if start < 0 or end > sizes[Path(file)] or (file == other and next_start < end):
            raise ValueError(f"no weight lies at bytes {start} to {end} of {file}")
    return _with_scales(stored)


def _with_scales(stored: dict[str, StoredTensor]) -> dict[str, Stored]:
    """Integers of linear layers, which lie in x out, and their scales as the weights out x in."""
    result: dict[str, Stored] = {**stored}
    for name, values in stored.items():
        if name.endswith(".values"):
            layer = name.removesuffix("values")
            turned = dataclasses.replace(
                values, shape=values.shape[::-1], transposed=not values.transposed
            )
            del result[name]
            result[f"{layer}weight"] = ScaledTensor(turned, result.pop(f"{layer}scales"))
    return result


def read_graph_sidecar(path: Path) -> dict[str, Any]:
    """The sidecar of an exported graph, once graph and weights are there in their full size.

    Raises:
        Blip2Error: a file is missing or truncated.
    """
    facts = artifacts.read_sidecar(path, EXPORT)
    artifacts.check_size(artifacts.data_path(path), facts.get("data"), EXPORT)
    return facts


def open_onnx_session(engine_dir: Path, query_tokens: Path) -> VisionSession:
    """Open an export with what runs it best here.

    On a GPU kernels of our own; on a CPU ONNX Runtime, but where bfloat16 is faster PyTorch in that,
    on files in float16 or INT8. A ViT in INT8 is made for CPUs, and runs there on every machine.

    Raises:
        Blip2Error: a file is missing, damaged, or does not fit the others; or the ViT is in FP8,
            and the device has none.
    """
    files, device = OnnxFiles.open(engine_dir, query_tokens), best_device()
    if files.compute_dtype == "float8" and not has_float8(device):
        raise Blip2Error(
            f"{files.vit} is in FP8, which {describe(device)} has not: NVIDIA GPUs have it from"
            " compute capability 8.9 on",
            f"export again with: {EXPORT} --dtype float16",
        )
    is_narrow = files.dtype == torch.float16 or files.compute_dtype == "int8"
    dtype = half_dtype(device) if is_narrow else files.dtype
    if device.type == "cuda":
        is_torchs = files.compute_dtype != "int8"
    else:
        is_torchs = dtype == torch.bfloat16 and files.has_weights
    if is_torchs:
        from blip2.vision.torch_session import TorchSession

        return TorchSession(files.checkpoint(), files.preprocessing, dtype, device)
    from blip2.vision.onnx_runtime import OnnxRuntimeSession

    return OnnxRuntimeSession(files)
