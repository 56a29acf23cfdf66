"""The ViT and Q-Former on ONNX Runtime, from the files of onnx_export.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from blip2 import artifacts, memory
from blip2.artifacts import UserError, first_line
from blip2.images import Preprocessing
from blip2.vision.session import VisionSession

MADE_BY = "python onnx_export.py"
VIT_FILE = "visual_encoder/visual_encoder.onnx"
QFORMER_FILE = "Qformer/Qformer.onnx"
DTYPES = {"float16": torch.float16, "float32": torch.float32}
_ELEMENTS = {"float16": "float16", "float32": "float", "int64": "int64"}  # ONNX Runtime's names


class OnnxRuntimeSession(VisionSession):
    """Runs on the CPU; inputs and outputs share memory with torch, nothing is copied between."""

    def __init__(self, engine_dir: Path, query_tokens: Path) -> None:
        """Open `engine_dir`'s two graphs and the query tokens saved beside them.

        Raises:
            UserError: a file is missing, damaged, or from another checkpoint than the others.
        """
        vit_facts = read_graph_sidecar(engine_dir / VIT_FILE)
        qformer_facts = read_graph_sidecar(engine_dir / QFORMER_FILE)
        query_facts = artifacts.read_sidecar(query_tokens, MADE_BY)
        artifacts.same_source(
            MADE_BY,
            {
                engine_dir / VIT_FILE: vit_facts,
                engine_dir / QFORMER_FILE: qformer_facts,
                query_tokens: query_facts,
            },
        )
        self.device = torch.device("cpu")
        vit, qformer = engine_dir / VIT_FILE, engine_dir / QFORMER_FILE
        with artifacts.reading_sidecar(vit, MADE_BY):
            self.dtype = DTYPES[vit_facts["dtype"]]
            self.preprocessing = Preprocessing.from_dict(vit_facts["preprocessing"])
        self._vit_graph = open_graph(vit)
        self._qformer_graph = open_graph(qformer)
        sizes = (self.preprocessing.height, self.preprocessing.width)
        tensors = _tensors(vit, self._vit_graph, vit_facts)
        foreign = _tensors(qformer, self._qformer_graph, qformer_facts)
        if tensors["input"][1] != (3, *sizes) or tensors["output"] != foreign["image_embeds"]:
            raise UserError(
                f"{vit} and {qformer} do not fit one another; make both again with: {MADE_BY}"
            )
        tokens = artifacts.load_tensor(query_tokens, MADE_BY)
        if tuple(tokens.shape) != (1, *foreign["query_tokens"][1]):
            raise UserError(
                f"{query_tokens} has shape {tuple(tokens.shape)}, {qformer} takes"
                f" {(1, *foreign['query_tokens'][1])}; make both again with: {MADE_BY}"
            )
        self._query_tokens = tokens.to(self.dtype)
        self.num_query_tokens = tokens.shape[1]
        self.output_size = foreign["query_output"][1][1]

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


def read_graph_sidecar(path: Path) -> dict[str, Any]:
    """The sidecar of an exported graph, once graph and weights are there in their full size.

    Raises:
        UserError: a file is missing or truncated.
    """
    facts = artifacts.read_sidecar(path, MADE_BY)
    artifacts.check_size(artifacts.data_path(path), facts.get("data"), MADE_BY)
    return facts


def open_graph(path: Path, optimise: bool = True):
    """An ONNX Runtime session on the CPU.

    `optimise=False` keeps fp16 weights in fp16: folding their conversions to the float32 that the
    CPU computes in would triple the memory, which matters more than speed when only checking.

    Raises:
        UserError: ONNX Runtime cannot read the file or its data file.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # Or its threads would go on waiting actively while torch needs the cores for the OPT. Forbidding
    # them that within a run as well would cost ViT-g 6 %.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if not optimise:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        # Each weight is converted just before its use; the default order converts all of them first.
        options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
    try:
        with memory.needed(
            f"to open {path}", "close other programs, or export with --dtype float16"
        ):
            return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except UserError:
        raise
    except Exception as error:  # its exception classes share no public base
        raise UserError(
            f"cannot open {path}: {first_line(error)}; make it again with: {MADE_BY}"
        ) from None


def _tensors(path: Path, graph, facts: dict[str, Any]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Element type, as ONNX Runtime names it, and shape without the batch of a graph's tensors.

    Raises:
        UserError: they are not those that the sidecar tells.
    """
    sides = {"inputs": graph.get_inputs(), "outputs": graph.get_outputs()}
    found = {
        value.name: (value.type, tuple(value.shape)) for side in sides.values() for value in side
    }
    with artifacts.reading_sidecar(path, MADE_BY):
        told = {
            name: (f"tensor({_ELEMENTS[value['dtype']]})", tuple(value["shape"]))
            for side in sides
            for name, value in facts[side].items()
        }
        if told != found:
            raise ValueError(f"the graph has {', '.join(found)} of other types or shapes")
    return {name: (kind, shape[1:]) for name, (kind, shape) in found.items()}


def run_graph(graph, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Run a graph of one output on CPU tensors."""
    feeds = {name: np.ascontiguousarray(tensor.numpy()) for name, tensor in inputs.items()}
    return torch.from_numpy(graph.run(None, feeds)[0])
