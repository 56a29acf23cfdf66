"""A TensorRT that runs without one: the runtime's rules, and a torch module for each plan's kernels.

`Runtime(modules)` stands in for the module `tensorrt` or `tensorrt_rtx` when a session runs a plan.
It knows plans by their bytes, reads and writes tensors at the addresses it is given, and fails the
test where the real runtime would compute nonsense. `CpuGpu` is the GPU to it where there is none.
"""

from __future__ import annotations

import ctypes
import enum
import json
import math
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from blip2.checkpoints import open_checkpoint
from blip2.vision import modules
from blip2.vision.tensorrt_plans import QFORMER, VIT, PlanFacts, Stage


class CpuGpu:
    """The CPU with the interface of the session's Gpu: streams are numbers, graphs are lists."""

    def __init__(self, compute_capability: str = "8.9") -> None:
        self.device = torch.device("cpu")
        self.name = "NVIDIA Double"
        self.compute_capability = compute_capability
        self.recording: list[Callable[[], None]] | None = None
        self.captures = self.replays = 0

    recording_stream = 222

    def stream(self) -> int:
        """The default stream is 0, as CUDA's."""
        return self.recording_stream if self.recording is not None else 0

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        self.recording = recorded = []
        run()
        self.recording = None
        self.captures += 1
        if not recorded:
            raise AssertionError("nothing was enqueued while capturing")

        def replay() -> None:
            self.replays += 1
            for launch in recorded:
                launch()

        return replay


class DataType(enum.Enum):
    HALF = torch.float16
    FLOAT = torch.float32
    INT64 = torch.int64


class Wide(torch.nn.Module):
    """A ViT that computes in float32, as its kernels accumulate: float16 on a CPU would say less."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.module(pixel_values.float()).half()


def stage_modules(checkpoint: Path) -> dict[Stage, torch.nn.Module]:
    """What the plans of a checkpoint compute."""
    opened = open_checkpoint(checkpoint)
    return {
        VIT: Wide(modules.load_vision_transformer(opened, torch.float32)),
        QFORMER: modules.load_qformer(opened, torch.float32),
    }


def runtime_double(
    name: str, version: str, gpu: Any, plans: dict[Path, tuple[PlanFacts, torch.nn.Module]]
) -> types.ModuleType:
    """A module to put into sys.modules[name].

    Args:
        name: tensorrt or tensorrt_rtx.
        version: what it says of itself.
        gpu: a CpuGpu, or the session's own Gpu on a machine that has one.
        plans: what each plan computes; any other bytes are refused, as another version's would be.
    """
    trt = types.ModuleType(name)
    trt.__version__ = version
    trt.ILogger = types.new_class("ILogger")
    trt.ILogger.Severity = enum.IntEnum("Severity", "INTERNAL_ERROR ERROR WARNING INFO VERBOSE")
    trt.ExecutionContextAllocationStrategy = enum.Enum("Strategy", "STATIC USER_MANAGED")
    if name == "tensorrt_rtx":
        trt.DynamicShapesKernelSpecializationStrategy = enum.Enum("Strategy", "LAZY EAGER NONE")
    known = {path.read_bytes(): plan for path, plan in plans.items()}
    trt.Runtime = lambda log: Runtime(trt, log, gpu, known)
    trt.contexts = []
    trt.compiled = []  # (plan, rows) that RTX had to compile for
    return trt


class Runtime:
    def __init__(self, trt: Any, log: Any, gpu: Any, known: dict[bytes, Any]) -> None:
        self.trt, self.log, self.gpu, self.known = trt, log, gpu, known

    def deserialize_cuda_engine(self, plan: bytes) -> Engine | None:
        if plan not in self.known:
            self.log.log(self.trt.ILogger.Severity.ERROR, "Serialization assertion failed.")
            return None
        return Engine(self.trt, self.log, self.gpu, *self.known[plan])


class Engine:
    device_memory_size_v2 = 4096

    def __init__(
        self, trt: Any, log: Any, gpu: Any, facts: PlanFacts, module: torch.nn.Module
    ) -> None:
        self.trt, self.log, self.gpu, self.facts, self.module = trt, log, gpu, facts, module
        self.inputs = list(facts.sidecar["inputs"])
        self.num_io_tensors = len(facts.dtypes)

    def get_tensor_name(self, index: int) -> str:
        return list(self.facts.dtypes)[index]

    def get_tensor_dtype(self, name: str) -> DataType:
        return DataType(getattr(torch, self.facts.dtypes[name]))

    def create_runtime_config(self) -> Any:
        config = types.SimpleNamespace(dynamic_shapes_kernel_specialization_strategy=None)
        config.set_execution_context_allocation_strategy = lambda s: setattr(config, "memory", s)
        config.create_runtime_cache = lambda: RuntimeCache(self)
        config.kernels = RuntimeCache(self)  # an empty one that nobody sees

        def set_runtime_cache(kernels: RuntimeCache) -> bool:
            config.kernels = kernels
            return True

        config.set_runtime_cache = set_runtime_cache
        return config

    def create_execution_context(self, how: Any) -> Context:
        kernels = getattr(how, "kernels", None)
        if self.trt.__name__ == "tensorrt_rtx":
            strategies = self.trt.DynamicShapesKernelSpecializationStrategy
            _rule(how.dynamic_shapes_kernel_specialization_strategy is strategies.EAGER, "lazy")
            how = how.memory
        _rule(how is self.trt.ExecutionContextAllocationStrategy.USER_MANAGED, "wastes memory")
        self.trt.contexts.append(Context(self, kernels))
        return self.trt.contexts[-1]


class RuntimeCache:
    """Which batch sizes RTX has compiled for; it takes over nothing of another version or GPU."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.rows: set[int] = set()

    def _environment(self) -> list[str]:
        return [self.engine.trt.__version__, self.engine.gpu.name, self.engine.facts.path.name]

    def serialize(self) -> bytes:
        return json.dumps([*self._environment(), sorted(self.rows)]).encode()

    def deserialize(self, blob: bytes) -> bool:
        *environment, rows = json.loads(blob) if blob.startswith(b"[") else [[]]
        if environment != self._environment():
            log, severity = self.engine.log, self.engine.trt.ILogger.Severity
            log.log(severity.ERROR, "runtime cache: environment mismatch")
            return False
        self.rows.update(rows)
        return True


