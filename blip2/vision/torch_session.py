"""The ViT and Q-Former in PyTorch, straight from a BLIP-2 checkpoint: nothing to export or build.

On a GPU the ViT computes in float16 and the Q-Former in TF32 (float32's range, float16's digits:
in float16 it is known to overflow); each stage is one CUDA graph a batch size. On a CPU both
compute in float32.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch

from blip2.checkpoints import open_checkpoint
from blip2.images import Preprocessing
from blip2.vision import modules
from blip2.vision.session import VisionSession

Stage = Callable[[torch.Tensor], torch.Tensor]

MAX_BATCH_SIZE = 64  # larger ones are no faster a picture, and take memory


class TorchSession(VisionSession):
    """Runs a checkpoint's own weights.

    On a GPU results lie in a graph's memory: the next call of the same stage and batch size
    overwrites them.
    """

    max_batch_size = MAX_BATCH_SIZE

    def __init__(self, engine_dir: Path, _query_tokens: Path, device: str | None = None) -> None:
        """Open the BLIP-2 checkpoint in `engine_dir`, which has query tokens of its own.

        Raises:
            UserError: it is damaged, incomplete, or no BLIP-2.
        """
        checkpoint = open_checkpoint(engine_dir)
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        on_gpu = self.device.type == "cuda"
        self.dtype = torch.float16 if on_gpu else torch.float32
        self.preprocessing = Preprocessing.of(checkpoint)
        query_tokens = checkpoint.tensor("query_tokens").float().to(self.device)
        self.num_query_tokens = query_tokens.shape[1]
        self.output_size = checkpoint.shape("language_projection.weight")[0]
        self._image_size = (3, self.preprocessing.height, self.preprocessing.width)
        vit = modules.load_vision_transformer(checkpoint, self.dtype).to(self.device)
        qformer = modules.load_qformer(checkpoint, torch.float32).to(self.device)
        self._stages = (gpu_stages if on_gpu else cpu_stages)(vit, qformer, query_tokens)

    @torch.inference_mode()
    def _vit(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self._stages.vit(pixel_values)

    @torch.inference_mode()
    def _qformer(self, image_embeds: torch.Tensor) -> torch.Tensor:
        return self._stages.qformer(image_embeds)


@dataclasses.dataclass(frozen=True)
class Stages:
    """pixel_values → image_embeds and image_embeds → query_output, as `VisionSession` has them."""

    vit: Stage
    qformer: Stage


def cpu_stages(
    vit: modules.VisionTransformer, qformer: modules.QFormer, query_tokens: torch.Tensor
) -> Stages:
    """The modules themselves; query_tokens: 1 x n x H_q."""

    def look(image_embeds: torch.Tensor) -> torch.Tensor:
        return qformer(query_tokens.expand(len(image_embeds), -1, -1), image_embeds, None)

    return Stages(vit, look)


def gpu_stages(
    vit: modules.VisionTransformer, qformer: modules.QFormer, query_tokens: torch.Tensor
) -> Stages:
    """CUDA graphs of a float16 ViT's and a float32 Q-Former's fast versions.

    Results lie in a graph's memory: see `Graphs`.
    """
    from blip2.vision.cuda import CudaQFormer, CudaVisionTransformer  # a CPU needs no Triton

    return Stages(
        Graphs(CudaVisionTransformer(vit)),
        Graphs(CudaQFormer(qformer, query_tokens)),
    )


@dataclasses.dataclass(frozen=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    input: torch.Tensor
    output: torch.Tensor


class Graphs:
    """A function of one tensor on the GPU, as a CUDA graph for each shape it is called with."""

    def __init__(self, function: Stage) -> None:
        self._function = function
        self._captured: dict[torch.Size, _Captured] = {}

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape not in self._captured:
            self._captured[x.shape] = self._capture(x)
        captured = self._captured[x.shape]
        captured.input.copy_(x)
        captured.graph.replay()
        return captured.output

    def _capture(self, x: torch.Tensor) -> _Captured:
        # TF32 only here: the setting is the process's, and others' products are not ours to round.
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        try:
            x = x.clone()
            self._function(x)  # cuBLAS sets itself up, which a capture must not do
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                output = self._function(x)
        finally:
            torch.set_float32_matmul_precision(precision)
        return _Captured(graph, x, output)
