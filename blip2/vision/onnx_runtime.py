"""The ViT and Q-Former on ONNX Runtime, from the files of onnx_export.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from blip2 import artifacts
from blip2.artifacts import UserError
from blip2.images import Preprocessing
from blip2.vision.session import VisionSession

MADE_BY = "python onnx_export.py"
VIT_FILE = "visual_encoder/visual_encoder.onnx"
QFORMER_FILE = "Qformer/Qformer.onnx"


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
        self.dtype = getattr(torch, vit_facts["dtype"])
        self.preprocessing = Preprocessing.from_dict(vit_facts["preprocessing"])
        self._query_tokens = artifacts.load_tensor(query_tokens, MADE_BY).to(self.dtype)
        self.num_query_tokens = self._query_tokens.shape[1]
        self._vit_graph = open_graph(engine_dir / VIT_FILE)
        self._qformer_graph = open_graph(engine_dir / QFORMER_FILE)

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
    artifacts.check_size(data_path(path), facts["data"], MADE_BY)
    return facts


def data_path(path: Path) -> Path:
    """Where a graph's weights lie: `visual_encoder.onnx.data` beside `visual_encoder.onnx`."""
    return path.with_name(path.name + ".data")


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
    if not optimise:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        # Each weight is converted just before its use; the default order converts all of them first.
        options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
    try:
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exception classes share no public base
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"cannot open {path}: {reason}; make it again with: {MADE_BY}") from None


def run_graph(graph, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Run a graph of one output on CPU tensors."""
    feeds = {name: np.ascontiguousarray(tensor.numpy()) for name, tensor in inputs.items()}
    return torch.from_numpy(graph.run(None, feeds)[0])