class Context:
    """Enforces: memory, profile, then shapes within it, then addresses, then execution, then graph."""

    def __init__(self, engine: Engine, kernels: RuntimeCache | None) -> None:
        self.engine, self.kernels = engine, kernels
        self.profile: int | None = None
        self.capturable: set[int] = set()  # streams of which that was asked, and is so
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.workspace = 0
        self.executions = 0
        self.captured = False
        self.tensors: dict[str, torch.Tensor] = {}  # what lies at the addresses

    def set_device_memory(self, memory: int, size: int) -> None:
        _rule(size >= self.engine.device_memory_size_v2 and memory, "workspace is too small")
        self.workspace = memory

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        _rule(not self.captured, "a captured context is changed")
        _rule(stream_handle == self.engine.gpu.stream(), "not torch's current stream")
        _rule(profile_index == 0, "there is one profile")
        self.profile = profile_index
        self.shapes.clear()
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        _rule(not self.captured, "a captured context is changed")
        _rule(self.profile is not None, "shapes before a profile is selected")
        facts = self.engine.facts
        low, _, high = facts.profile
        if not (low <= shape[0] <= high and shape[1:] == facts.shapes[name]):
            self.engine.log.log(self.engine.trt.ILogger.Severity.ERROR, f"{name}: out of profile")
            return False
        self.shapes[name] = shape
        self.tensors.clear()
        return True

    def set_tensor_address(self, name: str, memory: int) -> bool:
        _rule(not self.captured, "a captured context is changed")
        _rule(set(self.shapes) == set(self.engine.inputs), "addresses before shapes")
        _rule(type(memory) is int and memory % 16 == 0 and memory, "no aligned address")
        self.addresses[name] = memory
        self.tensors.clear()
        return True

    def is_stream_capturable(self, stream: int) -> bool:
        if stream:  # the default one never is
            self.capturable.add(stream)
        return bool(stream)

    def execute_async_v3(self, stream_handle: int) -> bool:
        gpu = self.engine.gpu
        _rule(stream_handle == gpu.stream(), "not torch's current stream")
        _rule(self.workspace, "no workspace")
        _rule(set(self.addresses) == set(self.engine.facts.dtypes), "a tensor has no address")
        capturing = self._capturing()
        _rule(self.executions or not capturing, "captured before its first run")
        if self.kernels is not None:
            _rule(not capturing or stream_handle in self.capturable, "may not be captured")
            self._compile()
        self.executions += 1
        self.captured = self.captured or capturing
        if isinstance(gpu, CpuGpu) and capturing:
            gpu.recording.append(self._compute)
        else:
            self._compute()
        return True

    def _compile(self) -> None:
        rows = self.shapes[self.engine.inputs[0]][0]
        if rows not in self.kernels.rows:
            self.kernels.rows.add(rows)
            self.engine.trt.compiled.append((self.engine.facts.path.name, rows))

    def _capturing(self) -> bool:
        gpu = self.engine.gpu
        if isinstance(gpu, CpuGpu):
            return gpu.recording is not None
        return torch.cuda.is_current_stream_capturing()

    @torch.inference_mode()
    def _compute(self) -> None:
        facts, module = self.engine.facts, self.engine.module
        rows = self.shapes[self.engine.inputs[0]][0]
        for name, dtype in facts.dtypes.items():
            if name not in self.tensors:
                shape, device = (rows, *facts.shapes[name]), self.engine.gpu.device
                address = self.addresses[name]
                self.tensors[name] = tensor_at(address, shape, getattr(torch, dtype), device)
        (output,) = facts.sidecar["outputs"]
        self.tensors[output].copy_(module(*(self.tensors[name] for name in self.engine.inputs)))


def tensor_at(
    address: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """The tensor that lies at an address, as TensorRT sees it: contiguous, of that dtype."""
    size = math.prod(shape) * dtype.itemsize
    if device.type == "cpu":
        memory = (ctypes.c_uint8 * size).from_address(address)
        return torch.frombuffer(memory, dtype=dtype).view(shape)
    interface = {"shape": (size,), "typestr": "|u1", "data": (address, False), "version": 3}
    holder = types.SimpleNamespace(__cuda_array_interface__=interface)
    return torch.as_tensor(holder, device=device).view(dtype).view(shape)


def _rule(kept: Any, what: str) -> None:
    if not kept:
        raise AssertionError(f"TensorRT's rule broken: {what}")
