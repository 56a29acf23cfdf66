"""CUDA C++ kernels, compiled on the machine that runs them by NVRTC, which comes with PyTorch.

What was compiled is kept between runs: see `blip2.cache`.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import cuda.bindings
import torch
from cuda.bindings import driver, nvrtc

from blip2 import cache
from blip2.devices import launches_dependently
from blip2.gpu.boxes import SWIZZLED_BYTES, Boxes
from blip2.gpu.kernel_launch import is_ahead, submit

_HEADERS = Path(__file__).parent  # what kernels of several packages include
_POINTER = ctypes.c_void_p


class CompiledKernel:
    """One kernel of a .cu file with its macros set; launches on PyTorch's current stream."""

    def __init__(self, path: Path, name: str, macros: tuple[tuple[str, int], ...]) -> None:
        """For the current GPU; it is compiled when it is first launched, or ahead of that."""
        self._source = (path, name, macros)
        self._device = torch.cuda.current_device()
        self._dependent = launches_dependently(self._device)
        self._shared_bytes = 48 << 10  # more has to be asked for
        self._compiling: Future | None = None

    @functools.cached_property
    def _function(self) -> driver.CUfunction:
        return self._compiling.result() if self._compiling else self._load()

    def _load(self) -> driver.CUfunction:
        path, name, macros = self._source
        major, minor = torch.cuda.get_device_capability(self._device)
        # With "a", what only this very architecture has: what is compiled here need not run elsewhere.
        architecture = f"sm_{major}{minor}" + ("a" if major >= 9 else "")
        cubin = kept_cubin(path, macros, architecture)
        with torch.cuda.device(self._device):
            torch.cuda.mem_get_info()  # a call that gives this thread the GPU's context
            library = _check(driver.cuModuleLoadData(cubin))  # stays loaded with the process
        return _check(driver.cuModuleGetFunction(library, name.encode()))

    def __call__(
        self,
        grid: tuple[int, int],
        threads: int,
        *arguments: Any,
        shared_bytes: int = 0,
        cluster: int = 1,
        together: bool = False,
        dependent: bool = True,
    ) -> None:
        """Launch, dependent on the kernel before where the GPU can (PDL, Hopper and later).

        Tensors go as their addresses, None as a null pointer, int and float as 32 bits, Boxes as the
        driver's description of them (`const __grid_constant__ TensorMap`). A `cluster`
        of so many blocks, side by side in x, sees one another's shared memory (Hopper and later).
        Blocks that wait for one another have to run `together` (a cooperative launch). A kernel that
        does not wait for the one before itself is not `dependent`. Within `compile_ahead` it is
        compiled only.
        """
        if is_ahead():
            if self._compiling is None:
                self._compiling = submit(self._load)
            return
        config = driver.CUlaunchConfig()
        config.sharedMemBytes = shared_bytes
        config.gridDimX, config.gridDimY = grid
        config.gridDimZ = config.blockDimY = config.blockDimZ = 1
        config.blockDimX = threads
        config.hStream = torch.cuda.current_stream().cuda_stream
        config.attrs = attributes = self._attributes(cluster, together, dependent)
        config.numAttrs = len(attributes)
        if shared_bytes > self._shared_bytes:
            limit = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            _check(driver.cuFuncSetAttribute(self._function, limit, shared_bytes))
            self._shared_bytes = shared_bytes
        values, types = zip(*map(_as_argument, arguments), strict=True)
        _check(driver.cuLaunchKernelEx(config, self._function, (values, types), 0))

    def _attributes(
        self, cluster: int, together: bool, dependent: bool
    ) -> list[driver.CUlaunchAttribute]:
        kinds, attributes = driver.CUlaunchAttributeID, []

        def attribute(kind: driver.CUlaunchAttributeID) -> Any:
            attributes.append(driver.CUlaunchAttribute())
            attributes[-1].id = kind
            return attributes[-1].value

        if together:
            attribute(kinds.CU_LAUNCH_ATTRIBUTE_COOPERATIVE).cooperative = 1
        if self._dependent and dependent:
            value = attribute(kinds.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION)
            value.programmaticStreamSerializationAllowed = 1
        if cluster > 1:
            size = attribute(kinds.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION).clusterDim
            size.x, size.y, size.z = cluster, 1, 1
        return attributes


