"""The ViT and Q-Former in PyTorch, from a BLIP-2 checkpoint or, on a GPU, from ONNX files' weights.

On a GPU the ViT computes in float16 and the Q-Former in TF32 (float32's range, float16's digits:
in float16 it is known to overflow), each stage with kernels of its own, as a CUDA graph for each of
a few batch sizes. On a CPU that is fast in bfloat16 both compute in it, in linear layers and
attention. On others, and where float32 is asked for, both compute in float32.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from blip2.checkpoints import Checkpoint, open_checkpoint
from blip2.devices import best_device, half_dtype
from blip2.gpu.cuda_graphs import Graph
from blip2.gpu.kernel_launch import compile_ahead, is_ahead
from blip2.images import Preprocessing
from blip2.vision import modules
from blip2.vision.session import VisionSession

Stage = Callable[[torch.Tensor], torch.Tensor]

MAX_BATCH_SIZE = 64  # larger ones are no faster a picture, and take memory
_SIZES_MULTIPLE = 8  # of a graph's batch size, above it


class TorchSession(VisionSession):
    """Runs a checkpoint's own weights.

    On a GPU results lie in a graph's memory: the next call of the same stage overwrites them.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        preprocessing: Preprocessing,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """For a BLIP-2 checkpoint, of which only descriptions are read yet.

        Args:
            checkpoint: has the query tokens too.
            preprocessing: what its ViT takes.
            dtype: to compute in: float16, on a GPU alone; bfloat16, on a CPU alone; or float32.
            device: to run on.

        Raises:
            Blip2Error: a tensor is missing, or has another shape than the configuration says.
        """
        modules.check_checkpoint(checkpoint)
        self.device, self._compute_dtype = device, dtype
        # What lies between the stages is small, and need not lose digits.
        self.dtype = torch.float32 if dtype == torch.bfloat16 else dtype
        self.max_batch_size = MAX_BATCH_SIZE
        self.preprocessing = preprocessing
        self.num_query_tokens = checkpoint.shape("query_tokens")[1]
        self.output_size = checkpoint.shape("language_projection.weight")[0]
        self._checkpoint = checkpoint
        self._stages: Stages | None = None
        self._compiled_sizes: set[int] = set()

    def load(self) -> None:
        """Read the weights; a second call does nothing.

        Raises:
            Blip2Error: a tensor holds NaN or Inf, or cannot be read.
        """
        if self._stages is not None:
            return
        checkpoint, device = self._checkpoint, self.device
        query_tokens = checkpoint.tensor("query_tokens").float().to(device)
        dtype = self._compute_dtype
        vit = modules.load_vision_transformer(checkpoint, dtype, device)
        qformer_dtype = torch.float32 if dtype == torch.float16 else dtype
        qformer = modules.load_qformer(checkpoint, qformer_dtype, device)
        make = gpu_stages if dtype == torch.float16 else module_stages
        self._stages = make(vit, qformer, query_tokens)

    @torch.inference_mode()
    def prepare(self, batch_size: int) -> None:
        self.load()
        size = prepared_size(min(batch_size, self.max_batch_size))
        if self.dtype != torch.float16 or size in self._compiled_sizes:
            return
        self._compiled_sizes.add(size)
        sides = (self.preprocessing.height, self.preprocessing.width)
        with compile_ahead():
            pixel_values = torch.zeros(size, 3, *sides, dtype=self.dtype, device=self.device)
            self._stages.qformer(self._stages.vit(pixel_values))

    def halve_batch(self, size: int) -> int:
        if self._stages is not None:
            self._stages.save_memory()
        return super().halve_batch(size)

    @torch.inference_mode()
    def _vit(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self._stages.vit(pixel_values)

    @torch.inference_mode()
    def _qformer(self, image_embeds: torch.Tensor) -> torch.Tensor:
        return self._stages.qformer(image_embeds)


def open_checkpoint_session(engine_dir: Path, _query_tokens: Path) -> TorchSession:
    """Open the BLIP-2 checkpoint in `engine_dir`, which has query tokens of its own.

    Raises:
        Blip2Error: it is damaged, incomplete, or no BLIP-2.
    """
    checkpoint, device = open_checkpoint(engine_dir), best_device()
    return TorchSession(checkpoint, Preprocessing.of(checkpoint), half_dtype(device), device)


@dataclasses.dataclass(frozen=True)
class Stages:
    """pixel_values → image_embeds and image_embeds → query_output, as `VisionSession` has them.

    `save_memory` gives back what they keep for batch sizes; from then on they keep less.
    """

    vit: Stage
    qformer: Stage
    save_memory: Callable[[], None] = lambda: None


def module_stages(
    vit: modules.VisionTransformer, qformer: modules.QFormer, query_tokens: torch.Tensor
) -> Stages:
    """The modules themselves; query_tokens: 1 x n x H_q."""

    def see(pixel_values: torch.Tensor) -> torch.Tensor:
        # The patches' convolution would round to TF32 by PyTorch's default.
        with torch.backends.cudnn.flags(allow_tf32=False):
            return vit(pixel_values)

    def look(image_embeds: torch.Tensor) -> torch.Tensor:
        return qformer(query_tokens.expand(len(image_embeds), -1, -1), image_embeds, None)

    return Stages(see, look)


def gpu_stages(
    vit: modules.VisionTransformer, qformer: modules.QFormer, query_tokens: torch.Tensor
) -> Stages:
    """CUDA graphs of a float16 ViT's and a float32 Q-Former's fast versions.

    Results lie in a graph's memory: see `Graphs`.
    """
    from blip2.vision.cuda import CudaQFormer, CudaVisionTransformer  # a CPU needs no Triton

    see = CudaVisionTransformer(vit) if CudaVisionTransformer.takes(vit) else vit
    stages = Graphs(see), Graphs(CudaQFormer(qformer, query_tokens))

    def save_memory() -> None:
        for stage in stages:
            stage.do_without()

    return Stages(*stages, save_memory)


def prepared_size(pictures: int) -> int:
    """The batch size that a batch of so many pictures is filled up to: one of few.

    1, 2, 4 and multiples of 8. Where pictures are broken a run has batches of every size.
    """
    if pictures <= _SIZES_MULTIPLE:
        return 1 << (pictures - 1).bit_length()
    return -(-pictures // _SIZES_MULTIPLE) * _SIZES_MULTIPLE


class _Prepared:
    """A function's buffers for one batch size, and its graph."""

    def __init__(self, size: int, example: torch.Tensor, graph: Graph | None) -> None:
        """`graph` is None of a function that is launched each time."""
        # Rows that no picture fills are computed too: as zeros they are as good as any.
        self.input = example.new_zeros(size, *example.shape[1:])
        self.output: torch.Tensor | None = None
        self._graph = graph

    def run(self, function: Stage) -> None:
        """Have `output` computed of `input`."""
        if is_ahead() and self.output is not None:
            return  # it has run, so all is compiled; and its graph's output must stay where it is

        def launch() -> None:
            # A graph's output stays where its capture put it; that of the first call is replaced.
            with _tf32_products():
                self.output = function(self.input)

        if self._graph is None:
            launch()
        else:
            self._graph(launch)


class Graphs:
    """A function of a batch on the GPU, as CUDA graphs for the sizes that `prepared_size` names.

    They share memory for what they compute on the way. A result is overwritten by the next call.
    """

    def __init__(self, function: Stage) -> None:
        self._function, self._captures = function, True
        self.release()

    def release(self) -> None:
        """Forget all graphs, and let their memory go."""
        self._prepared: dict[int, _Prepared] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def do_without(self) -> None:
        """Forget them, and capture no more: where memory is short their own is the work's."""
        self.release()
        self._captures = False

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x: at most MAX_BATCH_SIZE x …, of the same shape but for that each time."""
        size = prepared_size(len(x))
        if size not in self._prepared:
            graph = Graph(self._pool) if self._captures else None
            self._prepared[size] = _Prepared(size, x, graph)
        prepared = self._prepared[size]
        prepared.input[: len(x)].copy_(x)
        prepared.run(self._function)
        return prepared.output[: len(x)]


@contextlib.contextmanager
def _tf32_products() -> Iterator[None]:
    """Within, cuBLAS may round float32 to TF32: the setting is the process's, so not for longer."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
