"""The ViT and Q-Former on TensorRT plans, from the files of build_vit_qformer.py.

Everything a batch needs is allocated once, as torch tensors for the largest batch. The first run of
a batch size captures a CUDA graph, later ones replay it. The Q-Former reads the ViT's output where
it lies, and OPT the Q-Former's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from blip2 import artifacts, cache
from blip2.errors import Blip2Error
from blip2.gpu.cuda_graphs import capture
from blip2.images import Preprocessing
from blip2.layout import BUILD_PLANS
from blip2.vision.session import VisionSession
from blip2.vision.tensorrt_plans import (
    DTYPES,
    INSTALL,
    PRODUCTS,
    QFORMER,
    RTX,
    VIT,
    PlanFacts,
    Stage,
    flavour_of,
    import_tensorrt,
    log_of,
    read_plan_sidecar,
)

_KERNELS = "tensorrt_rtx"  # the cache's folder for what RTX compiles


class Gpu:
    """The GPU that plans run on, through torch."""

    def __init__(self) -> None:
        """Raises Blip2Error: there is none that torch can use."""
        # Before anything of TensorRT's runtime: some of it ends the process where no GPU is.
        if not torch.cuda.is_available():
            raise Blip2Error(
                "TensorRT plans need an NVIDIA GPU, and torch sees none here",
                "without one, run on the ONNX files: --engine_dir onnx",
            )
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.name = torch.cuda.get_device_name(self.device)
        self.compute_capability = "{}.{}".format(*torch.cuda.get_device_capability(self.device))
        self._recording = torch.cuda.Stream(self.device)

    def stream(self) -> int:
        """The handle of torch's current stream."""
        return torch.cuda.current_stream(self.device).cuda_stream

    @property
    def recording_stream(self) -> int:
        """The handle of the stream on which `capture` records."""
        return self._recording.cuda_stream

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        """Record what `run` enqueues, without executing it; return what replays it."""
        return capture(run, stream=self._recording)