def _as_argument(argument: Any) -> tuple[Any, Any]:
    if argument is None:
        return 0, _POINTER
    if isinstance(argument, torch.Tensor):
        return argument.data_ptr(), _POINTER
    if isinstance(argument, Boxes):
        return _tensor_map(argument), None
    return argument, ctypes.c_float if isinstance(argument, float) else ctypes.c_int


def _tensor_map(boxes: Boxes) -> driver.CUtensorMap:
    matrix = boxes.matrix
    rows, columns = matrix.shape
    size = matrix.element_size()
    # Its bytes are copied: which numbers they are does not matter.
    types, swizzles = driver.CUtensorMapDataType, driver.CUtensorMapSwizzle
    numbers = {
        2: types.CU_TENSOR_MAP_DATA_TYPE_UINT16,
        4: types.CU_TENSOR_MAP_DATA_TYPE_UINT32,
    }
    is_swizzled = boxes.row_bytes == SWIZZLED_BYTES
    return _check(
        driver.cuTensorMapEncodeTiled(
            numbers[size],
            2,
            matrix.data_ptr(),
            [driver.cuuint64_t(columns), driver.cuuint64_t(rows)],
            [driver.cuuint64_t(columns * size)],
            [driver.cuuint32_t(boxes.row_bytes // size), driver.cuuint32_t(boxes.rows)],
            [driver.cuuint32_t(1), driver.cuuint32_t(1)],
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            swizzles.CU_TENSOR_MAP_SWIZZLE_128B
            if is_swizzled
            else swizzles.CU_TENSOR_MAP_SWIZZLE_NONE,
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    )


def compile_source(path: Path, macros: tuple[tuple[str, int], ...], architecture: str) -> bytes:
    """Compile a .cu file for an architecture such as sm_90; the result is a cubin.

    It may include the .cuh files beside it, and those beside this module.

    Raises:
        RuntimeError: the source does not compile; holds the compiler's log.
    """
    (name, source), *headers = _files(path).items()
    program = _check(
        nvrtc.nvrtcCreateProgram(
            source,
            name.encode(),
            len(headers),
            [text for _, text in headers],
            [header.encode() for header, _ in headers],
        )
    )
    options = [option.encode() for option in _options(macros, architecture)]
    (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        log = b" " * _check(nvrtc.nvrtcGetProgramLogSize(program))
        _check(nvrtc.nvrtcGetProgramLog(program, log))
        raise RuntimeError(f"{name} with {dict(macros)}: {log.decode().strip()}")
    cubin = b" " * _check(nvrtc.nvrtcGetCUBINSize(program))
    _check(nvrtc.nvrtcGetCUBIN(program, cubin))
    _check(nvrtc.nvrtcDestroyProgram(program))
    return cubin


def kept_cubin(path: Path, macros: tuple[tuple[str, int], ...], architecture: str) -> bytes:
    """As `compile_source`; from an earlier run if nothing that matters has changed since."""
    compiler = (*map(str, _check(nvrtc.nvrtcVersion())), cuda.bindings.__version__)
    texts = (text for item in _files(path).items() for text in item)
    key = cache.key_of(*compiler, *_options(macros, architecture), *texts)
    cubin = cache.read("cubins", key)
    if cubin is None:
        cubin = compile_source(path, macros, architecture)
        cache.write("cubins", key, cubin)
    return cubin


def _files(path: Path) -> dict[str, bytes]:
    """A source, then the headers that it may include, by name."""
    headers = (sorted(place.glob("*.cuh")) for place in (path.parent, _HEADERS))
    return {file.name: file.read_bytes() for file in (path, *itertools.chain(*headers))}


def _options(macros: tuple[tuple[str, int], ...], architecture: str) -> list[str]:
    options = [f"--gpu-architecture={architecture}", "--std=c++17"]
    return options + [f"-D{name}={value}" for name, value in macros]


@functools.cache
def load_kernel(path: Path, name: str, macros: tuple[tuple[str, int], ...]) -> CompiledKernel:
    """A kernel for the current GPU, the same one throughout a process."""
    return CompiledKernel(path, name, macros)


def _check(result: tuple) -> Any:
    """What a driver or NVRTC call returns beside its status: nothing, a value, or several."""
    status, *values = result
    if status.value != 0:
        raise RuntimeError(f"CUDA call failed: {status.name}")
    return values[0] if len(values) == 1 else values
