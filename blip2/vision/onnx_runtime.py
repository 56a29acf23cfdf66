"""The ViT and Q-Former on ONNX Runtime, from the files of onnx_export.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from blip2 import artifacts, memory, onnx_sessions
from blip2.errors import Blip2Error, first_line
from blip2.layout import EXPORT
from blip2.vision import int8
from blip2.vision.onnx_files import OnnxFiles
from blip2.vision.session import VisionSession

_ELEMENTS = {"float16": "float16", "float32": "float", "int64": "int64"}  # ONNX Runtime's names

Tensors = dict[str, tuple[str, tuple[int | str, ...]]]  # the batch is a word


class OnnxRuntimeSession(VisionSession):
    """Runs on the CPU; inputs and outputs share memory with torch, nothing is copied between."""

    def __init__(self, files: OnnxFiles) -> None:
        """For an export whose files belong together, of which only descriptions are read yet.

        Raises:
            Blip2Error: the files do not fit one another.
        """
        self.device = torch.device("cpu")
        self.dtype, self.preprocessing = files.dtype, files.preprocessing
        sizes = (self.preprocessing.height, self.preprocessing.width)
        self._files = files
        self._vit_tensors = _described_tensors(files.vit, files.vit_facts)
        self._qformer_tensors = _described_tensors(files.qformer, files.qformer_facts)
        with artifacts.reading_sidecar(files.vit, EXPORT):
            pictures, image_embeds = (self._vit_tensors[name] for name in ("input", "output"))
        with artifacts.reading_sidecar(files.qformer, EXPORT):
            seen = self._qformer_tensors["image_embeds"]
            query_tokens = self._qformer_tensors["query_tokens"][1][1:]
            self.output_size = self._qformer_tensors["query_output"][1][2]
        if pictures[1][1:] != (3, *sizes) or (image_embeds[0], image_embeds[1][1:]) != (
            seen[0],
            seen[1][1:],
        ):
            raise Blip2Error(
                f"{files.vit} and {files.qformer} do not fit one another",
                f"make both again with: {EXPORT}",
            )
        tokens = files.load_query_tokens()
        if tuple(tokens.shape) != (1, *query_tokens):
            raise Blip2Error(
                f"{files.query_tokens} has shape {tuple(tokens.shape)}, {files.qformer} takes"
                f" {(1, *query_tokens)}",
                f"make both again with: {EXPORT}",
            )
        self._query_tokens = tokens.to(self.dtype)
        self.num_query_tokens = tokens.shape[1]
        self._vit_graph = self._qformer_graph = None

    def load(self) -> None:
        """Open the graphs; a second call does nothing.

        Raises:
            Blip2Error: ONNX Runtime cannot read one, or it is not what its sidecar says.
        """
        if self._qformer_graph is not None:
            return
        is_int8 = self._files.compute_dtype == "int8"
        self._vit_graph = open_graph(self._files.vit, is_int8=is_int8)
        _check_graph(self._files.vit, self._vit_graph, self._vit_tensors)
        qformer = open_graph(self._files.qformer)
        _check_graph(self._files.qformer, qformer, self._qformer_tensors)
        self._qformer_graph = qformer

    def _vit(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return run_graph(self._vit_graph, {"input": pixel_values})

    def _qformer(self, image_embeds: torch.Tensor) -> torch.Tensor:
        batch, patches, _ = image_embeds.shape
        return run_graph(
            self._qformer_graph,
            {
                "query_tokens": self._query_tokens.expand(batch, -1, -1),
                "image_embeds": image_embeds,
                "image_atts": torch.ones(batch, patches, dtype=torch.int64),
            },
        )


def open_graph(path: Path, *, is_int8: bool = False, optimise: bool = True):
    """An ONNX Runtime session on the CPU.

    Of a graph that `is_int8` the weights are brought to 7 bits where sums of 8 saturate.

    `optimise=False` keeps fp16 weights in fp16: folding their conversions to the float32 that the
    CPU computes in would triple the memory, which matters more than speed when only checking.

    Raises:
        Blip2Error: ONNX Runtime cannot read the file or its data file.
    """
    import onnxruntime

    # Its threads must not go on waiting actively while torch needs the cores for the OPT. Forbidding
    # them that within a run as well would cost ViT-g 6 %.
    options = onnx_sessions.session_options("work")
    if not optimise:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        # Each weight is converted just before its use; the default order converts all of them first.
        options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
    try:
        with memory.needed(
            f"to open {path}", "close other programs, or export with --dtype float16"
        ):
            if is_int8 and int8.saturates():
                return _session_of_7_bits(path, options)
            return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Blip2Error:
        raise
    except Exception as error:  # its exception classes share no public base
        raise Blip2Error(
            f"cannot open {path}: {first_line(error)}", f"make it again with: {EXPORT}"
        ) from None


def _session_of_7_bits(path: Path, options):
    import onnxruntime

    graph, weights = int8.graph_of_7_bits(path)
    # Held until the kernels have their own order of them.
    values = [onnxruntime.OrtValue.ortvalue_from_numpy(array) for array in weights.values()]
    options.add_external_initializers(list(weights), values)
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(path.parent)
    )
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def _described_tensors(path: Path, facts: dict[str, Any]) -> Tensors:
    """Element type, as ONNX Runtime names it, and shape of a graph's inputs and outputs.

    Raises:
        Blip2Error: the sidecar does not tell them.
    """
    with artifacts.reading_sidecar(path, EXPORT):
        return {
            name: (f"tensor({_ELEMENTS[value['dtype']]})", tuple(value["shape"]))
            for side in ("inputs", "outputs")
            for name, value in facts[side].items()
        }


def _check_graph(path: Path, graph, described: Tensors) -> None:
    """Raise Blip2Error where a graph's inputs and outputs are not those that its sidecar tells."""
    values = (*graph.get_inputs(), *graph.get_outputs())
    found = {value.name: (value.type, tuple(value.shape)) for value in values}
    with artifacts.reading_sidecar(path, EXPORT):
        if found != described:
            raise ValueError(f"the graph has {', '.join(found)} of other types or shapes")


def run_graph(graph, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Run a graph of one output on CPU tensors."""
    feeds = {name: np.ascontiguousarray(tensor.numpy()) for name, tensor in inputs.items()}
    return torch.from_numpy(graph.run(None, feeds)[0])