class TensorRTSession(VisionSession):
    """Runs on torch's current CUDA stream.

    Results are views of the session's own buffers: the next call of the same stage overwrites
    them, unless the batch was split.
    """

    def __init__(self, engine_dir: Path, query_tokens: Path, gpu: Gpu | None = None) -> None:
        """Open `engine_dir`'s two plans and the query tokens of the same export.

        Raises:
            Blip2Error: a file is missing, damaged or from another checkpoint than the others; a plan
                is of another TensorRT, another GPU or the other stage; there is no GPU.
        """
        vit, qformer = (read_plan_sidecar(engine_dir, stage) for stage in (VIT, QFORMER))
        artifacts.same_source(
            f"python onnx_export.py && {BUILD_PLANS}",
            {
                vit.path: vit.sidecar,
                qformer.path: qformer.sidecar,
                query_tokens: artifacts.read_sidecar(query_tokens, "python onnx_export.py"),
            },
        )
        trt = _tensorrt_of(vit, qformer)
        gpu = gpu or Gpu()
        for facts in (vit, qformer):
            _check_gpu(facts, gpu)

        tokens = artifacts.load_tensor(query_tokens, "python onnx_export.py")
        self.device = gpu.device
        self.dtype = getattr(torch, vit.dtypes[VIT.output])
        self.max_batch_size = min(vit.profile[2], qformer.profile[2])
        self.num_query_tokens = tokens.shape[1]
        with artifacts.reading_sidecar(vit.path, BUILD_PLANS):
            self.preprocessing = Preprocessing.from_dict(vit.sidecar["preprocessing"])
        self.output_size = qformer.shapes[QFORMER.output][1]
        _check_shapes(vit, qformer, query_tokens, tokens)
        self._engine_dir, self._gpu, self._trt = engine_dir, gpu, trt
        self._facts, self._tokens = {VIT: vit, QFORMER: qformer}, tokens
        self._vit_plan: Plan | None = None
        self._qformer_plan: Plan | None = None

    def load(self) -> None:
        """Load both plans; a second call does nothing.

        Raises:
            Blip2Error: TensorRT cannot read one, it is not what its sidecar says, or the GPU has too
                little memory.
        """
        if self._qformer_plan is not None:
            return
        try:
            vit, qformer = (
                Plan(self._trt, stage, facts, self._gpu) for stage, facts in self._facts.items()
            )
            self._connect(vit, qformer)
        except torch.OutOfMemoryError:
            raise Blip2Error(
                f"{self._gpu.name} has too little free memory for {self._engine_dir}",
                "free some, or"
                f" build with a smaller batch: {BUILD_PLANS} --max_batch_size"
                f" {max(1, self.max_batch_size // 2)}",
            ) from None
        self._vit_plan, self._qformer_plan = vit, qformer

    def _connect(self, vit: Plan, qformer: Plan) -> None:
        """Fill the Q-Former's inputs that never change, and let it read the ViT's output."""
        qformer.buffers["query_tokens"].copy_(self._tokens)  # repeated for every picture
        qformer.buffers["image_atts"].fill_(1)
        qformer.readable = [vit.buffers[VIT.output]]
        plans = (vit, qformer)
        # One after the other on one stream, so one workspace serves both.
        size = max(plan.workspace_bytes for plan in plans)
        workspace = torch.empty(max(1, size), dtype=torch.uint8, device=self.device)
        for plan in plans:
            plan.workspace = workspace

    def _vit(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self._vit_plan.run("input", pixel_values)

    def _qformer(self, image_embeds: torch.Tensor) -> torch.Tensor:
        return self._qformer_plan.run("image_embeds", image_embeds)


def _tensorrt_of(vit: PlanFacts, qformer: PlanFacts) -> ModuleType:
    """The TensorRT that built both plans."""
    if vit.product != qformer.product:
        raise Blip2Error(
            f"{vit.path} was built with {vit.product}, {qformer.path} with {qformer.product}",
            f"make both again with: {BUILD_PLANS}",
        )
    trt = import_tensorrt(vit.flavour)
    if trt.__version__ != vit.version:
        raise Blip2Error(
            f"{vit.path} was built with {vit.product}, and {PRODUCTS[vit.flavour]} {trt.__version__} is"
            " installed, which cannot read it",
            f"make it again with: {BUILD_PLANS}, or: {INSTALL[vit.flavour]}=={vit.version}",
        )
    return trt


def _check_gpu(facts: PlanFacts, gpu: Gpu) -> None:
    if gpu.compute_capability not in facts.compute_capabilities:
        raise Blip2Error(
            f"{facts.path} was built for compute capability {', '.join(facts.compute_capabilities)},"
            f" and this {gpu.name} has {gpu.compute_capability}",
            f"make it again on this machine with: {BUILD_PLANS}",
        )


def _check_shapes(
    vit: PlanFacts, qformer: PlanFacts, query_tokens: Path, tokens: torch.Tensor
) -> None:
    """The parts fit one another: same embeddings, same dtype, query tokens as expected."""
    if (vit.shapes[VIT.output], vit.dtypes[VIT.output]) != (
        qformer.shapes["image_embeds"],
        qformer.dtypes["image_embeds"],
    ):
        raise Blip2Error(
            f"{vit.path} yields other embeddings than {qformer.path} takes",
            f"make both again with: {BUILD_PLANS}",
        )
    if tuple(tokens.shape) != (1, *qformer.shapes["query_tokens"]):
        raise Blip2Error(
            f"{query_tokens} has shape {tuple(tokens.shape)}, {qformer.path} takes"
            f" {(1, *qformer.shapes['query_tokens'])}",
            "make it again with: python onnx_export.py",
        )


@dataclasses.dataclass(frozen=True)
class _Execution:
    """One batch size ready to run. A captured graph points into its context's state: it owns one."""

    context: Any
    launch: Callable[[], None]


class _CompiledKernels:
    """What RTX compiles for a plan on this GPU, kept between processes; each would do it again."""

    def __init__(self, trt: ModuleType, engine: Any, facts: PlanFacts, gpu: Gpu) -> None:
        self._key = cache.key_of(
            facts.sidecar["sha256"], facts.product, gpu.name, gpu.compute_capability
        )
        self._stored = cache.read(_KERNELS, self._key) or b""
        self._config = engine.create_runtime_config()
        self.runtime_cache = self._config.create_runtime_cache()
        if self._stored and not self.runtime_cache.deserialize(self._stored):
            # Of another driver: no reason for anything that fails later.
            log_of(trt).errors.clear()

    def save(self) -> None:
        """Keep what has been compiled since the last time."""
        content = bytes(memoryview(self.runtime_cache.serialize()))
        if content != self._stored:
            cache.write(_KERNELS, self._key, content)
            self._stored = content


class Plan:
    """One deserialised plan, its buffers for the largest batch, and its executions.

    Attributes:
        buffers: by tensor name, max_batch x ….
        readable: foreign tensors of the shape and dtype of the changing input, which may be read in
            place; they must live as long as the plan.
        workspace: uint8, of at least `workspace_bytes`; used while the plan runs.
    """

    def __init__(self, trt: ModuleType, stage: Stage, facts: PlanFacts, gpu: Gpu) -> None:
        """Raises Blip2Error: TensorRT cannot read the plan, or it is not what its sidecar says."""
        self._trt, self._stage, self._facts, self._gpu = trt, stage, facts, gpu
        log = log_of(trt)
        log.errors.clear()
        self._runtime = trt.Runtime(log)  # must outlive the engine
        self._engine = self._runtime.deserialize_cuda_engine(facts.path.read_bytes())
        if self._engine is None:
            raise Blip2Error(
                f"{PRODUCTS[flavour_of(trt)]} cannot read {facts.path}: {log.reason()}",
                f"make it again with: {BUILD_PLANS}",
            )
        self._check_tensors()
        is_rtx = flavour_of(trt) == RTX
        self._kernels = _CompiledKernels(trt, self._engine, facts, gpu) if is_rtx else None
        self.buffers = {
            name: torch.zeros(
                facts.profile[2],
                *shape,
                dtype=getattr(torch, facts.dtypes[name]),
                device=gpu.device,
            )
            for name, shape in facts.shapes.items()
        }
        self.readable: list[torch.Tensor] = []
        self.workspace = torch.empty(0, dtype=torch.uint8, device=gpu.device)
        self._executions: dict[tuple[int, int], _Execution] = {}

    @property
    def workspace_bytes(self) -> int:
        """Memory that the plan's intermediate results need, at the largest batch."""
        return self._engine.device_memory_size_v2

    def run(self, name: str, batch: torch.Tensor) -> torch.Tensor:
        """Run with `batch` as the input `name`; every other input is what its buffer holds.

        Returns:
            The first rows of the output's buffer: valid until the next run.

        Raises:
            Blip2Error: TensorRT refuses, with its reason.
        """
        # A plan for batches of at least m runs m; the rows beyond the batch are computed for nothing.
        rows = max(len(batch), self._facts.profile[0])
        source = self._source(name, batch, rows)
        key = (rows, source.data_ptr())
        if key not in self._executions:
            self._executions[key] = self._prepare(rows, {**self.buffers, name: source})
        self._executions[key].launch()
        return self.buffers[self._stage.output][: len(batch)]

    def _source(self, name: str, batch: torch.Tensor, rows: int) -> torch.Tensor:
        """Where the plan reads `batch`: where it lies if that is known memory, else a copy of it."""
        for known in self.readable:
            if (
                batch.data_ptr() == known.data_ptr()
                and batch.is_contiguous()
                and rows <= len(known)
            ):
                return known
        self.buffers[name][: len(batch)].copy_(batch)
        return self.buffers[name]

    def _prepare(self, rows: int, tensors: dict[str, torch.Tensor]) -> _Execution:
        """Set up a context for `rows` rows of `tensors` and capture its CUDA graph."""
        context = self._new_context(rows)
        for name in self._stage.inputs:
            if not context.set_input_shape(name, (rows, *self._facts.shapes[name])):
                raise self._failure(rows)
        for name, tensor in tensors.items():
            if not context.set_tensor_address(name, tensor.data_ptr()):
                raise self._failure(rows)

        def execute() -> None:
            if not context.execute_async_v3(self._gpu.stream()):
                raise self._failure(rows)

        execute()  # the first run allocates and compiles, which a capture cannot
        if self._kernels:
            self._kernels.save()
        if not self._capturable(context):
            return _Execution(context, execute)
        return _Execution(context, self._gpu.capture(execute))

    def _new_context(self, rows: int) -> Any:
        """An execution context of the plan's one profile that works in this plan's workspace."""
        trt = self._trt
        user_managed = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if self._kernels:
            config = self._engine.create_runtime_config()
            config.set_runtime_cache(self._kernels.runtime_cache)
            config.set_execution_context_allocation_strategy(user_managed)
            # RTX would start on generic kernels and swap in those for the batch size when they are
            # compiled; a graph would keep the generic ones.
            config.dynamic_shapes_kernel_specialization_strategy = (
                trt.DynamicShapesKernelSpecializationStrategy.EAGER
            )
            context = self._engine.create_execution_context(config)
        else:
            context = self._engine.create_execution_context(user_managed)
        # Only an engine's first context has a profile that nobody has selected.
        if context is None or not context.set_optimization_profile_async(0, self._gpu.stream()):
            raise self._failure(rows)
        context.set_device_memory(self.workspace.data_ptr(), self.workspace.numel())
        return context

    def _capturable(self, context: Any) -> bool:
        """RTX can say no; TensorRT's plans of these networks can always be captured."""
        if flavour_of(self._trt) != RTX:
            return True
        return context.is_stream_capturable(self._gpu.recording_stream)

    def _check_tensors(self) -> None:
        """The engine has the tensors that the sidecar promises, in number, name and dtype."""
        engine = self._engine
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        found = {name: DTYPES[engine.get_tensor_dtype(name).name] for name in names}
        if found != self._facts.dtypes:
            raise Blip2Error(
                f"{self._facts.path} holds other tensors than its sidecar says",
                f"make it again with: {BUILD_PLANS}",
            )

    def _failure(self, rows: int) -> Blip2Error:
        return Blip2Error(
            f"TensorRT cannot run {self._facts.path} on a batch of {rows}:"
            f" {log_of(self._trt).reason()}",
            f"make it again with: {BUILD_PLANS}",
        )
